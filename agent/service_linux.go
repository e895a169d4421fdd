package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"rendezvous.dev/rendezvous/agent/login/setup"
)

const unitFile = "/etc/systemd/system/" + ServiceName + ".service"

// CheckService says why a service can't be installed here.
func CheckService() error {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return errors.New("systemd does not run on this machine: set xrdp up with `agent login install`, and start `agent run` with --login-dir from this machine's own service manager")
	}
	if os.Geteuid() != 0 {
		return errors.New("only root can install a service: run this as root")
	}
	return nil
}

// programPath is where the service's program is put: where root alone writes, systemd may run it on every Linux, and
// updates of the system leave it alone.
const programPath = "/usr/local/sbin/rdv-agent"

// ServiceProgram says which program the service will run, and whether InstallProgram has to put it there: not where it
// stands already in a place for programs that root alone may change.
func ServiceProgram() (program string, missing bool, err error) {
	if p, err := setup.Program(); err == nil && (strings.HasPrefix(p, "/usr/") || strings.HasPrefix(p, "/opt/")) {
		return p, false, nil
	}
	return programPath, true, nil
}

// InstallProgram copies this process's program to where ServiceProgram says, and makes sure that it can be run there.
func InstallProgram(ctx context.Context) error {
	program, missing, err := ServiceProgram()
	if err != nil || !missing {
		return err
	}
	wayOut := fmt.Errorf("put the agent where root alone writes and programs may run, below /usr or /opt, and run `%s service install` from there", filepath.Base(program))
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		return fmt.Errorf("%w: %w", err, wayOut)
	}
	tmp := program + ".new"
	if err := writeProgram(tmp); err != nil {
		return fmt.Errorf("copying the agent to %s: %w: %w", program, err, wayOut)
	}
	defer os.Remove(tmp)
	if out, err := exec.CommandContext(ctx, tmp, "version").CombinedOutput(); err != nil {
		return fmt.Errorf("%s can't be run%s: %w %s: %w", program, noExec(tmp), err, bytes.TrimSpace(out), wayOut)
	}
	return os.Rename(tmp, program)
}

// noExec says so where the file system of a path runs no programs.
func noExec(path string) string {
	var fs unix.Statfs_t
	if unix.Statfs(path, &fs) == nil && fs.Flags&unix.ST_NOEXEC != 0 {
		return ", because its file system is mounted with noexec"
	}
	return ""
}

// InstallService makes the agent start at boot, with command and what o says of its folders, starts it now, and returns
// once it serves this machine. Where it doesn't, the unit is as it was before, absent or of an earlier installation, and the
// error has the agent's last words.
func InstallService(ctx context.Context, command []string, o Options) error {
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
	before, err := os.ReadFile(unitFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	unit := systemdUnit(unitOptions{
		command: command, writable: []string{o.StateDir, o.RDPCertDir}, drainSeconds: int(o.Drain / time.Second), loginDir: o.LoginDir,
	})
	if err := writeAtomic(unitFile, []byte(unit), 0o644); err != nil {
		return fmt.Errorf("systemd unit: %w: run this as root", err)
	}
	began := time.Now()
	err = systemctl(ctx, "daemon-reload")
	if err == nil {
		err = systemctl(ctx, "enable", ServiceName)
	}
	if err == nil {
		if err = systemctl(ctx, "restart", ServiceName); err != nil { // it waits for the agent's word
			err = notStarted(ctx, command[0], began)
		}
	}
	if err == nil {
		return nil
	}
	if before == nil {
		return errors.Join(err, UninstallService(ctx), systemctl(ctx, "reset-failed", ServiceName))
	}
	err = errors.Join(err, writeAtomic(unitFile, before, 0o644), systemctl(ctx, "daemon-reload"), systemctl(ctx, "reset-failed", ServiceName))
	if again := systemctl(ctx, "restart", ServiceName); again != nil {
		return errors.Join(err, fmt.Errorf("the service's unit is as it was before, and does not start either: %w", again))
	}
	return fmt.Errorf("%w\nThe service runs as it was installed before", err)
}

// notStarted tells why systemd did not get the agent to serve, in systemd's words and the agent's own.
func notStarted(ctx context.Context, program string, began time.Time) error {
	show, _ := exec.CommandContext(ctx, "systemctl", "show", ServiceName, "-p", "Result", "-p", "ExecMainStatus").Output()
	what := strings.Join(strings.Fields(string(show)), ", ")
	hint := "mend what the lines above say, and run this again"
	if strings.Contains(what, "ExecMainStatus=203") { // EXIT_EXEC
		hint = fmt.Sprintf("systemd may not run %s%s: put the agent elsewhere, below /usr or /opt, and run this from there; with SELinux, `restorecon %s`", program, noExec(program), program)
	}
	journal, err := exec.CommandContext(ctx, "journalctl", "--no-pager", "--quiet", "--output=cat", "--lines=15",
		"--unit="+ServiceName, "--since=@"+strconv.FormatInt(began.Unix(), 10)).CombinedOutput()
	if err != nil {
		journal = fmt.Appendf(nil, "journalctl: %v %s", err, journal)
	}
	return fmt.Errorf("service %s did not start (%s). Its journal:\n%s\n%s", ServiceName, what, indent(string(journal)), hint)
}

// UninstallService stops the agent and removes its unit, if there is one. The state folder stays.
func UninstallService(ctx context.Context) error {
	if _, err := os.Stat(unitFile); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := systemctl(ctx, "disable", "--now", ServiceName); err != nil {
		return err
	}
	if err := os.Remove(unitFile); err != nil {
		return fmt.Errorf("systemd unit: %w: run this as root", err)
	}
	return systemctl(ctx, "daemon-reload")
}

func systemctl(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", args[0], err, bytes.TrimSpace(out))
	}
	return nil
}

// RunAsService says whether the service manager started this process in a way that needs an answer of its own; on
// Linux it never does.
func RunAsService(bool, func(context.Context) error, <-chan struct{}) (handled bool, err error) {
	return false, nil
}
