package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	busserver "rendezvous.dev/rendezvous/broker/bus"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/orchestrate"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
)

// brokerCommand is how this program starts itself as a broker.
const brokerCommand = "broker"

// brokerConfig is what a broker's process reads first.
type brokerConfig struct {
	Name        string
	Dir         string // certificate
	Port, Route int
	Peers       []string
	Hosts       int
	TicketKey   ed25519.PrivateKey
}

// stats are what a broker's process answers.
type stats struct {
	Known, Local, Routes int
	// Live is heap and stacks in use after a collection, Resident what the kernel counts; both in bytes, and only where
	// they were asked for.
	Live, Resident int64
}

// runBroker is one broker: the bus and the orchestration of the product, over a declared world that stands still. It
// answers "count" and "memory", line by line, until its input ends.
func runBroker(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<20)
	var c brokerConfig
	if !s.Scan() {
		return errors.New("no configuration")
	}
	if err := json.Unmarshal(s.Bytes(), &c); err != nil {
		return err
	}
	certs, err := mtls.NewReloader(c.Dir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	var orch atomic.Pointer[orchestrate.Orchestrator]
	b, err := busserver.Start(ctx, busserver.Options{
		Namespace: namespace, Workspace: workspace, Name: c.Name, TLS: certs, Host: "127.0.0.1", Port: c.Port, WebSocketPort: -1, RoutePort: c.Route,
		Peers: func(context.Context) ([]string, error) { return c.Peers, nil }, PeersEvery: time.Second,
		Presence: func(id identity.ID, conn uint64, up bool) {
			if o := orch.Load(); o != nil {
				o.Presence(id, conn, up)
			}
		},
	})
	if err != nil {
		return err
	}
	defer b.Close()
	nc, err := b.Connect()
	if err != nil {
		return err
	}
	defer nc.Close()
	w := declare(c.Hosts)
	o := orchestrate.New(orchestrate.Options{
		Namespace: namespace, Workspace: workspace, Name: c.Name, Source: w, Writer: w, Conn: nc,
		TicketKey: func() (ed25519.PublicKey, error) { return c.TicketKey.Public().(ed25519.PublicKey), nil },
		ProofKey:  func() (ed25519.PrivateKey, error) { return c.TicketKey, nil },
	})
	if err := o.Start(ctx); err != nil {
		return err
	}
	orch.Store(o)
	for conn, id := range b.Present() {
		o.Presence(id, conn, true)
	}
	answer := json.NewEncoder(out)
	for s.Scan() {
		var st stats
		st.Known, st.Local, _ = o.Counts()
		st.Routes = b.Routes()
		if s.Text() == "memory" {
			debug.FreeOSMemory()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			st.Live, st.Resident = int64(m.HeapInuse+m.StackInuse), resident()
		}
		if err := answer.Encode(st); err != nil {
			return err
		}
	}
	return nil
}

// resident is this process's resident memory in bytes, 0 where the kernel doesn't say.
func resident() int64 {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// declared is a world of one pool that nobody changes; what brokers write of agents goes nowhere.
type declared struct {
	model.Writer
	snap *model.Snapshot
}

func declare(hosts int) *declared {
	s := &model.Snapshot{
		Workspace: &model.Workspace{Name: workspace, Resources: []model.Resource{{Name: resource, Pool: poolName, Groups: []string{"all"}}}},
		Pools: map[string]*model.Pool{poolName: {
			Name: poolName, Generation: 1, MaxSessions: 16, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 5 * time.Second,
		}},
		Hosts:    map[string]*model.Host{},
		Gateways: []*model.Gateway{{Name: gatewayName, Hostname: "gw.test", Port: 443, Ready: true}},
	}
	for i := range hosts {
		s.Hosts[hostName(i)] = &model.Host{Name: hostName(i), UID: hostName(i), Pool: poolName, Generation: 1}
	}
	return &declared{snap: s}
}

func (d *declared) Snapshot() *model.Snapshot                                   { return d.snap }
func (d *declared) WriteAgent(context.Context, string, model.AgentStatus) error { return nil }
func (d *declared) WriteGateway(context.Context, string, int32, []model.GatewayInstance) error {
	return nil
}

// cluster is the brokers' processes.
type cluster struct {
	all []*brokerProcess
}

type brokerProcess struct {
	config brokerConfig
	cmd    *exec.Cmd
	in     io.WriteCloser
	next   func(any) error
	stderr bytes.Buffer
}

func newCluster(ca *authority, hosts int, key ed25519.PrivateKey) (*cluster, error) {
	c := &cluster{}
	ports, err := freePorts(2 * brokers)
	if err != nil {
		return nil, err
	}
	for i := range brokers {
		dir, err := ca.dirFor(identity.Broker(namespace, workspace), i)
		if err != nil {
			return nil, err
		}
		p := &brokerProcess{config: brokerConfig{
			Name: fmt.Sprint("broker-", i), Dir: dir, Port: ports[2*i], Route: ports[2*i+1], Hosts: hosts, TicketKey: key,
		}}
		for j := range brokers {
			if j != i {
				p.config.Peers = append(p.config.Peers, fmt.Sprintf("127.0.0.1:%d", ports[2*j+1]))
			}
		}
		c.all = append(c.all, p)
	}
	return c, nil
}

func freePorts(n int) (ports []int, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // only once all are found, so that each is another
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

func (c *cluster) addrs() (addrs []string) {
	for _, p := range c.all {
		addrs = append(addrs, fmt.Sprintf("127.0.0.1:%d", p.config.Port))
	}
	return addrs
}

// start starts every process and returns when they are one cluster.
func (c *cluster) start(ctx context.Context) error {
	for _, p := range c.all {
		if err := p.start(ctx); err != nil {
			return err
		}
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		s, err := c.count()
		if err != nil {
			return err
		}
		if s.Routes == brokers-1 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("the brokers did not find each other")
		}
	}
}

func (p *brokerProcess) start(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	p.cmd = exec.CommandContext(ctx, self, brokerCommand)

	p.stderr.Reset()
	p.cmd.Stderr = &p.stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	p.next = lines(out)
	if err := p.cmd.Start(); err != nil {
		return err
	}
	return json.NewEncoder(p.in).Encode(p.config)
}

// kill ends every process as a power cut would.
func (c *cluster) kill() {
	for _, p := range c.all {
		if p.cmd != nil && p.cmd.Process != nil {
			p.cmd.Process.Kill()
			p.cmd.Wait() // says that it was killed
			p.cmd = nil
		}
	}
}

// count sums the agents on each broker, and gives what the broker that knows the fewest knows.
func (c *cluster) count() (stats, error) { return c.ask("count") }

// stats is count, with the memory of all brokers.
func (c *cluster) stats() (stats, error) { return c.ask("memory") }

func (c *cluster) ask(what string) (sum stats, err error) {
	for i, p := range c.all {
		var s stats
		if _, err = fmt.Fprintln(p.in, what); err == nil {
			err = p.next(&s)
		}
		if err != nil {
			return sum, fmt.Errorf("%s: %w\n%s", p.config.Name, err, p.stderr.String())
		}
		if i == 0 {
			sum.Known, sum.Routes = s.Known, s.Routes
		}
		sum.Known, sum.Routes = min(sum.Known, s.Known), min(sum.Routes, s.Routes)
		sum.Local, sum.Live, sum.Resident = sum.Local+s.Local, sum.Live+s.Live, sum.Resident+s.Resident
	}
	return sum, nil
}
