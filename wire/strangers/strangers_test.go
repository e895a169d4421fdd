package strangers

import (
	"net/netip"
	"testing"
)

// Of a flood that says nothing its own connections go, also where the client behind the same address is slow.
func TestMuteGoFirst(t *testing.T) {
	for name, from := range map[string]string{"from one address": "192.0.2.1", "from many": ""} {
		t.Run(name, func(t *testing.T) {
			var s Crowd
			const most = 64
			enter := func(n int) (*Stranger, *Stranger) {
				v := &Stranger{}
				addr, _ := netip.ParseAddr(from)
				if from == "" {
					addr = netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)})
				}
				return v, s.Enter(v, addr, most)
			}
			client, _ := enter(1 << 12)
			s.Spoke(client, false)
			for n := range 10 * most {
				if _, out := enter(n); out == client {
					t.Fatalf("after %d silent connections the client had to go", n+1)
				}
			}
			// Those who speak go by age all the same: nobody keeps a place by a ClientHello.
			for n := range 10 * most {
				v, out := enter(n)
				s.Spoke(v, false)
				if out == client {
					return
				}
			}
			t.Error("the oldest stays, whoever comes")
		})
	}
}

func TestSources(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7": "192.0.2.7", "::ffff:192.0.2.7": "192.0.2.7", "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::", "fe80::1%eth0": "fe80::",
	} {
		if got := sourceOf(netip.MustParseAddr(addr)); got.String() != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
	if sourceOf(netip.Addr{}).IsValid() {
		t.Error("an unknown source became one")
	}
	var s Crowd
	var all []*Stranger
	enter := func(from string, agent bool) *Stranger {
		v := &Stranger{}
		addr, _ := netip.ParseAddr(from)
		if out := s.Enter(v, addr, 64); out != nil {
			t.Fatalf("somebody had to go for %s", from)
		}
		if agent {
			s.Spoke(v, true)
		}
		all = append(all, v)
		return v
	}
	for range 30 { // another pod brings agents, and addresses that are nobody's tell nothing
		enter("10.0.0.1", true)
		enter("", false)
	}
	for _, v := range all {
		s.Leave(v)
	}
	if s.Len() != 0 || s.all.mute.Len() != 0 || len(s.sources) != 0 || s.spared != 0 {
		t.Errorf("left: %d, %d sources, %d agents", s.Len(), len(s.sources), s.spared)
	}
}

// A load balancer's connections are bounded by whom it brings, once it has said so.
func TestLocate(t *testing.T) {
	const most = 64
	var s Crowd
	bring := func(from string) (v, evicted *Stranger) {
		v = &Stranger{}
		if out := s.Enter(v, netip.Addr{}, most); out != nil {
			t.Fatal("the load balancer's connection costs somebody a place")
		}
		return v, s.Locate(v, netip.MustParseAddr(from), most)
	}
	client, _ := bring("192.0.2.1")
	var first *Stranger
	for n := range 2 * most {
		v, out := bring("192.0.2.2")
		if first == nil {
			first = v
		}
		if n < most/4 && out != nil || n >= most/4 && out == nil || out == client || n == most/4 && out != first {
			t.Fatalf("after %d connections of one source %v had to go", n+1, out)
		}
	}
	if s.Len() != 1+most/4 {
		t.Errorf("%d are there", s.Len())
	}
	if s.Locate(first, netip.MustParseAddr("192.0.2.3"), most) != nil || len(s.sources) != 2 {
		t.Error("who had to go came back")
	}
	agent, _ := bring("192.0.2.4")
	s.Spoke(agent, true)
	if s.Locate(agent, netip.MustParseAddr("192.0.2.2"), most) != nil {
		t.Error("a spared one counts for a source")
	}
	s.Leave(agent)
	s.Leave(agent)
	s.Enter(agent, netip.Addr{}, most)
	s.Leave(agent)
	if s.spared != 0 {
		t.Errorf("%d spared are left", s.spared)
	}
}
