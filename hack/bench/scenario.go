package main

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// scenario measures one contender once.
type scenario struct {
	name string
	// fresh has the stack started anew before each measurement.
	fresh  bool
	rounds func(p plan) int
	// add measures, and notes what it found.
	measure func(ctx context.Context, b *bench, c *contender, p plan, add func(m metric, v float64)) error
}

func everyRound(p plan) int { return p.rounds }

func scenarios() []scenario {
	var all []scenario
	for _, streams := range []int{1, 16} {
		for _, down := range []bool{true, false} {
			way, title := "up", "client to host"
			if down {
				way, title = "down", "host to client"
			}
			all = append(all, scenario{name: fmt.Sprintf("%s-%d", way, streams), rounds: everyRound,
				measure: func(ctx context.Context, b *bench, c *contender, p plan, add func(metric, float64)) error {
					cpu, rate, err := b.throughput(ctx, c, streams, down, p.duration)
					key := fmt.Sprintf("%s-%d", way, streams)
					add(metric{Key: "cpu-" + key, Group: "throughput", Title: fmt.Sprintf("CPU, %s, %d streams", title, streams), Unit: "s/GiB"}, cpu)
					add(metric{Key: "rate-" + key, Group: "throughput", Title: fmt.Sprintf("rate, %s, %d streams", title, streams), Unit: "MiB/s", Up: true}, rate)
					return err
				}})
		}
	}
	quantiles := func(add func(metric, float64), key, group, title string, v []time.Duration, unit string, per time.Duration, qs ...float64) {
		for _, q := range qs {
			name := strings.TrimSuffix(fmt.Sprintf("p%g", q*100), "0")
			if q == 0.5 {
				name = "p50"
			}
			add(metric{Key: key + "-" + name, Group: group, Title: title + ", " + name, Unit: unit}, float64(quantile(v, q))/float64(per))
		}
	}
	all = append(all,
		scenario{name: "rtt-1", rounds: everyRound,
			measure: func(ctx context.Context, b *bench, c *contender, p plan, add func(metric, float64)) error {
				trips, err := b.closedLoop(ctx, c, p.duration)
				quantiles(add, "rtt-1", "64-byte round trip", "alone", trips, "µs", time.Microsecond, 0.5, 0.99, 0.999)
				return err
			}},
		scenario{name: "rtt-200", rounds: everyRound,
			measure: func(ctx context.Context, b *bench, c *contender, p plan, add func(metric, float64)) error {
				w, err := b.work(ctx, c, busyOffice, p.duration)
				if err != nil {
					return err
				}
				quantiles(add, "rtt-200", "64-byte round trip", "200 busy", w.trips, "µs", time.Microsecond, 0.5, 0.99, 0.999)
				add(metric{Key: "rtt-200-cores", Group: "64-byte round trip", Title: "200 busy, CPU", Unit: "cores"}, w.cores)
				return nil
			}},
		scenario{name: "fair", rounds: everyRound,
			measure: func(ctx context.Context, b *bench, c *contender, p plan, add func(metric, float64)) error {
				w, err := b.work(ctx, c, office{sessions: 199, typing: 100 * time.Millisecond, greedy: true}, p.duration)
				if err != nil {
					return err
				}
				quantiles(add, "fair", "fair share", "199 typists beside 1 greedy", w.trips, "ms", time.Millisecond, 0.5, 0.99)
				add(metric{Key: "fair-rate", Group: "fair share", Title: "the greedy one's rate", Unit: "MiB/s", Up: true}, w.rate)
				return nil
			}},
	)
	for _, resume := range []bool{false, true} {
		kind := "full"
		if resume {
			kind = "resumed"
		}
		all = append(all, scenario{name: "setup-" + kind, rounds: everyRound,
			measure: func(ctx context.Context, b *bench, c *contender, p plan, add func(metric, float64)) error {
				o, err := b.setUp(ctx, c, resume, p.duration)
				if err != nil {
					return err
				}
				group := "set-up, " + kind + " handshakes"
				add(metric{Key: "setup-rate-" + kind, Group: group, Title: "sessions", Unit: "1/s", Up: true}, o.rate)
				add(metric{Key: "setup-cpu-" + kind, Group: group, Title: "CPU per session", Unit: "ms"}, ms(o.sum))
				if d, ok := o.cpu["gateway"]; ok {
					add(metric{Key: "setup-gateway-" + kind, Group: group, Title: "of it the gateway container's", Unit: "ms"}, ms(d))
				}
				quantiles(add, "connect-"+kind, group, "connect", o.connect, "ms", time.Millisecond, 0.5, 0.99)
				return nil
			}})
	}
	for i := range thorough.idle {
		all = append(all, scenario{name: fmt.Sprintf("idle-%d", thorough.idle[i]), fresh: true,
			rounds: func(p plan) int {
				switch {
				case i >= len(p.idle):
					return 0
				case i == len(thorough.idle)-1:
					return p.wide
				}
				return min(p.rounds, 2)
			},
			measure: func(ctx context.Context, b *bench, c *contender, p plan, add func(metric, float64)) error {
				n := p.idle[i]
				if c.most > 0 && n > c.most {
					return nil
				}
				if most := (int(b.descriptors) - 100) / 2; n > most { // both of a session's in one process
					n = most
				}
				fresh, used, err := b.idle(ctx, c, n)
				key := fmt.Sprintf("rss-%d", thorough.idle[i])
				add(metric{Key: key + "-fresh", Group: "memory of an idle session", Title: fmt.Sprintf("%d sessions, fresh", n), Unit: "KiB"}, fresh/kib)
				add(metric{Key: key + "-used", Group: "memory of an idle session", Title: fmt.Sprintf("%d sessions, after 256 KiB each", n), Unit: "KiB"}, used/kib)
				return err
			}})
	}
	return all
}

// busyOffice is 200 people who type and look at pictures that change: 4,000 round trips and 31 MiB a second.
var busyOffice = office{sessions: 200, typing: 50 * time.Millisecond, update: 16 * kib, updating: 100 * time.Millisecond}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func scenarioNames() (names []string) {
	for _, s := range scenarios() {
		names = append(names, s.name)
	}
	return names
}
