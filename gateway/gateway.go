// Package gateway is the admission container of a gateway pod. It answers the relay beside it (wire/admission, over a Unix
// socket) and speaks to the brokers of each workspace that the gateway serves (wire/bus, over mutual TLS):
//
//	Authenticate  the ticket's signature, issuer, audience, expiry: local, no bus (verified.go)
//	Connect       the same where nobody has asked before; the broker authorises again, picks a host and has its agent dial
//	Enter         the broker picks the gateway for a client that is told where to go (entry.go)
//	Route         which peer relay holds a client leg (route.go)
//	Report        the relay's sessions and timelines; sessions that a broker ends (report.go)
//
// It measures the way to the workspaces' other gateways, too (peers.go), and publishes that with its load.
//
// Workspaces stand for themselves (workspace.go): one whose bus is away or whose certificate is broken refuses its own
// connects, by name, and hurts no other. The container holds no session: it may restart while sessions run.
package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
)

// Options is what a Gateway is made of. Config and Instance must be given.
type Options struct {
	Config config.Gateway
	// Instance names this pod (admission.InstanceName of its address), as the relay beside it does.
	Instance string
	// WorkspacesDir has a folder per workspace. config.WorkspacesDir when empty.
	WorkspacesDir string
	Log           *slog.Logger
	Metrics       *Metrics
	// Lookup resolves the headless Service. The system's resolver when nil.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	// PeerPort is where peer relays listen. config.PortPublic when 0.
	PeerPort uint16
	// ReportEvery is how often the pod's load is reported when nothing changes. 5 s when 0.
	ReportEvery time.Duration
	// MeasureEvery is how often the way to other gateways is measured. 30 s when 0.
	MeasureEvery time.Duration
	// Ping measures one round trip to another gateway, over its public listener when nil.
	Ping func(ctx context.Context, peer bus.GatewayAddress) (time.Duration, error)
	// Patience is how long a connect waits for a bus that blinks (a broker that is replaced). 2 s when 0.
	Patience time.Duration
	// Refresh is how often certificates and ticket keys are looked at. 10 s when 0.
	Refresh time.Duration
	// Linger is for how long a gateway that is told to stop goes on admitting: clients are sent to this pod until
	// everybody has heard that it is leaving.
	Linger time.Duration
}

// Gateway is the admission server.
type Gateway struct {
	admission.UnimplementedAdmissionServer

	// Static.
	instance    string
	dir         string
	log         *slog.Logger
	metrics     *Metrics
	lookup      func(ctx context.Context, host string) ([]netip.Addr, error)
	peerPort    uint16
	reportEvery time.Duration
	patience    time.Duration
	refresh     time.Duration
	linger      time.Duration

	measureEvery time.Duration
	ping         func(ctx context.Context, peer bus.GatewayAddress) (time.Duration, error)
	peers        peers

	changed  chan struct{} // of one: a load report is due
	stopping chan struct{}

	connects atomic.Int32 // under way
	verified verifiedTickets
	table    relayTable
	serving  atomic.Bool

	mu         sync.Mutex
	config     config.Gateway
	workspaces map[string]*workspace
	live       map[string]*admission.Session
	draining   bool
	commands   chan *admission.RelayCommand // the relay's stream; nil while it is away
	owners     ownerTable
}

// New makes a gateway; Run serves.
func New(o Options) (*Gateway, error) {
	if o.Instance == "" || o.Config.Gateway == "" || o.Config.Namespace == "" {
		return nil, errors.New("gateway: Options needs Instance, and Config with gateway and namespace")
	}
	if o.WorkspacesDir == "" {
		o.WorkspacesDir = config.WorkspacesDir
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	if o.Lookup == nil {
		o.Lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if o.PeerPort == 0 {
		o.PeerPort = config.PortPublic
	}
	for d, v := range map[*time.Duration]time.Duration{&o.ReportEvery: 5 * time.Second, &o.Patience: 2 * time.Second, &o.Refresh: 10 * time.Second,
		&o.MeasureEvery: 30 * time.Second} {
		if *d == 0 {
			*d = v
		}
	}
	if o.Ping == nil {
		o.Ping = newPinger().ping
	}
	return &Gateway{
		instance: o.Instance, dir: o.WorkspacesDir, log: o.Log, metrics: o.Metrics, lookup: o.Lookup, peerPort: o.PeerPort,
		reportEvery: o.ReportEvery, patience: o.Patience, refresh: o.Refresh, config: o.Config,
		measureEvery: o.MeasureEvery, ping: o.Ping, linger: o.Linger,
		table:   relayTable{busy: make(chan struct{}, 1)},
		changed: make(chan struct{}, 1), stopping: make(chan struct{}),
		workspaces: map[string]*workspace{}, live: map[string]*admission.Session{},
	}, nil
}

// Listen makes the Unix socket at path. A socket that a predecessor left is removed; anything else there is an error. Only
// our own user, which both containers run as, may connect.
func Listen(path string) (net.Listener, error) {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("gateway: %w", err)
	case fi.Mode()&fs.ModeSocket == 0:
		return nil, fmt.Errorf("gateway: %s is there and is no socket; remove it", path)
	default:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("gateway: %w", err)
	}
	return l, nil
}

// Run serves l until ctx is done. Connects under way get 5 s more. It owns l.
func (g *Gateway) Run(ctx context.Context, l net.Listener) error {
	g.mu.Lock()
	cfg := g.config
	g.mu.Unlock()
	g.SetConfig(cfg)
	defer g.SetConfig(config.Gateway{Namespace: cfg.Namespace, Gateway: cfg.Gateway})
	background, stop := context.WithCancel(context.Background())
	defer stop()
	var reporting sync.WaitGroup
	reporting.Go(func() { g.reportLoad(background) })
	reporting.Go(func() { g.measurePeers(background) })

	srv := admission.NewServer()
	admission.RegisterAdmissionServer(srv, g)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	g.serving.Store(true)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	g.serving.Store(false)
	stop()
	reporting.Wait() // the next report is the last
	g.leave()
	time.Sleep(g.linger)
	close(g.stopping)
	forced := time.AfterFunc(5*time.Second, srv.Stop)
	defer forced.Stop()
	srv.GracefulStop()
	return <-served
}

// Ready says that the socket is served and that at least one workspace has been connected once, or none is configured: a
// workspace that is broken must not take the gateway from the others.
func (g *Gateway) Ready() error {
	if !g.serving.Load() {
		return errors.New("the admission socket is not served")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var waiting []string
	for name, w := range g.workspaces {
		if w.connected.Load() {
			return nil
		}
		waiting = append(waiting, name)
	}
	if len(waiting) == 0 {
		return nil
	}
	return fmt.Errorf("no bus of a workspace has been reached yet (%s)", strings.Join(waiting, ", "))
}

// SetConfig takes a new configuration over: new workspaces are connected, others let go, the rest stays as it is.
func (g *Gateway) SetConfig(c config.Gateway) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.config = c
	wanted := map[string]config.GatewayWorkspace{}
	for _, w := range c.Workspaces {
		wanted[w.Name] = w
	}
	for name, w := range g.workspaces {
		if spec, ok := wanted[name]; !ok || strings.Join(spec.BusURLs, ",") != w.urls {
			w.close()
			delete(g.workspaces, name)
		}
	}
	for name, spec := range wanted {
		if g.workspaces[name] == nil {
			g.workspaces[name] = g.newWorkspace(c, spec)
		}
	}
}

func (g *Gateway) workspace(name string) *workspace {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.workspaces[name]
}

func (g *Gateway) namespace() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.config.Namespace
}

// verify checks a ticket and finds its workspace. The workspace is also there with the refusal of a ticket that it signed.
func (g *Gateway) verify(raw string) (claims ticket.Claims, w *workspace, err error) {
	defer func() { g.metrics.authenticated(refusal.From(err)) }()
	t, err := ticket.Parse(raw)
	if err != nil {
		return ticket.Claims{}, nil, err
	}
	w = g.workspace(t.Workspace)
	if w == nil || t.Namespace != g.namespace() {
		return ticket.Claims{}, nil, refusal.New(refusal.TicketInvalid, "The ticket is of workspace %s/%s, which this gateway doesn't serve: use the gateway that the workspace's connection file names.", t.Namespace, t.Workspace)
	}
	keys := w.keys.Load()
	if keys == nil {
		return ticket.Claims{}, nil, refusal.New(refusal.BrokerAway, "Workspace %s is not set up on this gateway yet: try again in a minute; if it lasts, ask your administrator to look at Workspace %s and its Secret %s-tickets.", w.name, w.name, w.name)
	}
	for _, key := range *keys {
		claims, err = t.Verify(key, time.Now())
		if err == nil || errors.Is(err, &refusal.Error{Code: refusal.TicketExpired}) {
			return claims, w, err
		}
	}
	return ticket.Claims{}, nil, err
}

// protoError is a refusal as the relay is told of it.
func protoError(e *refusal.Error) *admission.Error {
	return &admission.Error{Code: string(e.Code), Message: e.Message}
}

// Authenticate is admission.AdmissionServer's.
func (g *Gateway) Authenticate(_ context.Context, r *admission.AuthenticateRequest) (*admission.AuthenticateResponse, error) {
	claims, w, err := g.verify(r.Ticket)
	resp := &admission.AuthenticateResponse{ActivityId: r.ActivityId}
	if w != nil {
		resp.Workspace = w.name
	}
	if e := refusal.From(err); e != nil {
		resp.Error = protoError(e)
		if claims.User != "" { // it has expired: its user finds the refusal
			resp.ActivityId, resp.User, resp.Resource = g.own(r.ActivityId, claims), claims.User, claims.Resource
		}
		g.log.Info("ticket refused", "activity", r.ActivityId, "workspace", resp.Workspace, "user", resp.User, "client", r.ClientAddr, "code", e.Code, "error", e.Message)
		return resp, nil
	}
	g.verified.put(r.Ticket, claims, w, time.Now())
	resp.ActivityId = g.own(r.ActivityId, claims)
	resp.User, resp.Resource, resp.Target, resp.RedirectFlags = claims.User, claims.Resource, claims.Target, claims.RedirectFlags
	resp.Expires = timestamppb.New(claims.Expires)
	return resp, nil
}

// own notes whose an activity is, and returns its id: the ticket's own, where it was made for one connect.
func (g *Gateway) own(activity string, claims ticket.Claims) string {
	id := cmp.Or(claims.ActivityID, activity)
	o := owner{activity: id, user: claims.User, workspace: claims.Workspace, at: time.Now()}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.owners.put(id, o)
	if g.owners.get(activity).activity == "" { // a client may choose this one, but not take another's
		g.owners.put(activity, o)
	}
	return id
}

// Connect is admission.AdmissionServer's. It checks the ticket itself, or did in Authenticate: the relay is not believed
// about it.
func (g *Gateway) Connect(ctx context.Context, r *admission.ConnectRequest) (*admission.ConnectResponse, error) {
	began := time.Now()
	g.connects.Add(1)
	g.loadChanged()
	defer func() {
		g.connects.Add(-1)
		g.loadChanged()
	}()
	resp := &admission.ConnectResponse{ActivityId: r.ActivityId}
	claims, w := g.verified.take(r.Ticket, began)
	var err error
	if w == nil {
		claims, w, err = g.verify(r.Ticket)
	}
	if w != nil {
		resp.Workspace, resp.User, resp.Resource = w.name, claims.User, claims.Resource
	}
	if claims.User != "" {
		resp.ActivityId = g.own(r.ActivityId, claims)
	}
	if err == nil {
		if r.Target != "" && !strings.EqualFold(r.Target, claims.Target) {
			err = refusal.New(refusal.WrongTarget, "The client asked for %q, but its ticket is for %q: use the connection file unchanged.", r.Target, claims.Target)
		} else {
			resp.Host, err = w.connect(ctx, r, resp.ActivityId)
		}
	}
	if ctx.Err() == context.Canceled {
		return nil, ctx.Err() // the client has left: nobody is there to be refused
	}
	e := refusal.From(err)
	g.metrics.connected(e, time.Since(began), resp.ActivityId)
	if e != nil {
		resp.Error = protoError(e)
		g.log.Info("connect refused", "activity", resp.ActivityId, "session", r.SessionId, "workspace", resp.Workspace, "user", resp.User, "resource", resp.Resource,
			"client", r.ClientAddr, "code", e.Code, "error", e.Message)
		return resp, nil
	}
	g.log.Info("host promised", "activity", resp.ActivityId, "session", r.SessionId, "workspace", resp.Workspace, "user", resp.User, "resource", resp.Resource, "host", resp.Host)
	return resp, nil
}
