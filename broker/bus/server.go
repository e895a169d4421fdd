// Package bus is the control channel's server: NATS, embedded in the broker and clustered over its replicas. Agents and
// gateways come in over TLS or over WebSocket, brokers over routes; each by mutual TLS, each held to what the identity
// in its certificate may say and hear (wire/bus.PermissionsFor). There is no other credential and nothing is stored.
package bus

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/door"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
)

const (
	// maxPayload bounds one message. The largest is a report of 1,000 sessions, each with its proof.
	maxPayload = 2 << 20
	// maxSubscriptions of one connection; an agent or gateway has three.
	maxSubscriptions = 128
	// handshakeTimeout leaves room for thousands that come at one time, as after the loss of every broker: their handshakes
	// share the cores, and one that is given up is made twice.
	handshakeTimeout = 20 * time.Second
	// A peer that says nothing is dropped after pingEvery*(maxPingsOut+1).
	pingEvery   = 20 * time.Second
	maxPingsOut = 2
	// lameDuck is over how long a stopping broker sends its agents to the others, after lameDuckGrace.
	lameDuck      = 10 * time.Second
	lameDuckGrace = 500 * time.Millisecond
	startTimeout  = 10 * time.Second
	// reportEvery is after how many attempts at an unreachable peer, about a second apart, it is logged again.
	reportEvery = 60
	// displaceAfter is how long an agent's connection lasts beside a newer one of its identity, by when that one has
	// subscribed, so that no request is lost in between.
	displaceAfter = 3 * time.Second
	// toldBefore is how long before its end it is told of it.
	toldBefore = 250 * time.Millisecond
	// maxPerAgent bounds the connections of one agent's identity: with more, the older go at once, and with twice as many the
	// newer are refused until they have gone. maxPerGateway bounds a gateway's, one per pod, of which the newer are refused.
	maxPerAgent, maxPerGateway = 4, 512
	// replyTTL is how long a receiver may take to answer a request.
	replyTTL = 2 * time.Minute
)

// Options of a Server. TLS, Namespace, Workspace and Name are required.
type Options struct {
	Namespace, Workspace string
	// Name is this replica's, unique in the cluster.
	Name string
	// TLS holds the broker's bus identity and the CA of its peers. Renewals take effect for new connections.
	TLS *mtls.Reloader
	// Host to listen on for agents and gateways, all addresses if empty; RouteHost for other replicas, all IPv4 addresses if empty.
	Host, RouteHost string
	// Ports; 0 is the standard port, -1 a free one.
	Port, WebSocketPort, RoutePort int
	// Peers gives the route addresses (host:port) of the other replicas. Nil is a broker alone.
	Peers func(context.Context) ([]string, error)
	// Callers is what can be known of who calls on the listeners for agents and gateways.
	Callers config.Callers
	// Ended is told why a connection ended that nobody had vouched for (door.Options).
	Ended func(why string)
	// PeersEvery is how often Peers is asked, 5 s if 0.
	PeersEvery time.Duration
	// Presence is told when an agent or gateway connects to or leaves this replica. conn is unique in its life. It is
	// called in order and must not block.
	Presence func(id identity.ID, conn uint64, connected bool)
	// Admit has a further say on who may connect, by a certificate over the key with this fingerprint
	// (identity.KeyFingerprint), issued when. See Recheck. It must not block. Nil admits all.
	Admit func(id identity.ID, key string, issued time.Time) error
	// Picked says whether the workspace has a gateway: the others' connections have wirebus.UnpickedPermissions. See Recheck.
	// It must not block. Nil picks all.
	Picked func(gateway string) bool
	Log    *slog.Logger
}

// Server is one replica of the bus.
type Server struct {
	o     Options
	auth  *authenticator
	front *front
	nats  *server.Server
	// listener and webSocket are the public ones; the server's own are behind them.
	listener, webSocket net.Listener
	tell                *nats.Conn     // to say so to connections that are about to be closed
	told                chan displaced // those
	stop                context.CancelFunc
	wg                  sync.WaitGroup

	// reloading is held while routes change: the server then asks for everybody's authentication again, and would turn
	// away a connection of our own that is only on its way. (Clients in that moment come back by themselves.)
	reloading sync.Mutex
	opts      *server.Options // owned by followPeers once it runs
}

// Start starts the server and returns once it listens.
func Start(ctx context.Context, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Presence == nil {
		o.Presence = func(identity.ID, uint64, bool) {}
	}
	if o.Picked == nil {
		o.Picked = func(string) bool { return true }
	}
	if o.Admit == nil {
		o.Admit = func(identity.ID, string, time.Time) error { return nil }
	}
	if o.PeersEvery == 0 {
		o.PeersEvery = 5 * time.Second
	}
	front, err := newFront(door.Options{Callers: o.Callers, Log: o.Log, Ended: o.Ended,
		Field: fmt.Sprintf("spec.broker.bus.service.proxyProtocol.networks of Workspace %s", o.Workspace)})
	if err != nil {
		return nil, err
	}
	s := &Server{o: o, auth: newAuthenticator(o), front: front, told: make(chan displaced, 1024)}
	s.auth.front = front
	s.auth.displace = func(id identity.ID, conns []uint64) {
		select {
		case s.told <- displaced{id, conns}:
		default: // each further connection of theirs asks again
		}
	}
	if s.listener, err = front.listen(o.Host, port(o.Port, config.PortBus)); err != nil {
		return nil, err
	}
	if s.webSocket, err = front.listen(o.Host, port(o.WebSocketPort, config.PortBusWebSocket)); err != nil {
		front.close()
		return nil, err
	}
	s.opts = s.options()
	if s.nats, err = server.NewServer(s.opts); err != nil {
		front.close()
		return nil, fmt.Errorf("bus: %w", err)
	}
	s.nats.SetLoggerV2(logger{o.Log, front.rename}, false, false, false)
	s.nats.Start()
	if !s.nats.ReadyForConnections(startTimeout) {
		s.nats.Shutdown()
		front.close()
		return nil, errors.New("bus: the server did not come up; see the log for the port that it could not take")
	}
	s.auth.system = s.nats.SystemAccount()
	front.serve(s.listener, s.nats.Addr(), true)
	front.serve(s.webSocket, s.portAddr(s.nats.PortsInfo(startTimeout).WebSocket), false)
	ctx, s.stop = context.WithCancel(ctx)
	if err := s.watchPresence(); err != nil {
		s.Close()
		return nil, err
	}
	if s.tell, err = s.Connect(); err != nil {
		s.Close()
		return nil, err
	}
	s.wg.Go(func() { s.closeDisplaced(ctx) })
	if o.Peers != nil {
		s.wg.Go(func() { s.followPeers(ctx) })
	}
	return s, nil
}

func (s *Server) options() *server.Options {
	agents := s.o.TLS.MutualServerConfig(s.auth.admit)
	return &server.Options{
		ServerName: s.o.Name,
		Host:       "127.0.0.1", Port: server.RANDOM_PORT,
		Websocket: server.WebsocketOpts{
			Host: "127.0.0.1", Port: server.RANDOM_PORT,
			TLSConfig: agents, HandshakeTimeout: handshakeTimeout,
		},
		Cluster: server.ClusterOpts{
			Name: s.o.Namespace + "/" + s.o.Workspace,
			Host: cmp.Or(s.o.RouteHost, s.o.Host, "0.0.0.0"), Port: port(s.o.RoutePort, config.PortBusRoutes),
			TLSConfig: s.routeTLS(), TLSTimeout: handshakeTimeout.Seconds(),
			// Clients know us by our Service; pod addresses would fail their check of our name.
			NoAdvertise: true,
			PoolSize:    -1, // one connection per peer: there is one account, and little traffic
		},
		TLSConfig: agents, TLSTimeout: handshakeTimeout.Seconds(), AuthTimeout: handshakeTimeout.Seconds() + 1,
		CustomClientAuthentication: s.auth,
		MaxPayload:                 maxPayload, MaxSubs: maxSubscriptions,
		PingInterval: pingEvery, MaxPingsOut: maxPingsOut,
		LameDuckDuration: lameDuck, LameDuckGracePeriod: lameDuckGrace,
		// A peer that is gone stays in DNS for a while; once a minute is often enough to be told.
		ConnectErrorReports: reportEvery, ReconnectErrorReports: reportEvery,
		NoSigs: true,
	}
}

// routeTLS verifies the other broker the same way whichever side dialled: a route carries every workspace message, so
// only role broker may hold one. The one certificate serves both directions, so it must be good for both.
func (s *Server) routeTLS() *tls.Config {
	allow := mtls.AllowRole(s.o.Namespace, s.o.Workspace, identity.RoleBroker)
	accept, dial := s.o.TLS.MutualServerConfig(allow), s.o.TLS.ClientConfig("", allow)
	asServer, asClient := accept.VerifyConnection, dial.VerifyConnection
	accept.GetClientCertificate = dial.GetClientCertificate
	accept.InsecureSkipVerify = true // Go's own check would use the system's roots; VerifyConnection does it all.
	accept.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := asServer(cs); err != nil {
			return err
		}
		return asClient(cs)
	}
	return accept
}

// Strangers counts the connections that have not authenticated.
func (s *Server) Strangers() int { return s.front.door.Strangers() }

func port(p, standard int) int {
	if p == 0 {
		return standard
	}
	return p
}

// Connect gives the broker's own connection: in this process, with every permission. opts are added to those it needs.
func (s *Server) Connect(opts ...nats.Option) (*nats.Conn, error) {
	return s.connect(s.auth.ownToken, append(opts, nats.Name("broker "+s.o.Name),
		nats.CustomInboxPrefix(wirebus.InboxPrefix(identity.Broker(s.o.Namespace, s.o.Workspace))))...)
}

func (s *Server) connect(token string, opts ...nats.Option) (*nats.Conn, error) {
	opts = append(opts, nats.InProcessServer(s.nats), nats.Token(token), nats.NoReconnect(),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			s.o.Log.Error("own connection to the bus", "subject", subject, "error", err)
		}))
	s.reloading.Lock()
	defer s.reloading.Unlock()
	nc, err := nats.Connect("", opts...)
	if err != nil {
		return nil, fmt.Errorf("bus: in-process connection: %w", err)
	}
	return nc, nil
}

// watchPresence hears of every connection's end from the server's own account; its beginning is authentication.
func (s *Server) watchPresence() error {
	nc, err := s.connect(s.auth.watchToken)
	if err != nil {
		return err
	}
	_, err = nc.Subscribe("$SYS.ACCOUNT.*.DISCONNECT", func(m *nats.Msg) {
		var e server.DisconnectEventMsg
		if json.Unmarshal(m.Data, &e) == nil && e.Server.ID == s.nats.ID() {
			s.auth.gone(e.Client.ID)
		}
	})
	if err != nil {
		return fmt.Errorf("bus: %w", err)
	}
	return nc.Flush()
}

// followPeers keeps routes to the replicas that there are. (NATS could resolve a name itself, but would give up for good
// where it finds only its own address, as the first of two starting replicas does.)
func (s *Server) followPeers(ctx context.Context) {
	var known []string
	tick := time.NewTicker(s.o.PeersEvery)
	defer tick.Stop()
	for {
		peers, err := s.o.Peers(ctx)
		slices.Sort(peers)
		switch {
		case err != nil:
			if ctx.Err() == nil {
				s.o.Log.Warn("can't find the other brokers; keeping the routes there are", "error", err)
			}
		case !slices.Equal(peers, known):
			next := *s.opts
			next.Routes = nil
			for _, p := range peers {
				next.Routes = append(next.Routes, &url.URL{Scheme: "nats-route", Host: p})
			}
			if err := s.reload(&next); err != nil {
				s.o.Log.Error("can't change routes", "error", err)
				break
			}
			s.opts, known = &next, peers
			s.o.Log.Info("routes", "peers", peers)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Server) reload(next *server.Options) error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	return s.nats.ReloadOptions(next)
}

// ResolvePeers makes Options.Peers from a headless Service's name: its addresses without self.
func ResolvePeers(host string, port int, self string) func(context.Context) ([]string, error) {
	return func(ctx context.Context) ([]string, error) {
		addrs, err := net.DefaultResolver.LookupHost(ctx, host)
		var dnsErr *net.DNSError
		if errors.As(err, &dnsErr) && dnsErr.IsNotFound {
			return nil, nil // no replica is published yet, not even this one
		}
		if err != nil {
			return nil, err
		}
		var peers []string
		for _, a := range addrs {
			if a != self {
				peers = append(peers, net.JoinHostPort(a, strconv.Itoa(port)))
			}
		}
		return peers, nil
	}
}

// Routes counts the other replicas that this one is joined to.
func (s *Server) Routes() int { return s.nats.NumRoutes() } // one per peer: ActivePeers may hold for a minute one that has gone

// Clients counts the agents and gateways on this replica.
func (s *Server) Clients() int { return s.auth.count() }

// Present gives the agents and gateways on this replica, by connection.
func (s *Server) Present() map[uint64]identity.ID {
	ids := map[uint64]identity.ID{}
	for conn, c := range s.auth.present() {
		ids[conn] = c.id
	}
	return ids
}

// displaced are connections of an identity that newer ones have replaced.
type displaced struct {
	id    identity.ID
	conns []uint64
}

// closeDisplaced tells such connections, and closes them.
func (s *Server) closeDisplaced(ctx context.Context) {
	for {
		var d displaced
		select {
		case <-ctx.Done():
			return
		case d = <-s.told:
		}
		for _, conn := range d.conns {
			data, err := json.Marshal(wirebus.HostDisplaced{Broker: s.o.Name, Conn: conn})
			if err == nil {
				err = s.tell.Publish(wirebus.HostDisplacedSubject(d.id.Pool, d.id.Host), data)
			}
			if err == nil {
				err = s.tell.FlushTimeout(time.Second)
			}
			s.o.Log.Info("connection ended: a newer one of the same identity came", "identity", d.id.String(), "conn", conn, "told", err == nil)
			// It reads no more once it is closed.
			time.AfterFunc(toldBefore, func() { s.disconnect(conn) })
		}
	}
}

// disconnect ends a connection. It counts no more before its client can know.
func (s *Server) disconnect(conn uint64) {
	s.auth.gone(conn)
	_ = s.nats.DisconnectClientByID(conn) // an error says that it has ended meanwhile
}

// DisplaceOlder closes the connections of an agent's identity to this replica that came before at: another replica has a
// newer one.
func (s *Server) DisplaceOlder(id identity.ID, at time.Time) { s.auth.displaceOlder(id, at) }

// Recheck asks Admit about everybody again, and ends the connections of those whom it does not admit any more, and of gateways
// that may say more, or less, than when they came: they come again.
func (s *Server) Recheck() {
	for conn, c := range s.auth.present() {
		err := s.o.Admit(c.id, c.key, c.issued)
		if picked := s.auth.picked(c.id); err == nil && picked != c.picked {
			err = fmt.Errorf("gateway %s: picked by the workspace is %t now", c.id.Gateway, picked)
		}
		if err != nil {
			s.o.Log.Info("connection ended", "identity", c.id.String(), "error", err)
			// It reads no more once it is closed.
			time.AfterFunc(toldBefore, func() { s.disconnect(conn) })
		}
	}
}

// Addr, WebSocketAddr and RouteAddr are the listeners'.
func (s *Server) Addr() net.Addr          { return s.listener.Addr() }
func (s *Server) WebSocketAddr() net.Addr { return s.webSocket.Addr() }
func (s *Server) RouteAddr() net.Addr     { return s.nats.ClusterAddr() }

func (s *Server) portAddr(urls []string) net.Addr {
	if len(urls) == 0 {
		return nil
	}
	u, err := url.Parse(urls[0])
	if err != nil {
		return nil
	}
	a, err := net.ResolveTCPAddr("tcp", u.Host)
	if err != nil {
		return nil
	}
	return a
}

// Shutdown sends clients to the other replicas, a few at a time so that they don't arrive all at once, then stops. When
// ctx ends first, it stops at once.
func (s *Server) Shutdown(ctx context.Context) {
	s.front.stopAccepting()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.nats.LameDuckShutdown()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	s.Close()
}

// Close stops at once.
func (s *Server) Close() {
	s.stop()
	s.front.stopAccepting()
	s.nats.Shutdown()
	s.nats.WaitForShutdown()
	s.front.close()
	s.wg.Wait()
}

func randomToken() string { return rand.Text() + rand.Text() }
