package agent

import (
	"cmp"
	"context"
	"slices"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
)

const (
	// assumeFor is how long, where the RDP server's sessions can't be seen, a user is taken to have one after the
	// connection ended: clients that lost theirs try again for a few minutes, and should find their session.
	assumeFor = 5 * time.Minute
	// maxAssumed bounds those users; the latest count.
	maxAssumed = 64
	// settleFor is how long a desktop's client may seem connected after its connection ended here.
	settleFor = 5 * time.Second
	// missedLooks is how often a desktop must be missing to be gone: the server makes some of its sockets anew when a
	// client leaves.
	missedLooks = 2
)

// held is a desktop that the RDP server holds, and whose it is as far as this agent knows: the Rendezvous user of the
// connection that was joined when a client appeared on the desktop. Until there was one, it is the machine's own user.
type held struct {
	desktop
	user, resource, activity string
	proof                    string // of the connect that brought user here
	ours                     bool   // user is a Rendezvous user
	attached                 bool   // a client is connected, by the last look
	session                  string
	since                    time.Time
	ended                    time.Time // when session ended, while attached still says otherwise
	missed                   int
}

// ending is a connection that ended, and whose desktop isn't known.
type ending struct {
	bus.HostSession
	at time.Time
}

// observe takes in a look at the RDP server's sessions, and says whether that changes what is reported.
func (l *ledger) observe(now time.Time, attached map[desktop]bool) (changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.list()
	l.sighted = l.sighted || len(attached) > 0
	l.endings = slices.DeleteFunc(l.endings, func(e ending) bool { return now.Sub(e.at) > settleFor })
	var abandoned []*held
	for d, is := range attached {
		if l.desktops[d] == nil {
			l.desktops[d] = &held{desktop: d, user: osUser(d.uid), since: now}
			if !is {
				abandoned = append(abandoned, l.desktops[d])
			}
		}
	}
	if len(abandoned) == 1 {
		l.claim(abandoned[0]) // its user came and went between two looks
	}
	for d, h := range l.desktops {
		is, there := attached[d]
		if !there {
			if h.missed++; h.missed >= missedLooks {
				delete(l.desktops, d)
			}
			continue
		}
		h.missed = 0
		switch {
		case is && !h.attached:
			h.attached, h.ended, h.since = true, time.Time{}, now
		case !is && h.attached:
			l.detach(h, now)
		case is && !h.ended.IsZero() && now.Sub(h.ended) > settleFor:
			h.ended = time.Time{} // somebody else's client, then
		}
	}
	l.bind()
	for user, a := range l.assumed {
		if now.Sub(a.Since) > assumeFor {
			delete(l.assumed, user)
		}
	}
	return !slices.Equal(before, l.list())
}

// detach notes that a desktop's client has left. mu is held.
func (l *ledger) detach(h *held, now time.Time) {
	if h.session == "" && h.ended.IsZero() {
		l.claim(h)
	}
	if h.ended.IsZero() {
		h.since = now
	}
	h.attached, h.session, h.ended = false, "", time.Time{}
}

// claim gives a desktop that somebody has just left to the user who has just left, where there is only one. mu is held.
func (l *ledger) claim(h *held) {
	if len(l.endings) != 1 {
		return
	}
	e := l.endings[0]
	h.user, h.resource, h.activity, h.proof, h.ours = e.User, e.Resource, e.ActivityID, e.Proof, true
	l.endings = nil
	delete(l.assumed, e.User)
}

// bind finds which connection of ours is whose client on a desktop. Where two came at one time nothing is said until
// one of them is known. mu is held.
func (l *ledger) bind() {
	for {
		var clients []*carried
		for _, s := range l.sessions {
			if s.State == bus.SessionActive && s.desktop == nil {
				clients = append(clients, s)
			}
		}
		slices.SortFunc(clients, func(a, b *carried) int { return older(a.HostSession, b.HostSession) })
		var open []*held
		for _, h := range l.desktops {
			if h.attached && h.session == "" {
				open = append(open, h)
			}
		}
		slices.SortFunc(open, func(a, b *held) int { return cmp.Compare(a.display, b.display) })
		if !l.bindOne(clients, open) {
			return
		}
	}
}

func (l *ledger) bindOne(clients []*carried, open []*held) bool {
	for _, h := range open {
		// The user comes back to the desktop from before, be it from a connection that seems to live on.
		i := slices.IndexFunc(clients, func(s *carried) bool { return h.ours && s.User == h.user })
		if i < 0 && len(clients) == 1 && len(open) == 1 && h.ended.IsZero() {
			i = 0
		}
		if i < 0 {
			continue
		}
		s := clients[i]
		s.desktop = h
		h.session, h.user, h.resource, h.activity, h.ours, h.ended = s.SessionID, s.User, s.Resource, s.ActivityID, true, time.Time{}
		h.proof = s.Proof
		return true
	}
	return false
}

// left notes that a joined session's connection has ended. mu is held.
func (l *ledger) left(s *carried, now time.Time) {
	if h := s.desktop; h != nil {
		h.session, h.ended, h.since = "", now, now
		return
	}
	l.endings = append(l.endings, ending{s.HostSession, now})
	if !l.sighted {
		a := s.HostSession
		a.SessionID, a.State, a.Since, a.Assumed = "", bus.SessionDisconnected, now, true
		l.assumed[s.User] = a
		if len(l.assumed) > maxAssumed {
			oldest := a
			for _, o := range l.assumed {
				if older(o, oldest) < 0 {
					oldest = o
				}
			}
			delete(l.assumed, oldest.User)
		}
	}
}

// list is what this host reports: the connections that the agent carries; the desktops that have no client, or one that
// didn't come through here; and, where desktops can't be seen, users who may have left one. mu is held.
func (l *ledger) list() []bus.HostSession {
	var list []bus.HostSession
	// Connections whose desktop isn't known: each stands for one desktop of its user, or a client of nobody known.
	arriving, unknown := map[string]int{}, 0
	for _, s := range l.sessions {
		list = append(list, s.HostSession)
		if s.desktop == nil {
			arriving[s.User]++
			if s.State == bus.SessionActive {
				unknown++
			}
		}
	}
	var rest []*held
	for _, h := range l.desktops {
		if h.session == "" {
			rest = append(rest, h)
		}
	}
	slices.SortFunc(rest, func(a, b *held) int { return cmp.Compare(a.display, b.display) })
	for _, h := range rest {
		entry := bus.HostSession{ActivityID: h.activity, User: h.user, Resource: h.resource, State: bus.SessionDisconnected, Since: h.since, Proof: h.proof}
		if h.attached && h.ended.IsZero() {
			if unknown > 0 {
				unknown--
				continue
			}
			entry.State = bus.SessionActive
		} else if h.ours && arriving[h.user] > 0 {
			arriving[h.user]--
			continue
		} else if !h.ours {
			// Nobody could get back to it as its owner, so it must not keep its owner out.
			entry.Assumed = true
		}
		list = append(list, entry)
	}
	for user, a := range l.assumed {
		if !slices.ContainsFunc(list, func(s bus.HostSession) bool { return s.User == user }) {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, older)
	return list
}

func older(a, b bus.HostSession) int {
	return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.SessionID, b.SessionID), cmp.Compare(a.User, b.User))
}

// keepLooking looks at the RDP server's sessions, more often than anybody logs in.
func (a *Agent) keepLooking(ctx context.Context) {
	for {
		if a.ledger.observe(time.Now(), a.opts.desktops()) {
			signal(a.changed)
		}
		if sleep(ctx, a.opts.timing.look) != nil {
			return
		}
	}
}
