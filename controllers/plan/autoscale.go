package plan

import "time"

// Autoscaling is how many hosts a pool keeps, by the places that are free.
type Autoscaling struct {
	Min, Max int32 // hosts
	// FreePlaces are to be free, or, where it is 0, FreePercent of all places.
	FreePlaces, FreePercent int32
	// Delay is how long there must be hosts too many before any goes.
	Delay time.Duration
	// PerHost is how many places a new host brings.
	PerHost int32
}

// Scaled is what was decided before. The zero value is a pool of which nothing was decided yet.
type Scaled struct {
	Decided bool
	Desired int32
	// Since is from when on fewer hosts would have done, zero while they would not; Enough is how many would have, at
	// every moment since then.
	Since  time.Time
	Enough int32
}

// ScaleDecision is how many hosts a pool is to have, and why.
type ScaleDecision struct {
	Scaled
	// Free places, those of hosts that are on their way, and how many are to be free.
	Free, Coming, Wanted int32
	// Limited says that Max keeps the pool from having enough.
	Limited bool
	// Next is when to look again; 0 means that time alone changes nothing.
	Next time.Duration
}

// Autoscale plans how many hosts a pool has. More come at once when too few places are free; fewer only when fewer would
// have done for all of Delay, so that places which are needed again soon stay. others are the places of hosts that the
// pool did not make: they are counted and never removed. A place is free on a host that is ready and does not drain.
func Autoscale(policy Autoscaling, hosts []Host, others Host, before Scaled, now time.Time) ScaleDecision {
	current := before.Desired
	if !before.Decided {
		for _, h := range hosts {
			if !h.Retiring {
				current++
			}
		}
	}
	current = min(max(current, policy.Min), policy.Max)

	// Those that Hosts, told of current, would keep.
	staying := inOrderOfLeaving(hosts)[max(0, len(hosts)-int(current)):]
	missing := current - int32(len(staying))
	fleet := places{free: others.Free, all: others.Places}
	for _, h := range staying {
		fleet.add(placesOf(h, policy))
	}
	expected := places{coming: policy.PerHost, all: policy.PerHost}
	for range missing {
		fleet.add(expected)
	}
	d := ScaleDecision{Free: fleet.free, Coming: fleet.coming, Wanted: policy.wanted(fleet), Scaled: Scaled{Decided: true, Desired: current}}

	for !policy.content(fleet) {
		if d.Desired >= policy.Max {
			d.Limited = true
			break
		}
		d.Desired++
		fleet.add(expected)
	}
	if d.Desired > current || d.Limited {
		return d
	}

	enough := current
	for less := fleet; enough > policy.Min; enough-- {
		if missing > 0 { // not made yet
			less.add(expected.negative())
			missing--
		} else {
			if staying[0].Assigned { // and so are all that follow
				break
			}
			less.add(placesOf(staying[0], policy).negative())
			staying = staying[1:]
		}
		if !policy.content(less) {
			break
		}
	}
	if enough == current {
		return d
	}
	if before.Since.IsZero() {
		before.Since, before.Enough = now, enough
	}
	before.Enough = min(max(before.Enough, enough), current)
	if left := policy.Delay - now.Sub(before.Since); left > 0 {
		d.Since, d.Enough, d.Next = before.Since, before.Enough, left
		return d
	}
	d.Desired = before.Enough
	return d
}

// places of some hosts.
type places struct{ free, coming, all int32 }

func (p *places) add(q places) {
	p.free, p.coming, p.all = p.free+q.free, p.coming+q.coming, p.all+q.all
}

func (p places) negative() places { return places{-p.free, -p.coming, -p.all} }

func placesOf(h Host, policy Autoscaling) places {
	if h.Coming {
		return places{coming: policy.PerHost, all: policy.PerHost}
	}
	return places{free: h.Free, all: h.Places}
}

// wanted is how many places are to be free, of those that there are: one at least, for no share of none is enough.
func (a Autoscaling) wanted(p places) int32 {
	if a.FreePlaces > 0 {
		return a.FreePlaces
	}
	return max(1, int32((int64(p.all)*int64(a.FreePercent)+99)/100))
}

// content says whether enough places are free, or soon will be.
func (a Autoscaling) content(p places) bool { return p.free+p.coming >= a.wanted(p) }
