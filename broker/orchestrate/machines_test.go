package orchestrate

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// An agent's connections on other brokers go once it has a newer one elsewhere.
func TestNewerConnectionAtAnotherBrokerWins(t *testing.T) {
	w := newWorld(t, 2)
	var mu sync.Mutex
	displaced := [2][]string{}
	for i, b := range w.brokers {
		b.o.Displace = func(id identity.ID, at time.Time) {
			mu.Lock()
			defer mu.Unlock()
			displaced[i] = append(displaced[i], id.Host)
			w.servers[i].DisplaceOlder(id, at)
		}
	}
	a := w.agent(0, "pool", "h1", 2)
	old := a.nc
	a.join(1)
	eventually(t, "the older connection is closed", old.IsClosed)
	if err := a.nc.Flush(); err != nil {
		t.Errorf("the newer was closed: %v", err)
	}
	time.Sleep(displaceAfter)
	mu.Lock()
	defer mu.Unlock()
	if got := fmt.Sprint(displaced[0]); got != "[h1]" {
		t.Errorf("displaced at the broker before: %s", got)
	}
	if err := a.nc.Flush(); err != nil {
		t.Errorf("the newer was closed later: %v", err)
	}
}

// Two lives of an agent that are heard by turns are two machines. A restart, and what comes late of the life before it, is
// not.
func TestSecondMachineIsSeen(t *testing.T) {
	now := time.Unix(1000, 0)
	r := newRegistry(func() time.Time { return now })
	k := hostKey{"p", "h"}
	sequence := uint64(0)
	for _, step := range []struct {
		what  string
		after time.Duration
		boot  string
		taken bool
		seen  bool
	}{
		{"the host", 0, "1", true, false},
		{"again", time.Minute, "1", true, false},
		{"restarted", time.Minute, "2", true, false},
		{"a late report", time.Second, "1", false, false},
		{"again", time.Minute, "2", true, false},
		{"restarted", time.Minute, "3", true, false},
		{"a life of long before", time.Minute, "1", true, true},
		{"and the other again", outlived - 1, "3", false, true},
	} {
		now = now.Add(step.after)
		sequence++
		if taken := r.report(k, bus.HostReport{Boot: step.boot, Sequence: sequence}); taken != step.taken {
			t.Errorf("%s: taken=%t", step.what, taken)
		}
		if seen := !r.hosts[k].second.IsZero(); seen != step.seen {
			t.Errorf("%s: a second machine is seen: %t", step.what, seen)
		}
	}
	for i := range 10 * maxBoots {
		now = now.Add(time.Minute)
		r.report(k, bus.HostReport{Boot: fmt.Sprint("boot ", i), Sequence: 1})
	}
	if n := len(r.hosts[k].oldBoots); n != maxBoots {
		t.Errorf("%d lives are remembered, want %d", n, maxBoots)
	}
	// What another broker tells of a life that is over is old news, and no second machine.
	r = newRegistry(func() time.Time { return now })
	r.report(k, bus.HostReport{Boot: "1", Sequence: 1})
	r.report(k, bus.HostReport{Boot: "2", Sequence: 1})
	now = now.Add(time.Hour)
	r.introduce(k, hostSeen{"b/1", bus.HostReport{Pool: "p", Host: "h", Boot: "1", Sequence: 9}})
	if h := r.hosts[k]; !h.second.IsZero() || h.report.Boot != "2" {
		t.Errorf("introduced by another broker: %+v", h)
	}
}

// The sight of a second machine is written, and not with every report.
func TestSecondMachineIsWritten(t *testing.T) {
	w := newWorld(t, 1)
	b := w.brokers[0]
	var mu sync.Mutex
	ahead := time.Duration(0)
	b.live.now = func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(ahead) }
	a := w.agent(0, "pool", "h1", 2)
	first := a.boot
	turn := func(boot string) {
		mu.Lock()
		ahead += outlived
		mu.Unlock()
		a.set(func() { a.boot = boot })
	}
	turn("another")
	turn(first)
	turn("another")
	var seen time.Time
	eventually(t, "it is written", func() bool {
		agent := w.fake.Snapshot().Hosts["h1"].Agent
		if agent == nil {
			return false
		}
		seen = agent.SecondMachine
		return !seen.IsZero()
	})
	turn(first)
	time.Sleep(3 * gather)
	if again := w.fake.Snapshot().Hosts["h1"].Agent.SecondMachine; !again.Equal(seen) {
		t.Errorf("it is written again after %v", again.Sub(seen))
	}
	if worthWriting(model.AgentStatus{SecondMachine: seen}, model.AgentStatus{SecondMachine: seen.UTC()}) {
		t.Error("the same moment is worth a write")
	}
}

func series(c prometheus.Collector) int {
	ch := make(chan prometheus.Metric, 1000)
	c.Collect(ch)
	return len(ch)
}

// What a host refuses with is one of the codes that there are, and a message of a few lines: it makes no metrics of its
// own and fills no memory.
func TestHostsRefusalsAreOfTheClosedSet(t *testing.T) {
	w := newWorld(t, 1)
	a := w.agent(0, "pool", "a", 2)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	long := strings.Repeat("x", 200<<10)
	for i := range 20 {
		a.set(func() { a.refuse = refusal.New(refusal.Code(fmt.Sprint("code-", i, long)), "%s", long+"\n") })
		reply := connectVia(t, gw, request(w.ticket(nil), nil))
		if reply.Err == nil || reply.Err.Code != refusal.HostRefused || len(reply.Err.Message) > 2*refusal.MaxMessage {
			t.Fatalf("got %.100v", reply.Err)
		}
	}
	m := w.brokers[0].o.Metrics
	if tries, connects := series(m.HostTries), series(m.Connects); tries > 2 || connects > 2 {
		t.Errorf("20 refusals made %d and %d series", tries, connects)
	}
}
