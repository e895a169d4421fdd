//go:build !linux && !windows

package agent

import (
	"context"
	"errors"
)

var errNoService = errors.New("installing a service is known for Linux (systemd) and Windows only: start `agent run` from this system's own service manager")

// CheckService says so.
func CheckService() error { return errNoService }

// ServiceProgram is not known on this system.
func ServiceProgram() (program string, missing bool, err error) { return "", false, errNoService }

// InstallProgram is not known on this system.
func InstallProgram(context.Context) error { return errNoService }

// InstallService is not known on this system.
func InstallService(context.Context, []string, Options) error { return errNoService }

// UninstallService is not known on this system.
func UninstallService(context.Context) error { return errNoService }

// RunAsService is only for systems whose service manager wants an answer.
func RunAsService(bool, func(context.Context) error, <-chan struct{}) (handled bool, err error) {
	return false, nil
}
