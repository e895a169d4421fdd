//go:build !linux

package control

import (
	"context"
	"errors"
	"log/slog"
	"net"
)

// Help is for containers, which are Linux.
func Help(context.Context, string, Control, func(net.Conn) (uint32, error), *slog.Logger) error {
	return errors.New("the session helper runs on Linux alone")
}
