package relay

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/tsgu"
)

// One good ticket, shown on connections that then say nothing, takes a quarter of the places; others get in.
func TestOneTicketTakesNoMoreThanAShare(t *testing.T) {
	const places = 16
	for name, open := range map[string]func(s *stack) *rdpClient{
		"ARM": func(s *stack) *rdpClient {
			c, err := s.dial(s.addr, testHost)
			if err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReader(c)
			resp, _ := s.request(c, r, "GET /rendezvous/v1/arm?"+url.Values{"ClmTk": {"Bearer " + testTicket}}.Encode()+" HTTP/1.1\n"+upgradeHeaders)
			if resp.StatusCode != http.StatusSwitchingProtocols {
				t.Fatal(resp.Status)
			}
			return &rdpClient{Conn: c, t: t, r: r}
		},
		"TSGU": func(s *stack) *rdpClient {
			c := s.dialTSGU("")
			c.packet(&tsgu.HandshakeRequest{Major: 1, ExtAuth: tsgu.ExtAuthPAA})
			c.want(tsgu.TypeHandshakeResponse)
			create := &tsgu.TunnelCreate{}
			create.SetCookie(testTicket)
			c.packet(create)
			c.want(tsgu.TypeTunnelResponse)
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, func(o *Options, f *fakeAdmission) {
				o.Config.MaxPending, o.Config.HandshakeTimeoutSeconds = places, 60
				good := f.authenticate
				f.authenticate = func(r *admission.AuthenticateRequest) *admission.AuthenticateResponse {
					if r.Ticket == "bobs" {
						return &admission.AuthenticateResponse{Workspace: "demo", User: "bob", Resource: "desk", Target: testTarget}
					}
					return good(r)
				}
			})
			var silent []*rdpClient
			for range places {
				silent = append(silent, open(s))
			}
			gone(t, silent[0].Conn)
			s.relay.mu.Lock()
			n := s.relay.places.held[userKey("demo", "alice")]
			s.relay.mu.Unlock()
			if n != places/4 {
				t.Errorf("alice has %d of %d places", n, places)
			}
			bob := s.dialTSGU("")
			if last, status := bob.open("bobs", testTarget); status != 0 {
				t.Errorf("bob: packet %#x, %#x", last, status)
			}
			s.agent()
			s.session(transportRaw) // nor does she keep herself out
			for _, c := range silent {
				c.Close()
			}
		})
	}
}

// Attempts that wait for their host are not silent: the newest of too many is refused.
func TestOneTicketsConnectsAreBounded(t *testing.T) {
	const places = 8
	s := newStack(t, func(o *Options, f *fakeAdmission) {
		o.Config.MaxPending = places
		f.connect = func(ctx context.Context, _ *admission.ConnectRequest) *admission.ConnectResponse {
			<-ctx.Done()
			return &admission.ConnectResponse{}
		}
	})
	for i := range places / 4 {
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, strings.ReplaceAll("GET /rendezvous/v1/connect HTTP/1.1\n"+upgradeHeaders+"\nAuthorization: Bearer "+testTicket+"\n\n", "\n", "\r\n"))
		eventually(t, "it waits for its host", func() bool {
			s.relay.joins.mu.Lock()
			defer s.relay.joins.mu.Unlock()
			return len(s.relay.joins.waiting) == i+1
		})
	}
	if _, _, e := s.dialRaw(testTicket, ""); e == nil || e.Code != refusal.GatewayFull || !strings.Contains(e.Message, "of yours") {
		t.Errorf("one more: %v", e)
	}
	if _, _, e := s.dialRaw("another", ""); e == nil || e.Code != refusal.TicketInvalid {
		t.Errorf("somebody else: %v", e)
	}
}

func TestVictim(t *testing.T) {
	now := time.Now()
	var p places
	add := func(who string, age time.Duration, silent bool) *attempt {
		a := &attempt{who: who, requested: now.Add(-age), silent: silent}
		p.enter(a)
		return a
	}
	add("busy", time.Hour, false)
	add("busy", time.Hour, false)
	add("busy", time.Hour, false)
	single := add("one", time.Minute, true)
	want := add("many", 10*time.Second, true)
	add("many", 9*time.Second, true)
	add("", time.Second, true) // strangers on their way
	add("", time.Second, true)
	add("", time.Second, true)
	if got := p.victim(now); got != want {
		t.Errorf("got %v, want the oldest of many", got)
	}
	p.leave(want)
	if got := p.victim(now); got != single {
		t.Errorf("got %v, want the oldest of those that have as many", got)
	}
	if p.leave(want) || p.held["many"] != 1 || p.queue.Len() != 8 {
		t.Errorf("an attempt left twice: %v", p.held)
	}
}

// A flood of silent connections from one address has a quarter of the places, and nobody else's goes for it.
func TestOneSourceTakesNoMoreThanAShare(t *testing.T) {
	const places = 64
	s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Config.MaxPending, o.Config.HandshakeTimeoutSeconds = places, 60 })
	s.from = netip.MustParseAddr("127.0.0.2")
	slow, err := net.Dial("tcp", s.addr) // somebody's, with a long way
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	eventually(t, "it is there", func() bool { return s.relay.strangers.Len() == 1 })
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.3:0"))}
	var first net.Conn
	for range 3 * places {
		c, err := d.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if first == nil {
			first = c
		}
	}
	gone(t, first)
	eventually(t, "the flood is bounded", func() bool { return s.relay.strangers.Len() == 1+places/4 })
	slow.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := slow.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("who was there before the flood: %v", err)
	}
	s.session(transportTSGU)
}
