package main

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// goal is a ratio of two contenders in one metric, and its bound.
type goal struct {
	Title  string
	Metric string
	Of     string
	To     string
	AtMost float64
}

// outcome is what became of a goal. Measured is false where the run lacks a side.
type outcome struct {
	goal
	Ratio    spread
	Measured bool
}

func (o outcome) met() bool { return o.Measured && o.Ratio.Median <= o.AtMost }

// goals are those that the relay was engineered to.
func goals() []goal {
	var g []goal
	for _, m := range []string{"cpu-down-1", "cpu-down-16", "cpu-up-1", "cpu-up-16"} {
		g = append(g, goal{Title: "raw mode's CPU per GiB to nginx's", Metric: m, Of: "relay-raw", To: "nginx", AtMost: 0.75})
	}
	for _, m := range []string{"cpu-down-1", "cpu-down-16", "cpu-up-1", "cpu-up-16"} {
		g = append(g, goal{Title: "TSGU's CPU per GiB to raw mode's", Metric: m, Of: "relay-tsgu", To: "relay-raw", AtMost: 1.25})
	}
	for _, of := range []string{"relay-raw", "relay-tsgu"} {
		for _, m := range []string{"rss-2000-fresh", "rss-2000-used", "rss-10000-fresh", "rss-10000-used"} {
			g = append(g, goal{Title: "memory of an idle session to HAProxy's", Metric: m, Of: of, To: "haproxy", AtMost: 1})
		}
	}
	for _, of := range []string{"relay-raw", "relay-tsgu"} {
		for _, m := range []string{"setup-cpu-full", "setup-cpu-resumed"} {
			g = append(g, goal{Title: "set-up CPU to HAProxy's", Metric: m, Of: of, To: "haproxy", AtMost: 0.75})
		}
	}
	for _, of := range []string{"relay-raw", "relay-tsgu"} {
		g = append(g, goal{Title: "p99 beside 200 busy sessions to HAProxy's", Metric: "rtt-200-p99", Of: of, To: "haproxy", AtMost: 1})
	}
	return g
}

// judge compares round by round, for the two sides of one round met the same machine, and takes the median of the ratios.
func (r *report) judge(g goal) outcome {
	of, to := r.values(g.Metric, g.Of), r.values(g.Metric, g.To)
	var ratios []float64
	for round, v := range of {
		if base := to[round]; base > 0 {
			ratios = append(ratios, v/base)
		}
	}
	return outcome{g, summarise(ratios), len(ratios) > 0}
}

// check prints a row per goal and says whether all that were measured are met.
func (r *report) check(w io.Writer) (met bool, err error) {
	met = true
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "\nGOAL\tmetric\tof\tratio\t(rounds)\tat most\t")
	for _, g := range goals() {
		o := r.judge(g)
		if !o.Measured {
			continue
		}
		word := "met"
		if !o.met() {
			word, met = "NOT MET", false
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%.2f\t%.2f to %.2f\t%.2f\t%s\n", g.Title, g.Metric, g.Of, o.Ratio.Median, o.Ratio.Min, o.Ratio.Max, g.AtMost, word)
	}
	return met, tw.Flush()
}
