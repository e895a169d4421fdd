package fleet

import (
	"bytes"
	"cmp"
	"fmt"
	"html"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Report is what a run found.
type Report struct {
	Machine                            string
	Began                              time.Time
	Setup, Took                        time.Duration
	Sessions, Hosts, Gateways, Brokers int
	Rows                               []Row
	Dropped, Wrong                     int
	// Checked counts bytes, both ways.
	Checked uint64
	// Faults tell of what went wrong, and when.
	Faults  []string `json:",omitempty"`
	Seconds []second
}

// Row is one step of a run.
type Row struct {
	Step string
	// Began and Ended in seconds since all sessions were there.
	Began, Ended float64
	// Sessions that lived when the step began, through Pods and Draining gateway pods at its end.
	Sessions, Pods, Draining int
	Dropped, Wrong           int
	Checked                  uint64
	// Connects of others meanwhile, and those that did not get in at the first try.
	Connects, Failed int
	Slowest          time.Duration
	// Stall is the longest time in which some session moved nothing, though it should have.
	Stall time.Duration
}

func newReport(o Options) *Report {
	return &Report{Machine: machine(), Began: time.Now(),
		Sessions: o.Sessions, Hosts: o.Hosts, Gateways: o.Gateways, Brokers: o.Brokers}
}

// machine describes what the run runs on.
func machine() string {
	first := func(file, key string) string {
		text, _ := os.ReadFile(file)
		for line := range strings.Lines(string(text)) {
			if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == key {
				return strings.TrimSpace(value)
			}
		}
		return "unknown"
	}
	load, _ := os.ReadFile("/proc/loadavg")
	ran, _, _ := strings.Cut(string(load), " ")
	return fmt.Sprintf("%d CPUs (%s), %s of memory, %s, load average %s when it began", runtime.NumCPU(), first("/proc/cpuinfo", "model name"),
		first("/proc/meminfo", "MemTotal"), runtime.Version(), ran)
}

func (r *Row) fill(t row, ended float64, checked uint64) {
	r.Ended, r.Checked = ended, checked
	r.Dropped, r.Wrong, r.Connects, r.Failed, r.Slowest, r.Stall = t.dropped, t.wrong, t.connects, t.failed, t.slowest, t.stall
}

// finish ends all sessions, and adds up.
func (r *Report) finish(f *fleet) {
	began := time.Since(f.tally.began).Seconds()
	last := Row{Step: "all users leave", Began: began, Sessions: int(f.tally.live.Load())}
	checked := f.tally.checked.Load()
	ends := make(chan struct{})
	all := f.release(1<<20, anyone)
	for _, s := range all {
		go func() { s.end(); ends <- struct{}{} }()
	}
	for range all {
		<-ends
	}
	last.fill(f.tally.take(), time.Since(f.tally.began).Seconds(), f.tally.checked.Load()-checked)
	r.Rows = append(r.Rows, last)
	for _, row := range r.Rows {
		r.Dropped += row.Dropped
		r.Wrong += row.Wrong
		r.Checked += row.Checked
	}
	r.Took = time.Since(r.Began)
	f.tally.mu.Lock()
	defer f.tally.mu.Unlock()
	r.Faults, r.Seconds = f.tally.faults, f.tally.seconds
}

// String is a row for those who wait.
func (r Row) String() string {
	return fmt.Sprintf("%-36s %5.1f s: %d sessions, %d dropped, %d wrong, %.1f MiB checked; connects %d, failed %d, slowest %.1f s; stall %.1f s; pods %d+%d",
		r.Step, r.Ended-r.Began, r.Sessions, r.Dropped, r.Wrong, mebi(r.Checked), r.Connects, r.Failed, r.Slowest.Seconds(), r.Stall.Seconds(), r.Pods, r.Draining)
}

func mebi(n uint64) float64 { return float64(n) / (1 << 20) }

// Markdown is the table.
func (r *Report) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d sessions on %d hosts through %d gateway pods and %d brokers, %s. **%d dropped, %d with wrong bytes, %.0f MiB checked**, %.0f s in all.\n\n",
		r.Sessions, r.Hosts, r.Gateways, r.Brokers, r.Machine, r.Dropped, r.Wrong, mebi(r.Checked), r.Took.Seconds())
	b.WriteString("| step | s | sessions | dropped | MiB checked | new connects | failed | slowest, s | longest stall, s | gateway pods + draining |\n")
	b.WriteString("| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |\n")
	for _, row := range r.Rows {
		fmt.Fprintf(&b, "| %s | %.0f | %d | %d | %.1f | %d | %d | %.1f | %.1f | %d + %d |\n", row.Step, row.Ended-row.Began, row.Sessions, row.Dropped+row.Wrong,
			mebi(row.Checked), row.Connects, row.Failed, row.Slowest.Seconds(), row.Stall.Seconds(), row.Pods, row.Draining)
	}
	return b.String()
}

// Plot draws the run second by second, an SVG file: live sessions, bytes checked, and the longest stall, with the steps
// as bands.
func (r *Report) Plot() []byte {
	const width, panel, left, top, gap = 1000, 120, 60, 60, 46
	seconds := max(len(r.Seconds), 1)
	x := func(s float64) float64 { return left + s/float64(seconds)*(width-left-10) }
	var rates, live, stalls []float64
	for i, s := range r.Seconds {
		rate := 0.0
		if i > 0 && s.Checked > r.Seconds[i-1].Checked {
			rate = mebi(s.Checked - r.Seconds[i-1].Checked)
		}
		rates, live, stalls = append(rates, rate), append(live, float64(s.Live)), append(stalls, s.Stall.Seconds())
	}
	panels := []struct {
		title  string
		values []float64
		colour string
	}{
		{"live sessions (guests included)", live, "#1f5fbf"}, {"MiB checked in each second", rates, "#3f8f4f"}, {"longest stall of any session, seconds", stalls, "#c2682b"},
	}
	height := top + len(panels)*(panel+gap) + 16*len(r.Rows) + 20
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/><text x="12" y="20" font-size="15" font-weight="bold">%d sessions while all is rolled: %d dropped, %d with wrong bytes, %.0f MiB checked</text><text x="12" y="38" fill="#555">%s</text>`+"\n",
		r.Sessions, r.Dropped, r.Wrong, mebi(r.Checked), html.EscapeString(r.Machine))
	for i, row := range r.Rows {
		fill := "#f3f3f3"
		if i%2 == 1 {
			fill = "#e4e9f2"
		}
		fmt.Fprintf(&b, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/><text x="%.1f" y="%d" fill="#555">%d</text>`+"\n",
			x(row.Began), top-8, x(row.Ended)-x(row.Began), len(panels)*(panel+gap)-gap+16, fill, x(row.Began)+2, top+2, i+1)
	}
	for n, p := range panels {
		base := float64(top + n*(panel+gap) + panel)
		highest := max(slices.MaxFunc(append(p.values, 0), cmp.Compare), 0.001)
		fmt.Fprintf(&b, `<text x="%d" y="%.0f" font-weight="bold">%s</text><text x="%d" y="%.0f" text-anchor="end">%.2g</text><text x="%d" y="%.0f" text-anchor="end">0</text><polyline fill="none" stroke="%s" stroke-width="1.5" points="`,
			left+14, base-panel+14, p.title, left-5, base-panel+24, highest, left-5, base, p.colour)
		for i, v := range p.values {
			fmt.Fprintf(&b, "%.1f,%.1f ", x(float64(i)+0.5), base-v/highest*(panel-20))
		}
		b.WriteString(`"/>` + "\n")
	}
	for i, row := range r.Rows {
		fmt.Fprintf(&b, `<text x="%d" y="%d">%d %s: %.0f s, %d dropped, %d connects, %d failed</text>`+"\n", left, top+len(panels)*(panel+gap)+16*i, i+1,
			html.EscapeString(row.Step), row.Ended-row.Began, row.Dropped+row.Wrong, row.Connects, row.Failed)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
