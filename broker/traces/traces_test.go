package traces

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/trace"
)

func id(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012x", n) }

func event(n int, user string) trace.Event {
	return trace.Event{ActivityID: id(n), Step: trace.StepOrchestrate, Component: "broker/b", User: user, At: time.Unix(int64(n), 0)}
}

const fromBroker = "rdv.trace.broker"

func TestOwner(t *testing.T) {
	s := New()
	s.Hear("rdv.trace.agent.p.h", event(1, "mallory"))
	if _, ok := s.Get(id(1), "mallory"); ok {
		t.Fatal("an agent made an activity mallory's")
	}
	s.Hear(fromBroker, event(1, "alice"))
	s.Hear(fromBroker, event(1, "bob"))
	events, ok := s.Get(id(1), "alice")
	if !ok || len(events) != 3 {
		t.Fatalf("alice sees %v %v", events, ok)
	}
	for _, other := range []string{"bob", "mallory", ""} {
		if _, ok := s.Get(id(1), other); ok {
			t.Errorf("%q sees alice's activity", other)
		}
	}
	if s.MayAdd(id(1), "bob") || !s.MayAdd(id(1), "alice") || !s.MayAdd(id(2), "bob") {
		t.Error("who may add is wrong")
	}
}

func TestComponentsAreTheSenders(t *testing.T) {
	s := New()
	s.Hear(fromBroker, event(1, "alice"))
	for _, subject := range []string{"rdv.trace.agent.p.h", "rdv.trace.gateway.g", "rdv.trace.else", "rdv.trace.agent.p", "x"} {
		s.Hear(subject, event(1, ""))
	}
	relay := event(1, "")
	relay.Component = "relay/pod"
	s.Hear("rdv.trace.gateway.g", relay)
	var got []string
	events, _ := s.Get(id(1), "alice")
	for _, e := range events {
		got = append(got, e.Component)
	}
	if want := "broker/b agent/h gateway/g relay/pod"; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestBounds(t *testing.T) {
	s := New()
	s.Hear(fromBroker, event(0, "alice"))
	for n := range maxUnowned * 2 {
		s.Hear("rdv.trace.agent.p.h", event(1+n, ""))
	}
	if len(s.activities) != maxUnowned+1 {
		t.Errorf("%d activities kept, want %d", len(s.activities), maxUnowned+1)
	}
	if _, ok := s.Get(id(0), "alice"); !ok {
		t.Error("made-up activities pushed out alice's")
	}
	for n := range maxActivities {
		s.Hear(fromBroker, event(100000+n, "bob"))
	}
	if _, ok := s.Get(id(0), "alice"); ok {
		t.Error("the oldest was not forgotten")
	}
	for range maxEvents + 5 {
		e := event(100000, "bob")
		e.Detail = strings.Repeat("é", maxText)
		s.Hear(fromBroker, e)
	}
	events, _ := s.Get(id(100000), "bob")
	if len(events) != maxEvents || len(events[1].Detail) > maxText {
		t.Errorf("%d events, %d bytes", len(events), len(events[1].Detail))
	}
	for _, bad := range []trace.Event{{ActivityID: "x"}, {ActivityID: id(7), Step: 99}, {ActivityID: strings.ToUpper("AAAAAAAA" + id(7)[8:])}} {
		s.Hear(fromBroker, bad)
		if _, ok := s.activities[bad.ActivityID]; ok {
			t.Errorf("%+v was kept", bad)
		}
	}
}

func TestOrder(t *testing.T) {
	s := New()
	for _, at := range []int64{3, 1, 2} {
		e := event(1, "alice")
		e.At = time.Unix(at, 0)
		s.Hear(fromBroker, e)
	}
	events, _ := s.Get(id(1), "alice")
	for i, e := range events {
		if e.At.Unix() != int64(i+1) {
			t.Fatalf("event %d is of %v", i, e.At)
		}
	}
}

// A gateway has seen tickets that no broker has: it is believed on whose an activity is while no broker says otherwise.
func TestGatewaysWord(t *testing.T) {
	s := New()
	s.Hear("rdv.trace.gateway.g", event(1, "alice"))
	if _, ok := s.Get(id(1), "alice"); !ok {
		t.Error("alice doesn't find what the gateway refused")
	}
	s.Hear("rdv.trace.gateway.g", event(1, "mallory"))
	if _, ok := s.Get(id(1), "mallory"); ok || s.MayAdd(id(1), "mallory") {
		t.Error("the activity became another's")
	}
	s.Hear(fromBroker, event(1, "bob"))
	if _, ok := s.Get(id(1), "bob"); !ok {
		t.Error("a broker is not believed")
	}
	if _, ok := s.Get(id(1), "alice"); ok {
		t.Error("two owners")
	}
}

func TestList(t *testing.T) {
	s := New()
	refused := event(2, "")
	refused.Error, refused.Detail, refused.Step = "ticket-expired", "expired", trace.StepAdmit
	s.Hear(fromBroker, event(1, "alice"))
	s.Hear("rdv.trace.gateway.g", refused)
	refused.User = "alice"
	s.Hear("rdv.trace.gateway.g", refused)
	s.Hear(fromBroker, event(3, "bob"))
	stranger := event(4, "")
	stranger.Error, stranger.ClientAddr = "protocol-error", "192.0.2.7"
	s.Hear("rdv.trace.gateway.g", stranger)
	s.Hear("rdv.trace.agent.p.h", trace.Event{ActivityID: id(5), ClientAddr: "192.0.2.7", Error: "x", At: time.Unix(5, 0)})
	stranger.ActivityID = id(1)
	s.Hear("rdv.trace.gateway.g", stranger) // under an id that is alice's
	unknown := event(6, "")
	unknown.Error, unknown.ClientAddr, unknown.At = "protocol-error", trace.UnknownClient, time.Unix(0, 0)
	s.Hear("rdv.trace.gateway.g", unknown)
	show := func(list []trace.Summary) (got []string) {
		for _, a := range list {
			got = append(got, fmt.Sprint(a.At.Unix(), a.Error, a.Anonymous))
		}
		return got
	}
	for _, c := range []struct {
		user, addr string
		most       int
		want       string
	}{
		{"alice", "", 9, "[2ticket-expiredfalse 1false 0protocol-errortrue]"},
		{"alice", "192.0.2.7", 9, "[4protocol-errortrue 2ticket-expiredfalse 1false 0protocol-errortrue]"},
		{"alice", "192.0.2.7", 2, "[4protocol-errortrue 2ticket-expiredfalse]"},
		{"alice", "192.0.2.8", 1, "[2ticket-expiredfalse]"},
		{"bob", "", 9, "[3false 0protocol-errortrue]"},
		{"", "", 9, "[0protocol-errortrue]"},
	} {
		if got := fmt.Sprint(show(s.List(c.user, c.addr, c.most))); got != c.want {
			t.Errorf("%q at %q: %s, want %s", c.user, c.addr, got, c.want)
		}
	}
	for n := range 500 {
		e := event(1000+n, "")
		e.Error, e.ClientAddr = "protocol-error", trace.UnknownClient
		s.Hear("rdv.trace.gateway.g", e)
	}
	if got := s.List("alice", "", 50); len(got) != maxStrangers+2 || got[maxStrangers].Anonymous {
		t.Errorf("a flood of strangers leaves alice %d entries", len(got))
	}
}
