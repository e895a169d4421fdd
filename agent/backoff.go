package agent

import (
	"math/rand/v2"
	"time"
)

// backoff grows the delay between attempts from min to max. Half of each delay is random, so that the agents of a
// restarted broker don't all come back in one instant.
type backoff struct {
	min, max time.Duration
	next     time.Duration
}

func (b *backoff) delay() time.Duration {
	b.next = min(max(b.next*2, b.min), b.max)
	return b.next/2 + rand.N(b.next/2+1)
}

func (b *backoff) reset() { b.next = 0 }
