// Package orchestrate carries out step 9 of a connect: it authorises again, picks a session host and has that host's
// agent dial the gateway that holds the client. To that end it listens to what hosts and gateways report, tells hosts
// their limits and drain, and writes what is worth keeping of their state.
//
// Any replica answers any request. They share no state but what all of them hear on the bus; a host's agent, which has
// the last word on its own limit, is where their decisions meet.
package orchestrate

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/accounts"
	"rendezvous.dev/rendezvous/broker/metrics"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/standing"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	// subjectPresence is between brokers only: no agent or gateway may say or hear it.
	subjectPresence = "rdv.presence"
	// maxConnects bounds connects in work at one broker; more wait.
	maxConnects = 512
	// sweepEvery is how often silent hosts, ended drains and changed gateways are looked for.
	sweepEvery = 5 * time.Second
	// pushAgain is how long a host has to report a configuration that it was sent before it is sent again.
	pushAgain = 5 * time.Second
	forget    = 10 * time.Minute
	// settle is Options.Settle; within it a connect looks again first after lookAgain, then after twice as long each time.
	settle, lookAgain = 500 * time.Millisecond, 20 * time.Millisecond
	// longestPause between two looks.
	longestPause = 250 * time.Millisecond
	// displaceAfter is how long an agent's connection here lasts beside a newer one to another broker.
	displaceAfter = 3 * time.Second
	// returning is how long an agent whose broker has gone may take to be heard through another.
	returning = 10 * time.Second
)

// Options of an Orchestrator. All but Now, Log and Metrics are required.
type Options struct {
	Namespace, Workspace string
	// Name is this replica's.
	Name   string
	Source model.Source
	Writer model.Writer
	// Conn is the broker's own connection to the bus.
	Conn *nats.Conn
	// TicketKey verifies tickets.
	TicketKey func() (ed25519.PublicKey, error)
	// ProofKey is its private half, which signs what hosts return with their sessions (broker/proof).
	ProofKey func() (ed25519.PrivateKey, error)
	// Displace closes this broker's own connections of an agent's identity that began before at. Nil closes none.
	Displace func(id identity.ID, at time.Time)
	// Settle is for how long a connect that finds every place taken looks again before it is refused, so that reports on
	// their way arrive; 500 ms if 0.
	Settle  time.Duration
	Now     func() time.Time
	Log     *slog.Logger
	Metrics *metrics.Metrics
}

// Orchestrator is the broker's part on the bus.
type Orchestrator struct {
	o        Options
	started  time.Time
	live     *registry
	accounts *accounts.Book
	peers    peers
	status   *statusWriter
	slots    chan struct{}
	subs     []*nats.Subscription
	work     sync.WaitGroup
	pools    atomic.Pointer[poolIndex]
	// standing is what users' newest tokens said; access has a place for the news that something may have been lost.
	standing *standing.Table
	access   chan struct{}
}

// poolIndex is the hosts of each pool in one snapshot.
type poolIndex struct {
	snap  *model.Snapshot
	hosts map[string][]poolHost
}

// poolHosts gives the hosts of a pool, in no order. A snapshot is gone through once, not for every connect.
func (b *Orchestrator) poolHosts(snap *model.Snapshot, pool string) []poolHost {
	if i := b.pools.Load(); i != nil && i.snap == snap {
		return i.hosts[pool]
	}
	i := &poolIndex{snap: snap, hosts: b.live.join(snap.Hosts)}
	b.pools.Store(i)
	return i.hosts[pool]
}

// hostMayReturn says whether a host of the pool that isn't connected is likely to be so in a moment: this broker has only
// just begun to listen, another is connected with the agent (as the host's status says) and not met yet, or the agent
// lost its channel only just now, without saying that it leaves.
func (b *Orchestrator) hostMayReturn(pool string) bool {
	young := b.o.Now().Sub(b.started) < returning
	for _, h := range b.poolHosts(b.o.Source.Snapshot(), pool) {
		if h.Agent != nil && b.live.mayReturn(hostKey{pool, h.Name}, young || h.Agent.Connected) {
			return true
		}
	}
	return false
}

// New makes an Orchestrator; Start has it listen.
func New(o Options) *Orchestrator {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	if o.Settle == 0 {
		o.Settle = settle
	}
	b := &Orchestrator{o: o, started: o.Now(), live: newRegistry(o.Now), peers: peers{met: map[string]peer{}}, slots: make(chan struct{}, maxConnects),
		accounts: accounts.New(o.Writer, o.Now)}
	b.standing, b.access = standing.New(o.Now), make(chan struct{}, 1)
	b.live.proofs = proofSource{o.Namespace, o.Workspace, o.TicketKey}
	b.live.spelling = b.user
	b.live.refusedLogins = func(reason string, n uint64) { o.Metrics.LoginsRefused.WithLabelValues(reason).Add(float64(n)) }
	b.status = newStatusWriter(b)
	return b
}

// user gives the spelling of a user's name by which everything compares it.
func (b *Orchestrator) user(name string) string {
	if ws := b.o.Source.Snapshot().Workspace; ws != nil {
		return ws.OIDC.User(name)
	}
	return name
}

// Start subscribes. Requests are answered from then on, until Drain or the end of ctx.
func (b *Orchestrator) Start(ctx context.Context) error {
	for _, s := range []struct {
		subject, queue string
		handle         func(context.Context, *nats.Msg)
	}{
		{bus.AllReports, "", b.onReport},
		{bus.AllGatewayReports, "", b.onGatewayReport},
		{subjectPresence, "", b.onPresence},
		{subjectJourney, "", b.onJourney},
		{subjectHello, "", b.onHello},
		{subjectHosts + "." + b.o.Name, "", b.onHosts},
		{subjectStanding, "", b.onStanding},
		{subjectStanding + "." + b.o.Name, "", b.onStanding},
		{bus.SubjectConnect, bus.Brokers, b.onConnect},
		{bus.SubjectEntry, bus.Brokers, b.onEntry},
		{bus.SubjectGateways, bus.Brokers, b.onGateways},
	} {
		handle := func(m *nats.Msg) { s.handle(ctx, m) }
		var sub *nats.Subscription
		var err error
		if s.queue != "" {
			sub, err = b.o.Conn.QueueSubscribe(s.subject, s.queue, handle)
		} else {
			sub, err = b.o.Conn.Subscribe(s.subject, handle)
		}
		if err != nil {
			return fmt.Errorf("orchestrate: subscribe to %s: %w", s.subject, err)
		}
		b.subs = append(b.subs, sub)
	}
	if err := b.o.Conn.Flush(); err != nil {
		return fmt.Errorf("orchestrate: %w", err)
	}
	b.work.Go(func() { b.sweep(ctx) })
	b.work.Go(func() { b.sayHello(ctx) })
	b.work.Go(func() { b.endLost(ctx) })
	b.work.Go(func() { b.status.run(ctx) })
	return nil
}

// Drain stops taking connects, which other brokers then answer, and waits for those in work or the end of ctx.
func (b *Orchestrator) Drain(ctx context.Context) {
	for _, s := range b.subs {
		if s.Queue != "" {
			if err := s.Drain(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
				b.o.Log.Warn("can't stop taking connects", "error", err)
			}
		}
	}
	b.o.Conn.FlushWithContext(ctx)
	for range cap(b.slots) {
		select {
		case b.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
	}
}

// Wait returns when what Start began has ended.
func (b *Orchestrator) Wait() { b.work.Wait() }

// presenceMessage is what a broker tells the others of an agent's connection.
type presenceMessage struct {
	Broker    string `json:"broker"`
	Conn      uint64 `json:"conn"`
	Pool      string `json:"pool"`
	Host      string `json:"host"`
	Connected bool   `json:"connected"`
}

// Presence takes in that an agent's connection to this replica began or ended, and tells the others.
func (b *Orchestrator) Presence(id identity.ID, conn uint64, connected bool) {
	if id.Role != identity.RoleAgent {
		return
	}
	b.o.Log.Debug("presence", "pool", id.Pool, "host", id.Host, "connected", connected)
	b.publish(subjectPresence, presenceMessage{b.o.Name, conn, id.Pool, id.Host, connected})
}

func (b *Orchestrator) onPresence(_ context.Context, m *nats.Msg) {
	var p presenceMessage
	if !b.decode(m, &p) {
		return
	}
	k, local := hostKey{p.Pool, p.Host}, p.Broker == b.o.Name
	conn := fmt.Sprintf("%s/%d", p.Broker, p.Conn)
	b.live.presence(k, conn, local, p.Connected)
	switch {
	case !local && p.Connected && b.o.Displace != nil:
		// An agent has one connection: the newest. It has subscribed by the time that the older ones go. What is newer is
		// told by this broker's clock alone.
		heard := time.Now()
		time.AfterFunc(displaceAfter, func() {
			if b.live.connection(k) == conn {
				b.o.Displace(identity.Agent(b.o.Namespace, b.o.Workspace, k.pool, k.host), heard)
			}
		})
	case !local:
	case !p.Connected:
		b.status.left(k)
	default: // its first report may have been faster, and found nobody to answer
		if pool, host := declared(b.o.Source.Snapshot(), k); host != nil {
			b.pushConfig(pool, host)
			b.status.changed(k)
		}
	}
}

// onReport takes in a host's report. Its names are those of the subject, which the sender's certificate binds.
func (b *Orchestrator) onReport(_ context.Context, m *nats.Msg) {
	var rep bus.HostReport
	parts := strings.Split(m.Subject, ".")
	if len(parts) != 4 || !b.decode(m, &rep) {
		return
	}
	k := hostKey{parts[2], parts[3]}
	rep.Pool, rep.Host = k.pool, k.host // other brokers are told by these whose report it is
	if !b.live.report(k, rep) {
		return
	}
	snap := b.o.Source.Snapshot()
	if pool, host := declared(snap, k); host != nil {
		b.pushConfig(pool, host)
		b.status.changed(k)
	}
}

func (b *Orchestrator) onGatewayReport(_ context.Context, m *nats.Msg) {
	var rep bus.GatewayReport
	parts := strings.Split(m.Subject, ".")
	if len(parts) != 5 || !b.decode(m, &rep) {
		return
	}
	b.live.gatewayReport(gatewayKey{parts[2], parts[3]}, boundedLoad(rep, b.o.Source.Snapshot().Gateways))
}

// declared finds what is declared of a host, nil where its certificate outlives its object, or names another pool.
func declared(snap *model.Snapshot, k hostKey) (*model.Pool, *model.Host) {
	h, p := snap.Hosts[k.host], snap.Pools[k.pool]
	if h == nil || p == nil || h.Pool != k.pool {
		return nil, nil
	}
	return p, h
}

// Changed looks after what a new snapshot changes for hosts and sessions.
func (b *Orchestrator) Changed() {
	b.accessChanged()
	b.pushAll(b.o.Source.Snapshot())
}

func (b *Orchestrator) pushAll(snap *model.Snapshot) {
	for _, h := range snap.Hosts {
		b.pushConfig(snap.Pools[h.Pool], h)
	}
}

// pushConfig sends a host its configuration where it holds another. Only the replica that the agent is on does.
func (b *Orchestrator) pushConfig(pool *model.Pool, host *model.Host) {
	c := hostConfig(pool, host, b.o.Now())
	if b.live.shouldPush(hostKey{pool.Name, host.Name}, c.Generation, pushAgain) {
		b.publish(bus.HostConfigSubject(pool.Name, host.Name), c)
	}
}

// hostConfig is what a host must hold to. The generation grows with every change of pool or host, and is one further
// once a drain has ended by itself, which changes neither.
func hostConfig(pool *model.Pool, host *model.Host, now time.Time) bus.HostConfig {
	c := bus.HostConfig{
		Generation: 2 * (pool.Generation + host.Generation), MaxSessions: pool.MaxSessions, Draining: host.Draining(now),
		ReportEvery: max(1, int32(pool.HeartbeatTimeout/time.Second/3)), RDPKey: pool.RDPKey,
	}
	switch {
	case c.Draining:
		c.DrainReason = host.Drain.Reason
	case host.Drain != nil:
		c.Generation++
	}
	return c
}

// sweep looks for what no message tells.
func (b *Orchestrator) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		snap := b.o.Source.Snapshot()
		b.pushAll(snap)
		b.status.lookForSilence(snap)
		b.live.prune(func(k hostKey) bool { _, h := declared(snap, k); return h != nil }, forget)
		b.standing.Prune()
		b.pools.Store(nil) // it may point to what a snapshot older than its own has just forgotten
	}
}

// Counts gives the hosts that are there, those on this replica, and the sessions that hosts report.
func (b *Orchestrator) Counts() (hosts, local, sessions int) { return b.live.counts() }

// Trace publishes a step of a connect, to all brokers.
func (b *Orchestrator) Trace(e trace.Event) {
	if e.ActivityID != "" {
		b.publish(bus.TraceSubject(identity.Broker(b.o.Namespace, b.o.Workspace)), e)
	}
}

func (b *Orchestrator) publish(subject string, v any) {
	data, err := json.Marshal(v)
	if err == nil {
		err = b.o.Conn.Publish(subject, data)
	}
	if err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		b.o.Log.Error("can't publish", "subject", subject, "error", err)
	}
}

func (b *Orchestrator) decode(m *nats.Msg, v any) bool {
	if err := json.Unmarshal(m.Data, v); err != nil {
		b.o.Log.Warn("message is not what its subject says", "subject", m.Subject, "error", err)
		return false
	}
	return true
}
