// Package placement decides which session hosts to ask for a user's session, and in which order. It is a pure function
// of what is declared and what hosts report: every broker that sees the same decides the same.
//
// A host's agent has the last word, against its own limit. So an answer is a list of candidates to ask one by one, and a
// snapshot that is a moment old costs a further question, never an overfull host.
package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Pool is what a pool rules.
type Pool struct {
	Name        string
	Personal    bool
	Automatic   bool // Personal: give a user without a host the first free one
	DepthFirst  bool // Pooled: fill one host after the other
	MaxSessions int32
}

// Host is one host, declared and live.
type Host struct {
	Name         string
	AssignedUser string
	Connected    bool
	Ready        bool   // the RDP server answers
	Message      string // why it doesn't
	Draining     bool
	DrainReason  string
	// Sessions that the host reports, Reserved those promised to it that it has not reported yet.
	Sessions []Session
	Reserved []Session
}

// Session is one session, or one on its way.
type Session struct {
	User         string
	Disconnected bool
}

// Candidate is one host to ask.
type Candidate struct {
	Host string
	// Resume says that the user has a session there, so that none is added.
	Resume bool
	// Assign says that the host must be given to the user first.
	Assign bool
}

// Why says why a host, or all hosts of a pool, can't take a session.
type Why struct {
	Pool    Pool
	Hosts   int // looked at
	reasons []reason
}

type reason struct {
	kind, detail string
}

// What keeps a host out, in the order in which they are told.
const (
	notConnected = "not connected"
	notReady     = "not ready"
	draining     = "draining"
	full         = "full"
	otherPersons = "assigned to other users"
	notAssigned  = "not assigned to anybody"
	nothing      = ""
)

var order = []string{notConnected, notReady, draining, full, otherPersons, notAssigned}

// String tells it to a person: `3 hosts: 1 not connected, 1 draining ("new image"), 1 full`.
func (w *Why) String() string {
	if w.Hosts == 0 {
		return "the pool has no hosts"
	}
	counts, details := map[string]int{}, map[string][]string{}
	for _, r := range w.reasons {
		counts[r.kind]++
		if r.detail != "" && !slices.Contains(details[r.kind], r.detail) {
			details[r.kind] = append(details[r.kind], r.detail)
		}
	}
	var parts []string
	for _, kind := range order {
		if counts[kind] == 0 {
			continue
		}
		part := fmt.Sprintf("%d %s", counts[kind], kind)
		if d := details[kind]; len(d) > 0 {
			slices.Sort(d)
			part += fmt.Sprintf(" (%s)", strings.Join(d[:min(len(d), 3)], "; "))
		}
		parts = append(parts, part)
	}
	noun := "hosts"
	if w.Hosts == 1 {
		noun = "host"
	}
	if len(parts) == 0 {
		return fmt.Sprintf("%d %s, none of them out of the question", w.Hosts, noun)
	}
	return fmt.Sprintf("%d %s: %s", w.Hosts, noun, strings.Join(parts, ", "))
}

// Place gives the hosts to ask for the user's session, best first, and why the others are not among them.
//
//  1. Where the user has a session already, a disconnected one before another: also on a draining or full host.
//  2. Personal: the user's own hosts; only where there are none, and under Automatic assignment, hosts of nobody.
//  3. Pooled: hosts with a free place; the emptiest first, or with DepthFirst the fullest first.
//  4. Hosts whose last places are promised but not taken: a promise may still come to nothing.
//
// Only connected hosts whose RDP server answers count, and in 2 to 4 only those that don't drain. Ties go by name.
func Place(pool Pool, hosts []Host, user string) ([]Candidate, *Why) {
	why := &Why{Pool: pool, Hosts: len(hosts)}
	owns := pool.Personal && slices.ContainsFunc(hosts, func(h Host) bool { return h.AssignedUser == user })
	var ranked []ranking
	for i := range hosts {
		r, out := rank(pool, &hosts[i], user, owns)
		if out.kind != nothing {
			why.reasons = append(why.reasons, out)
			continue
		}
		ranked = append(ranked, r)
	}
	slices.SortFunc(ranked, func(a, b ranking) int {
		return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(a.load, b.load), strings.Compare(a.Host, b.Host))
	})
	candidates := make([]Candidate, len(ranked))
	for i, r := range ranked {
		candidates[i] = r.Candidate
	}
	return candidates, why
}

// ranking is a candidate with what sorts it: classes first, then load.
type ranking struct {
	Candidate
	class, load int
}

// Classes of candidates, best first.
const (
	ownDisconnected = iota
	ownSession
	free
	promised
)

// rank says how good a host is for the user, or what keeps it out.
func rank(pool Pool, h *Host, user string, owns bool) (ranking, reason) {
	r := ranking{Candidate: Candidate{Host: h.Name}}
	if pool.Personal {
		switch {
		case h.AssignedUser == user:
		case h.AssignedUser != "":
			return r, reason{otherPersons, ""}
		case owns || !pool.Automatic:
			return r, reason{notAssigned, ""}
		default:
			r.Assign = true
		}
	}
	switch {
	case !h.Connected:
		return r, reason{notConnected, ""}
	case !h.Ready:
		return r, reason{notReady, h.Message}
	}
	if mine, disconnected := h.sessionOf(user); mine {
		r.Resume, r.class = true, ownSession
		if disconnected {
			r.class = ownDisconnected
		}
		return r, reason{}
	}
	if h.Draining {
		return r, reason{draining, h.DrainReason}
	}
	taken := len(h.Sessions) + len(h.Reserved)
	switch {
	case len(h.Sessions) >= int(pool.MaxSessions):
		return r, reason{full, ""}
	case taken >= int(pool.MaxSessions):
		r.class = promised
	default:
		r.class = free
	}
	r.load = taken
	if pool.DepthFirst && !pool.Personal && r.class == free {
		r.load = -taken
	}
	return r, reason{}
}

func (h *Host) sessionOf(user string) (mine, disconnected bool) {
	for _, list := range [][]Session{h.Sessions, h.Reserved} {
		for _, s := range list {
			if s.User == user {
				mine, disconnected = true, disconnected || s.Disconnected
			}
		}
	}
	return mine, disconnected
}
