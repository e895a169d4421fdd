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
	nc, err := w.servers[1].Connect()
	if err != nil {
		t.Fatal(err)
	}
	late := New(Options{
		Namespace: ns, Workspace: ws, Name: "broker-late", Source: w.fake, Writer: w.fake, Conn: nc,
		TicketKey: func() (ed25519.PublicKey, error) { return w.key.Public().(ed25519.PublicKey), nil },
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
		answer bool
	}{
		{"never met", 0, 1, true},
		{"again", helloEvery, 1, false},
		{"started anew", helloEvery, 2, true},
		{"after a silence", estranged + helloEvery, 2, true},
	} {
		now = now.Add(step.after)
		if got := p.meet(helloMessage{Broker: "b", Boot: time.Unix(step.boot, 0)}, now); got != step.answer {
			t.Errorf("%s: answer=%t, want %t", step.what, got, step.answer)
		}
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
