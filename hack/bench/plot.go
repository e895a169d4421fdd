package main

import (
	"bytes"
	"fmt"
	"html"
)

// colours of the contenders, in their order: ours in blue.
var colours = []string{"#1f5fbf", "#6aa3e8", "#c2682b", "#3f8f4f", "#8a8a8a", "#b04a7a"}

const (
	plotColumns = 3
	panelWidth  = 380
	barHeight   = 15
	labelWidth  = 76
	barsWidth   = 220
	panelHead   = 34
	panelFoot   = 16
)

// plot draws a panel per metric: a bar to the median, a whisker from the lowest to the highest round. It is an SVG file.
func (r *report) plot() []byte {
	panelHeight := panelHead + len(r.Contenders)*barHeight + panelFoot
	rows := (len(r.Metrics) + plotColumns - 1) / plotColumns
	const top = 48
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", plotColumns*panelWidth+20, top+rows*panelHeight)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/><text x="12" y="20" font-size="15" font-weight="bold">Relay, peers and yardstick: medians, whiskers from lowest to highest round</text>`+"\n")
	fmt.Fprintf(&b, `<text x="12" y="37" fill="#555">%s; %s</text>`+"\n", html.EscapeString(r.Machine), html.EscapeString(r.Versions))
	for i, m := range r.Metrics {
		x, y := 12+i%plotColumns*panelWidth, top+i/plotColumns*panelHeight
		r.panel(&b, m, x, y)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func (r *report) panel(b *bytes.Buffer, m metric, x, y int) {
	better := "less is better"
	if m.Up {
		better = "more is better"
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" font-weight="bold">%s</text><text x="%d" y="%d" fill="#555">%s, %s; %s</text>`+"\n",
		x, y+14, html.EscapeString(m.Group), x, y+27, html.EscapeString(m.Title), html.EscapeString(m.Unit), better)
	highest := 0.0
	for _, c := range r.Contenders {
		if s, ok := r.cell(m.Key, c); ok {
			highest = max(highest, s.Max)
		}
	}
	if highest <= 0 {
		return
	}
	at := func(v float64) float64 { return float64(x+labelWidth) + max(v, 0)/highest*barsWidth }
	for i, c := range r.Contenders {
		top := y + panelHead + i*barHeight
		fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, x+labelWidth-5, top+11, html.EscapeString(c))
		s, ok := r.cell(m.Key, c)
		if !ok {
			fmt.Fprintf(b, `<text x="%d" y="%d" fill="#999">not measured</text>`+"\n", x+labelWidth, top+11)
			continue
		}
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, x+labelWidth, top+2, at(s.Median)-at(0), barHeight-4, colours[i%len(colours)])
		fmt.Fprintf(b, `<path d="M%.1f %dH%.1fM%.1f %dv6M%.1f %dv6" stroke="black"/>`, at(s.Min), top+7, at(s.Max), at(s.Min), top+4, at(s.Max), top+4)
		fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`+"\n", at(s.Max)+5, top+11, number(s.Median))
	}
}
