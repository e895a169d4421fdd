// Package placement decides which session hosts to ask for a user's session, and in which order. It is a pure function
// of what is declared and what hosts report: every broker that sees the same decides the same.
//
// A host's agent has the last word, against its own limit. So an answer is the best host to ask, and, when that one
// refuses, the next by what is known then: a snapshot that is a moment old costs a further question, never an overfull
// host. One decision is one pass over the hosts, which sorts nothing and keeps nothing.
package placement

import (
	"cmp"
	"fmt"
	"iter"
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
	// User is whose it is by the brokers' own word, empty where there is only the host's: then it takes a place and draws
	// nobody.
	User string
	// Sent says that a broker sent the user there only just now, so that an assignment may be on its way.
	Sent         bool
	Disconnected bool
	// Assumed says that the session may be over: it draws its user back and takes no place.
	Assumed bool
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
	Hosts  int // looked at
	counts [reasons]int
	// details are the first few by name, each once, so that they don't hang on the order of the hosts.
	details [reasons][]string
}

type reason int

// What keeps a host out, in the order in which they are told.
const (
	nothing reason = iota
	notConnected
	notReady
	draining
	full
	otherPersons
	notAssigned
	askedBefore
	reasons
)

var titles = [reasons]string{
	notConnected: "not connected", notReady: "not ready", draining: "draining", full: "full",
	otherPersons: "assigned to other users", notAssigned: "not assigned to anybody", askedBefore: "asked in vain",
}

// maxDetails bounds what is told of one reason.
const maxDetails = 3

func (w *Why) add(r reason, detail string) {
	w.counts[r]++
	if detail == "" {
		return
	}
	d := w.details[r]
	i, known := slices.BinarySearch(d, detail)
	if known || i == maxDetails {
		return
	}
	d = slices.Insert(d, i, detail)
	w.details[r] = d[:min(len(d), maxDetails)]
}

// Full counts the hosts where a session's end would make a place.
func (w *Why) Full() int { return w.counts[full] }

// String tells it to a person: `3 hosts: 1 not connected, 1 draining (new image), 1 full`.
func (w *Why) String() string {
	if w.Hosts == 0 {
		return "the pool has no hosts"
	}
	var parts []string
	for r, n := range w.counts {
		if n == 0 {
			continue
		}
		part := fmt.Sprintf("%d %s", n, titles[r])
		if d := w.details[r]; len(d) > 0 {
			part += fmt.Sprintf(" (%s)", strings.Join(d, "; "))
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

// Best gives the host to ask for the user's session, but for those that asked names, and why the others are out of the
// question. The order in which the hosts come makes no difference; names are unique.
//
//  1. Where the user has a session already, a disconnected one before another: also on a draining or full host.
//  2. Personal: the user's own hosts; only where there are none, and under Automatic assignment, hosts of nobody. A session
//     there gives no right to such a host, unless a broker has just sent the user to it.
//  3. Pooled: hosts with a free place; the emptiest first, or with DepthFirst the fullest first.
//  4. Hosts whose last places are promised but not taken: a promise may still come to nothing.
//
// Only connected hosts whose RDP server answers count, and in 2 to 4 only those that don't drain. Ties go by name. asked
// is called with candidates only; nil leaves none out. hosts is gone through twice where the pool is Personal.
func Best(pool Pool, hosts iter.Seq[Host], user string, asked func(host string) bool) (best Candidate, found bool, why Why) {
	owns := pool.Personal && owns(hosts, user)
	var top ranking
	for h := range hosts {
		why.Hosts++
		r, out, detail := rank(pool, &h, user, owns)
		if out == nothing && asked != nil && asked(h.Name) {
			out = askedBefore
		}
		switch {
		case out != nothing:
			why.add(out, detail)
		case !found || r.before(top):
			top, found = r, true
		}
	}
	return top.Candidate, found, why
}

func owns(hosts iter.Seq[Host], user string) bool {
	for h := range hosts {
		if h.AssignedUser == user {
			return true
		}
	}
	return false
}

// ranking is a candidate with what orders it: classes first, then load.
type ranking struct {
	Candidate
	class, load int
}

func (r ranking) before(o ranking) bool {
	return cmp.Or(cmp.Compare(r.class, o.class), cmp.Compare(r.load, o.load), strings.Compare(r.Host, o.Host)) < 0
}

// Classes of candidates, best first.
const (
	ownDisconnected = iota
	ownSession
	hasRoom
	promised
)

// rank says how good a host is for the user, or what keeps it out.
func rank(pool Pool, h *Host, user string, owns bool) (r ranking, out reason, detail string) {
	r.Host = h.Name
	if pool.Personal {
		switch {
		case h.AssignedUser == user:
		case h.AssignedUser != "":
			return r, otherPersons, ""
		case owns || !pool.Automatic:
			return r, notAssigned, ""
		default:
			r.Assign = true
		}
	}
	switch {
	case !h.Connected:
		return r, notConnected, ""
	case !h.Ready:
		return r, notReady, h.Message
	}
	reported, taken, mine, disconnected := h.look(user, r.Assign)
	if mine {
		r.Resume, r.class = true, ownSession
		if disconnected {
			r.class = ownDisconnected
		}
		return r, nothing, ""
	}
	if h.Draining {
		return r, draining, h.DrainReason
	}
	switch {
	case reported >= int(pool.MaxSessions):
		return r, full, ""
	case taken >= int(pool.MaxSessions):
		r.class = promised
	default:
		r.class = hasRoom
	}
	r.load = taken
	if pool.DepthFirst && !pool.Personal && r.class == hasRoom {
		r.load = -taken
	}
	return r, nothing, ""
}

// look counts the places that sessions take, and those with what is promised, and finds the user's own session: where
// sent is set, only one that a broker sent there just now.
func (h *Host) look(user string, sent bool) (reported, taken int, mine, disconnected bool) {
	for i := range h.Sessions {
		s := &h.Sessions[i]
		if !s.Assumed {
			reported++
		}
		if s.User == user && (s.Sent || !sent) {
			mine, disconnected = true, disconnected || s.Disconnected
		}
	}
	for i := range h.Reserved {
		mine = mine || h.Reserved[i].User == user
	}
	return reported, reported + len(h.Reserved), mine, disconnected
}
