package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"time"
)

const unitFile = "/etc/systemd/system/" + ServiceName + ".service"

// CheckService says why a service can't be installed here.
func CheckService() error {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return errors.New("systemd does not run on this machine: set xrdp up with `agent login install`, and start `agent run` with --login-dir from this machine's own service manager")
	}
	return nil
}

// InstallService makes the agent start at boot, with command and what o says of its folders, and starts it now.
func InstallService(command []string, o Options) error {
	// The unit can't name a folder that is absent.
	if err := (store{o.StateDir}).prepare(); err != nil {
		return err
	}
	for flag, dir := range map[string]string{"rdp-cert-dir": o.RDPCertDir, "login-dir": o.LoginDir} {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("--%s: %w", flag, err)
		}
	}
	unit := systemdUnit(unitOptions{
		command: command, writable: []string{o.StateDir, o.RDPCertDir}, drainSeconds: int(o.Drain / time.Second), loginDir: o.LoginDir,
	})
	if err := writeAtomic(unitFile, []byte(unit), 0o644); err != nil {
		return fmt.Errorf("systemd unit: %w: run this as root", err)
	}
	if err := systemctl("daemon-reload"); err != nil {
		return err
	}
	if err := systemctl("enable", ServiceName); err != nil {
		return err
	}
	return systemctl("restart", ServiceName)
}

// UninstallService stops the agent and removes its unit, if there is one. The state folder stays.
func UninstallService() error {
	if _, err := os.Stat(unitFile); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := systemctl("disable", "--now", ServiceName); err != nil {
		return err
	}
	if err := os.Remove(unitFile); err != nil {
		return fmt.Errorf("systemd unit: %w: run this as root", err)
	}
	return systemctl("daemon-reload")
}

func systemctl(args ...string) error {
	if out, err := exec.Command("systemctl", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", args[0], err, out)
	}
	return nil
}

// RunAsService says whether the service manager started this process in a way that needs an answer of its own; on
// Linux it never does.
func RunAsService(func(context.Context) error) (handled bool, err error) { return false, nil }
