package relay

import (
	"bufio"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
	"rendezvous.dev/rendezvous/wire/tsgu"
)

// failed is the reported steps that failed, under an activity id.
func (s *stack) failed(activity string) (steps []*admission.Step) {
	for _, r := range s.adm.list() {
		if p := r.GetStep(); p != nil && p.ActivityId == activity && p.Error != "" {
			steps = append(steps, p)
		}
	}
	return steps
}

// Every refusal of a client is reported: with its workspace where a ticket has told it, else with the client's address.
func TestRefusalsAreReported(t *testing.T) {
	s := newStack(t, nil)
	for name, c := range map[string]struct {
		refused func() (activity string)
		code    refusal.Code
		address string
	}{
		"an upgrade without its headers": {func() string {
			c, err := s.dial(s.addr, testHost)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, body := s.request(c, bufio.NewReader(c), "GET /rendezvous/v1/connect HTTP/1.1\nHost: x")
			return decodeRefusal(t, body).ActivityID
		}, refusal.Protocol, "127.0.0.1"},
		"a forged ticket": {func() string {
			_, _, e := s.dialRaw("forged", "")
			return e.ActivityID
		}, refusal.TicketInvalid, "127.0.0.1"},
		"no such path": {func() string {
			c, err := s.dial(s.addr, testHost)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, body := s.request(c, bufio.NewReader(c), "GET /remoteDesktopGateway/ HTTP/1.1\nHost: x")
			return decodeRefusal(t, body).ActivityID
		}, refusal.Protocol, "127.0.0.1"},
		"a breach before the ticket": {func() string {
			c := s.dialTSGU("")
			c.packet(&tsgu.TunnelAuth{})
			return c.header.Get("Activity-Id")
		}, refusal.Protocol, "127.0.0.1"},
		"a breach after the ticket": {func() string {
			c := s.dialTSGU("")
			c.packet(&tsgu.HandshakeRequest{Major: 1, ExtAuth: tsgu.ExtAuthPAA})
			c.want(tsgu.TypeHandshakeResponse)
			create := &tsgu.TunnelCreate{}
			create.SetCookie(testTicket)
			c.packet(create)
			c.want(tsgu.TypeTunnelResponse)
			c.packet(&tsgu.HandshakeRequest{Major: 1})
			return c.header.Get("Activity-Id")
		}, refusal.Protocol, ""},
	} {
		t.Run(name, func(t *testing.T) {
			activity := c.refused()
			eventually(t, "it is reported", func() bool { return len(s.failed(activity)) > 0 })
			p := s.failed(activity)[0]
			if p.Error != string(c.code) || p.ClientAddr != c.address || p.Detail == "" || (p.Workspace != "") != (c.address == "") {
				t.Errorf("reported %v, want %s from %q", p, c.code, c.address)
			}
			if c.address != "" && p.Step != trace.StepDialGateway || c.address == "" && p.Step != trace.StepAdmit {
				t.Errorf("in step %d", p.Step)
			}
		})
	}
	t.Run("without a node's address", func(t *testing.T) {
		cfg := *s.relay.config.Load()
		hidden := cfg
		hidden.AddressesHidden = true
		s.relay.SetConfig(hidden)
		defer s.relay.SetConfig(cfg)
		_, _, e := s.dialRaw("forged", "")
		eventually(t, "it is reported", func() bool { return len(s.failed(e.ActivityID)) > 0 })
		if p := s.failed(e.ActivityID)[0]; p.ClientAddr != trace.UnknownClient {
			t.Errorf("reported %v", p)
		}
	})
}

func TestRate(t *testing.T) {
	r := rate{most: 3}
	now := time.Unix(1, 0)
	for second := range 2 {
		n := 0
		for range 100 {
			if r.allow(now.Add(time.Duration(second) * time.Second)) {
				n++
			}
		}
		if n != 3 {
			t.Errorf("%d in one second, want 3", n)
		}
	}
}

// What the gateway container refuses with makes no metric of its own.
func TestRefusalsAreOfTheClosedSet(t *testing.T) {
	reg := prometheus.NewRegistry()
	n := 0
	s := newStack(t, func(o *Options, f *fakeAdmission) {
		o.Metrics = NewMetrics(reg)
		f.connect = func(context.Context, *admission.ConnectRequest) *admission.ConnectResponse {
			n++
			return &admission.ConnectResponse{Error: &admission.Error{Code: fmt.Sprint("code-", n), Message: strings.Repeat("x", 1<<20)}}
		}
		f.enter = func(*admission.EnterRequest) *admission.EnterResponse {
			n++
			return &admission.EnterResponse{Error: &admission.Error{Code: fmt.Sprint("code-", n), Message: "m"}}
		}
	})
	for range 5 {
		if _, _, e := s.dialRaw(testTicket, ""); e == nil || e.Code != refusal.Internal || len(e.Message) > refusal.MaxMessage {
			t.Fatalf("got %.200v", e)
		}
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		s.request(c, bufio.NewReader(c), "POST /api/arm/v2/connections HTTP/1.1\nAuthorization: Bearer "+testTicket+"\nContent-Length: 2\n\n{}")
		c.Close()
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "rendezvous_relay_admissions_total" && len(f.Metric) > 2 {
			t.Errorf("%d series", len(f.Metric))
		}
	}
}
