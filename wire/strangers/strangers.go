// Package strangers bounds the connections to a public listener that nobody has vouched for yet, oldest first: at the bound
// the newest takes the oldest one's place. Were the newest refused instead, whoever holds connections open and says nothing
// could keep everybody out at the price of a few connections a second; so, he has to be faster than an honest handshake.
//
// Those who have said nothing at all, not even a ClientHello, go first while they have half of the places or more: honest
// clients speak at once.
//
// One source (an IPv4 address, an IPv6 /64) has a quarter of the places at most: beyond, one of its own goes by the same
// rules, so that a flood from one address keeps nobody else out.
package strangers

import (
	"container/list"
	"net/netip"
	"sync"
)

// minPerSource is what one source has in any case.
const minPerSource = 8

// Crowd is all strangers of one listener. The zero value is ready, and it is safe for concurrent use.
type Crowd struct {
	mu     sync.Mutex
	all    line
	spared int // of them
	// sources are those that are not spared, by where they come from.
	sources map[netip.Addr]*line
}

// Stranger is one connection. Of is the connection itself, for whoever has to close it.
type Stranger struct {
	Of any

	// Guarded by Crowd.mu.
	all    member // none once somebody vouched for it
	near   member // among those of its source
	source netip.Addr
	spoke  bool
	spared bool
}

// line is strangers, oldest first.
type line struct {
	everybody, mute list.List // of *Stranger
}

// member is a stranger's place in a line; the zero value is none.
type member struct{ place, mute *list.Element }

func (l *line) enter(v *Stranger) (m member) {
	m.place = l.everybody.PushBack(v)
	if !v.spoke {
		m.mute = l.mute.PushBack(v)
	}
	return m
}

func (l *line) spoke(m *member) {
	if m.mute != nil {
		l.mute.Remove(m.mute)
		m.mute = nil
	}
}

func (l *line) leave(m *member) {
	l.spoke(m)
	l.everybody.Remove(m.place)
	m.place = nil
}

// tooMute gives the oldest of those who have said nothing, where they have half of the places or more.
func (l *line) tooMute(places int) *Stranger {
	if l.mute.Len() < max(places/2, 1) {
		return nil
	}
	return l.mute.Front().Value.(*Stranger)
}

// sourceOf tells where an address belongs to: people have a /64 of IPv6 each.
func sourceOf(addr netip.Addr) netip.Addr {
	if addr.Is6() && !addr.Is4In6() {
		p, _ := addr.WithZone("").Prefix(64)
		return p.Addr()
	}
	return addr.Unmap()
}

// Enter adds v, and returns who has to go, if anybody: that one is off the list, and for the caller to close. Most is the
// number of places. An address that is not valid, since it tells nobody apart, is not bounded for itself.
func (c *Crowd) Enter(v *Stranger, from netip.Addr, most int) (evicted *Stranger) {
	c.mu.Lock()
	defer c.mu.Unlock()
	most = max(most, 1)
	if evicted = c.tooNearLocked(sourceOf(from), most); evicted == nil && c.all.everybody.Len() >= most {
		if evicted = c.all.tooMute(most); evicted == nil {
			evicted = c.oldestLocked(most)
		}
	}
	if evicted != nil {
		c.removeLocked(evicted)
	}
	v.all = c.all.enter(v)
	c.enterSourceLocked(v, sourceOf(from))
	return evicted
}

// Locate notes that v, which entered with no address or with a load balancer's, comes from somewhere else, and returns who
// has to go for that, as Enter does.
func (c *Crowd) Locate(v *Stranger, from netip.Addr, most int) (evicted *Stranger) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v.all.place == nil || v.spared {
		return nil
	}
	c.leaveSourceLocked(v)
	if evicted = c.tooNearLocked(sourceOf(from), max(most, 1)); evicted != nil {
		c.removeLocked(evicted)
	}
	c.enterSourceLocked(v, sourceOf(from))
	return evicted
}

// tooNearLocked gives the one that has to go where a source has its share of the places already.
func (c *Crowd) tooNearLocked(source netip.Addr, most int) *Stranger {
	share := max(most/4, minPerSource)
	near := c.sources[source]
	if near == nil || near.everybody.Len() < share {
		return nil
	}
	if mute := near.tooMute(share); mute != nil {
		return mute
	}
	return near.everybody.Front().Value.(*Stranger)
}

// oldestLocked gives the oldest that is not spared while the spared have half of the places or fewer, else the oldest.
func (c *Crowd) oldestLocked(most int) *Stranger {
	out := c.all.everybody.Front()
	for e := out; e != nil && c.spared <= most/2; e = e.Next() {
		if !e.Value.(*Stranger).spared {
			out = e
			break
		}
	}
	return out.Value.(*Stranger)
}

// Spoke notes that v has said something. Spare says that what it said has it stay while others are there, up to half of the
// places, and count for no source.
func (c *Crowd) Spoke(v *Stranger, spare bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v.spoke = true
	if v.all.place == nil {
		return
	}
	c.all.spoke(&v.all)
	if v.near.place != nil {
		c.sources[v.source].spoke(&v.near)
	}
	if spare && !v.spared {
		v.spared = true
		c.spared++
		c.leaveSourceLocked(v)
	}
}

// Leave takes v off, where it still stands.
func (c *Crowd) Leave(v *Stranger) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removeLocked(v)
}

// Len counts them.
func (c *Crowd) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all.everybody.Len()
}

// Mute counts those of them who have said nothing.
func (c *Crowd) Mute() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all.mute.Len()
}

func (c *Crowd) removeLocked(v *Stranger) {
	if v.all.place == nil {
		return
	}
	c.all.leave(&v.all)
	c.leaveSourceLocked(v)
	if v.spared {
		v.spared = false
		c.spared--
	}
}

func (c *Crowd) enterSourceLocked(v *Stranger, source netip.Addr) {
	if !source.IsValid() {
		return
	}
	if c.sources == nil {
		c.sources = map[netip.Addr]*line{}
	}
	if c.sources[source] == nil {
		c.sources[source] = &line{}
	}
	v.source, v.near = source, c.sources[source].enter(v)
}

func (c *Crowd) leaveSourceLocked(v *Stranger) {
	if v.near.place == nil {
		return
	}
	near := c.sources[v.source]
	near.leave(&v.near)
	if near.everybody.Len() == 0 {
		delete(c.sources, v.source)
	}
}
