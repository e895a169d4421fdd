package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"
)

// fleetOptions of one simulation.
type fleetOptions struct {
	Seed     uint64
	Connects int
	// Scale is in hundredths of the full size.
	Scale int
}

// storm is how many come within one second, for the gateways' part.
const storm = 2_000

// runFleet simulates an hour and prints what there was.
func runFleet(o fleetOptions, out io.Writer) error {
	begin := time.Now()
	w := newWorld(o.Seed, o.Scale)
	hosts := 0
	for _, p := range w.pools {
		hosts += len(p.hosts)
	}
	// A third each of the users work in pools of each size, those in the small ones crowd into a few: so the great pools
	// are half empty, and some small ones overrun.
	for i := range o.Connects {
		var p *pool
		switch i % 3 {
		case 0:
			p = w.pools[w.rand.IntN(5)]
		case 1:
			p = w.pools[5+w.rand.IntN(45)]
		default:
			p = w.pools[50+w.rand.IntN(12)]
		}
		w.after(time.Duration(w.rand.Int64N(int64(time.Hour))), func() { w.live(fmt.Sprint("u", i), p) })
	}
	w.run(time.Hour)

	r := &w.result
	fmt.Fprintf(out, "%d hosts in %d pools, %d brokers, %d connects in one simulated hour, seed %d\n\n", hosts, len(w.pools), brokers, r.accepted+r.refused, o.Seed)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(cells ...any) {
		for _, c := range cells {
			fmt.Fprintf(t, "%v\t", c)
		}
		fmt.Fprintln(t)
	}
	row("CONNECTS", "accepted", "back to own session", "elsewhere than own", "refused: full", "refused as one came free", "refused, a place free", "overfull hosts", "questions/connect", "looked again")
	row("", r.accepted, r.resumed, r.elsewhere, r.refused-r.refusedFree-r.refusedInTheMoment, r.refusedInTheMoment, r.refusedFree, r.overfull, fmt.Sprintf("%.3f", float64(r.questions)/float64(max(1, r.accepted+r.refused))), r.looks)
	t.Flush()
	fmt.Fprintln(out)
	row("HOSTS IN POOL", "sessions", "breadth first: max/mean", "depth first: used/needed", "decisions", "p50", "p99", "max")
	for _, kind := range []string{"10000", "1000", "100"} {
		e := evenness(w.pools, kind)
		d := r.decisions[kind]
		slices.Sort(d)
		at := func(q float64) time.Duration {
			if len(d) == 0 {
				return 0
			}
			return d[min(len(d)-1, int(q*float64(len(d))))].Round(time.Microsecond)
		}
		row(kind, e.sessions, fmt.Sprintf("%d/%.2f", e.most, e.mean), fmt.Sprintf("%d/%d", e.used, e.needed), len(d), at(.5), at(.99), at(1))
	}
	t.Flush()
	fmt.Fprintln(out)
	row(fmt.Sprintf("%d GATEWAYS, %d REGIONS", gateways, regions), "steady: max/mean", fmt.Sprintf("of %d in one second: max/mean", storm))
	for _, c := range []chooser{
		{"rdv measures and chooses; live sessions count", true, false, false},
		{"rdv measures and chooses; those on their way too", true, true, false},
		{"rdv measures, the feed chooses of the nearest", true, true, true},
		{"the feed chooses; live sessions count", false, false, false},
		{"the feed chooses; those on their way too", false, true, false},
	} {
		after, steady := runFront(c, o.Seed, 20_000, storm)
		row(c.title, fmt.Sprintf("%.2f", steady), fmt.Sprintf("%.2f", after))
	}
	t.Flush()
	fmt.Fprintf(out, "\nmax/mean is 1 where all carry the same; of gateways, it is the worst region's, over those that are near. Took %s.\n", time.Since(begin).Round(100*time.Millisecond))
	if r.overfull > 0 || r.refusedFree > 0 {
		return fmt.Errorf("%d times a host was overfull, %d times a connect was refused while a place was free", r.overfull, r.refusedFree)
	}
	return nil
}

// spread says how evenly the pools of one size are filled, or how densely.
type spread struct {
	sessions, most int
	mean           float64
	used, needed   int
}

// evenness looks at hosts that take sessions: Pooled pools only.
func evenness(pools []*pool, kind string) spread {
	var s spread
	open := 0
	for _, p := range pools {
		if p.kind != kind {
			continue
		}
		sessions, used := 0, 0
		for _, h := range p.hosts {
			s.sessions += len(h.sessions)
			sessions += len(h.sessions)
			if len(h.sessions) > 0 {
				used++
			}
			if !p.rules.DepthFirst && !p.rules.Personal && h.connected && h.ready && !h.draining {
				s.most = max(s.most, len(h.sessions))
				s.mean += float64(len(h.sessions))
				open++
			}
		}
		if p.rules.DepthFirst {
			s.used += used
			s.needed += (sessions + perHost - 1) / perHost
		}
	}
	s.mean /= float64(max(1, open))
	return s
}
