// Package broker is one replica of a workspace's broker: the feed, enrolment, the control channel's server, and the
// orchestration of connects. It puts together what the packages below it do.
package broker

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"rendezvous.dev/rendezvous/broker/bus"
	"rendezvous.dev/rendezvous/broker/enrol"
	"rendezvous.dev/rendezvous/broker/metrics"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/oidc"
	"rendezvous.dev/rendezvous/broker/orchestrate"
	"rendezvous.dev/rendezvous/broker/traces"
	"rendezvous.dev/rendezvous/broker/web"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/door"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
)

const (
	reloadEvery = 10 * time.Second
	// shutdownTimeout bounds a graceful stop: connects in work, then clients that move to other replicas.
	shutdownTimeout = 25 * time.Second
	oidcCAFile      = "oidc-ca.crt"
	recheckEvery    = time.Minute
	// feedStrangers bounds the feed's connections of people who haven't signed in, feedPatience how long one may say nothing.
	feedStrangers = 2048
	feedPatience  = 10 * time.Second
)

// Inventory is the declared world, live; broker/inventory has one over Kubernetes.
type Inventory interface {
	model.Source
	model.Writer
	// OnChange has f called after each new snapshot. Called before Run.
	OnChange(f func())
	// Run keeps the snapshot current until ctx ends.
	Run(ctx context.Context) error
	// Synced says that there was a first whole snapshot.
	Synced() bool
	// Heard says when the declared world's keeper last answered, zero for never, and why the last look failed.
	Heard() (time.Time, error)
}

// Options of a broker.
type Options struct {
	Config config.Broker
	// ConfigDir holds oidc-ca.crt, beside the configuration file.
	ConfigDir string
	// TLSDir, BusDir, TicketsDir and SigningDir are mounted Secrets; see wire/config.
	TLSDir, BusDir, TicketsDir, SigningDir string
	// Name is the pod's, PodIP its address.
	Name, PodIP string
	// Host to listen on, all addresses if empty. Ports 0 are the standard ones, -1 free ones.
	Host                                              string
	FeedPort, BusPort, BusWebSocketPort, BusRoutePort int
	SessionsPort                                      int
	// MetricsAddr serves /metrics, /healthz and /readyz.
	MetricsAddr string
	Inventory   Inventory
	Log         *slog.Logger
	// Linger is for how long a broker that is told to stop goes on serving, without being ready: clients are sent here
	// until everybody has heard that it is leaving.
	Linger time.Duration
	// Started is told the addresses once all listeners are up. May be nil.
	Started func(Addresses)
}

// Addresses of the listeners.
type Addresses struct {
	Feed, Bus, BusWebSocket, BusRoutes, Metrics, Sessions net.Addr
}

// Run runs a broker until ctx ends, then lets go of its clients and stops.
func Run(ctx context.Context, o Options) error {
	log := o.Log
	reloaders := map[string]*mtls.Reloader{}
	for _, dir := range []string{o.TLSDir, o.BusDir, o.TicketsDir, o.SigningDir} {
		r, err := mtls.NewReloader(dir, log)
		if err != nil {
			return err
		}
		go r.Poll(ctx.Done(), reloadEvery)
		reloaders[dir] = r
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m := metrics.New(reg)

	// What runs until the graceful stop is over has a context of its own.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()

	enrolment := enrol.New(enrol.Options{
		Namespace: o.Config.Namespace, Workspace: o.Config.Workspace, Source: o.Inventory, Writer: o.Inventory,
		InternalIssuer: o.Config.InternalIssuer, BusURLs: o.Config.BusURLs, BusCA: busCA(o.BusDir, log), Log: log, Metrics: m,
	})
	// The bus knows of a connection before there is somebody to tell.
	var orchestrator atomic.Pointer[orchestrate.Orchestrator]
	b, err := bus.Start(life, bus.Options{
		Namespace: o.Config.Namespace, Workspace: o.Config.Workspace, Name: o.Name, TLS: reloaders[o.BusDir],
		Host: o.Host, RouteHost: routeHost(o), Port: o.BusPort, WebSocketPort: o.BusWebSocketPort, RoutePort: o.BusRoutePort,
		Peers: peers(o), Admit: enrolment.Member, Picked: picked(o.Inventory), Log: log, Callers: o.Config.Bus, Ended: ended(m, "bus"),
		Presence: func(id identity.ID, conn uint64, connected bool) {
			if orch := orchestrator.Load(); orch != nil {
				orch.Presence(id, conn, connected)
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

	orch := orchestrate.New(orchestrate.Options{
		Namespace: o.Config.Namespace, Workspace: o.Config.Workspace, Name: o.Name, Source: o.Inventory, Writer: o.Inventory, Conn: nc,
		TicketKey: ticketPublicKey(reloaders[o.TicketsDir]), ProofKey: ticketPrivateKey(reloaders[o.TicketsDir]), Log: log, Metrics: m,
		Displace: b.DisplaceOlder,
	})
	store := traces.New()
	validator := oidc.New(oidc.Options{
		Config: func() (model.OIDC, bool) {
			ws := o.Inventory.Snapshot().Workspace
			if ws == nil {
				return model.OIDC{}, false
			}
			return ws.OIDC, true
		},
		CAFile: filepath.Join(o.ConfigDir, oidcCAFile), Log: log,
	})
	o.Inventory.OnChange(orch.Changed)
	o.Inventory.OnChange(b.Recheck)
	o.Inventory.OnChange(enrolment.Changed)
	if err := errors.Join(orch.Start(life), store.Subscribe(nc), enrolment.ServeRenewals(life, nc)); err != nil {
		return err
	}
	orchestrator.Store(orch)
	for conn, id := range b.Present() {
		orch.Presence(id, conn, true)
	}

	feedListener, err := listenFeed(o, m)
	if err != nil {
		return fmt.Errorf("broker: feed: %w", err)
	}
	defer feedListener.Close()
	sessionsListener, err := door.Inside(net.JoinHostPort(o.Host, strconv.Itoa(port(o.SessionsPort, config.PortSessions))), log, ended(m, "sessions"))
	if err != nil {
		return fmt.Errorf("broker: sessions: %w", err)
	}
	defer sessionsListener.Close()
	options := web.Options{
		Namespace: o.Config.Namespace, Workspace: o.Config.Workspace, Name: o.Name, Source: o.Inventory, Identity: validator, Enrol: enrolment,
		Traces: store, Trace: orch.Trace, Gateways: orch, Access: orch, Sessions: orch, TicketKey: ticketPrivateKey(reloaders[o.TicketsDir]),
		Signer: reloaders[o.SigningDir].Certificate, Log: log, Metrics: m,
	}
	feed := web.Server(options, reloaders[o.TLSDir].ServerConfig())
	sessions := web.SessionsServer(options, reloaders[o.BusDir].MutualServerConfig(mtls.AllowRole(o.Config.Namespace, o.Config.Workspace, identity.RoleOperator)))

	gauges(reg, o, b, orch, validator)
	ready := func() error {
		switch {
		case ctx.Err() != nil:
			return errors.New("stopping")
		case !o.Inventory.Synced():
			return errors.New("the Kubernetes caches are not filled yet")
		case !nc.IsConnected():
			return errors.New("the bus is down")
		}
		return nil
	}
	monitorListener, err := door.Inside(o.MetricsAddr, log, ended(m, "metrics"))
	if err != nil {
		return fmt.Errorf("broker: metrics: %w", err)
	}
	defer monitorListener.Close()
	monitor := &http.Server{Handler: monitorHandler(reg, ready), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}

	work, workCtx := errgroup.WithContext(life)
	work.Go(func() error { return served(feed.ServeTLS(feedListener, "", "")) })
	work.Go(func() error { return served(sessions.ServeTLS(sessionsListener, "", "")) })
	work.Go(func() error { return served(monitor.Serve(monitorListener)) })
	work.Go(func() error { return o.Inventory.Run(workCtx) })
	work.Go(func() error { validator.Run(workCtx); return nil })
	work.Go(func() error { enrolment.Follow(workCtx); return nil })
	work.Go(func() error { recheck(workCtx, b, enrolment); return nil })
	work.Go(func() error {
		select {
		case <-ctx.Done():
			log.Info("stopping")
			select {
			case <-time.After(o.Linger):
			case <-workCtx.Done():
			}
		case <-workCtx.Done():
		}
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		orch.Drain(stop)
		feed.Shutdown(stop)
		sessions.Shutdown(stop)
		b.Shutdown(stop)
		monitor.Shutdown(stop)
		end()
		return nil
	})
	log.Info("broker runs", "workspace", o.Config.Workspace, "feed", feedListener.Addr().String(), "bus", b.Addr().String())
	if o.Started != nil {
		o.Started(Addresses{Feed: feedListener.Addr(), Bus: b.Addr(), BusWebSocket: b.WebSocketAddr(), BusRoutes: b.RouteAddr(), Metrics: monitorListener.Addr(), Sessions: sessionsListener.Addr()})
	}
	err = work.Wait()
	orch.Wait()
	return err
}

// recheck asks again and again who may be on the bus. What changes that is acted on at once; this is for what could not be
// recorded then.
func recheck(ctx context.Context, b *bus.Server, e *enrol.Service) {
	tick := time.NewTicker(recheckEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			b.Recheck()
			e.Changed()
		}
	}
}

// routeHost is where other brokers find this one: at its pod's address, of whichever family.
func routeHost(o Options) string {
	if addr, err := netip.ParseAddr(o.PodIP); err == nil && addr.Is6() && o.Host == "" {
		return netip.IPv6Unspecified().String()
	}
	return o.Host
}

func peers(o Options) func(context.Context) ([]string, error) {
	if o.Config.PeersHost == "" {
		return nil
	}
	return bus.ResolvePeers(o.Config.PeersHost, config.PortBusRoutes, o.PodIP)
}

// picked says which gateways are the workspace's. While nothing is known of the declared world, each is.
func picked(source model.Source) func(string) bool {
	return func(gateway string) bool {
		snap := source.Snapshot()
		return snap.Workspace == nil || slices.ContainsFunc(snap.Gateways, func(g *model.Gateway) bool { return g.Name == gateway })
	}
}

func listenFeed(o Options, m *metrics.Metrics) (net.Listener, error) {
	d, err := door.New(door.Options{
		Places: feedStrangers, Patience: feedPatience, Callers: o.Config.Feed, Log: o.Log, Ended: ended(m, "feed"),
		Field: fmt.Sprintf("spec.broker.service.proxyProtocol.networks of Workspace %s", o.Config.Workspace),
	})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(o.Host, strconv.Itoa(port(o.FeedPort, config.PortPublic))))
	if err != nil {
		return nil, err
	}
	return d.Listen(l), nil
}

// ended counts the strangers that had to go.
func ended(m *metrics.Metrics, listener string) func(why string) {
	return func(why string) { m.StrangersEnded.WithLabelValues(listener, why).Inc() }
}

func port(p, standard int) int {
	switch p {
	case 0:
		return standard
	case -1:
		return 0
	}
	return p
}

// served forgives a server that it was closed.
func served(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("broker: %w", err)
}

func ticketPrivateKey(r *mtls.Reloader) func() (ed25519.PrivateKey, error) {
	return func() (ed25519.PrivateKey, error) {
		key, ok := r.Certificate().PrivateKey.(ed25519.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("the ticket signer's key is %T, want Ed25519", r.Certificate().PrivateKey)
		}
		return key, nil
	}
}

func ticketPublicKey(r *mtls.Reloader) func() (ed25519.PublicKey, error) {
	private := ticketPrivateKey(r)
	return func() (ed25519.PublicKey, error) {
		key, err := private()
		if err != nil {
			return nil, err
		}
		return key.Public().(ed25519.PublicKey), nil
	}
}

func busCA(dir string, log *slog.Logger) func() string {
	return func() string {
		data, err := os.ReadFile(filepath.Join(dir, mtls.CAFile))
		if err != nil {
			log.Error("can't read the bus's CA", "error", err)
		}
		return string(data)
	}
}

func gauges(reg prometheus.Registerer, o Options, b *bus.Server, orch *orchestrate.Orchestrator, v *oidc.Validator) {
	metrics.Gauge(reg, "bus_clients", "Agents and gateways on this replica.", func() float64 { return float64(b.Clients()) })
	metrics.Gauge(reg, "bus_strangers", "Connections to the bus that have not authenticated.", func() float64 { return float64(b.Strangers()) })
	metrics.Gauge(reg, "bus_routes", "Other replicas that this one is joined to.", func() float64 { return float64(b.Routes()) })
	metrics.Gauge(reg, "hosts", "Session hosts that report.", func() float64 { n, _, _ := orch.Counts(); return float64(n) })
	metrics.Gauge(reg, "hosts_local", "Session hosts whose agent is on this replica.", func() float64 { _, n, _ := orch.Counts(); return float64(n) })
	metrics.Gauge(reg, "sessions", "Sessions that hosts report.", func() float64 { _, _, n := orch.Counts(); return float64(n) })
	for name, of := range map[string]struct {
		who   string
		heard func() (time.Time, error)
	}{"identity": {"identity provider", v.Heard}, "kubernetes": {"Kubernetes API server", o.Inventory.Heard}} {
		metrics.Gauge(reg, name+"_heard_timestamp_seconds", "When the "+of.who+" last answered, 0 for never.", func() float64 {
			heard, _ := of.heard()
			if heard.IsZero() {
				return 0
			}
			return float64(heard.Unix())
		})
		metrics.Gauge(reg, name+"_up", "1 where the "+of.who+" answered when it was last asked.", func() float64 {
			if heard, err := of.heard(); err != nil || heard.IsZero() {
				return 0
			}
			return 1
		})
	}
	metrics.Gauge(reg, "kubernetes_synced", "1 once the caches of Kubernetes objects were filled.", func() float64 {
		if o.Inventory.Synced() {
			return 1
		}
		return 0
	})
}

func monitorHandler(reg *prometheus.Registry, ready func() error) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}
