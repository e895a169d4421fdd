package main

import (
	"bytes"
	"fmt"
	"html"
	"time"
)

// goal is how soon all agents must be back after the loss of every broker.
const goal = 30 * time.Second

// point of a curve: how many there were at a moment.
type point struct {
	at    time.Duration
	known int
}

// curve is one line of a plot.
type curve struct {
	title, colour string
	points        []point
}

// plotArrivals draws how the agents came, the first time and after every broker was killed: an SVG file.
func plotArrivals(agents int, first, back arrivals, facts []string) []byte {
	return plot(fmt.Sprintf("%d agents known to each of %d brokers", agents, brokers), agents, goal, []curve{
		{fmt.Sprintf("all come for the first time: all after %s", first.all), "#8a8a8a", first.curve},
		{fmt.Sprintf("every broker was killed and started again: all after %s", back.all), "#1f5fbf", back.curve},
	}, facts)
}

// plot draws curves over time, up to most, with a line at the goal (none where it is 0) and facts below: an SVG file.
func plot(title string, most int, goal time.Duration, curves []curve, facts []string) []byte {
	const width, left, top, right, bottom, line = 900, 70, 60, 20, 60, 16
	height := 320 + line*len(facts)
	low := height - bottom - line*len(facts) // of the plot
	longest := goal
	for _, c := range curves {
		for _, p := range c.points {
			longest = max(longest, p.at)
		}
	}
	longest = longest * 105 / 100
	x := func(d time.Duration) float64 { return left + float64(d)/float64(longest)*(width-left-right) }
	y := func(n int) float64 { return top + (1-float64(n)/float64(most))*float64(low-top) }
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11"><rect width="100%%" height="100%%" fill="white"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="12" y="20" font-size="15" font-weight="bold">%s</text>`+"\n", title)
	for i, c := range curves {
		fmt.Fprintf(&b, `<text x="%d" y="40" fill="%s">%s</text><polyline fill="none" stroke="%s" stroke-width="2" points="%.1f,%.1f `,
			left+i*320, c.colour, c.title, c.colour, x(0), y(0))
		for _, p := range c.points {
			fmt.Fprintf(&b, "%.1f,%.1f ", x(p.at), y(p.known))
		}
		b.WriteString(`"/>` + "\n")
	}
	fmt.Fprintf(&b, `<path d="M%.1f %dV%dM%d %.1fH%d" stroke="black" fill="none"/>`+"\n", x(0), top, low, left, y(0), width-right)
	step := 5 * time.Second
	for longest/step > 15 {
		step *= 2
	}
	for s := time.Duration(0); s <= longest; s += step {
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%.0f s</text>`, x(s), low+15, s.Seconds())
	}
	for _, n := range []int{0, most / 2, most} {
		fmt.Fprintf(&b, `<text x="%d" y="%.1f" text-anchor="end">%d</text>`, left-5, y(n)+4, n)
	}
	if goal > 0 {
		fmt.Fprintf(&b, `<path d="M%.1f %dV%d" stroke="#c2682b" stroke-dasharray="4 3"/><text x="%.1f" y="%d" fill="#c2682b" text-anchor="end">goal</text>`, x(goal), top, low, x(goal)-4, top+10)
	}
	for i, f := range facts {
		fmt.Fprintf(&b, `<text x="%d" y="%d" fill="#333">%s</text>`+"\n", left, low+36+line*i, html.EscapeString(f))
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
