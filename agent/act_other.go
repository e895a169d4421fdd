//go:build !linux

package agent

import (
	"context"
	"errors"
	"log/slog"

	"rendezvous.dev/rendezvous/agent/control"
)

// localControl is nil: sessions can be disconnected here, and no more.
func localControl() control.Control { return nil }

// HelpSessions is for containers, which are Linux.
func HelpSessions(context.Context, string, *slog.Logger) error {
	return errors.New("the session helper runs on Linux alone")
}
