package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"html"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// flame records where the relay's CPU time goes in one of flameLoads, by perf, kernel included, and draws it.
func (b *bench) flame(ctx context.Context, load, dir string) error {
	c := b.contenders[0]
	run, ok := map[string]func() error{
		"down":  func() error { _, _, err := b.throughput(ctx, c, 1, true, flameTime); return err },
		"up":    func() error { _, _, err := b.throughput(ctx, c, 1, false, flameTime); return err },
		"busy":  func() error { _, err := b.work(ctx, c, busyOffice, flameTime); return err },
		"setup": func() error { _, err := b.setUp(ctx, c, false, flameTime); return err },
	}[load]
	if !ok {
		return fmt.Errorf("bench: -flame takes %s, not %q", flameLoads, load)
	}
	if err := install("linux-perf"); err != nil {
		return err
	}
	if err := c.stack.start(ctx); err != nil {
		return err
	}
	data := filepath.Join(b.dir, "perf.data")
	record := exec.CommandContext(ctx, "perf", "record", "-q", "-F", "997", "-e", "cpu-clock", "-g", "-p", strconv.Itoa(b.pod.relay.pids[0]), "-o", data)
	if err := record.Start(); err != nil {
		return err
	}
	progress("%s under %s", c.name, load)
	err := run()
	record.Process.Signal(os.Interrupt)
	record.Wait() // interrupted, it says so
	if err != nil {
		return err
	}
	script, err := exec.CommandContext(ctx, "perf", "script", "-i", data, "-F", "ip,sym,dso").Output()
	if err != nil {
		return fmt.Errorf("bench: perf script: %w", err)
	}
	root, err := fold(bytes.NewReader(script))
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "flame-"+load+".svg")
	title := fmt.Sprintf("CPU time of the relay, %s: %d samples; %s", load, root.n, machine())
	if err := os.WriteFile(file, root.draw(title), 0o644); err != nil {
		return err
	}
	fmt.Println("flame graph:", file)
	return nil
}

const (
	flameLoads = "down, up, busy or setup"
	flameTime  = 6 * time.Second
)

// frame is one function in the place that its callers give it.
type frame struct {
	n      int // samples in it and what it called
	kernel bool
	calls  map[string]*frame
}

func (f *frame) call(name string, kernel bool) *frame {
	if f.calls == nil {
		f.calls = map[string]*frame{}
	}
	g := f.calls[name]
	if g == nil {
		g = &frame{kernel: kernel}
		f.calls[name] = g
	}
	g.n++
	return g
}

// fold reads the stacks of perf script: lines of address, function and file, innermost first, a blank line after each stack.
func fold(r io.Reader) (*frame, error) {
	type line struct {
		name   string
		kernel bool
	}
	root := &frame{}
	var stack []line
	end := func() {
		if len(stack) == 0 {
			return
		}
		root.n++
		at := root
		for _, l := range slices.Backward(stack) {
			at = at.call(l.name, l.kernel)
		}
		stack = stack[:0]
	}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		text := strings.TrimSpace(sc.Text())
		if text == "" {
			end()
			continue
		}
		_, rest, _ := strings.Cut(text, " ") // the address
		open := strings.LastIndex(rest, " (")
		if open < 0 {
			continue
		}
		name, _, _ := strings.Cut(rest[:open], "+0x")
		stack = append(stack, line{strings.TrimSuffix(name, ".abi0"), strings.Contains(rest[open:], "kernel")})
	}
	end()
	return root, sc.Err()
}

const (
	flameWidth  = 1200
	flameHeight = 16
	leastWidth  = 2.0 // pixels; what is narrower is left out
)

// draw makes an SVG file: the outermost function at the top, widths are CPU time.
func (f *frame) draw(title string) []byte {
	var boxes bytes.Buffer
	depth := f.boxes(&boxes, 0, float64(flameWidth)/float64(max(f.n, 1)), 0)
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="monospace" font-size="10"><rect width="100%%" height="100%%" fill="white"/>`+"\n", flameWidth, 30+depth*flameHeight)
	fmt.Fprintf(&b, `<text x="4" y="14" font-family="sans-serif" font-size="12">%s</text><g transform="translate(0 24)">`+"\n", html.EscapeString(title))
	boxes.WriteTo(&b)
	b.WriteString("</g></svg>\n")
	return b.Bytes()
}

// boxes draws what f called, from x on, and says how deep that went.
func (f *frame) boxes(b *bytes.Buffer, x, scale float64, depth int) (deepest int) {
	deepest = depth
	for _, name := range slices.Sorted(maps.Keys(f.calls)) {
		g := f.calls[name]
		width := float64(g.n) * scale
		if width >= leastWidth {
			short := name[strings.LastIndexByte(name, '/')+1:]
			fmt.Fprintf(b, `<g><title>%s: %.1f%%</title><rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`,
				html.EscapeString(name), width/flameWidth*100, x, depth*flameHeight, max(width-0.3, 0.3), flameHeight-1, g.colour(name))
			if room := int(width-4) / 6; room >= 3 {
				fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`, x+2, depth*flameHeight+11, html.EscapeString(short[:min(len(short), room)]))
			}
			b.WriteString("</g>\n")
			deepest = max(deepest, g.boxes(b, x, scale, depth+1))
		}
		x += width
	}
	return max(deepest, depth+1)
}

// colour tells kernel, cryptography, the relay and the rest of Go apart.
func (f *frame) colour(name string) string {
	switch {
	case f.kernel:
		return "#f0b27a"
	case strings.Contains(name, "crypto/"):
		return "#a9cce3"
	case strings.Contains(name, "rendezvous"):
		return "#7fb3d5"
	}
	return "#d5d8dc"
}
