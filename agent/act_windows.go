package agent

import "rendezvous.dev/rendezvous/agent/control"

// localControl acts on this machine's own sessions.
func localControl() control.Control { return control.WTS{} }

// controlWithoutLogin is for machines that ask for credentials themselves, as Windows does.
func controlWithoutLogin() control.Control { return control.WTS{} }
