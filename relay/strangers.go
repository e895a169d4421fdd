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
// One source (an IPv4 address, an IPv6 /64) has a quarter of the places at most: beyond, its own oldest goes, so that a
// flood from one address keeps nobody else out. Agents on their way don't count there, since another pod of the gateway may
// bring many of them.
//
// Agents on their way to join are spared while others are there, up to half of the places: a flood of clients doesn't
// cost those a session whose tickets were found good.
type strangers struct {
	mu     sync.Mutex
	queue  list.List // of *visitor
	agents int       // of them that named an instance
	// sources are those that named none, by where they come from.
	sources map[netip.Addr]*list.List
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
	if near := s.sources[from]; near != nil && near.Len() >= max(most/4, minPerSource) {
		evicted = near.Front().Value.(*visitor)
		s.removeLocked(evicted)
	} else if s.queue.Len() >= most {
		out := s.queue.Front()
		for e := out; e != nil && s.agents <= most/2; e = e.Next() {
			if !e.Value.(*visitor).agent {
				out = e
				break
			}
		}
		evicted = out.Value.(*visitor)
		s.removeLocked(evicted)
	}
	v.place = s.queue.PushBack(v)
	if from.IsValid() {
		if s.sources == nil {
			s.sources = map[netip.Addr]*list.List{}
		}
		if s.sources[from] == nil {
			s.sources[from] = list.New()
		}
		v.source, v.near = from, s.sources[from].PushBack(v)
	}
	return evicted
}

// name notes that v named an instance of ours, as agents do.
func (s *strangers) name(v *visitor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.place != nil && !v.agent {
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
	if v.place == nil {
		return
	}
	s.queue.Remove(v.place)
	v.place = nil
	s.leaveSourceLocked(v)
	if v.agent {
		s.agents--
	}
}

func (s *strangers) leaveSourceLocked(v *visitor) {
	if v.near == nil {
		return
	}
	near := s.sources[v.source]
	near.Remove(v.near)
	v.near = nil
	if near.Len() == 0 {
		delete(s.sources, v.source)
	}
}

func (s *strangers) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.queue.Len()
}
