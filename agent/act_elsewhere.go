//go:build !linux && !windows

package agent

import "rendezvous.dev/rendezvous/agent/control"

// localControl is nil: sessions can be disconnected here, and no more.
func localControl() control.Control { return nil }

// controlWithoutLogin is for machines that ask for credentials themselves.
func controlWithoutLogin() control.Control { return nil }
