package brokerapi

import (
	"slices"
	"testing"
)

// The names stand in certificates, connection files and clients' memory: another spelling would break them all.
func TestRDPNames(t *testing.T) {
	if got := RDPNames("desk", "linux", "linux-0"); !slices.Equal(got, []string{"linux.desk.rdv.internal", "linux-0.linux.desk.rdv.internal"}) {
		t.Errorf("got %q", got)
	}
}
