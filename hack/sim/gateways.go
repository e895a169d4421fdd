package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"rendezvous.dev/rendezvous/wire/choose"
)

const (
	gateways = 50
	// reportAfter is how long after a change a gateway reports it, with all that came meanwhile.
	reportAfter = 250 * time.Millisecond
	// measuring is how long rdv takes between reading the list of gateways and having chosen.
	measuring = 300 * time.Millisecond
)

// betweenRegions are round trips.
var betweenRegions = [regions][regions]time.Duration{
	{4 * time.Millisecond, 80 * time.Millisecond, 140 * time.Millisecond},
	{80 * time.Millisecond, 4 * time.Millisecond, 110 * time.Millisecond},
	{140 * time.Millisecond, 110 * time.Millisecond, 4 * time.Millisecond},
}

type gateway struct {
	name   string
	region int
	// far is what this one adds to a round trip.
	far     time.Duration
	live    int
	storm   int // came with the storm
	pending bool
	seen    [brokers]int
	onWay   [brokers]int
}

// makeGateways puts three quarters of each region's gateways where the region's users feel no difference, and the others
// further off.
func makeGateways(r *rand.Rand) []*gateway {
	var all []*gateway
	for i := range gateways {
		g := &gateway{name: fmt.Sprintf("g%02d", i), region: i % regions, far: time.Duration(r.Int64N(int64(2 * time.Millisecond)))}
		if i%4 == 3 {
			g.far += 15 * time.Millisecond
		}
		all = append(all, g)
	}
	return all
}

func (g *gateway) near() bool { return g.far < 10*time.Millisecond }

// chooser says how gateways are chosen.
type chooser struct {
	title string
	// measured: the client measures and chooses, by a list that it read before. Otherwise the feed does, by load alone.
	measured bool
	// ahead: those on their way count.
	ahead bool
	// group: the client names all that it found nearest, and the feed picks of these.
	group bool
}

// front is the gateways' part of the world: nobody waits for a host here.
type front struct {
	clock
	chooser
	rand     *rand.Rand
	gateways []*gateway
}

// arrive is one client, from the list to the connect.
func (f *front) arrive(region int, storm bool) {
	broker := f.rand.IntN(brokers)
	ranked := f.rank(f.gateways, region, broker, f.measured)
	if !f.measured {
		f.travel(f.gateway(ranked[0]), broker, storm)
		return
	}
	f.after(measuring, func() {
		g := f.gateway(ranked[0])
		if f.group {
			var near []*gateway
			for _, w := range ranked {
				if w.Group == ranked[0].Group {
					near = append(near, f.gateway(w))
				}
			}
			g = f.gateway(f.rank(near, region, broker, false)[0])
		}
		f.travel(g, broker, storm)
	})
}

func (f *front) gateway(w choose.Weighed) *gateway {
	return f.gateways[slices.IndexFunc(f.gateways, func(g *gateway) bool { return g.name == w.Name })]
}

// rank applies the rule by what a broker knows, and by latencies where they are measured.
func (f *front) rank(of []*gateway, region, broker int, measured bool) []choose.Weighed {
	candidates := make([]choose.Candidate, len(of))
	for i, g := range of {
		c := choose.Candidate{Name: g.name, Answered: true, Connections: g.seen[broker]}
		if measured {
			c.Latency = betweenRegions[region][g.region] + g.far + time.Duration(f.rand.Int64N(int64(3*time.Millisecond)))
		}
		if f.ahead {
			c.Connections += g.onWay[broker]
		}
		candidates[i] = c
	}
	ranked, _ := choose.Gateway(candidates)
	return ranked
}

// travel is the way from the ticket to the session, and its end.
func (f *front) travel(g *gateway, broker int, storm bool) {
	f.expect(g, broker, 1)
	f.after(300*time.Millisecond+time.Duration(f.rand.Int64N(int64(1500*time.Millisecond))), func() {
		g.live++
		if storm {
			g.storm++
		}
		f.report(g)
		// The connect tells every broker, and the gateway's report takes its place.
		f.after(reportAfter, func() { f.expect(g, broker, -1) })
		f.after(time.Duration(f.rand.ExpFloat64()*float64(25*time.Minute)), func() { g.live--; f.report(g) })
	})
}

// expect counts one on the way more or less: at once at the broker itself, at the others within moments.
func (f *front) expect(g *gateway, broker, n int) {
	for b := range brokers {
		if b == broker {
			g.onWay[b] += n
			continue
		}
		f.after(time.Duration(f.rand.Int64N(int64(4*time.Millisecond))), func() { g.onWay[b] += n })
	}
}

func (f *front) report(g *gateway) {
	if g.pending {
		return
	}
	g.pending = true
	f.after(reportAfter, func() {
		g.pending = false
		live := g.live
		for b := range brokers {
			f.after(time.Duration(f.rand.Int64N(int64(4*time.Millisecond))), func() { g.seen[b] = live })
		}
	})
}

// weights of the regions' users.
func (f *front) region() int {
	switch roll := f.rand.Float64(); {
	case roll < .5:
		return 0
	case roll < .8:
		return 1
	}
	return 2
}

// evenness gives max/mean over the gateways that clients are to be spread over, worst region first: those near by region
// where clients measure, else all.
func (f *front) evenness(count func(*gateway) int) float64 {
	worst := 0.0
	for r := range regions {
		most, sum, n := 0, 0, 0
		for _, g := range f.gateways {
			if f.measured && (g.region != r || !g.near()) {
				continue
			}
			most, sum, n = max(most, count(g)), sum+count(g), n+1
		}
		if sum > 0 {
			worst = max(worst, float64(most)*float64(n)/float64(sum))
		}
	}
	return worst
}

// runFront has connects come over an hour, and in the middle of it storm of them within one second.
func runFront(how chooser, seed uint64, connects, storm int) (afterStorm, steady float64) {
	r := rand.New(rand.NewPCG(seed, 11))
	f := &front{chooser: how, rand: r, gateways: makeGateways(r)}
	for range connects {
		f.after(time.Duration(r.Int64N(int64(time.Hour))), func() { f.arrive(f.region(), false) })
	}
	for range storm {
		f.after(30*time.Minute+time.Duration(r.Int64N(int64(time.Second))), func() { f.arrive(f.region(), true) })
	}
	f.run(30*time.Minute - time.Second)
	steady = f.evenness(func(g *gateway) int { return g.live })
	f.run(30*time.Minute + 10*time.Second)
	return f.evenness(func(g *gateway) int { return g.storm }), steady
}
