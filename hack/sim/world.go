package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"rendezvous.dev/rendezvous/broker/placement"
)

const (
	brokers = 3
	regions = 3
	perHost = 4 // sessions

	// settle and lookAgain are those of broker/orchestrate: for how long a connect looks again before it is refused.
	settle, lookAgain = 500 * time.Millisecond, 20 * time.Millisecond
	// reportTime is what no report takes longer than; see hop.
	reportTime = 100 * time.Millisecond
)

// world is all that the simulation holds: the truth at the hosts, and what each broker believes.
type world struct {
	clock
	rand     *rand.Rand
	pools    []*pool
	gateways []*gateway
	sessions int // made so far
	result   result
}

type pool struct {
	rules placement.Pool
	hosts []*host
	kind  string
}

// host is the truth of one host, and each broker's view of it.
type host struct {
	name             string
	pool             *pool
	connected, ready bool
	draining         bool
	assigned         string
	sessions         []session
	freed            time.Duration // when a session ended last
	reports          uint64        // made so far
	views            [brokers]view
}

type session struct {
	id   int
	user string
	away bool
}

// view is what one broker knows of a host: its last report, and what was promised since.
type view struct {
	sequence uint64
	reported []session
	promises []promise
	// taken and reserved are what placement gets of it.
	taken, reserved []placement.Session
}

type promise struct {
	session
	accepted bool
	after    uint64
}

// result is what is counted.
type result struct {
	accepted, resumed, elsewhere int // elsewhere: had a session and got to another host
	// refusedFree were refused while a place was free, refusedInTheMoment while the report of one was on its way.
	refused, refusedFree, refusedInTheMoment int
	questions, looks, overfull               int
	decisions                                map[string][]time.Duration // by kind of pool
}

func (v *view) rebuild() {
	v.taken, v.reserved = make([]placement.Session, 0, len(v.reported)+len(v.promises)), nil
	for _, s := range v.reported {
		v.taken = append(v.taken, placement.Session{User: s.user, Disconnected: s.away})
	}
	for _, p := range v.promises {
		if p.accepted {
			v.taken = append(v.taken, placement.Session{User: p.user})
		} else {
			v.reserved = append(v.reserved, placement.Session{User: p.user})
		}
	}
}

// hear takes in a report, unless a later one was faster.
func (v *view) hear(sequence uint64, reported []session) {
	if sequence <= v.sequence {
		return
	}
	v.sequence, v.reported = sequence, reported
	v.promises = slices.DeleteFunc(v.promises, func(p promise) bool {
		return p.accepted && sequence > p.after || slices.ContainsFunc(reported, func(s session) bool { return s.id == p.id })
	})
	v.rebuild()
}

func (v *view) promise(s session) {
	v.promises = append(v.promises, promise{session: s})
	v.rebuild()
}

func (v *view) settle(id int, accepted bool, after uint64) {
	for i := range v.promises {
		p := &v.promises[i]
		if p.id != id {
			continue
		}
		p.accepted, p.after = accepted, after
		if !accepted || v.sequence > after {
			v.promises = slices.Delete(v.promises, i, i+1)
		}
		break
	}
	v.rebuild()
}

// newWorld makes pools of three sizes, each by turns filled breadth first and depth first, and some personal ones.
// scale is in hundredths.
func newWorld(seed uint64, scale int) *world {
	w := &world{rand: rand.New(rand.NewPCG(seed, 7)), result: result{decisions: map[string][]time.Duration{}}}
	for _, c := range []struct{ pools, hosts int }{{5, 10_000}, {45, 1_000}, {50, 100}} {
		for i := range c.pools {
			p := &pool{kind: fmt.Sprint(c.hosts), rules: placement.Pool{
				Name: fmt.Sprintf("p%d-%02d", c.hosts, i), MaxSessions: perHost, DepthFirst: i%2 == 1,
			}}
			if c.hosts == 1_000 && i%5 == 4 {
				p.rules.Personal, p.rules.Automatic, p.rules.DepthFirst, p.rules.MaxSessions = true, true, false, 1
			}
			for j := range max(1, c.hosts*scale/100) {
				h := &host{name: fmt.Sprintf("%s-%05d", p.rules.Name, j), pool: p, connected: true, ready: true}
				switch roll := w.rand.Float64(); {
				case roll < .01:
					h.connected = false
				case roll < .02:
					h.ready = false
				case roll < .04:
					h.draining = true
				}
				p.hosts = append(p.hosts, h)
			}
			w.pools = append(w.pools, p)
		}
	}
	w.gateways = makeGateways(w.rand)
	return w
}

// seen gives a pool's hosts as a broker sees them.
func (p *pool) seen(broker int) func(func(placement.Host) bool) {
	return func(yield func(placement.Host) bool) {
		for _, h := range p.hosts {
			v := &h.views[broker]
			if !yield(placement.Host{
				Name: h.name, AssignedUser: h.assigned, Connected: h.connected, Ready: h.ready, Draining: h.draining,
				Sessions: v.taken, Reserved: v.reserved,
			}) {
				return
			}
		}
	}
}

func (h *host) index(user string) int {
	return slices.IndexFunc(h.sessions, func(s session) bool { return s.user == user })
}

// takes is the agent's last word. ok says whether the host takes the session, again whether it is one that it had.
func (h *host) takes(user string) (ok, again bool) {
	switch {
	case !h.connected || !h.ready:
		return false, false
	case h.index(user) >= 0:
		return true, true
	}
	return !h.draining && len(h.sessions) < int(h.pool.rules.MaxSessions), false
}

// hop is how long a message between a host and a broker takes.
func (w *world) hop() time.Duration {
	return time.Millisecond + time.Duration(w.rand.ExpFloat64()*float64(4*time.Millisecond))
}

// report tells every broker, each in its own time.
func (w *world) report(h *host) {
	h.reports++
	sequence, now := h.reports, slices.Clone(h.sessions)
	for b := range brokers {
		w.after(w.hop(), func() { h.views[b].hear(sequence, now) })
	}
	if len(h.sessions) > int(h.pool.rules.MaxSessions) {
		w.result.overfull++
	}
}
