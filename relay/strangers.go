package relay

import (
	"container/list"
	"net/netip"
	"sync"
)

// minPerSource is what one source has in any case.
const minPerSource = 8

// strangers is the connections that nobody has vouched for yet, oldest first. It is bounded: at the bound the newest
// takes the oldest one's place. Were the newest refused instead, whoever holds connections open and says nothing could
// keep everybody out at the price of a few connections a second; so, he has to be faster than an honest handshake.
//
// Those who have said nothing at all, not even a ClientHello, go first while they have half of the places or more: honest
// clients speak at once.
//
// One source (an IPv4 address, an IPv6 /64) has a quarter of the places at most: beyond, one of its own goes by the same
// rules, so that a flood from one address keeps nobody else out. Agents on their way don't count there, since another pod
// of the gateway may bring many of them.
//
// Agents on their way to join are spared while others are there, up to half of the places: a flood of clients doesn't
// cost those a session whose tickets were found good.
type strangers struct {
	mu     sync.Mutex
	all    crowd
	agents int // of them that named an instance
	// sources are those that named none, by where they come from.
	sources map[netip.Addr]*crowd
}

// crowd is strangers, oldest first.
type crowd struct {
	everybody, mute list.List // of *visitor
}

// member is a visitor's place in a crowd; the zero value is none.
type member struct{ place, mute *list.Element }

func (c *crowd) enter(v *visitor) (m member) {
	m.place = c.everybody.PushBack(v)
	if !v.spoke {
		m.mute = c.mute.PushBack(v)
	}
	return m
}

func (c *crowd) spoke(m *member) {
	if m.mute != nil {
		c.mute.Remove(m.mute)
		m.mute = nil
	}
}

func (c *crowd) leave(m *member) {
	c.spoke(m)
	c.everybody.Remove(m.place)
	m.place = nil
}

// tooMute gives the oldest of those who have said nothing, where they have half of the places or more.
func (c *crowd) tooMute(places int) *visitor {
	if c.mute.Len() < max(places/2, 1) {
		return nil
	}
	return c.mute.Front().Value.(*visitor)
}

// source tells where an address belongs to: people have a /64 of IPv6 each.
func source(addr netip.Addr) netip.Addr {
	if addr.Is6() && !addr.Is4In6() {
		p, _ := addr.WithZone("").Prefix(64)
		return p.Addr()
	}
	return addr.Unmap()
}

// enter adds v and returns who has to go, if anybody. A source that is not valid is not bounded.
func (s *strangers) enter(v *visitor, from netip.Addr, most int) (evicted *visitor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	most = max(most, 1)
	share := max(most/4, minPerSource)
	if near := s.sources[from]; near != nil && near.everybody.Len() >= share {
		if evicted = near.tooMute(share); evicted == nil {
			evicted = near.everybody.Front().Value.(*visitor)
		}
	} else if s.all.everybody.Len() >= most {
		if evicted = s.all.tooMute(most); evicted == nil {
			evicted = s.oldestLocked(most)
		}
	}
	if evicted != nil {
		s.removeLocked(evicted)
	}
	v.all = s.all.enter(v)
	if from.IsValid() {
		if s.sources == nil {
			s.sources = map[netip.Addr]*crowd{}
		}
		if s.sources[from] == nil {
			s.sources[from] = &crowd{}
		}
		v.source, v.near = from, s.sources[from].enter(v)
	}
	return evicted
}

// oldestLocked gives the oldest that is no agent while agents have half of the places or fewer, else the oldest.
func (s *strangers) oldestLocked(most int) *visitor {
	out := s.all.everybody.Front()
	for e := out; e != nil && s.agents <= most/2; e = e.Next() {
		if !e.Value.(*visitor).agent {
			out = e
			break
		}
	}
	return out.Value.(*visitor)
}

// spoke notes that v has said something; agent, that it named an instance of ours, as agents do.
func (s *strangers) spoke(v *visitor, agent bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.spoke = true
	if v.all.place == nil {
		return
	}
	s.all.spoke(&v.all)
	if v.near.place != nil {
		s.sources[v.source].spoke(&v.near)
	}
	if agent && !v.agent {
		v.agent = true
		s.agents++
		s.leaveSourceLocked(v)
	}
}

// leave takes v off, where it still stands.
func (s *strangers) leave(v *visitor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked(v)
}

func (s *strangers) removeLocked(v *visitor) {
	if v.all.place == nil {
		return
	}
	s.all.leave(&v.all)
	s.leaveSourceLocked(v)
	if v.agent {
		s.agents--
	}
}

func (s *strangers) leaveSourceLocked(v *visitor) {
	if v.near.place == nil {
		return
	}
	near := s.sources[v.source]
	near.leave(&v.near)
	if near.everybody.Len() == 0 {
		delete(s.sources, v.source)
	}
}

func (s *strangers) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all.everybody.Len()
}
