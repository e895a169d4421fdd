package gateway

import (
	"crypto/ed25519"
	"crypto/sha256"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/ticket"
)

// Tickets that Authenticate found good are remembered until Connect asks, which follows at once.
const (
	verifiedLife = 30 * time.Second
	maxVerified  = 1000
)

// verifiedTickets saves Connect from checking a second time what Authenticate has just checked. It is good for one
// Connect, and only while the workspace, its keys and the ticket are what they were then. Whether the Workspace still
// grants what the ticket says is the broker's question, and asked each time.
//
// A ticket is kept as its hash: who reads this memory can't use one.
type verifiedTickets struct {
	mu sync.Mutex
	m  map[[sha256.Size]byte]verified
}

type verified struct {
	claims ticket.Claims
	w      *workspace
	keys   *[]ed25519.PublicKey
	until  time.Time
}

func (t *verifiedTickets) put(raw string, claims ticket.Claims, w *workspace, now time.Time) {
	v := verified{claims, w, w.keys.Load(), now.Add(verifiedLife)}
	if claims.Expires.Before(v.until) {
		v.until = claims.Expires
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m == nil || len(t.m) >= maxVerified { // what was there is checked again, no more
		t.m = map[[sha256.Size]byte]verified{}
	}
	t.m[sha256.Sum256([]byte(raw))] = v
}

// take returns the claims of a ticket that was found good, once; a nil workspace is that it must be checked.
func (t *verifiedTickets) take(raw string, now time.Time) (ticket.Claims, *workspace) {
	hash := sha256.Sum256([]byte(raw))
	t.mu.Lock()
	defer t.mu.Unlock()
	v, ok := t.m[hash]
	delete(t.m, hash)
	if !ok || !now.Before(v.until) || v.w.closed.Load() || v.keys != v.w.keys.Load() {
		return ticket.Claims{}, nil
	}
	return v.claims, v.w
}
