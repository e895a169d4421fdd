package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestSummarise(t *testing.T) {
	for name, c := range map[string]struct {
		in   []float64
		want spread
	}{
		"none": {nil, spread{}},
		"one":  {[]float64{3}, spread{3, 3, 3}},
		"odd":  {[]float64{9, 1, 4}, spread{4, 1, 9}},
		"even": {[]float64{8, 2, 4, 6}, spread{5, 2, 8}},
	} {
		if got := summarise(c.in); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	var v []time.Duration
	for i := range 1000 {
		v = append(v, time.Duration(i+1))
	}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 500, 0.99: 990, 0.999: 999, 1: 1000} {
		if got := quantile(v, q); got != want {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
	if got := quantile(nil, 0.5); got != 0 {
		t.Errorf("the median of nothing is %d", got)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 1.234: "1.23", 45.67: "45.7", 1234.5: "1234", -12.34: "-12.3"} {
		if got := number(v); got != want {
			t.Errorf("%v is written %q, want %q", v, got, want)
		}
	}
}

// sampleReport has two contenders, three rounds and a metric that only one of them has.
func sampleReport() *report {
	r := &report{Machine: "a machine", Versions: "a <version>", Rounds: 3, Took: "1s", Contenders: []string{"relay-raw", "nginx"}}
	cpu := metric{Key: "cpu-down-1", Group: "throughput", Title: "CPU", Unit: "s/GiB"}
	for round, v := range []float64{1, 3, 2} {
		r.add(cpu, "relay-raw", round, v)
		r.add(cpu, "nginx", round, 2*v)
	}
	r.add(metric{Key: "own", Group: "set-up", Title: "of it the gateway's", Unit: "ms", Up: true}, "relay-raw", 0, 7)
	return r
}

// Ratios are of one round each: that the rounds differ doesn't blur them.
func TestJudge(t *testing.T) {
	r := sampleReport()
	g := goal{Metric: "cpu-down-1", Of: "relay-raw", To: "nginx", AtMost: 0.75}
	if o := r.judge(g); !o.met() || o.Ratio != (spread{0.5, 0.5, 0.5}) {
		t.Errorf("the ratio is %v, met %v", o.Ratio, o.met())
	}
	g.AtMost = 0.49
	if r.judge(g).met() {
		t.Error("0.5 is met as at most 0.49")
	}
	g.To = "haproxy"
	if o := r.judge(g); o.Measured || o.met() {
		t.Error("a ratio to what was not measured is met")
	}
}

func TestCheckPrintsWhatIsNotMet(t *testing.T) {
	r := sampleReport()
	var b bytes.Buffer
	if met, err := r.check(&b); err != nil || !met {
		t.Fatalf("met %v, error %v:\n%s", met, err, &b)
	}
	for i := range r.Samples {
		if r.Samples[i].Contender == "relay-raw" {
			r.Samples[i].Value *= 2
		}
	}
	b.Reset()
	if met, err := r.check(&b); err != nil || met || !strings.Contains(b.String(), "NOT MET") {
		t.Errorf("met %v, error %v:\n%s", met, err, &b)
	}
}

// Each goal names a metric that a scenario may give; a typing error would leave it unmeasured for ever.
func TestGoalsNameMetrics(t *testing.T) {
	known := map[string]bool{}
	for _, s := range scenarioNames() {
		known[s] = true
	}
	for _, g := range goals() {
		rest := g.Metric
		for _, prefix := range []string{"cpu-", "setup-cpu-", "rss-"} {
			if after, ok := strings.CutPrefix(rest, prefix); ok {
				rest = map[string]string{"cpu-": "", "setup-cpu-": "setup-", "rss-": "idle-"}[prefix] + after
				break
			}
		}
		for _, suffix := range []string{"-p99", "-fresh", "-used"} {
			rest = strings.TrimSuffix(rest, suffix)
		}
		if !known[rest] {
			t.Errorf("goal on %q: there is no scenario %q", g.Metric, rest)
		}
	}
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	if err := sampleReport().table(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"THROUGHPUT", "2.00 ±1.00", "4.00 ±2.00", "SET-UP", "-"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, &b)
		}
	}
}

func TestPlotIsXML(t *testing.T) {
	svg := sampleReport().plot()
	d := xml.NewDecoder(bytes.NewReader(svg))
	rects := 0
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		if e, ok := tok.(xml.StartElement); ok && e.Name.Local == "rect" {
			rects++
		}
	}
	if want := 1 + 3; rects != want { // the ground, and three cells that were measured
		t.Errorf("%d rectangles, want %d", rects, want)
	}
	if !bytes.Contains(svg, []byte("not measured")) {
		t.Error("nothing says that a cell was not measured")
	}
}

func TestSaveAndLoad(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bench.json")
	r := sampleReport()
	if err := r.save(file); err != nil {
		t.Fatal(err)
	}
	got, err := load(file)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, r) {
		t.Errorf("read %+v, want %+v", got, r)
	}
}

func TestParseRSS(t *testing.T) {
	if n, err := parseRSS([]byte("Name:\tx\nVmRSS:\t    1234 kB\nRssAnon:\t 5 kB\n")); err != nil || n != 1234<<10 {
		t.Errorf("%d, %v", n, err)
	}
	for _, bad := range []string{"", "Name:\tx\n", "VmRSS:\t12\n", "VmRSS:\tx kB\n"} {
		if n, err := parseRSS([]byte(bad)); err == nil {
			t.Errorf("%q reads %d", bad, n)
		}
	}
}

func TestParseParent(t *testing.T) {
	if pid, parent, ok := parseParent("42 (a (b) 7 c) S 7 42 42 0"); pid != 42 || parent != 7 || !ok {
		t.Errorf("%d, %d, %v", pid, parent, ok)
	}
	for _, bad := range []string{"", "42 S 7", "42 (x)", "x (x) S 7"} {
		if _, _, ok := parseParent(bad); ok {
			t.Errorf("%q is read", bad)
		}
	}
}

// A real process: its CPU clock runs on, its memory is there, and it is gone after stop.
func TestProcess(t *testing.T) {
	dir := t.TempDir()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("no shell")
	}
	p, err := launch(dir, "worker", []string{"WORD=yes"}, sh, "-c", `echo "$WORD"; while :; do :; done`)
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	log := func() string { b, _ := os.ReadFile(p.log); return string(b) }
	if err := p.settle(t.Context(), func() bool { return log() == "yes\n" }); err != nil {
		t.Fatal(err)
	}
	before, err := p.cpu()
	if err != nil {
		t.Fatal(err)
	}
	for now := before; now <= before; time.Sleep(time.Millisecond) {
		if now, err = p.cpu(); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := p.rss(); err != nil || n <= 0 {
		t.Errorf("memory %d, %v", n, err)
	}
	p.stop()
	if _, err := p.cpu(); err == nil {
		t.Error("it has a CPU clock after stop")
	}
}

func TestSettleTellsTheLog(t *testing.T) {
	p, err := launch(t.TempDir(), "broken", nil, "/bin/sh", "-c", "echo no such option; exit 1")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.settle(t.Context(), func() bool { return false }); err == nil || !strings.Contains(err.Error(), "no such option") {
		t.Errorf("the error is %v", err)
	}
}

func TestCells(t *testing.T) {
	var wire []byte
	for i, length := range []int{cellLen, 300, cellLen} {
		b := make([]byte, length)
		putCell(b, byte(i+1), length, time.Duration(i))
		wire = append(wire, b...)
	}
	var kinds []byte
	err := readCells(bytes.NewReader(wire), func(cell []byte) error {
		kind, _, at := parseCell(cell)
		if at != time.Duration(len(kinds)) {
			t.Errorf("message %d says time %d", len(kinds), at)
		}
		kinds = append(kinds, kind)
		return nil
	})
	if !errors.Is(err, io.EOF) || string(kinds) != "\x01\x02\x03" {
		t.Errorf("read %v, %v", kinds, err)
	}
}

// Every template of a peer's configuration takes the settings that start gives it, and knows both legs.
func TestPeerConfigurations(t *testing.T) {
	all, err := peers(t.TempDir(), t.TempDir(), &backend{port: 1234})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		text, err := p.configuration(settings{Host: hostName, Backend: 1234, Legs: []leg{{"full", 21, 22, false}, {"resumed", 31, 32, true}}})
		if err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
		for _, want := range []string{"127.0.0.1:21", "127.0.0.1:31", "127.0.0.1:1234", hostName} {
			if !strings.Contains(text, want) {
				t.Errorf("%s's configuration lacks %q:\n%s", p.name, want, text)
			}
		}
	}
}

func TestFold(t *testing.T) {
	const script = `
  aa inner+0x1 (/bin/relay)
  bb crypto/tls.(*Conn).Read+0x2f (/bin/relay)
  cc main.main (/bin/relay)

  dd tcp_sendmsg ([kernel.kallsyms])
  cc main.main (/bin/relay)

`
	root, err := fold(strings.NewReader(script))
	if err != nil {
		t.Fatal(err)
	}
	main := root.calls["main.main"]
	if root.n != 2 || main == nil || main.n != 2 || len(main.calls) != 2 {
		t.Fatalf("folded to %+v", root)
	}
	if read := main.calls["crypto/tls.(*Conn).Read"]; read == nil || read.n != 1 || read.calls["inner"] == nil || read.kernel {
		t.Errorf("Read is %+v", read)
	}
	if send := main.calls["tcp_sendmsg"]; send == nil || !send.kernel {
		t.Errorf("tcp_sendmsg is %+v", send)
	}
	svg := root.draw("a <title>")
	if err := xml.Unmarshal(svg, new(struct{})); err != nil {
		t.Fatalf("%v in\n%s", err, svg)
	}
	if !bytes.Contains(svg, []byte("main.main: 100.0%")) || !bytes.Contains(svg, []byte("tcp_sendmsg: 50.0%")) {
		t.Errorf("shares are missing in\n%s", svg)
	}
}
