package plan

import "time"

// Departure is an object that is being deleted, as seen.
type Departure struct {
	// Since is when it was deleted, Deadline how long it may wait for its sessions.
	Since    time.Time
	Deadline time.Duration
	// Sessions that are known to be on it.
	Sessions int32
	// Settled says that it is certain that no further session begins.
	Settled bool
	// Skip says that somebody asked not to wait.
	Skip bool
	// NamespaceGoing says that the namespace is being deleted, and everything in it.
	NamespaceGoing bool
	// Uncounted says that nobody is left who would say when sessions end.
	Uncounted bool
}

// Cause is why an object that is being deleted may go.
type Cause int

// The causes, in the order in which they count.
const (
	Waits Cause = iota
	WasEmpty
	WasSkipped
	WasNamespaceGoing
	WasUncounted
	WasDeadline
)

// settleDeparture is how long after its deletion brokers and hosts certainly know of it, should nobody be able to say so.
const settleDeparture = 10 * time.Second

// Depart says whether an object that is being deleted may go, and why, or how long to wait before that may change by itself.
func Depart(d Departure, now time.Time) (why Cause, next time.Duration) {
	left := d.Deadline - now.Sub(d.Since)
	settles := settleDeparture - now.Sub(d.Since)
	switch {
	case d.Skip:
		return WasSkipped, 0
	case d.NamespaceGoing:
		return WasNamespaceGoing, 0
	case d.Sessions == 0 && (d.Settled || settles <= 0):
		return WasEmpty, 0
	case d.Uncounted:
		return WasUncounted, 0
	case left <= 0:
		return WasDeadline, 0
	case d.Sessions == 0:
		return Waits, min(settles, left)
	}
	return Waits, left
}
