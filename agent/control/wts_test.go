package control

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestParseClientAddress(t *testing.T) {
	v4 := [20]byte{0, 0, 127, 0, 0, 1}
	v6 := [20]byte{15: 1}
	for _, c := range []struct {
		family  uint32
		address [20]byte
		want    netip.Addr
	}{
		{addressFamilyINET, v4, netip.MustParseAddr("127.0.0.1")},
		{addressFamilyINET6, v6, netip.MustParseAddr("::1")},
		{0, v4, netip.Addr{}},
	} {
		if got := parseClientAddress(c.family, c.address); got != c.want {
			t.Errorf("family %d: %v, want %v", c.family, got, c.want)
		}
	}
}

// With one session from this machine it is that one; consoles, listeners, disconnected ones and those of other machines
// are none of ours; of two none is guessed.
func TestOnlyTerminal(t *testing.T) {
	local, elsewhere := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.1")
	ours := terminal{id: 2, state: wtsActive, rdp: true, client: local, user: "alice"}
	rest := []terminal{
		{id: 0, state: 4}, {id: 1, state: wtsActive, user: "console"}, {id: 3, state: wtsActive, rdp: true, client: elsewhere, user: "mallory"},
		{id: 4, state: 4, rdp: true, client: local, user: "left"}, {id: 5, state: wtsActive, rdp: true, client: local}, {id: 65536, state: 6},
	}
	if got, err := onlyTerminal(append(rest, ours)); err != nil || got.id != 2 {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := onlyTerminal(rest); !errors.Is(err, ErrNoDesktop) {
		t.Errorf("without ours: %v", err)
	}
	second := ours
	second.id, second.client = 7, netip.Addr{}
	if _, err := onlyTerminal(append(rest, ours, second)); !errors.Is(err, errAmbiguous) || !strings.Contains(err.Error(), "2 sessions") {
		t.Errorf("with two: %v", err)
	}
}
