package admission

import (
	"net/netip"
	"testing"

	"rendezvous.dev/rendezvous/wire/identity"
)

func TestInstanceName(t *testing.T) {
	for addr, want := range map[string]string{
		"10.244.0.7":        "10-244-0-7",
		"::ffff:10.244.0.7": "10-244-0-7",
		"fd00::7":           "fd00-0000-0000-0000-0000-0000-0000-0007",
		"fe80::1%eth0":      "fe80-0000-0000-0000-0000-0000-0000-0001",
	} {
		a := netip.MustParseAddr(addr)
		name := InstanceName(a)
		back, err := InstanceAddr(name)
		if name != want || !identity.IsLabel(name) || err != nil || back != a.Unmap().WithZone("") {
			t.Errorf("%s: %q (want %q), back %v, %v", addr, name, want, back, err)
		}
	}
	for _, bad := range []string{"", "relay-0", "10-244-0", "10.244.0.7", "10-244-0-07", "fd00--7"} {
		if a, err := InstanceAddr(bad); err == nil {
			t.Errorf("%q was read as %v", bad, a)
		}
	}
}
