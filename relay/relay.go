// Package relay is the data path of a gateway pod: it holds the public listener, its TLS key and the bytes, and nothing
// else. Whatever needs a secret, a bus or an opinion it asks the gateway container beside it (wire/admission).
//
// One connection goes through these, in this order:
//
//	proxied.go  the PROXY protocol header of a load balancer, where there is one
//	listen.go   accept, TLS; an agent that was sent to another pod of this gateway is spliced there (splice.go)
//	head.go     one HTTP/1.1 request head
//	attempt.go  a client's way in: authenticate, connect, wait for the agent's leg (join.go); its place (places.go)
//	tsgu.go     the client speaks MS-TSGU over WebSocket; raw.go: it speaks RDP in WebSocket frames
//	legacy.go   it speaks MS-TSGU over two connections; pair.go: they reached two pods
//	arm.go      it asks first which gateway is to serve it, then speaks RDP in WebSocket frames
//	session.go  both legs are there: copy (copy.go), keep alive, end
//	report.go   tell the gateway container what happens
//
// The HTTP server of the standard library is not used, though it would parse method RDG_OUT_DATA: taking a connection
// back from it leaves a buffered reader and writer, a context and a goroutine with each session that lasts for hours,
// and bytes that it read ahead. Here the head is read into a buffer that goes back to its pool before the session starts.
//
// The relay keeps no secret besides its TLS key: a ticket is dropped once the gateway container has answered, of a join
// secret only its hash stays, and the RDP inside is the client's and the host's own TLS.
package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/proxyproto"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/strangers"
)

// Options is what a Relay is made of. TLS, Admission and Instance must be given.
type Options struct {
	// Config is the bounds; SetConfig changes them later. Zero fields get the defaults of withDefaults.
	Config config.Relay
	// Instance is this pod's name among its gateway's relays (admission.InstanceName).
	Instance string
	// TLS serves the gateway's certificate (mtls.Reloader.ServerConfig).
	TLS *tls.Config
	// Admission is the gateway container.
	Admission admission.AdmissionClient
	Log       *slog.Logger
	Metrics   *Metrics
	// KeepAlive is how often a TSGU client is sent a KEEPALIVE; below the shortest idle limit of cloud load balancers. 45 s when 0.
	KeepAlive time.Duration
	// CloseGrace is how long one direction may go on after the other has ended. 5 s when 0.
	CloseGrace time.Duration
	// PairTimeout is how long an OUT channel of the legacy form waits for its IN channel. 30 s when 0 (MS-TSGU 3.3.6.3).
	PairTimeout time.Duration
	// Dial connects to a peer relay.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Relay serves one listener.
type Relay struct {
	// Static.
	instance    string
	tls         *tls.Config
	certs       *ownCerts
	admission   admission.AdmissionClient
	log         *slog.Logger
	metrics     *Metrics
	keepAlive   time.Duration
	closeGrace  time.Duration
	pairTimeout time.Duration
	dial        func(ctx context.Context, network, address string) (net.Conn, error)
	reports     *reporter
	joins       joinTable
	halves      halves
	searches    chan struct{} // holds one for each search among the peers

	config    atomic.Pointer[config.Relay]
	proxies   atomic.Pointer[proxyproto.Networks] // whose headers are believed
	warnings  proxyproto.Warnings
	draining  atomic.Bool
	serving   atomic.Bool
	strangers strangers.Crowd
	entries   atomic.Int32   // clients of the ARM form that are being told where to go
	legs      sync.WaitGroup // every connection's goroutine

	mu       sync.Mutex
	places   places
	splices  int
	sessions map[string]*session
	conns    map[net.Conn]struct{} // strangers' connections, to close at the end
	idle     chan struct{}         // closed by the last leaver while draining
}

// withDefaults fills in what a configuration leaves out.
func withDefaults(c config.Relay) config.Relay {
	set := func(v *int32, d int32) {
		if *v <= 0 {
			*v = d
		}
	}
	set(&c.MaxSessions, 1000)
	set(&c.MaxPending, 200)
	set(&c.HandshakeTimeoutSeconds, 15)
	set(&c.JoinTimeoutSeconds, 30)
	set(&c.DrainDeadlineSeconds, 3600)
	return c
}

// New makes a relay; Run serves.
func New(o Options) (*Relay, error) {
	if o.TLS == nil || o.Admission == nil || o.Instance == "" {
		return nil, errors.New("relay: Options needs TLS, Admission and Instance")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	if o.KeepAlive == 0 {
		o.KeepAlive = 45 * time.Second
	}
	if o.CloseGrace == 0 {
		o.CloseGrace = 5 * time.Second
	}
	if o.PairTimeout == 0 {
		o.PairTimeout = 30 * time.Second
	}
	if o.Dial == nil {
		o.Dial = (&net.Dialer{Timeout: 5 * time.Second, Control: setOptions, KeepAlive: -1}).DialContext
	}
	r := &Relay{
		instance: o.Instance, admission: o.Admission, log: o.Log, metrics: o.Metrics,
		keepAlive: o.KeepAlive, closeGrace: o.CloseGrace, pairTimeout: o.PairTimeout, dial: o.Dial, searches: make(chan struct{}, maxSearches),
		sessions: map[string]*session{}, conns: map[net.Conn]struct{}{},
	}
	r.SetConfig(o.Config)
	r.tls = o.TLS.Clone()
	var err error
	if r.certs, err = newOwnCerts(r.tls); err != nil {
		return nil, err
	}
	r.tls.GetConfigForClient = r.onHello
	r.tls.DynamicRecordSizingDisabled = true // full records from the start: a desktop's first picture is the big one
	r.reports = newReporter(r)
	return r, nil
}

// SetConfig changes the bounds. Sessions that run keep their idle timeout.
func (r *Relay) SetConfig(c config.Relay) {
	c = withDefaults(c)
	r.config.Store(&c)
	proxies, err := proxyproto.ParseNetworks(c.ProxyNetworks)
	if err != nil {
		r.log.Error("no PROXY protocol header is believed", "field", r.proxyField(), "error", err)
	}
	r.proxies.Store(&proxies)
	r.metrics.Capacity.Set(float64(c.MaxSessions))
}

// Ready says that the relay listens and takes new clients.
func (r *Relay) Ready() bool { return r.serving.Load() && !r.draining.Load() }

// Run serves l, which Listen made, until ctx is done, then drains: no new clients, joins for those under way still welcome, until the last
// session ends or the drain deadline passes. It owns l.
func (r *Relay) Run(ctx context.Context, l net.Listener) error {
	background, stop := context.WithCancel(context.Background())
	reporting := make(chan struct{})
	go func() {
		defer close(reporting)
		r.reports.run(background)
	}()
	accepting := make(chan error, 1)
	go func() { accepting <- r.accept(l) }()
	r.serving.Store(true)

	var err error
	select {
	case err = <-accepting:
	case <-ctx.Done():
		r.drain()
		l.Close()
		<-accepting
	}
	r.serving.Store(false)
	r.closeStrangers()
	r.endAll(refusal.DrainDeadline, "The gateway pod was replaced and its drain deadline has passed: connect again.")
	r.legs.Wait()
	stop()
	<-reporting
	return err
}

// drain waits for the last session, bounded by the drain deadline.
func (r *Relay) drain() {
	wait := time.Duration(r.config.Load().DrainDeadlineSeconds) * time.Second
	r.draining.Store(true)
	r.mu.Lock()
	r.idle = make(chan struct{})
	idle := r.idle
	sessions, pending := len(r.sessions), r.places.queue.Len()
	r.checkIdleLocked()
	r.mu.Unlock()
	r.log.Info("draining", "sessions", sessions, "pending", pending, "deadline", wait.String())
	r.reports.draining(time.Now().Add(wait))
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-idle:
		r.log.Info("drained")
	case <-timer.C:
		r.log.Warn("drain deadline passed")
	}
}

// checkIdleLocked tells drain when nothing is left.
func (r *Relay) checkIdleLocked() {
	if r.idle == nil || r.places.queue.Len() > 0 || r.splices > 0 || len(r.sessions) > 0 {
		return
	}
	select {
	case <-r.idle:
	default:
		close(r.idle)
	}
}

// reserve takes a place for one attempt, or says why there is none.
func (r *Relay) reserve(a *attempt) *refusal.Error {
	c := r.config.Load()
	if r.draining.Load() {
		return refusal.New(refusal.GatewayDraining, "Gateway %s is being replaced on this pod and takes no new session: try again, another pod will answer.", c.Gateway)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.places.queue.Len(); n >= int(c.MaxPending) || n > 0 && len(r.sessions)+n >= int(c.MaxSessions) {
		if silent := r.places.victim(time.Now()); silent != nil {
			r.evict(silent)
		}
	}
	switch pending := r.places.queue.Len(); {
	case len(r.sessions)+pending >= int(c.MaxSessions):
		return refusal.New(refusal.GatewayFull, "This pod of gateway %s holds its limit of %d sessions: try again later, or ask your administrator for more replicas or a higher relay.maxSessions.", c.Gateway, c.MaxSessions)
	case pending >= int(c.MaxPending):
		return refusal.New(refusal.GatewayFull, "This pod of gateway %s is setting up its limit of %d connects at once: try again in a few seconds.", c.Gateway, c.MaxPending)
	}
	r.places.enter(a)
	r.metrics.Pending.Set(float64(r.places.queue.Len()))
	return nil
}

// release gives an attempt's place back; with s, the attempt became that session.
func (r *Relay) release(a *attempt, s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.places.leave(a)
	r.metrics.Pending.Set(float64(r.places.queue.Len()))
	if s != nil {
		r.sessions[s.id] = s
		r.metrics.Sessions.Set(float64(len(r.sessions)))
	}
	r.checkIdleLocked()
}

// remove takes a session that has ended off the list.
func (r *Relay) remove(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sessions, s.id)
	r.metrics.Sessions.Set(float64(len(r.sessions)))
	r.checkIdleLocked()
}

// splice counts a connection that is handed on to another pod; false means that there are too many.
func (r *Relay) splice(delta int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if delta > 0 && r.splices >= int(r.config.Load().MaxSessions) {
		return false
	}
	r.splices += delta
	r.metrics.Splices.Set(float64(r.splices))
	r.checkIdleLocked()
	return true
}

// live is every session.
func (r *Relay) live() []*session {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*session, 0, len(r.sessions))
	for _, s := range r.sessions {
		all = append(all, s)
	}
	return all
}

// End ends one session, if it is here.
func (r *Relay) End(sessionID string, code refusal.Code, message string) bool {
	r.mu.Lock()
	s := r.sessions[sessionID]
	r.mu.Unlock()
	if s != nil {
		s.end(code, message)
	}
	return s != nil
}

func (r *Relay) endAll(code refusal.Code, message string) {
	var all sync.WaitGroup
	for _, s := range r.live() {
		all.Go(func() { s.end(code, message) })
	}
	all.Wait()
}

func (r *Relay) closeStrangers() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		c.Close()
	}
}

// adopt and disown keep track of connections that are no session's.
func (r *Relay) adopt(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns[c] = struct{}{}
}

func (r *Relay) disown(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
}
