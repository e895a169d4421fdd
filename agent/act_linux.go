package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"

	"rendezvous.dev/rendezvous/agent/control"
	"rendezvous.dev/rendezvous/agent/login"
)

// localControl acts on this machine's own desktops.
func localControl() control.Control { return &control.Local{} }

// controlWithoutLogin is for machines that ask for credentials themselves: nothing says there which desktop is whose.
func controlWithoutLogin() control.Control { return nil }

// HelpSessions does for the agent with this login folder, which is in another container, what it can't do to the desktops
// here, until ctx ends.
func HelpSessions(ctx context.Context, loginDir string, log *slog.Logger) error {
	if os.Geteuid() != 0 {
		return errors.New("the session helper must run as root: it ends users' sessions and shows them messages")
	}
	if err := os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"); err != nil {
		return err
	}
	return control.Help(ctx, filepath.Join(loginDir, control.SocketName), &control.Local{}, login.PeerUID, log)
}
