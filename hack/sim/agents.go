package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	randv2 "math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/ticket"
)

const (
	namespace, workspace, poolName, gatewayName, resource = "sim", "sim", "pool", "gw", "desk"
	// patience bounds each phase.
	patience = 5 * time.Minute
	// asking is how many connects are in work at one time.
	asking = 32
	// The delays of package agent between attempts, and its timeout for a handshake.
	retryMin, retryMax, dialTimeout = 500 * time.Millisecond, 15 * time.Second, 20 * time.Second
)

// agentsOptions of one run.
type agentsOptions struct {
	Agents, Connects int
	Patience         time.Duration
	// Plot is a file for the curves of arrival; none where empty.
	Plot string
}

// runAgents starts brokers as processes and agents in this one, and measures.
func runAgents(ctx context.Context, o agentsOptions, out io.Writer) error {
	dir, err := os.MkdirTemp("", "rdv-sim")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ca, err := newAuthority(dir)
	if err != nil {
		return err
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	all, err := newCluster(ca, o.Agents, private)
	if err != nil {
		return err
	}
	defer all.kill()
	if err := all.start(ctx); err != nil {
		return err
	}
	empty, err := all.stats()
	if err != nil {
		return err
	}

	// The agents' certificates are made before the clock runs.
	fleet := &agents{addrs: all.addrs()}
	for i := range o.Agents {
		cert, err := ca.issue(identity.Agent(namespace, workspace, poolName, hostName(i)))
		if err != nil {
			return err
		}
		fleet.all = append(fleet.all, &simAgent{fleet: fleet, host: hostName(i), boot: rand.Text(), tls: ca.clientTLS(cert)})
	}
	agentCtx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() { stop(); wg.Wait() }()

	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer t.Flush()
	var facts []string
	row := func(what, format string, args ...any) {
		facts = append(facts, what+": "+fmt.Sprintf(format, args...))
		fmt.Fprintf(t, "%s\t%s\n", what, fmt.Sprintf(format, args...))
		t.Flush()
	}
	row("agents, brokers", "%d, %d processes", o.Agents, len(all.all))
	begin := time.Now()
	for _, a := range fleet.all {
		wg.Go(func() { a.run(agentCtx) })
	}
	first, err := all.waitFor(ctx, o, begin)
	if err != nil {
		return err
	}
	row("first time: all agents known to every broker", "%s (median %s, p99 %s)", first.all, first.median, first.p99)
	full, err := all.stats()
	if err != nil {
		return err
	}
	row("memory per idle agent, over all brokers", "%.1f KiB of heap and stacks, %.1f KiB resident",
		perAgent(full.Live-empty.Live, o.Agents), perAgent(full.Resident-empty.Resident, o.Agents))

	if err := connects(ctx, o, ca, all, private, row); err != nil {
		return err
	}

	fleet.attempts.Store(0)
	lost := time.Now()
	all.kill()
	if err := all.start(ctx); err != nil {
		return err
	}
	up := time.Since(lost).Round(10 * time.Millisecond)
	back, err := all.waitFor(ctx, o, lost)
	if err != nil {
		return err
	}
	row("every broker killed and started again", "brokers listen after %s", up)
	row("all agents back, since the kill", "%s (median %s, p99 %s), %d attempts to connect", back.all, back.median, back.p99, fleet.attempts.Load())
	met := "met"
	if back.all > goal {
		met = "not met"
	}
	row("goal: all back within "+goal.String(), "%s", met)
	if o.Plot == "" {
		return nil
	}
	return os.WriteFile(o.Plot, plotArrivals(o.Agents, first, back, facts[2:len(facts)-3]), 0o644)
}

func perAgent(bytes int64, agents int) float64 { return float64(bytes) / float64(agents) / 1024 }

func hostName(i int) string { return fmt.Sprintf("h%05d", i) }

// agents are all of them, in this process.
type agents struct {
	addrs    []string
	all      []*simAgent
	attempts atomic.Int64
}

// simAgent is what package agent is on the bus: one connection, made anew for ever, reports, and the last word.
type simAgent struct {
	fleet *agents
	host  string
	boot  string
	tls   *tls.Config

	mu       sync.Mutex
	conn     *nats.Conn
	sequence uint64
	config   bus.HostConfig
	sessions []bus.HostSession
}

func (a *simAgent) run(ctx context.Context) {
	delay := time.Duration(0)
	for ctx.Err() == nil {
		closed, err := a.dial()
		if err == nil {
			delay = 0
			a.report()
			a.keepReporting(ctx, closed)
			if ctx.Err() != nil {
				a.mu.Lock()
				a.conn.Close()
				a.mu.Unlock()
				return
			}
		}
		delay = min(max(delay*2, retryMin), retryMax)
		select {
		case <-ctx.Done():
		case <-time.After(delay/2 + randv2.N(delay/2+1)):
		}
	}
}

func (a *simAgent) dial() (<-chan struct{}, error) {
	a.fleet.attempts.Add(1)
	closed := make(chan struct{})
	nc, err := nats.Connect("tls://"+a.fleet.addrs[randv2.IntN(len(a.fleet.addrs))], nats.Secure(a.tls), nats.Timeout(dialTimeout), nats.NoReconnect(),
		nats.CustomInboxPrefix(bus.InboxPrefix(identity.Agent(namespace, workspace, poolName, a.host))), nats.PingInterval(10*time.Second),
		nats.ErrorHandler(quiet), nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		return nil, err
	}
	if _, err = nc.Subscribe(bus.HostConnectSubject(poolName, a.host), a.onConnect); err == nil {
		_, err = nc.Subscribe(bus.HostConfigSubject(poolName, a.host), a.onConfig)
	}
	if err == nil {
		err = nc.FlushTimeout(dialTimeout)
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	a.mu.Lock()
	a.conn = nc
	a.mu.Unlock()
	return closed, nil
}

// quiet takes the place of a handler that prints: that connections break is what is measured.
func quiet(*nats.Conn, *nats.Subscription, error) {}

func (a *simAgent) keepReporting(ctx context.Context, closed <-chan struct{}) {
	for {
		a.mu.Lock()
		every := time.Duration(max(a.config.ReportEvery, 10)) * time.Second
		a.mu.Unlock()
		tick := time.NewTimer(every)
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-closed:
			tick.Stop()
			return
		case <-tick.C:
			a.report()
		}
	}
}

func (a *simAgent) report() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sequence++
	data, err := json.Marshal(bus.HostReport{
		Pool: poolName, Host: a.host, Boot: a.boot, Sequence: a.sequence, ConfigGeneration: a.config.Generation, AgentVersion: "sim", OS: "linux/amd64",
		RDPReady: true, Sessions: a.sessions,
	})
	if err == nil && a.conn != nil {
		a.conn.Publish(bus.ReportSubject(poolName, a.host), data) // one that is lost is made good by the next
	}
}

func (a *simAgent) onConfig(m *nats.Msg) {
	var c bus.HostConfig
	if json.Unmarshal(m.Data, &c) != nil {
		return
	}
	a.mu.Lock()
	a.config = c
	a.mu.Unlock()
	a.report()
}

// onConnect accepts, as a real agent does before it dials, and lets the session end a second later.
func (a *simAgent) onConnect(m *nats.Msg) {
	var req bus.HostConnect
	if json.Unmarshal(m.Data, &req) != nil {
		return
	}
	a.mu.Lock()
	a.sessions = append(slices.Clone(a.sessions), bus.HostSession{SessionID: req.SessionID, User: req.User, State: bus.SessionPending, Since: time.Now(), Proof: req.Proof})
	data, _ := json.Marshal(bus.HostReply{Sequence: a.sequence})
	a.mu.Unlock()
	m.Respond(data)
	a.report()
	time.AfterFunc(time.Second, func() {
		a.mu.Lock()
		a.sessions = slices.DeleteFunc(slices.Clone(a.sessions), func(s bus.HostSession) bool { return s.SessionID == req.SessionID })
		a.mu.Unlock()
		a.report()
	})
}

// connects asks the brokers for sessions, as gateways do, some at a time.
func connects(ctx context.Context, o agentsOptions, ca *authority, all *cluster, key ed25519.PrivateKey, row func(string, string, ...any)) error {
	id := identity.Gateway(namespace, workspace, gatewayName)
	cert, err := ca.issue(id)
	if err != nil {
		return err
	}
	var gws []*nats.Conn
	for _, addr := range all.addrs() {
		nc, err := nats.Connect("tls://"+addr, nats.Secure(ca.clientTLS(cert)), nats.CustomInboxPrefix(bus.InboxPrefix(id)), nats.Timeout(30*time.Second), nats.ErrorHandler(quiet))
		if err != nil {
			return err
		}
		defer nc.Close()
		gws = append(gws, nc)
	}
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	next, done, failed := make(chan int), make([]time.Duration, 0, o.Connects), map[string]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	begin := time.Now()
	for worker := range asking {
		wg.Go(func() {
			for i := range next {
				took, err := connectOnce(ctx, gws[worker%len(gws)], i, key)
				mu.Lock()
				if err != nil {
					failed[err.Error()]++
				} else {
					done = append(done, took)
				}
				mu.Unlock()
			}
		})
	}
	for i := range o.Connects {
		select {
		case next <- i:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(next)
	wg.Wait()
	took := time.Since(begin)
	slices.Sort(done)
	if len(done) == 0 {
		return fmt.Errorf("no connect was accepted: %v", failed)
	}
	row("connects", "%d accepted, %d not; %.0f a second with %d at a time; median %s, p99 %s", len(done), o.Connects-len(done),
		float64(len(done))/took.Seconds(), asking, quantile(done, .5), quantile(done, .99))
	for text, n := range failed {
		row("  refused", "%d: %s", n, text)
	}
	return nil
}

func connectOnce(ctx context.Context, nc *nats.Conn, i int, key ed25519.PrivateKey) (time.Duration, error) {
	now := time.Now()
	raw, err := ticket.Sign(ticket.Claims{
		ID: rand.Text(), Namespace: namespace, Workspace: workspace, User: fmt.Sprint("user", i), Groups: []string{"all"}, Resource: resource,
		Target: brokerapi.PoolName(namespace, poolName), IssuedAt: now, Expires: now.Add(time.Hour),
	}, key)
	if err != nil {
		return 0, err
	}
	data, err := json.Marshal(bus.ConnectRequest{
		ActivityID: fmt.Sprintf("00000000-0000-4000-8000-%012x", i), SessionID: rand.Text(), Ticket: raw, Gateway: gatewayName, Instance: "pod",
		JoinSecret: make([]byte, 32), Deadline: now.Add(30 * time.Second),
	})
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	m, err := nc.RequestWithContext(ctx, bus.SubjectConnect, data)
	if err != nil {
		return 0, err
	}
	var reply bus.ConnectReply
	if err := json.Unmarshal(m.Data, &reply); err != nil {
		return 0, err
	}
	if reply.Err != nil {
		return 0, reply.Err
	}
	return time.Since(begin), nil
}

// quantile of a sorted list.
func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))].Round(10 * time.Microsecond)
}

// arrivals says when agents were known to every broker.
type arrivals struct {
	median, p99, all time.Duration
	curve            []point
}

// waitFor waits until every broker knows every agent, and each is on one of them.
func (c *cluster) waitFor(ctx context.Context, o agentsOptions, begin time.Time) (a arrivals, err error) {
	for {
		s, err := c.count()
		if err != nil {
			return a, err
		}
		now := time.Since(begin).Round(10 * time.Millisecond)
		for _, m := range []struct {
			when *time.Duration
			part float64
		}{{&a.median, .5}, {&a.p99, .99}, {&a.all, 1}} {
			if *m.when == 0 && float64(s.Known) >= m.part*float64(o.Agents) && float64(s.Local) >= m.part*float64(o.Agents) {
				*m.when = now
			}
		}
		if known := min(s.Known, s.Local); len(a.curve) == 0 || a.curve[len(a.curve)-1].known != known || a.all > 0 {
			a.curve = append(a.curve, point{now, known})
		}
		switch {
		case a.all > 0:
			return a, nil
		case now > o.Patience:
			return a, fmt.Errorf("after %s only %d of %d agents are on a broker, and %d known to every one", now, s.Local, o.Agents, s.Known)
		}
		select {
		case <-ctx.Done():
			return a, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// lines gives the next line of a process that answers.
func lines(r io.Reader) func(v any) error {
	s := bufio.NewScanner(r)
	return func(v any) error {
		if !s.Scan() {
			return fmt.Errorf("a process ended: %w", s.Err())
		}
		return json.Unmarshal(s.Bytes(), v)
	}
}
