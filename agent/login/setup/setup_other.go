//go:build !linux

package setup

import (
	"context"
	"errors"
	"io"
)

var errNotHere = errors.New("login by connection is for Linux machines with xrdp")

// Setup is for Linux.
type Setup struct{}

// New is for Linux.
func New(string, io.Writer) *Setup { return &Setup{} }

// Program is for Linux.
func Program() (string, error) { return "", errNotHere }

// Plan is for Linux.
func (*Setup) Plan(context.Context, Options) (bool, error) { return false, errNotHere }

// Install is for Linux.
func (*Setup) Install(context.Context, Options) error { return errNotHere }

// Uninstall finds nothing to undo.
func (*Setup) Uninstall(context.Context) error { return nil }

// Installed is never so.
func (*Setup) Installed() (Options, bool, error) { return Options{}, false, nil }

// Status is for Linux.
func (*Setup) Status(context.Context) error { return errNotHere }

// Check finds nothing: the RDP servers of other systems ask people for credentials themselves.
func Check(string) error { return nil }
