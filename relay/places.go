package relay

import (
	"container/list"
	"crypto/sha256"
	"time"

	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// places is the attempts between request and session, oldest first, bounded by MaxPending. An attempt that waits for its
// client is silent: where all places are taken, one that has been there for silentGrace and is silent goes, the oldest of
// whoever has the most, strangers counting as one. So neither a good ticket nor none keeps others out by opening connections
// and saying nothing, and a rush of honest clients doesn't push itself out.
//
// One user, or one ticket of the raw form, has a quarter of the places at most: beyond, the user's own oldest silent attempt
// goes, and where none is silent the newest is refused. Guarded by Relay.mu.
type places struct {
	queue list.List      // of *attempt
	held  map[string]int // by attempt.who
}

// silentGrace is what a client's way to its channel may take where others wait: five round trips and TLS.
const silentGrace = 2 * time.Second

// mostOf is how many places one user may have.
func mostOf(c *config.Relay) int { return max(int(c.MaxPending)/4, 2) }

func (p *places) enter(a *attempt) {
	if p.held == nil {
		p.held = map[string]int{}
	}
	a.place = p.queue.PushBack(a)
	p.held[a.who]++
}

// leave takes an attempt off; false where it was evicted.
func (p *places) leave(a *attempt) bool {
	if a.place == nil {
		return false
	}
	p.queue.Remove(a.place)
	a.place = nil
	p.forget(a.who)
	return true
}

func (p *places) forget(who string) {
	if p.held[who]--; p.held[who] <= 0 {
		delete(p.held, who)
	}
}

// silent gives the oldest silent attempt, but this one, of whom; nil where there is none.
func (p *places) silent(who string, but *attempt) *attempt {
	for e := p.queue.Front(); e != nil; e = e.Next() {
		if a := e.Value.(*attempt); a.silent && a.who == who && a != but {
			return a
		}
	}
	return nil
}

// victim gives the silent attempt that has to go where all places are taken; nil where none is silent.
func (p *places) victim(now time.Time) (victim *attempt) {
	for e := p.queue.Front(); e != nil; e = e.Next() {
		if a := e.Value.(*attempt); a.silent && now.Sub(a.requested) > silentGrace && (victim == nil || p.held[a.who] > p.held[victim.who]) {
			victim = a
		}
	}
	return victim
}

// evict ends an attempt and frees its place. mu is held.
func (r *Relay) evict(a *attempt) {
	r.places.leave(a)
	r.metrics.handshakeFailed("limit")
	r.log.Info("a client that says nothing makes room", "activity", a.activity, "peer", a.v.tcp.RemoteAddr().String(), "transport", a.transport, "user", a.user)
	for _, l := range []*leg{a.v.leg, a.from} {
		l.tcp.SetLinger(0)
		l.tcp.Close()
	}
}

// known says whose an attempt is, and refuses it where the user has too many that are not silent.
func (r *Relay) known(a *attempt, who string) *refusal.Error {
	c := r.config.Load()
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.place == nil {
		return nil // evicted: its connection says so
	}
	r.places.forget(a.who)
	a.who = who
	r.places.held[who]++
	if r.places.held[who] <= mostOf(c) {
		return nil
	}
	if own := r.places.silent(who, a); own != nil {
		r.evict(own)
		return nil
	}
	return refusal.New(refusal.GatewayFull, "This pod of gateway %s is setting up %d connects of yours: try again in a few seconds.", c.Gateway, mostOf(c))
}

// busy says that an attempt no longer waits for its client; false where it has been evicted.
func (r *Relay) busy(a *attempt) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	a.silent = false
	return a.place != nil
}

// userKey tells users apart; ticketKey the tickets of those whom nobody has named yet.
func userKey(workspace, user string) string { return "user " + workspace + "/" + user }

func ticketKey(ticket string) string {
	sum := sha256.Sum256([]byte(ticket))
	return "ticket " + string(sum[:])
}
