package orchestrate

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/proof"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// obey has an agent do what brokers say to sessions, and gives what it was told.
func (a *agent) obey(reply func(bus.SessionAct) bus.SessionActReply) (told func() []bus.SessionAct) {
	a.w.t.Helper()
	var mu sync.Mutex
	var all []bus.SessionAct
	if _, err := a.nc.Subscribe(bus.HostSessionSubject(a.pool, a.name), func(m *nats.Msg) {
		var act bus.SessionAct
		json.Unmarshal(m.Data, &act)
		mu.Lock()
		all = append(all, act)
		mu.Unlock()
		data, _ := json.Marshal(reply(act))
		m.Respond(data)
	}); err != nil {
		a.w.t.Fatal(err)
	}
	a.nc.Flush()
	return func() []bus.SessionAct {
		mu.Lock()
		defer mu.Unlock()
		return append([]bus.SessionAct(nil), all...)
	}
}

// Sessions with good proofs are listed with their users, at every broker; what a host merely claims is a session of nobody
// known, and nothing of the claim is shown.
func TestSessionsAreListed(t *testing.T) {
	w := newWorld(t, 2)
	a := w.agent(0, "pool", "a", 5)
	good := w.proof("pool", "a", "alice", func(c *proof.Claims) {
		c.SessionID, c.Account, c.Client, c.ActivityID = "s-alice", "alice", "192.0.2.7:1234", activity
	})
	since := time.Now().Truncate(time.Second)
	a.set(func() {
		a.sessions = []bus.HostSession{
			{SessionID: "s-alice", User: "alice", State: bus.SessionActive, Since: since, Proof: good, Gateway: "lies", Account: "root"},
			{SessionID: "s-bob", User: "bob", Resource: "desk", State: "<b>", Since: since, ActivityID: activity},
			{User: "carol", State: bus.SessionDisconnected, Assumed: true},
		}
	})
	for i, b := range w.brokers {
		var all []brokerapi.Session
		eventually(t, "both sessions", func() bool { all = b.Sessions(); return len(all) == 2 })
		got := all[0]
		if got.ID != "s-alice" || got.User != "alice" || got.Account != "alice" || got.Client != "192.0.2.7:1234" || got.Gateway != "gw" || !got.Proven ||
			got.Pool != "pool" || got.Host != "a" || got.State != bus.SessionActive || !got.Since.Equal(since) || got.ActivityID != activity || got.Resource != "desk" {
			t.Errorf("broker %d: %+v", i, got)
		}
		if got := all[1]; got.Proven || got.User != "" || got.Resource != "" || got.ActivityID != "" || got.State != "Unknown" || !strings.HasPrefix(got.ID, "unknown-") {
			t.Errorf("broker %d shows a claim: %+v", i, got)
		}
	}
}

// An act at one broker reaches the agent at another, is answered, and shows in the activity. A user acts on own sessions
// alone, and learns nothing of others'.
func TestActs(t *testing.T) {
	w := newWorld(t, 2)
	a := w.agent(0, "pool", "a", 5)
	other := w.agent(0, "pool", "b", 5)
	raw := w.proof("pool", "a", "alice", func(c *proof.Claims) { c.SessionID, c.ActivityID = "s1", activity })
	a.set(func() {
		a.sessions = []bus.HostSession{
			{SessionID: "s1", User: "alice", State: bus.SessionActive, Proof: raw, Gateway: "gw", Instance: "10-0-0-1"},
			{SessionID: "s2", User: "alice", State: bus.SessionActive},
		}
	})
	b := w.brokers[1]
	eventually(t, "the session", func() bool { return len(b.LiveSessions()) == 1 })
	if _, err := b.Act(t.Context(), brokerapi.ActRequest{SessionID: "s1", Act: bus.ActEnd, By: "admin"}, ""); refusal.From(err) == nil || refusal.From(err).Code != refusal.HostTimeout {
		t.Errorf("an agent that knows no acts: %v", err)
	}
	answer := bus.SessionActReply{Detail: "logged off"}
	told := a.obey(func(act bus.SessionAct) bus.SessionActReply {
		if act.Text == "fail" {
			return bus.SessionActReply{Err: refusal.New("no-such-code", "no\x1b window")}
		}
		return answer
	})
	toldOther := other.obey(func(bus.SessionAct) bus.SessionActReply { return answer })
	gw := w.dial(1, identity.Gateway(ns, ws, "gw"))
	ends := make(chan bus.EndSession, 10)
	if _, err := gw.Subscribe(bus.GatewayEndSubject("gw", "10-0-0-1"), func(m *nats.Msg) {
		var e bus.EndSession
		json.Unmarshal(m.Data, &e)
		ends <- e
	}); err != nil {
		t.Fatal(err)
	}
	gw.Flush()
	eventually(t, "the agent's subscription", func() bool {
		detail, err := b.Act(t.Context(), brokerapi.ActRequest{SessionID: "s1", Act: bus.ActEnd, By: "admin (Kubernetes)"}, "")
		return err == nil && detail == "logged off"
	})
	if got := told()[0]; got.SessionID != "s1" || got.Proof != raw || got.Act != bus.ActEnd || got.By != "admin (Kubernetes)" || got.ActivityID != activity {
		t.Errorf("the agent was told %+v", got)
	}
	before := len(told())
	for name, c := range map[string]struct {
		req  brokerapi.ActRequest
		user string
		code refusal.Code
	}{
		"another's session": {brokerapi.ActRequest{SessionID: "s1", Act: bus.ActEnd}, "bob", refusal.UnknownSession},
		"no such session":   {brokerapi.ActRequest{SessionID: "s9", Act: bus.ActEnd}, "", refusal.UnknownSession},
		"not proven":        {brokerapi.ActRequest{SessionID: "s2", Act: bus.ActEnd}, "", refusal.UnknownSession},
		"no id":             {brokerapi.ActRequest{Act: bus.ActEnd}, "", refusal.UnknownSession},
		"unknown act":       {brokerapi.ActRequest{SessionID: "s1", Act: "explode"}, "", refusal.BadRequest},
		"message, no text":  {brokerapi.ActRequest{SessionID: "s1", Act: bus.ActMessage}, "", refusal.BadRequest},
	} {
		if _, err := b.Act(t.Context(), c.req, c.user); refusal.From(err) == nil || refusal.From(err).Code != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	if n := len(told()); n != before {
		t.Errorf("the agent was told of %d refused acts", n-before)
	}
	if _, err := b.Act(t.Context(), brokerapi.ActRequest{SessionID: "s1", Act: bus.ActMessage, Text: "fail"}, "alice"); refusal.From(err).Code != refusal.HostRefused || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("the host's refusal: %v", err)
	}
	if _, err := b.Act(t.Context(), brokerapi.ActRequest{SessionID: "s1", Act: bus.ActDisconnect, By: "alice"}, "alice"); err != nil {
		t.Error(err)
	}
	select {
	case e := <-ends:
		if e.SessionID != "s1" || !strings.Contains(e.Reason, "Disconnected by alice") {
			t.Errorf("the gateway was told %+v", e)
		}
	case <-time.After(patience):
		t.Error("the gateway was not told of the disconnect")
	}
	if n := len(toldOther()); n > 0 {
		t.Errorf("another host was told %d times", n)
	}
	eventually(t, "the acts in alice's activity", func() bool {
		events, _ := w.traces.Get(activity, "alice")
		ended, disconnected := false, false
		for _, e := range events {
			ended = ended || strings.Contains(e.Detail, "end by admin (Kubernetes): logged off")
			disconnected = disconnected || strings.Contains(e.Detail, "disconnect by alice")
		}
		return ended && disconnected
	})
}
