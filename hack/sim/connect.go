package main

import (
	"strconv"
	"time"

	"rendezvous.dev/rendezvous/broker/placement"
)

// connect is one connect at one broker, as broker/orchestrate carries it out.
type connect struct {
	w      *world
	user   string
	pool   *pool
	broker int
	asked  map[string]uint64
	first  time.Duration // when it first found no place, 0 before
	pause  time.Duration
	done   func(h *host, id int) // nil host: refused
}

func (w *world) connect(user string, p *pool, done func(*host, int)) {
	c := &connect{w: w, user: user, pool: p, broker: w.rand.IntN(brokers), asked: map[string]uint64{}, pause: lookAgain, done: done}
	c.place()
}

func (c *connect) place() {
	w := c.w
	begin := time.Now()
	cand, found, why := placement.Best(c.pool.rules, c.pool.seen(c.broker), c.user, func(name string) bool {
		after, was := c.asked[name]
		return was && (after == 0 || c.pool.host(name).views[c.broker].sequence <= after)
	})
	w.result.decisions[c.pool.kind] = append(w.result.decisions[c.pool.kind], time.Since(begin))
	if found {
		c.ask(c.pool.host(cand.Host), cand)
		return
	}
	mayChange := why.Full() > 0
	for _, after := range c.asked {
		mayChange = mayChange || after > 0
	}
	if c.first == 0 {
		c.first = w.now
	}
	if !mayChange || w.now-c.first >= settle {
		c.refused()
		return
	}
	w.result.looks++
	w.after(min(c.pause, c.first+settle-w.now), c.place)
	c.pause *= 2
}

// ask has a host's agent decide. A host of nobody is given to the user first; that is written to one place, where the
// first one wins.
func (c *connect) ask(h *host, cand placement.Candidate) {
	w, v := c.w, &h.views[c.broker]
	c.asked[h.name] = 0
	if cand.Assign {
		if h.assigned != "" && h.assigned != c.user {
			c.place()
			return
		}
		h.assigned = c.user
	}
	w.result.questions++
	w.sessions++
	id := w.sessions
	if !cand.Resume {
		v.promise(session{id: id, user: c.user})
	}
	w.after(w.hop(), func() {
		ok, again := h.takes(c.user)
		switch {
		case ok && again:
			s := &h.sessions[h.index(c.user)]
			s.id, s.away = id, false
		case ok:
			h.sessions = append(h.sessions, session{id: id, user: c.user})
		}
		after := h.reports
		if ok {
			w.report(h)
		}
		w.after(w.hop(), func() {
			if !cand.Resume {
				v.settle(id, ok, after)
			}
			if !ok {
				if !h.draining && h.connected && h.ready {
					c.asked[h.name] = after
				}
				c.place()
				return
			}
			w.result.accepted++
			if again {
				w.result.resumed++
			}
			c.done(h, id)
		})
	})
}

func (c *connect) refused() {
	c.w.result.refused++
	inTheMoment := false
	for _, h := range c.pool.hosts {
		ok, _ := h.takes(c.user)
		if ok && c.pool.rules.Personal {
			ok = h.assigned == c.user || h.assigned == ""
		}
		switch {
		case ok && c.w.now-h.freed > reportTime:
			c.w.result.refusedFree++
			c.done(nil, 0)
			return
		case ok:
			inTheMoment = true
		}
	}
	if inTheMoment {
		c.w.result.refusedInTheMoment++
	}
	c.done(nil, 0)
}

func (p *pool) host(name string) *host {
	i, err := strconv.Atoi(name[len(p.rules.Name)+1:])
	if err != nil {
		panic(err) // every name is made by newWorld
	}
	return p.hosts[i]
}

// live is one user's day: a session, which ends or is left behind, and taken up again some time later.
func (w *world) live(user string, p *pool) {
	w.connect(user, p, func(h *host, id int) {
		if h == nil {
			return
		}
		w.after(time.Duration(w.rand.ExpFloat64()*float64(25*time.Minute)), func() {
			i := h.index(user)
			if i < 0 || h.sessions[i].id != id {
				return
			}
			if w.rand.Float64() < .6 { // logs out
				w.logOut(h, i)
				return
			}
			h.sessions[i].away = true
			w.report(h)
			w.after(time.Minute+time.Duration(w.rand.ExpFloat64()*float64(10*time.Minute)), func() {
				w.back(user, p, h)
			})
		})
	})
}

// back takes up a session that was left behind.
func (w *world) back(user string, p *pool, left *host) {
	w.connect(user, p, func(h *host, id int) {
		if h == nil {
			return
		}
		if h != left {
			w.result.elsewhere++
		}
		w.after(time.Duration(w.rand.ExpFloat64()*float64(25*time.Minute)), func() {
			if i := h.index(user); i >= 0 && h.sessions[i].id == id {
				w.logOut(h, i)
			}
		})
	})
}

func (w *world) logOut(h *host, i int) {
	h.sessions = append(h.sessions[:i:i], h.sessions[i+1:]...)
	h.freed = w.now
	w.report(h)
}
