package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/mgr"
)

// CheckService finds nothing in the way.
func CheckService() error { return nil }

// InstallService makes the agent start at boot with command, and starts it now.
func InstallService(command []string, o Options) error {
	if err := (store{o.StateDir}).prepare(); err != nil {
		return err
	}
	m, err := mgr.Connect()
	if err != nil {
		return fmt.Errorf("service manager: %w: run this as administrator", err)
	}
	defer m.Disconnect()
	s, err := m.CreateService(ServiceName, command[0], mgr.Config{
		StartType: mgr.StartAutomatic, DisplayName: "Rendezvous agent", Description: serviceDescription,
		Dependencies: []string{"TermService"},
	}, command[1:]...)
	if err != nil {
		return fmt.Errorf("service %s: %w", ServiceName, err)
	}
	defer s.Close()
	restart := mgr.RecoveryAction{Type: mgr.ServiceRestart, Delay: 5 * time.Second}
	if err := s.SetRecoveryActions([]mgr.RecoveryAction{restart, restart, restart}, 24*60*60); err != nil {
		return fmt.Errorf("service %s: %w", ServiceName, err)
	}
	return s.Start()
}

// UninstallService stops the agent and removes the service. The state folder stays.
func UninstallService() error {
	m, err := mgr.Connect()
	if err != nil {
		return fmt.Errorf("service manager: %w: run this as administrator", err)
	}
	defer m.Disconnect()
	s, err := m.OpenService(ServiceName)
	if err != nil {
		return fmt.Errorf("service %s: %w", ServiceName, err)
	}
	defer s.Close()
	_, stopErr := s.Control(svc.Stop)
	if err := s.Delete(); err != nil {
		return errors.Join(stopErr, fmt.Errorf("service %s: %w", ServiceName, err))
	}
	return nil
}

// RunAsService answers Windows's service manager while run serves, where that manager started this process.
func RunAsService(run func(context.Context) error) (handled bool, err error) {
	if is, err := svc.IsWindowsService(); err != nil || !is {
		return false, err
	}
	h := &handler{run: run}
	if err := svc.Run(ServiceName, h); err != nil {
		return true, err
	}
	return true, h.err
}

type handler struct {
	run func(context.Context) error
	err error
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
	status <- svc.Status{State: svc.Running, Accepts: accepts}
	for {
		select {
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
