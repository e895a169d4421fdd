package agent

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"time"

	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/bus"
)

const (
	// assumeFor is how long, where a session did not log in by its connection, its user is taken to have left a desktop
	// after the connection ended: clients that lost theirs try again for a few minutes, and should find their session.
	assumeFor = 5 * time.Minute
	// maxAssumed bounds those users; the latest count.
	maxAssumed = 64
	// missedLooks is how often a desktop must be missing to be gone: the server makes some of its sockets anew when a
	// client leaves.
	missedLooks = 2
)

// held is a desktop that the RDP server holds. Whose it is follows from its account.
type held struct {
	desktop
	attached bool // a client is connected, by the last look
	since    time.Time
	missed   int
}

// observe takes in a look at the RDP server's sessions, and says whether that changes what is reported.
func (l *ledger) observe(now time.Time, attached map[desktop]bool) (changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.list()
	for d, is := range attached {
		if l.desktops[d] == nil {
			l.desktops[d] = &held{desktop: d, attached: is, since: now}
		}
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
		if is != h.attached {
			h.attached, h.since = is, now
		}
	}
	for user, a := range l.assumed {
		if now.Sub(a.Since) > assumeFor {
			delete(l.assumed, user)
		}
	}
	return !slices.Equal(before, l.list())
}

// loggedIn notes in which account a session runs from now on.
func (l *ledger) loggedIn(id string, account string, uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.sessions[id]; s != nil {
		s.Account, s.uid = account, strconv.FormatUint(uint64(uid), 10)
	}
}

// left notes that a joined session's connection has ended. mu is held.
func (l *ledger) left(s *carried, now time.Time) {
	if s.uid != "" {
		for _, h := range l.desktops {
			if h.uid == s.uid {
				h.since = now
			}
		}
		return
	}
	if l.owner != nil { // nobody logged in, so nothing was left behind
		return
	}
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

// ownerOf says whose account a desktop runs in, as far as this host knows from logins.
func (l *ledger) ownerOf(d desktop) (account string, rec login.Record, ok bool) {
	uid, err := strconv.ParseUint(d.uid, 10, 32)
	if err != nil || l.owner == nil {
		return "", login.Record{}, false
	}
	return l.owner(uint32(uid))
}

// list is what this host reports: the connections that the agent carries; the desktops that none of those leads to; and,
// where sessions don't log in by their connections, users who may have left one. mu is held.
func (l *ledger) list() []bus.HostSession {
	var list []bus.HostSession
	// Connections that have not logged in: each stands for a desktop of its user, or a client of nobody known.
	arriving, unknown := map[string]int{}, 0
	led := map[string]bool{} // user ids whose desktops a connection leads to
	for _, s := range l.sessions {
		list = append(list, s.HostSession)
		switch {
		case s.uid != "":
			led[s.uid] = true
			continue
		case s.State == bus.SessionActive:
			unknown++
		}
		arriving[s.User]++
	}
	var rest []*held
	for _, h := range l.desktops {
		if !led[h.uid] {
			rest = append(rest, h)
		}
	}
	slices.SortFunc(rest, func(a, b *held) int { return cmp.Compare(a.display, b.display) })
	for _, h := range rest {
		account, rec, known := l.ownerOf(h.desktop)
		entry := bus.HostSession{State: bus.SessionDisconnected, Since: h.since}
		switch {
		case known && arriving[rec.Person] > 0:
			arriving[rec.Person]--
			continue
		case known: // whoever seems to be connected is about to be gone: all who log in come through here
			entry.User, entry.Account, entry.Resource, entry.ActivityID, entry.Proof = rec.Person, account, rec.Resource, rec.Activity, rec.Proof
		case h.attached && unknown > 0:
			unknown--
			continue
		case h.attached:
			entry.User, entry.State = osUser(h.uid), bus.SessionActive
		default:
			// Nobody could get back to it as its owner, so it must not keep its owner out.
			entry.User, entry.Assumed = osUser(h.uid), true
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
