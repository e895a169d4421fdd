package bus

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/internal/testca"
	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
)

const (
	ns, ws = "ns", "ws"
	// patience bounds a wait for something that must happen; quiet is a wait for something that must not.
	patience = 20 * time.Second
	quiet    = 300 * time.Millisecond
)

var (
	agentA  = identity.Agent(ns, ws, "pool", "a")
	agentB  = identity.Agent(ns, ws, "pool", "b")
	gateway = identity.Gateway(ns, ws, "gw")
)

func start(t *testing.T, ca *testca.CA, o Options) *Server {
	t.Helper()
	o.Namespace, o.Workspace, o.Host = ns, ws, "127.0.0.1"
	if o.Name == "" {
		o.Name = "broker-0"
	}
	if o.TLS == nil {
		o.TLS = ca.Reloader(identity.Broker(ns, ws))
	}
	o.Port, o.WebSocketPort, o.RoutePort = -1, -1, -1
	s, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// dial connects as an agent or gateway does. A nil certificate shows none.
func dial(url string, r *mtls.Reloader, id identity.ID, opts ...nats.Option) (*nats.Conn, error) {
	c := &tls.Config{InsecureSkipVerify: true}
	if r != nil {
		c = r.ClientConfig("127.0.0.1", mtls.AllowRole(ns, ws, identity.RoleBroker))
	}
	return nats.Connect(url, append([]nats.Option{
		nats.Secure(c), nats.CustomInboxPrefix(wirebus.InboxPrefix(id)), nats.Timeout(patience), nats.NoReconnect(),
	}, opts...)...)
}

func mustDial(t *testing.T, s *Server, ca *testca.CA, id identity.ID, opts ...nats.Option) *nats.Conn {
	t.Helper()
	nc, err := dial("tls://"+s.Addr().String(), ca.Reloader(id), id, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func own(t *testing.T, s *Server) *nats.Conn {
	t.Helper()
	nc, err := s.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}

func echo(t *testing.T, nc *nats.Conn, subject string) {
	t.Helper()
	if _, err := nc.Subscribe(subject, func(m *nats.Msg) { m.Respond(m.Data) }); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestRequestsBothWays(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	broker := own(t, s)
	for _, url := range []string{"tls://" + s.Addr().String(), "wss://" + s.WebSocketAddr().String()} {
		t.Run(url[:3], func(t *testing.T) {
			agent, err := dial(url, ca.Reloader(agentA), agentA)
			if err != nil {
				t.Fatal(err)
			}
			defer agent.Close()
			echo(t, agent, wirebus.HostConnectSubject("pool", "a"))
			if m, err := broker.Request(wirebus.HostConnectSubject("pool", "a"), []byte("go"), patience); err != nil || string(m.Data) != "go" {
				t.Fatalf("broker asks agent: %v %v", m, err)
			}
		})
	}
	gw := mustDial(t, s, ca, gateway)
	if _, err := broker.QueueSubscribe(wirebus.SubjectConnect, wirebus.Brokers, func(m *nats.Msg) { m.Respond(m.Data) }); err != nil {
		t.Fatal(err)
	}
	broker.Flush()
	if _, err := gw.Request(wirebus.SubjectConnect, []byte("x"), patience); err != nil {
		t.Fatalf("gateway asks brokers: %v", err)
	}
}

// Each row is something that an identity must not do. The control shows that the same message would be seen if allowed.
func TestPermissions(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	broker := own(t, s)
	for _, c := range []struct {
		name      string
		as        identity.ID
		publish   string
		subscribe string
	}{
		{name: "an agent asks for a connect", as: agentA, publish: wirebus.SubjectConnect},
		{name: "an agent ends another host's session", as: agentA, publish: wirebus.HostSessionSubject("pool", "b")},
		{name: "an agent hears what is done to another host's sessions", as: agentA, subscribe: wirebus.HostSessionSubject("pool", "b")},
		{name: "an agent reports for another host", as: agentA, publish: wirebus.ReportSubject("pool", "b")},
		{name: "an agent renews for another host", as: agentA, publish: wirebus.RenewSubject("pool", "b")},
		{name: "an agent tells another agent to connect", as: agentA, publish: wirebus.HostConnectSubject("pool", "b")},
		{name: "an agent traces as another", as: agentA, publish: wirebus.TraceSubject(agentB)},
		{name: "an agent tells another that it is displaced", as: agentA, publish: wirebus.HostDisplacedSubject("pool", "b")},
		{name: "an agent ends a session", as: agentA, publish: wirebus.GatewayEndSubject("gw", "pod")},
		{name: "a gateway tells an agent to connect", as: gateway, publish: wirebus.HostConnectSubject("pool", "a")},
		{name: "a gateway reports for a host", as: gateway, publish: wirebus.ReportSubject("pool", "a")},
		{name: "a gateway reports for another gateway", as: gateway, publish: wirebus.GatewayReportSubject("other", "pod")},
		{name: "a gateway speaks as a broker", as: gateway, publish: "rdv.presence"},
		{name: "a gateway says what groups users are in", as: gateway, publish: "rdv.standing"},
		{name: "an agent says what groups users are in", as: agentA, publish: "rdv.standing.broker-0"},
		{name: "a gateway hears what groups users are in", as: gateway, subscribe: "rdv.standing"},
		{name: "an agent hears what groups users are in", as: agentA, subscribe: "rdv.standing.>"},
		{name: "a gateway ends another gateway's session", as: gateway, publish: wirebus.GatewayEndSubject("other", "pod")},
		{name: "an agent hears another host's connects", as: agentA, subscribe: wirebus.HostConnectSubject("pool", "b")},
		{name: "an agent hears all hosts", as: agentA, subscribe: "rdv.host.>"},
		{name: "an agent hears everything", as: agentA, subscribe: ">"},
		{name: "an agent hears another's replies", as: agentA, subscribe: wirebus.InboxPrefix(agentB) + ".>"},
		{name: "an agent takes connect requests", as: agentA, subscribe: wirebus.SubjectConnect},
		{name: "a gateway takes connect requests", as: gateway, subscribe: wirebus.SubjectConnect},
		{name: "a gateway answers for a host", as: gateway, subscribe: wirebus.HostConnectSubject("pool", "a")},
		{name: "a gateway hears reports", as: gateway, subscribe: wirebus.AllReports},
		{name: "a gateway hears the server's own account", as: gateway, subscribe: "$SYS.>"},
	} {
		t.Run(c.name, func(t *testing.T) {
			violations := make(chan error, 4)
			nc := mustDial(t, s, ca, c.as, nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { violations <- err }))
			heard := make(chan *nats.Msg, 4)
			if c.publish != "" {
				sub, err := broker.ChanSubscribe(c.publish, heard)
				if err != nil {
					t.Fatal(err)
				}
				defer sub.Unsubscribe()
				broker.Flush()
				nc.Publish(c.publish, []byte("forged"))
			} else {
				nc.ChanSubscribe(c.subscribe, heard)
				nc.Flush()
				broker.Publish(strings.NewReplacer(">", "x.y", "*", "x").Replace(c.subscribe), []byte("secret"))
				broker.Flush()
			}
			select {
			case err := <-violations:
				if !errors.Is(err, nats.ErrPermissionViolation) {
					t.Fatalf("got %v, want a permissions violation", err)
				}
			case <-time.After(patience):
				t.Fatal("no violation was reported")
			}
			nc.Flush()
			broker.Flush()
			select {
			case m := <-heard:
				t.Fatalf("%q came through on %s", m.Data, m.Subject)
			default:
			}
		})
	}
}

func TestReplyOnce(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	broker := own(t, s)
	agent := mustDial(t, s, ca, agentA)
	if _, err := agent.Subscribe(wirebus.HostConnectSubject("pool", "a"), func(m *nats.Msg) {
		m.Respond([]byte("1"))
		m.Respond([]byte("2"))
	}); err != nil {
		t.Fatal(err)
	}
	agent.Flush()
	inbox := broker.NewInbox()
	replies, _ := broker.SubscribeSync(inbox)
	broker.PublishRequest(wirebus.HostConnectSubject("pool", "a"), inbox, nil)
	if _, err := replies.NextMsg(patience); err != nil {
		t.Fatal(err)
	}
	agent.Flush()
	if m, err := replies.NextMsg(quiet); err == nil {
		t.Fatalf("a second reply came through: %q", m.Data)
	}
}

func TestRefusedConnections(t *testing.T) {
	ca, other := testca.New(t, "ca"), testca.New(t, "other")
	s := start(t, ca, Options{})
	expired := testca.IdentitySpec(agentA)
	expired.NotAfter = time.Now().Add(-time.Minute)
	two := testca.IdentitySpec(agentA)
	two.URIs = append(two.URIs, gateway.URI())
	for _, c := range []struct {
		name string
		cert *mtls.Reloader
	}{
		{"no certificate", nil},
		{"another CA", other.Reloader(agentA)},
		{"a ticket signer", ca.Reloader(identity.TicketSigner(ns, ws))},
		{"a broker, which has routes", ca.Reloader(identity.Broker(ns, ws))},
		{"an agent of another workspace", ca.Reloader(identity.Agent(ns, "else", "pool", "a"))},
		{"an agent of another namespace", ca.Reloader(identity.Agent("else", ws, "pool", "a"))},
		{"an expired certificate", testca.NewReloader(t, ca.Dir(ca.Issue(expired)))},
		{"two identities", testca.NewReloader(t, ca.Dir(ca.Issue(two)))},
		{"no identity", testca.NewReloader(t, ca.Dir(ca.Issue(testca.Spec{DNSNames: []string{"pool"}})))},
	} {
		for _, url := range []string{"tls://" + s.Addr().String(), "wss://" + s.WebSocketAddr().String()} {
			t.Run(c.name+" "+url[:3], func(t *testing.T) {
				cfg := &tls.Config{InsecureSkipVerify: true}
				if c.cert != nil {
					cfg.Certificates = []tls.Certificate{*c.cert.Certificate()}
				}
				nc, err := nats.Connect(url, nats.Secure(cfg), nats.NoReconnect(), nats.Timeout(patience))
				if err == nil {
					nc.Close()
					t.Fatal("was let in")
				}
			})
		}
	}
	if s.Clients() != 0 {
		t.Fatalf("%d clients counted, want 0", s.Clients())
	}
	t.Run("no TLS, guessing the in-process token", func(t *testing.T) {
		nc, err := nats.Connect("nats://"+s.Addr().String(), nats.Token("guess"), nats.NoReconnect(), nats.Timeout(patience))
		if err == nil {
			nc.Close()
			t.Fatal("was let in")
		}
	})
}

func TestRefusedRoutes(t *testing.T) {
	ca, other := testca.New(t, "ca"), testca.New(t, "other")
	s := start(t, ca, Options{})
	for _, c := range []struct {
		name string
		cert *mtls.Reloader
		ok   bool
	}{
		{"a broker", ca.Reloader(identity.Broker(ns, ws)), true},
		{"an agent", ca.Reloader(agentA), false},
		{"a gateway", ca.Reloader(gateway), false},
		{"a ticket signer", ca.Reloader(identity.TicketSigner(ns, ws)), false},
		{"another workspace's broker", ca.Reloader(identity.Broker(ns, "else")), false},
		{"another CA's broker", other.Reloader(identity.Broker(ns, ws)), false},
		{"no certificate", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			// A route speaks first in clear ("INFO"), then both sides do TLS.
			conn, err := net.Dial("tcp", s.RouteAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			cfg := &tls.Config{InsecureSkipVerify: true}
			if c.cert != nil {
				cfg.Certificates = []tls.Certificate{*c.cert.Certificate()}
			}
			tc := tls.Client(conn, cfg)
			// With TLS 1.3 a refusal shows at the first read; an accepted route sends INFO.
			buf := make([]byte, 4)
			err = tc.Handshake()
			if err == nil {
				_, err = tc.Read(buf)
			}
			if got := err == nil && string(buf) == "INFO"; got != c.ok {
				t.Fatalf("let in: %v (%v, %q), want %v", got, err, buf, c.ok)
			}
		})
	}
}

// cluster is replicas that find each other through a list, as through DNS.
type cluster struct {
	mu    sync.Mutex
	addrs []string
}

func (c *cluster) peers(context.Context) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.addrs), nil
}

func (c *cluster) publish(s *Server) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.addrs = append(c.addrs, s.RouteAddr().String())
}

func (c *cluster) withdraw(s *Server) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.addrs = slices.DeleteFunc(c.addrs, func(a string) bool { return a == s.RouteAddr().String() })
}

func TestThreeReplicas(t *testing.T) {
	ca := testca.New(t, "ca")
	var c cluster
	var servers []*Server
	add := func() *Server {
		s := start(t, ca, Options{Name: fmt.Sprintf("broker-%d", len(servers)), Peers: c.peers, PeersEvery: 20 * time.Millisecond})
		c.publish(s) // its own address is in the list too, as in DNS
		servers = append(servers, s)
		return s
	}
	joined := func(n int) func() bool {
		return func() bool {
			for _, s := range servers {
				if s.Routes() != n {
					return false
				}
			}
			return true
		}
	}
	add()
	// An agent is there before the others come: its connection must outlive the changes of routes.
	agent := mustDial(t, servers[0], ca, agentA)
	echo(t, agent, wirebus.HostConnectSubject("pool", "a"))
	first := own(t, servers[0])
	add()
	eventually(t, "two replicas join", joined(1))
	third := add()
	eventually(t, "three replicas join", joined(2))

	nc := own(t, third)
	eventually(t, "a request from the third replica reaches the agent on the first", func() bool {
		m, err := nc.Request(wirebus.HostConnectSubject("pool", "a"), []byte("hi"), time.Second)
		return err == nil && string(m.Data) == "hi"
	})
	if !agent.IsConnected() || !first.IsConnected() {
		t.Fatal("changing routes dropped a connection")
	}
	c.withdraw(servers[1])
	servers[1].Close()
	servers = []*Server{servers[0], third}
	eventually(t, "the others go on without the second", joined(1))
	if _, err := nc.Request(wirebus.HostConnectSubject("pool", "a"), nil, patience); err != nil {
		t.Fatal(err)
	}
}

func TestPresence(t *testing.T) {
	ca := testca.New(t, "ca")
	type event struct {
		id   identity.ID
		conn uint64
		up   bool
	}
	events := make(chan event, 16)
	s := start(t, ca, Options{Presence: func(id identity.ID, conn uint64, up bool) { events <- event{id, conn, up} }})
	next := func() event {
		select {
		case e := <-events:
			return e
		case <-time.After(patience):
			t.Fatal("no event")
			return event{}
		}
	}
	agent := mustDial(t, s, ca, agentA)
	up := next()
	if up.id != agentA || !up.up {
		t.Fatalf("got %+v", up)
	}
	agent.Close()
	if down := next(); down.id != agentA || down.up || down.conn != up.conn {
		t.Fatalf("got %+v after %+v", down, up)
	}
}

func TestAdmit(t *testing.T) {
	ca := testca.New(t, "ca")
	var revoked atomic.Bool
	s := start(t, ca, Options{Admit: func(id identity.ID, key string, issued time.Time) error {
		if id.Host == "b" || id.Host == "a" && revoked.Load() || len(key) != 64 || issued.IsZero() {
			return errors.New("not a member")
		}
		return nil
	}})
	a, gw := mustDial(t, s, ca, agentA), mustDial(t, s, ca, gateway)
	if nc, err := dial("tls://"+s.Addr().String(), ca.Reloader(agentB), agentB); err == nil {
		nc.Close()
		t.Fatal("b was let in")
	}
	s.Recheck()
	if err := a.Flush(); err != nil {
		t.Fatalf("a member was dropped: %v", err)
	}
	revoked.Store(true)
	s.Recheck()
	eventually(t, "a is dropped", a.IsClosed)
	if err := gw.Flush(); err != nil {
		t.Fatalf("the gateway was dropped: %v", err)
	}
}

// A gateway that the workspace doesn't pick hears which sessions to end, may be refused connects, and no more.
func TestUnpickedGateway(t *testing.T) {
	ca := testca.New(t, "ca")
	var picked atomic.Bool
	s := start(t, ca, Options{Picked: func(g string) bool { return picked.Load() && g == "gw" }})
	broker := own(t, s)
	for _, subject := range []string{wirebus.SubjectConnect, wirebus.SubjectGateways} {
		echo(t, broker, subject)
	}
	heard := make(chan *nats.Msg, 16)
	if _, err := broker.ChanSubscribe("rdv.*.>", heard); err != nil {
		t.Fatal(err)
	}
	agent := mustDial(t, s, ca, agentA)
	violations := make(chan error, 16)
	nc := mustDial(t, s, ca, gateway, nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { violations <- err }))
	for _, subject := range []string{wirebus.SubjectGateways, wirebus.GatewayReportSubject("gw", "pod"), wirebus.TraceSubject(gateway)} {
		if err := nc.PublishRequest(subject, wirebus.InboxPrefix(gateway)+".x", []byte("{}")); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-violations:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("%s: %v", subject, err)
			}
		case <-time.After(patience):
			t.Fatalf("%s was taken", subject)
		}
	}
	if m, err := nc.Request(wirebus.SubjectConnect, []byte("x"), patience); err != nil || string(m.Data) != "x" {
		t.Errorf("nobody says why it gets no connect: %v", err)
	}
	end, err := nc.SubscribeSync(wirebus.GatewayEndSubject("gw", "pod"))
	if err != nil {
		t.Fatal(err)
	}
	nc.Flush()
	broker.Publish(wirebus.GatewayEndSubject("gw", "pod"), []byte("end"))
	if _, err := end.NextMsg(patience); err != nil {
		t.Errorf("it isn't told to end a session: %v", err)
	}
	broker.Flush()
	for n := len(heard); n > 0; n-- {
		if m := <-heard; m.Subject != wirebus.GatewayEndSubject("gw", "pod") {
			t.Errorf("%q came through on %s", m.Data, m.Subject)
		}
	}

	// Once it is picked it comes again, with all that gateways may; and the other way round.
	s.Recheck()
	if err := nc.Flush(); err != nil {
		t.Fatalf("nothing has changed: %v", err)
	}
	picked.Store(true)
	s.Recheck()
	eventually(t, "the connection with few rights ends", nc.IsClosed)
	nc = mustDial(t, s, ca, gateway)
	if _, err := nc.Request(wirebus.SubjectGateways, []byte("x"), patience); err != nil {
		t.Errorf("once it is picked: %v", err)
	}
	picked.Store(false)
	s.Recheck()
	eventually(t, "the connection with all rights ends", nc.IsClosed)
	if err := agent.Flush(); err != nil {
		t.Errorf("an agent was dropped: %v", err)
	}
}

func TestRenewedCertificateAndCA(t *testing.T) {
	oldCA, newCA := testca.New(t, "old"), testca.New(t, "new")
	dir := oldCA.Dir(oldCA.Issue(testca.IdentitySpec(identity.Broker(ns, ws))))
	r := testca.NewReloader(t, dir)
	s := start(t, oldCA, Options{TLS: r})
	before := mustDial(t, s, oldCA, agentA)
	cert, key := newCA.Issue(testca.IdentitySpec(identity.Broker(ns, ws)))
	testca.WriteDir(t, dir, cert, key, newCA.PEM)
	if err := r.Reload(); err != nil {
		t.Fatal(err)
	}
	after := mustDial(t, s, newCA, agentB)
	if err := after.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := before.Flush(); err != nil {
		t.Fatalf("the renewal dropped a connection: %v", err)
	}
	if nc, err := dial("tls://"+s.Addr().String(), oldCA.Reloader(agentA), agentA); err == nil {
		nc.Close()
		t.Fatal("the old CA is still let in")
	}
}

func TestConnectionEndsWithItsCertificate(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	spec := testca.IdentitySpec(agentA)
	spec.NotAfter = time.Now().Add(2 * time.Second)
	nc, err := dial("tls://"+s.Addr().String(), testca.NewReloader(t, ca.Dir(ca.Issue(spec))), agentA)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	eventually(t, "the server ends the connection", nc.IsClosed)
}

func TestShutdownSendsClientsAway(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	told := make(chan struct{})
	agent := mustDial(t, s, ca, agentA, nats.LameDuckModeHandler(func(*nats.Conn) { close(told) }))
	s.Shutdown(t.Context())
	select {
	case <-told:
	case <-time.After(patience):
		t.Fatal("the agent was not told to move on")
	}
	eventually(t, "the agent's connection ends", agent.IsClosed)
}
