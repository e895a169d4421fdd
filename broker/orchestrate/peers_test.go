package orchestrate

import (
	"context"
	"crypto/ed25519"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
)

// A broker that comes later knows the others' hosts without a word from those.
func TestBrokersThatMeetIntroduceTheirHosts(t *testing.T) {
	w := newWorld(t, 2)
	w.agent(0, "pool", "h1", 2)
	eventually(t, "the broker knows that the agent is its own", func() bool { _, local, _ := w.brokers[0].Counts(); return local == 1 })
	nc, err := w.servers[1].Connect()
	if err != nil {
		t.Fatal(err)
	}
	late := New(Options{
		Namespace: ns, Workspace: ws, Name: "broker-late", Source: w.fake, Writer: w.fake, Conn: nc,
		TicketKey: func() (ed25519.PublicKey, error) { return w.key.Public().(ed25519.PublicKey), nil },
		ProofKey:  func() (ed25519.PrivateKey, error) { return w.key, nil },
	})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); late.Wait() })
	if err := late.Start(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the late broker knows the host, which has not said a word since", func() bool {
		hosts, local, _ := late.Counts()
		return hosts == 1 && local == 0
	})
}

func TestMeet(t *testing.T) {
	now := time.Unix(1000, 0)
	p := peers{met: map[string]peer{}}
	for _, step := range []struct {
		what   string
		after  time.Duration
		boot   int64
		lost   int
		answer bool
	}{
		{"never met", 0, 1, 0, true},
		{"again", helloEvery, 1, 0, false},
		{"started anew", helloEvery, 2, 0, true},
		{"after a silence", estranged + helloEvery, 2, 1, true},
		{"again after that", helloEvery, 2, 0, false},
	} {
		now = now.Add(step.after)
		if lost := p.lost(now); len(lost) != step.lost {
			t.Errorf("%s: lost %q, want %d", step.what, lost, step.lost)
		}
		if got := p.meet(helloMessage{Broker: "b", Boot: time.Unix(step.boot, 0)}, now); got != step.answer {
			t.Errorf("%s: answer=%t, want %t", step.what, got, step.answer)
		}
	}
}

// Hosts on a broker that is gone are on their way to another: they are not asked, and are waited for.
func TestWithout(t *testing.T) {
	now := time.Unix(1000, 0)
	r := newRegistry(func() time.Time { return now })
	on := func(host, conn string) hostKey {
		k := hostKey{"p", host}
		r.presence(k, conn, false, true)
		r.report(k, bus.HostReport{Boot: "1", Sequence: 1, ConfigGeneration: 1})
		return k
	}
	stays, goes := on("stays", "b-1/7"), on("goes", "b/7")
	now = now.Add(returning - time.Second) // the last report is old news by now
	r.without("b")
	for _, want := range []struct {
		k                    hostKey
		connected, mayReturn bool
	}{{stays, true, false}, {goes, false, true}} {
		_, connected := r.live(want.k, time.Minute)
		if mayReturn := r.mayReturn(want.k, false); connected != want.connected || mayReturn != want.mayReturn {
			t.Errorf("%s: connected=%t mayReturn=%t", want.k.host, connected, mayReturn)
		}
	}
	now = now.Add(2 * time.Second)
	if !r.mayReturn(goes, false) {
		t.Error("it is given up two seconds after its broker went")
	}
	if sequence := r.missed(stays); sequence != 1 {
		t.Errorf("missed after report %d, want 1", sequence)
	}
	if _, connected := r.live(stays, time.Minute); connected || !r.mayReturn(stays, false) {
		t.Error("a host that nobody answers for still counts as connected, or is not waited for")
	}
	r.report(stays, bus.HostReport{Boot: "1", Sequence: 2, ConfigGeneration: 1})
	if h, connected := r.live(stays, time.Minute); !connected || h.conn != "b-1/7" {
		t.Errorf("a host that is heard again: connected=%t by %q", connected, h.conn)
	}
}

func TestIntroduce(t *testing.T) {
	now := time.Unix(1000, 0)
	r := newRegistry(func() time.Time { return now })
	k := hostKey{"p", "h"}
	seen := func(conn string, sequence uint64) hostSeen {
		return hostSeen{conn, bus.HostReport{Pool: "p", Host: "h", Boot: "1", Sequence: sequence}}
	}
	state := func() (string, uint64, bool) {
		h, _ := r.live(k, time.Hour)
		return h.conn, h.report.Sequence, h.gone
	}
	r.introduce(k, seen("a/1", 5))
	if conn, sequence, gone := state(); conn != "a/1" || sequence != 5 || gone {
		t.Errorf("a stranger: %s %d gone=%t", conn, sequence, gone)
	}
	r.presence(k, "b/1", true, true) // it moves here
	r.introduce(k, seen("a/1", 4))
	if conn, sequence, gone := state(); conn != "b/1" || sequence != 5 || gone {
		t.Errorf("old news of one that is here: %s %d gone=%t", conn, sequence, gone)
	}
	r.presence(k, "b/1", true, false)
	r.introduce(k, seen("b/1", 6))
	if conn, _, gone := state(); conn != "" || !gone {
		t.Errorf("word of one that has just left: %s gone=%t", conn, gone)
	}
	now = now.Add(2 * overtaken)
	r.introduce(k, seen("c/1", 7))
	if conn, sequence, gone := state(); conn != "c/1" || sequence != 7 || gone {
		t.Errorf("one that turned up elsewhere: %s %d gone=%t", conn, sequence, gone)
	}
}
