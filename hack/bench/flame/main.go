// Command flame draws a flame graph (SVG) of a CPU profile of Go's:
//
//	go run ./flame cpu.pprof > flame.svg
//
// A box is a function, as wide as its share of CPU time; what it calls stands above it. Shares below half a percent are left out.
package main

import (
	"bufio"
	"cmp"
	"fmt"
	"html"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/google/pprof/profile"
)

const (
	width, row, least = 1200.0, 18, 0.005
	charWidth         = 6.6 // of the 11 pixel font, about
)

// frame is a function in its place in the stack.
type frame struct {
	name  string
	value int64
	calls map[string]*frame
}

func (f *frame) call(name string) *frame {
	if f.calls == nil {
		f.calls = map[string]*frame{}
	}
	if f.calls[name] == nil {
		f.calls[name] = &frame{name: name}
	}
	return f.calls[name]
}

// depth is how many rows f needs.
func (f *frame) depth(total int64) int {
	d := 0
	for _, c := range f.calls {
		if float64(c.value) >= least*float64(total) {
			d = max(d, c.depth(total))
		}
	}
	return d + 1
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return fmt.Errorf("usage: flame cpu.pprof > flame.svg")
	}
	f, err := os.Open(os.Args[1])
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := profile.Parse(f)
	if err != nil {
		return err
	}
	out := bufio.NewWriter(os.Stdout)
	draw(out, gather(p))
	return out.Flush()
}

// gather makes one tree of all samples.
func gather(p *profile.Profile) *frame {
	root := &frame{name: "all"}
	last := len(p.SampleType) - 1 // CPU nanoseconds
	for _, s := range p.Sample {
		v := s.Value[last]
		root.value += v
		at := root
		for _, loc := range slices.Backward(s.Location) {
			for _, line := range slices.Backward(loc.Line) {
				at = at.call(line.Function.Name)
				at.value += v
			}
		}
	}
	return root
}

func draw(w io.Writer, root *frame) {
	height := root.depth(root.value) * row
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %d" font-family="monospace" font-size="11">`+"\n", width, height)
	var place func(f *frame, x float64, level int)
	place = func(f *frame, x float64, level int) {
		share := float64(f.value) / float64(root.value)
		if share < least {
			return
		}
		short := f.name[strings.LastIndexByte(f.name, '/')+1:]
		fmt.Fprintf(w, `<g><title>%s: %.1f %%</title><rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s" stroke="#fff" stroke-width="0.5"/>`,
			html.EscapeString(f.name), 100*share, x, height-(level+1)*row, share*width, row, colour(f.name))
		if n := int(share * width / charWidth); n > 3 {
			fmt.Fprintf(w, `<text x="%.1f" y="%d">%s</text>`, x+3, height-level*row-5, html.EscapeString(short[:min(len(short), n-1)]))
		}
		fmt.Fprintln(w, "</g>")
		calls := slices.SortedFunc(maps.Values(f.calls), func(a, b *frame) int { return cmp.Compare(b.value, a.value) })
		for _, c := range calls {
			place(c, x, level+1)
			x += float64(c.value) / float64(root.value) * width
		}
	}
	place(root, 0, 0)
	fmt.Fprintln(w, "</svg>")
}

// colour tells at a glance whose time it is: the kernel's, cryptography's, our own, the rest of Go's.
func colour(name string) string {
	switch {
	case strings.Contains(name, "yscall"), strings.HasPrefix(name, "golang.org/x/sys/unix."):
		return "#f0b090"
	case strings.HasPrefix(name, "crypto/"):
		return "#b8cce8"
	case strings.HasPrefix(name, "rendezvous.dev/"):
		return "#b5dba8"
	}
	return "#e4e0d4"
}
