package relay

import (
	"container/list"
	"sync"
)

// strangers is the connections that nobody has vouched for yet, oldest first. It is bounded: at the bound the newest
// takes the oldest one's place. Were the newest refused instead, whoever holds connections open and says nothing could
// keep everybody out at the price of a few connections a second; so, he has to be faster than an honest handshake.
//
// Agents on their way to join are spared while others are there, up to half of the places: a flood of clients doesn't
// cost those a session whose tickets were found good.
type strangers struct {
	mu     sync.Mutex
	queue  list.List // of *visitor
	agents int       // of them that named an instance
}

// enter adds v and returns who has to go, if anybody.
func (s *strangers) enter(v *visitor, most int) (evicted *visitor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if most = max(most, 1); s.queue.Len() >= most {
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
	return evicted
}

// name notes that v named an instance of ours, as agents do.
func (s *strangers) name(v *visitor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.place != nil && !v.agent {
		v.agent = true
		s.agents++
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
	if v.agent {
		s.agents--
	}
}

func (s *strangers) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.queue.Len()
}
