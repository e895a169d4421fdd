package main

import (
	"bytes"
	"fmt"
	"time"
)

// goal is how soon all agents must be back after the loss of every broker.
const goal = 30 * time.Second

// point of a curve: how many agents every broker knew at a moment.
type point struct {
	at    time.Duration
	known int
}

// plotArrivals draws how the agents came, the first time and after every broker was killed: an SVG file.
func plotArrivals(agents int, first, back arrivals, facts []string) []byte {
	const width, height, left, top, right, bottom = 900, 380, 70, 60, 20, 110
	longest := max(first.all, back.all, goal) * 105 / 100
	x := func(d time.Duration) float64 { return left + float64(d)/float64(longest)*(width-left-right) }
	y := func(n int) float64 { return top + (1-float64(n)/float64(agents))*(height-top-bottom) }
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11"><rect width="100%%" height="100%%" fill="white"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="12" y="20" font-size="15" font-weight="bold">%d agents known to each of %d brokers</text>`+"\n", agents, brokers)
	for i, c := range []struct {
		title, colour string
		a             arrivals
	}{{"all come for the first time", "#8a8a8a", first}, {"every broker was killed and started again", "#1f5fbf", back}} {
		fmt.Fprintf(&b, `<text x="%d" y="40" fill="%s">%s: all after %s</text><polyline fill="none" stroke="%s" stroke-width="2" points="%.1f,%.1f `,
			left+i*320, c.colour, c.title, c.a.all, c.colour, x(0), y(0))
		for _, p := range c.a.curve {
			fmt.Fprintf(&b, "%.1f,%.1f ", x(p.at), y(p.known))
		}
		b.WriteString(`"/>` + "\n")
	}
	fmt.Fprintf(&b, `<path d="M%.1f %dV%dM%d %.1fH%d" stroke="black" fill="none"/>`+"\n", x(0), top, height-bottom, left, y(0), width-right)
	for s := time.Duration(0); s <= longest; s += 5 * time.Second {
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%.0f s</text>`, x(s), height-bottom+15, s.Seconds())
	}
	for _, n := range []int{0, agents / 2, agents} {
		fmt.Fprintf(&b, `<text x="%d" y="%.1f" text-anchor="end">%d</text>`, left-5, y(n)+4, n)
	}
	fmt.Fprintf(&b, `<path d="M%.1f %dV%d" stroke="#c2682b" stroke-dasharray="4 3"/><text x="%.1f" y="%d" fill="#c2682b" text-anchor="end">goal</text>`+"\n", x(goal), top, height-bottom, x(goal)-4, top+10)
	for i, f := range facts {
		fmt.Fprintf(&b, `<text x="%d" y="%d" fill="#333">%s</text>`+"\n", left, height-bottom+36+16*i, f)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
