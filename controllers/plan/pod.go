package plan

import "time"

// Pod is a session-host pod as seen.
type Pod struct {
	Exists      bool
	Terminating bool
	// Finished says that the pod will not run again: evicted, or its node is gone.
	Finished bool
	Created  time.Time
	// Hash is what it was rendered from.
	Hash string
	// Revoked says that the enrolment of the agent in it was revoked.
	Revoked bool
}

// PodAction is what to do about a session-host pod.
type PodAction int

// The actions.
const (
	// PodKeep leaves the pod, with its labels put right.
	PodKeep PodAction = iota
	// PodCreate makes it.
	PodCreate
	// PodDelete removes it; its end brings the next decision.
	PodDelete
	// PodWait leaves it for now: Next says until when, or a session must end first.
	PodWait
)

// PodDecision is an action and when to look again (0: time alone changes nothing).
type PodDecision struct {
	Action PodAction
	Next   time.Duration
}

// retryFinished keeps a pod that fails at once from being made again without a pause.
const retryFinished = 15 * time.Second

// DecidePod plans a host's pod. wantHash is that of the pod as it would be rendered now.
func DecidePod(seen Pod, wantHash string, sessions int32, now time.Time) PodDecision {
	switch {
	case !seen.Exists:
		return PodDecision{Action: PodCreate}
	case seen.Terminating:
		return PodDecision{Action: PodWait}
	case seen.Finished:
		if pause := retryFinished - now.Sub(seen.Created); pause > 0 {
			return PodDecision{Action: PodWait, Next: pause}
		}
		return PodDecision{Action: PodDelete}
	case seen.Hash == wantHash:
		return PodDecision{Action: PodKeep}
	case seen.Revoked: // whoever has its key may have the pod, so its sessions are no reason to wait
		return PodDecision{Action: PodDelete}
	case sessions > 0:
		return PodDecision{Action: PodWait}
	}
	return PodDecision{Action: PodDelete}
}

// ReplaceAtOnce is how many of a pool's pods may be on their way to a new template at the same time: a quarter, so that
// users who arrive meanwhile find hosts.
func ReplaceAtOnce(hosts int) int { return max(1, hosts/4) }
