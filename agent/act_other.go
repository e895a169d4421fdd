//go:build !linux

package agent

import (
	"context"
	"errors"
	"log/slog"
)

// HelpSessions is for containers, which are Linux.
func HelpSessions(context.Context, string, *slog.Logger) error {
	return errors.New("the session helper runs on Linux alone")
}
