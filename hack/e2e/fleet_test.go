package e2e

import (
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/hack/fleet"
)

// The fleet run (`make fleet`) on a small scale: nobody is dropped.
func TestFleet(t *testing.T) {
	r, err := fleet.Run(t.Context(), w.Stage, fleet.Options{
		Sessions: 20, Hosts: 4, Gateways: 2, Brokers: 3, Say: t.Logf,
		Steps: []string{"relay image", "one gateway pod fewer than at first", "kill -9 of a broker", "certificates renewed", "workspace, pool and gateway edited"},
	})
	if err != nil {
		t.Error(err)
	}
	if r == nil {
		return
	}
	t.Logf("\n%s", r.Markdown())
	for _, row := range r.Rows {
		if row.Failed > 0 && !strings.HasPrefix(row.Step, "kill") {
			t.Errorf("%s: %d new connects did not get in at the first try: %q", row.Step, row.Failed, r.Faults)
		}
	}
	if r.Checked < 1<<20 {
		t.Errorf("only %d bytes were checked", r.Checked)
	}
}
