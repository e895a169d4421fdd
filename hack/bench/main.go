package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == naiveCommand {
		if err := runNaive(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var errGoals = errors.New("bench: not every goal is met")

// plan is how much of everything a run does.
type plan struct {
	rounds   int           // of each scenario
	duration time.Duration // of one measurement
	idle     []int         // sessions that idle
	wide     int           // rounds of the largest number of idle sessions
}

var (
	thorough = plan{rounds: 3, duration: 1500 * time.Millisecond, idle: []int{2000, 10000}, wide: 1}
	quick    = plan{rounds: 1, duration: 700 * time.Millisecond, idle: []int{500}, wide: 1}
)

const (
	// enough is when a slow machine is spared further rounds, so that make bench, with its simulations, takes some 20 minutes.
	enough = 8 * time.Minute
	// budget is when a run that hangs is given up.
	budget = 25 * time.Minute
)

func run(ctx context.Context) error {
	short := flag.Bool("quick", false, "a short run that shows that all works; its figures are rough")
	check := flag.Bool("check", false, "fail when a goal of the relay is not met")
	from := flag.String("from", "", "print a saved run (bench.json) and measure nothing")
	out := flag.String("out", ".", "folder for bench.json and bench.svg")
	only := flag.String("run", "", "comma-separated scenarios (default all): "+strings.Join(scenarioNames(), ","))
	with := flag.String("with", "", "comma-separated contenders (default all)")
	bin := flag.String("bin", "", "folder with relay and gateway binaries to measure (default: they are built)")
	flame := flag.String("flame", "", "draw a flame graph of the relay under one load ("+flameLoads+") and do nothing else; needs perf")
	rounds := flag.Int("rounds", 0, "rounds of each scenario (default: 3, with -quick 1)")
	flag.Parse()
	if *from != "" {
		r, err := load(*from)
		if err != nil {
			return err
		}
		return r.publish(*out, *check)
	}
	p := thorough
	if *short {
		p = quick
	}
	if *rounds > 0 {
		p.rounds = *rounds
	}
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	debug.SetGCPercent(400) // the load generator had better not be what is measured

	b, err := prepare(ctx, *bin)
	if err != nil {
		return err
	}
	defer b.close()
	if *flame != "" {
		return b.flame(ctx, *flame, *out)
	}
	r, err := b.measure(ctx, p, list(*only), list(*with))
	if err != nil {
		return err
	}
	if err := r.save(filepath.Join(*out, "bench.json")); err != nil {
		return err
	}
	return r.publish(*out, *check)
}

func list(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// publish prints the table and the goals, and draws the plot.
func (r *report) publish(dir string, check bool) error {
	if err := r.table(os.Stdout); err != nil {
		return err
	}
	met, err := r.check(os.Stdout)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "bench.svg")
	if err := os.WriteFile(file, r.plot(), 0o644); err != nil {
		return err
	}
	fmt.Printf("\nplot: %s\n", file)
	if check && !met {
		return errGoals
	}
	return nil
}

// bench is what a run stands on.
type bench struct {
	meet
	dir         string
	descriptors uint64
	backend     *backend
	pod         *gatewayPod
	contenders  []*contender
}

// prepare installs, builds and makes what a run needs.
func prepare(ctx context.Context, bin string) (b *bench, err error) {
	b = &bench{}
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	if b.descriptors, err = descriptors(1 << 16); err != nil {
		return b, err
	}
	progress("installing haproxy, nginx, stunnel where they are missing")
	if err = install(peerPackages...); err != nil {
		return b, err
	}
	if b.dir, err = os.MkdirTemp("", "rdv-bench-"); err != nil {
		return b, err
	}
	if err = os.Chmod(b.dir, 0o755); err != nil {
		return b, err
	}
	if bin == "" {
		progress("building relay and gateway")
		bin = filepath.Join(b.dir, "bin")
		if err = build(ctx, "../..", bin); err != nil {
			return b, err
		}
	}
	ca, err := newAuthority()
	if err != nil {
		return b, err
	}
	hostDir := filepath.Join(b.dir, "host")
	if err = ca.host(hostDir, hostName); err != nil {
		return b, err
	}
	if b.backend, err = newBackend(hostDir, &b.meet); err != nil {
		return b, err
	}
	if b.pod, err = newGatewayPod(ctx, b.dir, bin, ca, &b.meet); err != nil {
		return b, err
	}
	b.contenders = []*contender{{name: "relay-raw", stack: b.pod, dial: b.pod.dialRaw}, {name: "relay-tsgu", stack: b.pod, dial: b.pod.dialTSGU}}
	all, err := peers(b.dir, hostDir, b.backend)
	if err != nil {
		return b, err
	}
	for _, p := range all {
		c := &contender{name: p.name, stack: p, dial: p.dial}
		if p.name == "stunnel" {
			c.most = 2000 // two threads and four descriptors a session
		}
		b.contenders = append(b.contenders, c)
	}
	return b, nil
}

// close stops all that runs and removes what was made.
func (b *bench) close() {
	for _, c := range b.contenders {
		c.stack.stop()
	}
	if b.pod != nil {
		b.pod.bus.Close()
	}
	if b.backend != nil {
		b.backend.l.Close()
	}
	if b.dir != "" {
		os.RemoveAll(b.dir)
	}
}

// measure runs the scenarios, each round over all contenders, every second round in reverse order.
func (b *bench) measure(ctx context.Context, p plan, only, with []string) (*report, error) {
	r := &report{Machine: machine(), Versions: versions(), Began: time.Now(), Rounds: p.rounds}
	var chosen []*contender
	for _, c := range b.contenders {
		if with == nil || slices.Contains(with, c.name) {
			chosen = append(chosen, c)
			r.Contenders = append(r.Contenders, c.name)
		}
	}
	running := map[stack]bool{}
	for _, s := range scenarios() {
		if only != nil && !slices.Contains(only, s.name) {
			continue
		}
		for round := range s.rounds(p) {
			if round > 0 && time.Since(r.Began) > enough {
				break
			}
			order := slices.Clone(chosen)
			if round%2 == 1 {
				slices.Reverse(order)
			}
			for _, c := range order {
				if s.fresh {
					c.stack.stop()
					running[c.stack] = false
				}
				if !running[c.stack] {
					if err := c.stack.start(ctx); err != nil {
						return nil, err
					}
					running[c.stack] = true
				}
				progress("%s, round %d, %s", s.name, round+1, c.name)
				err := s.measure(ctx, b, c, p, func(m metric, v float64) { r.add(m, c.name, round, v) })
				if bad := b.backend.bad.Load(); bad != nil {
					err = errors.Join(err, *bad)
				}
				if err != nil {
					return nil, fmt.Errorf("bench: %s: %w%s", s.name, err, words(c.stack))
				}
				if s.fresh {
					c.stack.stop()
					running[c.stack] = false
				}
			}
		}
	}
	r.Took = time.Since(r.Began).Round(time.Second).String()
	return r, nil
}

// words is the end of the logs of a stack that failed.
func words(s stack) string {
	text := ""
	for _, p := range s.processes() {
		if p != nil {
			text += "\n--- " + p.name + "\n" + p.lastWords()
		}
	}
	return text
}

// progress tells who waits what happens.
func progress(format string, args ...any) {
	fmt.Fprintf(io.Writer(os.Stderr), time.Now().Format("15:04:05 ")+format+"\n", args...)
}

// machine describes what the run ran on.
func machine() string {
	var u syscall.Utsname
	syscall.Uname(&u)
	var release []byte
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	model := "unknown CPU"
	if out, err := exec.Command("sh", "-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2").Output(); err == nil {
		model = strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("%d CPUs (%s), Linux %s, %s", runtime.NumCPU(), model, release, runtime.Version())
}
