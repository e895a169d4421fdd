package orchestrate

import (
	"cmp"
	"crypto/ed25519"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"rendezvous.dev/rendezvous/broker/placement"
	"rendezvous.dev/rendezvous/broker/proof"
	"rendezvous.dev/rendezvous/wire/bus"
)

// What a host reports of its sessions counts in two ways. That a session is there is the host's own word: it takes one of
// the host's places. Whose it is, is the brokers' word: it stands in the proof that one of them gave the host when it sent
// the user there (broker/proof). A session without a proof for this host and user is nobody's.

const (
	// A host may show this many new proofs at once, and so many a second later: as many as sessions that begin, and far
	// more than need be. Those beyond are looked at with a later report.
	proofBurst, proofsPerSecond = 1100, 20
	// sentLately is for how long after a connect the brokers' word stands that its user was sent to the host, whatever the
	// SessionHost's assignment, which takes a moment to be seen everywhere.
	sentLately = time.Minute
)

// checked is what was found of a report's proofs. What a host shows again and again is looked at once, and who shows much
// fills no memory but that of the own last report.
type checked struct {
	key  ed25519.PublicKey        // with which they were checked
	good map[string]*proof.Claims // by their text, nil where one is not good
}

// proofSource says whose proofs are good here. Without a key none is.
type proofSource struct {
	namespace, workspace string
	key                  func() (ed25519.PublicKey, error)
}

// check looks at a report's proofs. It takes no lock meanwhile: a signature costs some 0.1 ms.
func (r *registry) check(k hostKey, sessions []bus.HostSession) checked {
	if r.proofs.key == nil || !slices.ContainsFunc(sessions, func(s bus.HostSession) bool { return s.Proof != "" }) {
		return checked{}
	}
	key, err := r.proofs.key()
	if err != nil {
		return checked{} // the connects say so
	}
	r.mu.Lock()
	h := r.host(k)
	if h.budget == nil {
		h.budget = rate.NewLimiter(proofsPerSecond, proofBurst)
	}
	known, budget := h.proofs, h.budget
	r.mu.Unlock()

	now, found := r.now(), checked{key, make(map[string]*proof.Claims, len(sessions))}
	if !key.Equal(known.key) {
		known.good = nil
	}
	for _, s := range sessions {
		if s.Proof == "" {
			continue
		}
		if _, twice := found.good[s.Proof]; twice {
			continue
		}
		c, before := known.good[s.Proof]
		switch {
		case before && c != nil && !now.Before(c.Expires):
			c = nil
		case before:
		case !budget.AllowN(now, 1):
			continue
		default:
			if claims, err := proof.Verify(s.Proof, key, r.proofs.namespace, r.proofs.workspace, now); err == nil && claims.Pool == k.pool && claims.Host == k.host {
				c = &claims
			}
		}
		found.good[s.Proof] = c
	}
	return found
}

// of gives the proof of a session on the SessionHost with this UID, nil where it has none that is good.
func (c checked) of(s *bus.HostSession, uid string) *proof.Claims {
	p := c.good[s.Proof]
	if p == nil || p.HostUID != uid || p.User != s.User || s.SessionID != "" && s.SessionID != p.SessionID {
		return nil
	}
	return p
}

// placementSessions gives the reported sessions as placement takes them. The registry's mu is held.
func (h *liveHost) placementSessions(uid string, now time.Time, spelling func(string) string) []placement.Session {
	if h.sessions != nil && h.madeFor == uid {
		return h.sessions
	}
	h.sessions, h.madeFor = make([]placement.Session, 0, len(h.report.Sessions)), uid
	for i := range h.report.Sessions {
		s := &h.report.Sessions[i]
		one := placement.Session{Disconnected: s.State == bus.SessionDisconnected, Assumed: s.Assumed}
		if p := h.proofs.of(s, uid); p != nil {
			one.User, one.Sent = spelling(p.User), now.Sub(p.IssuedAt) < sentLately
		}
		h.sessions = append(h.sessions, one)
	}
	return h.sessions
}

// checkedReport is the last report without what is the host's word alone: whose its sessions are, and where they come from,
// stands only where a proof says so.
func (h *liveHost) checkedReport() bus.HostReport {
	r := h.report
	r.Sessions = slices.Clone(r.Sessions)
	for i := range r.Sessions {
		s := &r.Sessions[i]
		told := anonymous(s)
		told.Gateway, told.Instance = s.Gateway, s.Instance
		if p := h.proofs.good[s.Proof]; p != nil && h.proofs.of(s, p.HostUID) == p {
			told.SessionID, told.ActivityID, told.Proof = s.SessionID, s.ActivityID, s.Proof
			told.User, told.Resource, told.Account = p.User, p.Resource, p.Account
			if s.Gateway != "" {
				told.Gateway, told.Instance = p.Gateway, p.Instance
			}
		}
		*s = told
	}
	return r
}

// LiveSession is a session that a host reports and whose user a broker sent there. All but State, Since and Connected are
// the brokers' own word, as it stands in the session's proof.
type LiveSession struct {
	proof.Claims
	// State and Since are the host's word: bus.SessionPending, Active or Disconnected, and since when.
	State string
	Since time.Time
	// Connected says that a gateway pod, Claims.Gateway and Claims.Instance, carries it now, as the session Claims.SessionID.
	// Otherwise it is a desktop that its user has left: the claims are of the connect that brought them there last.
	Connected bool
	// Proof is the text of it, by which the host knows the session too.
	Proof string
}

// LiveSessions gives the sessions with good proofs of all hosts that this broker hears, its own and others', by pool, host
// and session. Groups are shared: they must not be changed.
func (b *Orchestrator) LiveSessions() []LiveSession {
	snap := b.o.Source.Snapshot()
	return b.live.liveSessions(func(k hostKey) (uid string, timeout time.Duration, ok bool) {
		pool, host := declared(snap, k)
		if host == nil {
			return "", 0, false
		}
		return host.UID, pool.HeartbeatTimeout, true
	})
}

func (r *registry) liveSessions(declared func(hostKey) (uid string, timeout time.Duration, ok bool)) (all []LiveSession) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, h := range r.hosts {
		uid, timeout, ok := declared(k)
		if !ok || !r.connected(h, timeout) {
			continue
		}
		seen := map[string]bool{} // a session that is listed twice is one
		for i := range h.report.Sessions {
			s := &h.report.Sessions[i]
			p := h.proofs.of(s, uid)
			if p == nil || seen[p.SessionID] {
				continue
			}
			seen[p.SessionID] = true
			all = append(all, LiveSession{
				Claims: *p, Proof: s.Proof, State: s.State, Since: s.Since, Connected: s.SessionID != "" && s.State != bus.SessionDisconnected,
			})
		}
	}
	slices.SortFunc(all, func(a, b LiveSession) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), cmp.Compare(a.Host, b.Host), cmp.Compare(a.SessionID, b.SessionID))
	})
	return all
}

// prove makes the proof that goes to a host with a connect.
func (c *connect) prove(host string) (string, error) {
	key, err := c.b.o.ProofKey()
	if err != nil {
		return "", err
	}
	declared := c.b.o.Source.Snapshot().Hosts[host]
	if declared == nil {
		return "", errHostGone
	}
	now, account := c.b.o.Now(), ""
	if c.account != nil {
		account = c.account.Name
	}
	return proof.Sign(proof.Claims{
		Namespace: c.b.o.Namespace, Workspace: c.b.o.Workspace, Pool: c.pool.Name, Host: host, HostUID: declared.UID,
		User: c.claims.User, Resource: c.resource.Name, Groups: c.claims.Groups, TicketID: c.claims.ID, SessionID: c.req.SessionID,
		ActivityID: c.req.ActivityID, SignedIn: c.claims.Since(),
		Gateway: c.req.Gateway, Instance: c.req.Instance, Account: account, Client: c.req.ClientAddr, IssuedAt: now, Expires: now.Add(proof.Lifetime),
	}, key)
}
