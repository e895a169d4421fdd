// Package traces keeps the timelines of recent connects in memory, so that their users can read them. It is bounded in
// every direction, and every replica keeps the same, from what all publish.
package traces

import (
	"cmp"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	maxActivities = 8192
	// maxUnowned bounds activities of which no broker has said whose they are, so that an agent that makes them up
	// pushes out no user's.
	maxUnowned = 1024
	// maxStrangersKept bounds those of clients that were refused before anybody knew whose they are, apart from all others:
	// strangers make as many as they like.
	maxStrangersKept = 256
	maxEvents        = 128
	maxText          = 1024
	// maxStrangers bounds what a list has of others', so that they push nobody's own off it.
	maxStrangers = 10
)

var guid = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// IsActivity says whether id is an activity id: a lower-case GUID.
func IsActivity(id string) bool { return guid.MatchString(id) }

// Store of recent activities. Safe for concurrent use.
type Store struct {
	mu         sync.Mutex
	activities map[string]*activity
	owned      []string // oldest first
	unowned    []string // oldest first; may name activities that got an owner since
	strangers  []string // oldest first, of clients that nobody knows; likewise
}

type activity struct {
	user    string
	claimed string // whose it is by a gateway's word, where no broker has said
	addr    string // of the client, where nobody knows whose it is
	events  []trace.Event
}

// owner is whose the activity is, as far as anybody knows.
func (a *activity) owner() string { return cmp.Or(a.user, a.claimed) }

// New makes an empty store.
func New() *Store { return &Store{activities: map[string]*activity{}} }

// Subscribe has the store hear everyone's steps.
func (s *Store) Subscribe(nc *nats.Conn) error {
	_, err := nc.Subscribe(bus.AllTraces, func(m *nats.Msg) {
		var e trace.Event
		if json.Unmarshal(m.Data, &e) == nil {
			s.Hear(m.Subject, e)
		}
	})
	return err
}

// Hear takes in an event from a subject, which says whose it is. Brokers are believed on whose the activity is; a gateway,
// which has seen a ticket that no broker has, until a broker says otherwise. Agents and gateways speak for themselves alone.
func (s *Store) Hear(subject string, e trace.Event) {
	parts := strings.Split(strings.TrimPrefix(subject, "rdv.trace."), ".")
	claimed := ""
	switch {
	case parts[0] == "broker":
		e.ClientAddr = ""
	case parts[0] == "agent" && len(parts) == 3:
		e.User, e.ClientAddr = "", ""
		e.Component = "agent/" + parts[2]
	case parts[0] == "gateway" && len(parts) == 2:
		claimed, e.User = e.User, ""
		// The relay has no voice on the bus; its gateway speaks for it.
		if !ofGateway(e.Component) {
			e.Component = "gateway/" + parts[1]
		}
	default:
		return
	}
	s.add(e, claimed)
}

func ofGateway(component string) bool {
	role, _, _ := strings.Cut(component, "/")
	return role == "gateway" || role == "relay"
}

func (s *Store) add(e trace.Event, claimed string) {
	if !IsActivity(e.ActivityID) || e.Step < 0 || e.Step >= len(trace.Titles) {
		return
	}
	e.Component, e.Detail, e.Error, e.ClientAddr = clip(e.Component), clip(e.Detail), clip(e.Error), clip(e.ClientAddr)
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.activities[e.ActivityID]
	// A stranger chooses the activity's id: he adds nothing to somebody's.
	if e.ClientAddr != "" && a != nil && (a.user != "" || a.claimed != "") {
		return
	}
	if a == nil {
		a = &activity{addr: e.ClientAddr}
		s.activities[e.ActivityID] = a
		switch {
		case e.ClientAddr != "":
			s.strangers = s.push(s.strangers, maxStrangersKept, e.ActivityID, func(a *activity) bool { return a.owner() == "" })
		case e.User == "":
			s.unowned = s.push(s.unowned, maxUnowned, e.ActivityID, func(a *activity) bool { return a.user == "" })
		}
	}
	if a.user == "" && e.User != "" {
		a.user = e.User
		s.owned = s.push(s.owned, maxActivities, e.ActivityID, func(*activity) bool { return true })
	}
	if a.claimed == "" {
		a.claimed = claimed
	}
	if len(a.events) < maxEvents {
		a.events = append(a.events, e)
	}
}

// push adds to a list and forgets the oldest beyond most, where drop agrees.
func (s *Store) push(list []string, most int, id string, drop func(*activity) bool) []string {
	if list = append(list, id); len(list) > most {
		if a := s.activities[list[0]]; a != nil && drop(a) {
			delete(s.activities, list[0])
		}
		list = slices.Delete(list, 0, 1)
	}
	return list
}

// Get gives an activity's events in the order in which they began, if it is the user's.
func (s *Store) Get(id, user string) ([]trace.Event, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.activities[id]
	if a == nil || user == "" || a.owner() != user {
		return nil, false
	}
	return a.sorted(), true
}

func (a *activity) sorted() []trace.Event {
	events := slices.Clone(a.events)
	slices.SortStableFunc(events, func(a, b trace.Event) int { return a.At.Compare(b.At) })
	return events
}

// List sums up a user's activities, the latest first, at most so many; with them those that gateways refused before they
// knew whose they are, of clients at addr, where it is given, or at nobody knows which.
func (s *Store) List(user, addr string, most int) []trace.Summary {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []trace.Summary{}
	for id, a := range s.activities {
		mine := user != "" && a.owner() == user
		anonymous := a.owner() == "" && a.addr != "" && (a.addr == addr || a.addr == trace.UnknownClient)
		if !mine && !anonymous || len(a.events) == 0 {
			continue
		}
		events := a.sorted()
		last := events[len(events)-1]
		for _, e := range events {
			if e.Error != "" {
				last = e
			}
		}
		list = append(list, trace.Summary{ActivityID: id, At: events[0].At, Step: last.Step, Error: last.Error, Detail: last.Detail, Anonymous: anonymous})
	}
	slices.SortFunc(list, func(a, b trace.Summary) int {
		return cmp.Or(b.At.Compare(a.At), strings.Compare(a.ActivityID, b.ActivityID))
	})
	strangers := 0
	list = slices.DeleteFunc(list, func(a trace.Summary) bool {
		if a.Anonymous {
			strangers++
		}
		return a.Anonymous && strangers > maxStrangers
	})
	return list[:min(len(list), most)]
}

// MayAdd says whether a user may add own steps to an activity: to the user's own, or to a new one.
func (s *Store) MayAdd(id, user string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.activities[id]
	return a == nil || a.owner() == "" || a.owner() == user
}

func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "")
}
