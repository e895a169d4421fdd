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
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/mgr"
)

const (
	// startPatience is how long a starting service may take to serve, and a stopping one, beside its drain, to be gone.
	startPatience = 30 * time.Second
	// logWords is how much of the end of the service's log is shown where it doesn't start, in bytes.
	logWords = 2000
)

// CheckService finds nothing in the way.
func CheckService() error { return nil }

// ServiceProgram says which program the service will run, and whether InstallProgram has to put it there: in the folder for
// programs, which administrators alone may change, since the service runs as SYSTEM.
func ServiceProgram() (program string, missing bool, err error) {
	programs := os.Getenv("ProgramFiles")
	if programs == "" {
		return "", false, errors.New("%ProgramFiles% is not set: this is needed to know where to put the agent")
	}
	program = filepath.Join(programs, "Rendezvous", "rdv-agent.exe")
	self, err := os.Executable()
	return program, !strings.EqualFold(self, program), err
}

// InstallProgram copies this process's program to where ServiceProgram says, and makes sure that it can be run there. One that
// runs can't be overwritten, but another name can be given to it.
func InstallProgram(ctx context.Context) error {
	program, missing, err := ServiceProgram()
	if err != nil || !missing {
		return err
	}
	fresh, old := program+".new.exe", program+".old"
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		return fmt.Errorf("%w: run this as administrator", err)
	}
	if err := writeProgram(fresh); err != nil {
		return fmt.Errorf("copying the agent to %s: %w: run this as administrator", program, err)
	}
	defer os.Remove(fresh)
	if out, err := exec.CommandContext(ctx, fresh, "version").CombinedOutput(); err != nil {
		return fmt.Errorf("%s can't be run: %w %s: does a policy of this machine forbid it?", program, err, bytes.TrimSpace(out))
	}
	os.Remove(old) // of an earlier update, whose process has ended
	if err := os.Rename(program, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(fresh, program); err != nil {
		return errors.Join(err, os.Rename(old, program))
	}
	os.Remove(old)
	return nil
}

// InstallService makes the agent start at boot with command, starts it now, and returns once it serves this machine. Where it
// doesn't, the service is as it was before, absent or of an earlier installation, and the error has the agent's last words.
func InstallService(ctx context.Context, command []string, o Options) error {
	if err := (store{o.StateDir}).prepare(); err != nil {
		return err
	}
	m, err := mgr.Connect()
	if err != nil {
		return fmt.Errorf("service manager: %w: run this as administrator", err)
	}
	defer m.Disconnect()
	conf := mgr.Config{
		StartType: mgr.StartAutomatic, ErrorControl: mgr.ErrorNormal, DisplayName: "Rendezvous agent", Description: serviceDescription,
		Dependencies: []string{"TermService"},
	}
	command = append(command, "--"+ServiceFlag)
	logFile := logFileOf(command)
	logged := fileSize(logFile)

	before := "" // the command line of an earlier installation
	s, err := m.OpenService(ServiceName)
	switch {
	case err == nil:
		defer s.Close()
		if before, err = serviceCommand(s); err != nil {
			return fmt.Errorf("service %s: %w", ServiceName, err)
		}
		if err := stopService(ctx, s, o.Drain+startPatience); err != nil {
			return fmt.Errorf("service %s: %w: stop it, and run this again", ServiceName, err)
		}
		if err := setServiceCommand(s, windows.ComposeCommandLine(command)); err != nil {
			return fmt.Errorf("service %s: %w", ServiceName, err)
		}
	case errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST):
		if s, err = m.CreateService(ServiceName, command[0], conf, command[1:]...); err != nil {
			return fmt.Errorf("service %s: %w", ServiceName, err)
		}
		defer s.Close()
	default:
		return fmt.Errorf("service %s: %w: run this as administrator", ServiceName, err)
	}

	restart := mgr.RecoveryAction{Type: mgr.ServiceRestart, Delay: 5 * time.Second}
	if err = s.SetRecoveryActions([]mgr.RecoveryAction{restart, restart, restart}, 24*60*60); err != nil {
		err = fmt.Errorf("service %s: restart after failures: %w", ServiceName, err)
	} else if err = startService(ctx, s); err != nil {
		err = fmt.Errorf("service %s did not start: %w\n%s", ServiceName, err, lastWords(logFile, logged))
	}
	if err == nil {
		return nil
	}
	if before == "" {
		return errors.Join(err, stopService(ctx, s, startPatience), s.Delete())
	}
	err = errors.Join(err, stopService(ctx, s, startPatience), setServiceCommand(s, before))
	if again := startService(ctx, s); again != nil {
		return errors.Join(err, fmt.Errorf("the service is as it was before, and does not start either: %w", again))
	}
	return fmt.Errorf("%w\nThe service runs as it was installed before", err)
}

// serviceCommand is a service's command line. mgr's own Config asks for more, which wine does not know.
func serviceCommand(s *mgr.Service) (string, error) {
	size := uint32(8 << 10) // the most that Windows has
	buf := make([]byte, size)
	conf := (*windows.QUERY_SERVICE_CONFIG)(unsafe.Pointer(&buf[0]))
	if err := windows.QueryServiceConfig(s.Handle, conf, size, &size); err != nil {
		return "", err
	}
	return windows.UTF16PtrToString(conf.BinaryPathName), nil
}

// setServiceCommand changes it, and has the service start at boot.
func setServiceCommand(s *mgr.Service, command string) error {
	line, err := windows.UTF16PtrFromString(command)
	if err != nil {
		return err
	}
	return windows.ChangeServiceConfig(s.Handle, windows.SERVICE_NO_CHANGE, mgr.StartAutomatic, windows.SERVICE_NO_CHANGE, line, nil, nil, nil, nil, nil, nil)
}

// startService starts a service and returns once it runs, which the agent says of itself when it serves.
func startService(ctx context.Context, s *mgr.Service) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	// The service manager is locked while it starts services itself, as after a boot.
	for {
		err := s.Start()
		if err == nil {
			break
		}
		if !errors.Is(err, windows.ERROR_SERVICE_DATABASE_LOCKED) || sleep(ctx, 250*time.Millisecond) != nil {
			return err
		}
	}
	for {
		st, err := s.Query()
		switch {
		case err != nil:
			return err
		case st.State == svc.Running:
			return nil
		case st.State == svc.Stopped:
			return fmt.Errorf("it ended with code %d (its own: %d)", st.Win32ExitCode, st.ServiceSpecificExitCode)
		}
		if sleep(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("it does not serve after %s", startPatience)
		}
	}
}

// stopService has a service stop, and waits for its end. One that doesn't run is left alone.
func stopService(ctx context.Context, s *mgr.Service, patience time.Duration) error {
	if _, err := s.Control(svc.Stop); err != nil {
		if errors.Is(err, windows.ERROR_SERVICE_NOT_ACTIVE) {
			return nil
		}
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		st, err := s.Query()
		if err != nil || st.State == svc.Stopped {
			return err
		}
		if sleep(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("it did not stop in %s", patience)
		}
	}
}

// logFileOf finds the log in a service's command: its standard error is lost.
func logFileOf(command []string) string {
	for _, arg := range command {
		if file, ok := strings.CutPrefix(arg, "--log-file="); ok {
			return file
		}
	}
	return ""
}

func fileSize(file string) int64 {
	fi, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return fi.Size()
}

// lastWords are what a service that didn't start has logged since, or what else a person can look at.
func lastWords(logFile string, since int64) string {
	data, err := os.ReadFile(logFile)
	if err != nil || int64(len(data)) <= since {
		return fmt.Sprintf("It logged nothing to %s. Event Viewer, Windows Logs, System, has what the service manager says of it (source Service Control Manager)", logFile)
	}
	data = data[since:]
	return fmt.Sprintf("From its log, %s:\n%s", logFile, indent(string(data[max(0, len(data)-logWords):])))
}

// UninstallService stops the agent and removes the service, if there is one. The state folder stays.
func UninstallService(ctx context.Context) error {
	m, err := mgr.Connect()
	if err != nil {
		return fmt.Errorf("service manager: %w: run this as administrator", err)
	}
	defer m.Disconnect()
	s, err := m.OpenService(ServiceName)
	if errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("service %s: %w", ServiceName, err)
	}
	defer s.Close()
	stopErr := stopService(ctx, s, startPatience)
	if err := s.Delete(); err != nil {
		return errors.Join(stopErr, fmt.Errorf("service %s: %w", ServiceName, err))
	}
	return stopErr
}

// RunAsService answers Windows's service manager while run serves, where that manager started this process: it is told that
// the service runs when ready closes. The service's own command line says so (ServiceFlag); a process that was not told is
// looked at, which finds the service manager on Windows, and doesn't under wine.
func RunAsService(told bool, run func(context.Context) error, ready <-chan struct{}) (handled bool, err error) {
	if is, err := svc.IsWindowsService(); !told && (err != nil || !is) {
		return false, err
	}
	h := &handler{run: run, ready: ready}
	if err := svc.Run(ServiceName, h); err != nil {
		return true, err
	}
	return true, h.err
}

type handler struct {
	run   func(context.Context) error
	ready <-chan struct{}
	err   error
}

// Execute is called by the service manager; it returns when the agent has drained.
func (h *handler) Execute(_ []string, requests <-chan svc.ChangeRequest, status chan<- svc.Status) (bool, uint32) {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.err = h.run(ctx)
	}()
	accepts := svc.AcceptStop | svc.AcceptShutdown
	status <- svc.Status{State: svc.StartPending}
	ready := h.ready
	for {
		select {
		case <-ready:
			ready = nil
			status <- svc.Status{State: svc.Running, Accepts: accepts}
		case <-done:
			if h.err != nil {
				return true, 1
			}
			return false, 0
		case r := <-requests:
			switch r.Cmd {
			case svc.Interrogate:
				status <- r.CurrentStatus
			case svc.Stop, svc.Shutdown:
				status <- svc.Status{State: svc.StopPending}
				stop()
			}
		}
	}
}
