package agent

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
)

// agentsOnBus gives the connections of this host's agent, the oldest first.
func (w *world) agentsOnBus() []uint64 {
	w.t.Helper()
	z, err := w.nats.Connz(&server.ConnzOptions{Sort: server.ByCid})
	must(w.t, err)
	var ids []uint64
	for _, c := range z.Conns {
		if c.Name == "agent "+pool+"/"+host {
			ids = append(ids, c.Cid)
		}
	}
	return ids
}

// An agent that is told that another machine took its place lets some time go by before it comes back. Word of a
// connection that isn't its own is none to it.
func TestDisplacedAgentWaits(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	o.timing.displaced = time.Second
	w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	conn := w.agentsOnBus()[0]
	for _, c := range []struct {
		what  string
		told  bus.HostDisplaced
		waits bool
	}{
		{"another broker's connection", bus.HostDisplaced{Broker: "another", Conn: conn}, false},
		{"another connection", bus.HostDisplaced{Broker: w.nats.Name(), Conn: conn + 100}, false},
		{"its own", bus.HostDisplaced{Broker: w.nats.Name()}, true},
	} {
		w.mu.Lock()
		reports := len(w.reports)
		w.mu.Unlock()
		w.configure(bus.HostConfig{Generation: int64(reports), MaxSessions: 1})
		w.eventually(c.what+": it hears and reports", func() bool { return len(w.reports) > reports })
		conn := w.agentsOnBus()[0]
		if c.waits {
			c.told.Conn = conn
		}
		data, _ := json.Marshal(c.told)
		must(t, w.conn.Publish(bus.HostDisplacedSubject(pool, host), data))
		must(t, w.conn.Flush())
		time.Sleep(100 * time.Millisecond)
		must(t, w.nats.DisconnectClientByID(conn))
		began := time.Now()
		w.eventually(c.what+": it is back", func() bool { ids := w.agentsOnBus(); return len(ids) == 1 && ids[0] != conn })
		if waited := time.Since(began) >= o.timing.displaced; waited != c.waits {
			t.Errorf("%s: back after %v", c.what, time.Since(began))
		}
	}
}

// A renewed key that the brokers don't take, as where one of an older release signed it and recorded nothing, does not lock
// the machine out.
func TestRenewedKeyIsRefused(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	o.timing.unrenewed = 200 * time.Millisecond
	var keys []string // as they came, each once
	w.admit = func(c *x509.Certificate) bool {
		key := identity.KeyFingerprint(c.RawSubjectPublicKeyInfo)
		if !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
		return slices.Index(keys, key) != 1 // the first renewal's
	}
	a, err := New(o)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	first := w.agentsOnBus()[0]
	a.RenewNow()
	w.eventually("the renewed key is refused", func() bool { return len(keys) == 2 })
	must(t, w.nats.DisconnectClientByID(first)) // the channel of the key before is lost, too
	w.eventually("the machine is back, and renews again", func() bool { return w.renewals == 2 && len(keys) == 3 && len(w.busAgents) >= 3 })
	w.eventually("it reports", func() bool { return w.last().RDPReady })
	if len(w.enrolled) != 1 {
		t.Errorf("%d enrolments, want 1", len(w.enrolled))
	}
}

// A machine whose key is out enrols again once it is given another token, and not with the one that it came with.
func TestRefusedKeyEnrolsWithAnotherToken(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	w.mu.Lock()
	out := w.busAgents[0]
	refused := 0
	w.admit = func(c *x509.Certificate) bool {
		if c.SerialNumber.String() == out {
			refused++
			return false
		}
		return true
	}
	w.mu.Unlock()
	must(t, w.nats.DisconnectClientByID(w.agentsOnBus()[0]))
	w.eventually("it is refused more than once", func() bool { return refused > 2 })
	w.mu.Lock()
	if len(w.enrolled) != 1 {
		t.Errorf("%d enrolments with the token of before", len(w.enrolled))
	}
	w.mu.Unlock()
	must(t, os.WriteFile(w.token, []byte("rdvreg.demo.linux.linux-1.another"), 0o600))
	w.eventually("it is back with another key", func() bool {
		return len(w.enrolled) == 2 && w.enrolled[1].Token == "rdvreg.demo.linux.linux-1.another" && len(w.agentsOnBus()) == 1
	})
}

// A machine whose enrolment got no answer asks again with the same key, by which the broker knows it.
func TestEnrolmentKeepsItsKey(t *testing.T) {
	w := newWorld(t)
	w.lose = true
	w.run(w.options())
	w.eventually("it has asked twice", func() bool { return len(w.enrolled) >= 2 })
	w.mu.Lock()
	w.lose = false
	w.mu.Unlock()
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, again := range w.enrolled[1:] {
		if !bytes.Equal(parseCSR(t, w.enrolled[0].ClientCSR).RawSubjectPublicKeyInfo, parseCSR(t, again.ClientCSR).RawSubjectPublicKeyInfo) {
			t.Error("it has asked with another key")
		}
	}
}

// An agent serves at brokers of a release before this one, which don't let it hear of displacements.
func TestAgentAtOlderBrokers(t *testing.T) {
	w := newWorld(t)
	w.older = true
	w.run(w.options())
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	if n := len(w.agentsOnBus()); n != 1 {
		t.Errorf("%d connections", n)
	}
}
