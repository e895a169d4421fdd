package agent

import (
	"context"
	"net"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// ledger is this host's own word on whether one session more fits. It is the point of serialisation: whatever two
// brokers believe at one time, here a place is given once.
type ledger struct {
	mu         sync.Mutex
	configured bool
	config     bus.HostConfig
	ready      bool
	notReady   string // why not
	stopping   bool
	sessions   map[string]*carried // by session id
	idle       chan struct{}       // closed while there is no session

	desktops map[desktop]*held
	assumed  map[string]bus.HostSession // by user
	// owner says whose account a user id is; nil where the RDP server asks for credentials itself. Set once, before use.
	owner func(uid uint32) (account string, rec login.Record, ok bool)
}

// carried is one session that this agent joins to a gateway.
type carried struct {
	bus.HostSession
	conns    []net.Conn // closed to end the session
	ended    bool
	uid      string // of the account that it has logged in to; empty before, and where it doesn't log in by its connection
	replaces string // the session whose place it takes when it is joined: the same user's
}

func newLedger() *ledger {
	idle := make(chan struct{})
	close(idle)
	return &ledger{
		sessions: map[string]*carried{}, notReady: "the agent has only just started", idle: idle,
		desktops: map[desktop]*held{}, assumed: map[string]bus.HostSession{},
	}
}

// configure takes the brokers' word on limit and drain. The last word counts, not the highest generation: a host that
// was deleted and made again begins at 1, and brokers repeat themselves where a report shows another generation.
func (l *ledger) configure(c bus.HostConfig) (changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	changed = !l.configured || l.config != c
	l.configured, l.config = true, c
	return changed
}

// setReady takes the probe's word.
func (l *ledger) setReady(ready bool, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ready, l.notReady = ready, why
}

// stop refuses every session from now on.
func (l *ledger) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopping = true
}

// reserve gives req a place, or refuses. A session id that has a place already keeps it; fresh is false then. Who has a
// desktop here gets back to it also while the host is full or drains; who still seems connected, as after a gateway was
// lost, takes the place of that connection.
func (l *ledger) reserve(req bus.HostConnect, host string, now time.Time) (fresh bool, refused *refusal.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.sessions[req.SessionID]; ok {
		return false, nil
	}
	taken, desktop, assumed := l.taken(req.User)
	replaces := ""
	full := taken >= int(l.config.MaxSessions)
	if !desktop && (full || l.config.Draining) {
		replaces = l.replaceable(req.User)
	}
	back := desktop || replaces != ""
	switch {
	case req.Account == nil && l.owner != nil:
		refused = refusal.New(refusal.HostNotReady, "Session host %s logs people in by their connection, but its HostPool does not say into which accounts. Set spec.accounts of the HostPool, or start the agent without --login-dir.", host)
	case req.Account != nil && l.owner == nil:
		refused = refusal.New(refusal.HostNotReady, "Session host %s is not set up to log people in by their connection, which its HostPool asks for (spec.accounts). Run `agent service install` there again, or start the agent with --login-dir.", host)
	case l.stopping:
		refused = refusal.New(refusal.HostDraining, "Session host %s is stopping. Connect again: another host will serve you.", host)
	case !l.configured:
		refused = refusal.New(refusal.HostNotReady, "Session host %s has not been told its limits yet. Connect again in a few seconds.", host)
	case l.config.Draining && !back && !assumed && l.config.DrainReason != "":
		refused = refusal.New(refusal.HostDraining, "Session host %s takes no new session: %s.", host, l.config.DrainReason)
	case l.config.Draining && !back && !assumed:
		refused = refusal.New(refusal.HostDraining, "Session host %s takes no new session: it is being drained.", host)
	case !l.ready:
		refused = refusal.New(refusal.HostNotReady, "The RDP server on session host %s is not ready: %s. Connect again in a moment; if it stays so, look at that host.", host, l.notReady)
	case full && !back:
		refused = refusal.New(refusal.HostFull, "Session host %s carries %d of at most %d sessions. Try again later, or ask for more hosts in its pool.", host, taken, l.config.MaxSessions)
	}
	if refused != nil {
		return false, refused.With(req.ActivityID)
	}
	if len(l.sessions) == 0 {
		l.idle = make(chan struct{})
	}
	l.sessions[req.SessionID] = &carried{replaces: replaces, HostSession: bus.HostSession{
		SessionID: req.SessionID, ActivityID: req.ActivityID, User: req.User, Resource: req.Resource,
		State: bus.SessionPending, Since: now, Gateway: req.Gateway, Instance: req.Instance, Proof: req.Proof,
	}}
	return true, nil
}

// taken counts the places that are taken, and says whether the user has a desktop without a client, or may have one. mu
// is held.
func (l *ledger) taken(user string) (places int, desktop, assumed bool) {
	for _, s := range l.list() {
		switch {
		case s.User == user && s.Assumed:
			assumed = true
		case s.User == user && s.State == bus.SessionDisconnected:
			desktop = true
		}
		if !s.Assumed {
			places++
		}
	}
	for _, s := range l.sessions {
		if s.replaces != "" && l.sessions[s.replaces] != nil {
			places-- // it shares that one's place
		}
	}
	return places, desktop, assumed
}

// replaceable finds the user's oldest joined session that no other is about to replace. mu is held.
func (l *ledger) replaceable(user string) string {
	var oldest *carried
	for _, s := range l.sessions {
		if s.User != user || s.State != bus.SessionActive || l.replacing(s.SessionID) {
			continue
		}
		if oldest == nil || older(s.HostSession, oldest.HostSession) < 0 {
			oldest = s
		}
	}
	if oldest == nil {
		return ""
	}
	return oldest.SessionID
}

func (l *ledger) replacing(id string) bool {
	for _, s := range l.sessions {
		if s.replaces == id {
			return true
		}
	}
	return false
}

// activate says that a session's legs are joined. The connections are closed where the session has to end; false
// says that it has ended already.
func (l *ledger) activate(id string, now time.Time, conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.sessions[id]
	if !ok || s.ended {
		return false
	}
	s.State, s.Since, s.conns = bus.SessionActive, now, conns
	delete(l.assumed, s.User)
	if old := l.sessions[s.replaces]; old != nil {
		old.end()
	}
	return true
}

// release gives a session's place back.
func (l *ledger) release(id string, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.sessions[id]
	if !ok {
		return
	}
	delete(l.sessions, id)
	if s.State == bus.SessionActive {
		l.left(s, now)
	}
	if len(l.sessions) == 0 {
		close(l.idle)
	}
}

// endAll closes every session's connections. Those still pending end when they would be joined.
func (l *ledger) endAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.sessions {
		s.end()
	}
}

func (s *carried) end() {
	s.ended = true
	for _, c := range s.conns {
		c.Close()
	}
}

// wait returns when there is no session, or with ctx's error.
func (l *ledger) wait(ctx context.Context) error {
	l.mu.Lock()
	idle := l.idle
	l.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.sessions)
}

// Sessions lists what this host reports, oldest first.
func (l *ledger) Sessions() []bus.HostSession {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.list()
}

// inForce is the configuration and whether the agent is stopping.
func (l *ledger) inForce() (config bus.HostConfig, stopping bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.config, l.stopping
}
