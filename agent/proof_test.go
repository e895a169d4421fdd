package agent

import (
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
)

// The brokers' word on a session is reported with it, and with the desktop that its user leaves, also where none can be
// seen (presence_test.go has those that can).
func TestProofIsReportedWithTheSession(t *testing.T) {
	now := time.Unix(1_900_000_000, 0)
	enter := func(l *ledger) {
		t.Helper()
		l.configure(bus.HostConfig{Generation: 1, MaxSessions: 2})
		l.setReady(true, "")
		if _, refused := l.reserve(bus.HostConnect{SessionID: "s1", User: "alice", Proof: "proof"}, "h1", now); refused != nil {
			t.Fatal(refused)
		}
	}
	check := func(l *ledger, what, state string, assumed bool) {
		t.Helper()
		s := l.Sessions()
		if len(s) != 1 || s[0].State != state || s[0].Assumed != assumed || s[0].User != "alice" || s[0].Proof != "proof" {
			t.Errorf("%s: got %+v", what, s)
		}
	}
	seen := newLedger()
	enter(seen)
	check(seen, "accepted", bus.SessionPending, false)
	seen.activate("s1", now)
	seen.observe(now, map[desktop]bool{{display: 10}: true})
	check(seen, "joined", bus.SessionActive, false)

	unseen := newLedger()
	enter(unseen)
	unseen.activate("s1", now)
	unseen.release("s1", now)
	check(unseen, "left, and no desktop can be seen", bus.SessionDisconnected, true)
}
