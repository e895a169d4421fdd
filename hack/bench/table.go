package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// table prints a row per metric and a column per contender: the median, and half of what lies between the lowest and the
// highest round.
func (r *report) table(w io.Writer) error {
	fmt.Fprintf(w, "%s\n%s\n%d rounds in %s; median ±half of the range; < less is better, > more is\n", r.Machine, r.Versions, r.Rounds, r.Took)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	group := ""
	for _, m := range r.Metrics {
		if m.Group != group {
			group = m.Group
			fmt.Fprintf(tw, "\t%s\t\n%s\t\t%s\t\n", strings.Repeat("\t", len(r.Contenders)), strings.ToUpper(group), strings.Join(r.Contenders, "\t"))
		}
		better := "<"
		if m.Up {
			better = ">"
		}
		fmt.Fprintf(tw, "%s, %s\t%s\t", m.Title, m.Unit, better)
		for _, c := range r.Contenders {
			text := "-"
			if s, ok := r.cell(m.Key, c); ok {
				text = number(s.Median)
				if r.Rounds > 1 {
					text += " ±" + number((s.Max-s.Min)/2)
				}
			}
			fmt.Fprint(tw, text, "\t")
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}
