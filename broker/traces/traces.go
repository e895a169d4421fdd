// Package traces keeps the timelines of recent connects in memory, so that their users can read them. It is bounded in
// every direction, and every replica keeps the same, from what all publish.
package traces

import (
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
	maxEvents  = 128
	maxText    = 1024
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
}

type activity struct {
	user   string
	events []trace.Event
}

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

// Hear takes in an event from a subject, which says whose it is: only brokers are believed on whose the activity is,
// and agents and gateways speak for themselves alone.
func (s *Store) Hear(subject string, e trace.Event) {
	parts := strings.Split(strings.TrimPrefix(subject, "rdv.trace."), ".")
	switch {
	case parts[0] == "broker":
	case parts[0] == "agent" && len(parts) == 3:
		e.User = ""
		e.Component = "agent/" + parts[2]
	case parts[0] == "gateway" && len(parts) == 2:
		e.User = ""
		// The relay has no voice on the bus; its gateway speaks for it.
		if !ofGateway(e.Component) {
			e.Component = "gateway/" + parts[1]
		}
	default:
		return
	}
	s.add(e)
}

func ofGateway(component string) bool {
	role, _, _ := strings.Cut(component, "/")
	return role == "gateway" || role == "relay"
}

func (s *Store) add(e trace.Event) {
	if !IsActivity(e.ActivityID) || e.Step < 0 || e.Step >= len(trace.Titles) {
		return
	}
	e.Component, e.Detail, e.Error = clip(e.Component), clip(e.Detail), clip(e.Error)
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.activities[e.ActivityID]
	if a == nil {
		a = &activity{}
		s.activities[e.ActivityID] = a
		if e.User == "" {
			s.unowned = s.push(s.unowned, maxUnowned, e.ActivityID, func(a *activity) bool { return a.user == "" })
		}
	}
	if a.user == "" && e.User != "" {
		a.user = e.User
		s.owned = s.push(s.owned, maxActivities, e.ActivityID, func(*activity) bool { return true })
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
	if a == nil || user == "" || a.user != user {
		return nil, false
	}
	events := slices.Clone(a.events)
	slices.SortStableFunc(events, func(a, b trace.Event) int { return a.At.Compare(b.At) })
	return events, true
}

// MayAdd says whether a user may add own steps to an activity: to the user's own, or to a new one.
func (s *Store) MayAdd(id, user string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.activities[id]
	return a == nil || a.user == "" || a.user == user
}

func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "")
}
