package relay

import (
	"crypto/sha256"
	"crypto/subtle"
	"sync"
	"time"
)

// arrival is an agent's leg that has joined.
type arrival struct {
	leg      *leg
	accepted time.Time
	arrived  time.Time
}

// joinWait is one client that waits for an agent.
type joinWait struct {
	hash     [sha256.Size]byte
	activity string
	leg      chan *arrival // of one; the claimer always delivers, nil where the leg broke
}

func (w *joinWait) deliver(a *arrival) { w.leg <- a }

// joinTable is the clients that wait, by the hash of their join secret: the secret itself is not kept, and looking up a
// hash tells a guesser's stopwatch nothing about it.
type joinTable struct {
	mu      sync.Mutex
	waiting map[[sha256.Size]byte]*joinWait
}

// add registers a secret. cancel must follow.
func (t *joinTable) add(secret []byte, activity string) *joinWait {
	w := &joinWait{hash: sha256.Sum256(secret), activity: activity, leg: make(chan *arrival, 1)}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting == nil {
		t.waiting = map[[sha256.Size]byte]*joinWait{}
	}
	t.waiting[w.hash] = w
	return w
}

// claim takes the client that waits for secret; nobody else gets it after. The claimer must deliver.
func (t *joinTable) claim(secret []byte) *joinWait {
	hash := sha256.Sum256(secret)
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.waiting[hash]
	if w == nil || subtle.ConstantTimeCompare(w.hash[:], hash[:]) != 1 {
		return nil
	}
	delete(t.waiting, hash)
	return w
}

// cancel ends the wait and closes a leg that came too late to be used.
func (t *joinTable) cancel(w *joinWait) {
	t.mu.Lock()
	_, waiting := t.waiting[w.hash]
	delete(t.waiting, w.hash)
	t.mu.Unlock()
	if waiting {
		return
	}
	if a := <-w.leg; a != nil {
		a.leg.tcp.Close()
	}
}
