package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/bus"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// The one workspace.
const (
	namespace, workspace, gatewayObject = "bench", "bench", "bench"
	pool, host                          = "pool", "host"
	podIP, instance                     = "127.0.0.1", "127-0-0-1"
)

// gatewayPod is the relay and gateway binaries as they run in a gateway pod. The broker's bus is the real one; what answers
// on it stands where the broker's decision and the host's agent are, and has the load generator dial the join.
type gatewayPod struct {
	dir, bin string
	meet     *meet
	clients  *tlsDialer
	agents   *tlsDialer
	key      ed25519.PrivateKey // signs tickets, as a broker's feed does
	target   string
	bus      *bus.Server
	resume   atomic.Bool // whether agents resume TLS sessions now

	port           int
	relay, gateway *process
}

func newGatewayPod(ctx context.Context, dir, bin string, ca *authority, m *meet) (*gatewayPod, error) {
	g := &gatewayPod{dir: filepath.Join(dir, "relay"), bin: bin, meet: m, clients: newTLSDialer(gatewayName), agents: newTLSDialer(instance + ".join." + gatewayName),
		target: brokerapi.PoolName(namespace, pool)}
	member := filepath.Join(g.dir, "workspaces", workspace)
	key, signer, err := ca.ticketSigner(identity.TicketSigner(namespace, workspace))
	if err == nil {
		err = errors.Join(ca.host(g.path("tls"), gatewayName, "*.join."+gatewayName), ca.member(g.path("broker"), identity.Broker(namespace, workspace)),
			ca.member(member, identity.Gateway(namespace, workspace, gatewayObject)))
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(member, config.TicketCert), signer, 0o600)
	}
	g.key = key
	if err != nil {
		return nil, err
	}
	certs, err := mtls.NewReloader(g.path("broker"), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	if g.bus, err = bus.Start(ctx, bus.Options{Namespace: namespace, Workspace: workspace, Name: "bench-0", TLS: certs, Host: "127.0.0.1", Port: -1, WebSocketPort: -1, RoutePort: -1}); err != nil {
		return nil, err
	}
	nc, err := g.bus.Connect()
	if err == nil {
		_, err = nc.QueueSubscribe(wirebus.SubjectConnect, wirebus.Brokers, g.orchestrate)
	}
	if err != nil {
		g.bus.Close()
		return nil, err
	}
	return g, nil
}

func (g *gatewayPod) path(name string) string { return filepath.Join(g.dir, name) }

// ticket makes a ticket for one session: no part of the path may live off having seen it before.
func (g *gatewayPod) ticket() (string, error) {
	now := time.Now()
	return ticket.Sign(ticket.Claims{ID: rand.Text(), Namespace: namespace, Workspace: workspace, User: "alice@bench.test", Groups: []string{"engineers"},
		Resource: "desktop", Target: g.target, IssuedAt: now, Expires: now.Add(time.Hour)}, g.key)
}

// build compiles relay and gateway into a folder.
func build(ctx context.Context, root, bin string) error {
	c := exec.CommandContext(ctx, "go", "build", "-o", bin+"/", "./cmd/relay", "./cmd/gateway")
	c.Dir = root
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("bench: building relay and gateway: %w\n%s", err, out)
	}
	return nil
}

func (g *gatewayPod) start(ctx context.Context) error {
	const most = 100000
	var ports [3]int
	for i := range ports {
		var err error
		if ports[i], err = freePort(); err != nil {
			return err
		}
	}
	g.port = ports[0]
	for name, v := range map[string]any{
		"relay.json": config.Relay{Gateway: gatewayObject, Hostname: gatewayName, MaxSessions: most, MaxPending: 1000, HandshakeTimeoutSeconds: 15, JoinTimeoutSeconds: 30, DrainDeadlineSeconds: 1},
		"gateway.json": config.Gateway{Namespace: namespace, Gateway: gatewayObject, Hostname: gatewayName, PeersHost: "localhost", MaxSessions: most,
			Workspaces: []config.GatewayWorkspace{{Name: workspace, BusURLs: []string{"tls://" + g.bus.Addr().String()}}}},
	} {
		text, err := config.Render(v)
		if err == nil {
			err = os.WriteFile(g.path(name), []byte(text), 0o600)
		}
		if err != nil {
			return err
		}
	}
	socket := g.path("admission.sock")
	var err error
	if g.gateway, err = launch(g.dir, "gateway", nil, filepath.Join(g.bin, "gateway"), "--config", g.path("gateway.json"), "--workspaces-dir", g.path("workspaces"),
		"--admission-socket", socket, "--pod-ip", podIP, "--metrics-addr", loopback(ports[1])); err != nil {
		return err
	}
	if err := g.gateway.settle(ctx, func() bool { return ready(ports[1]) }); err != nil {
		return err
	}
	if g.relay, err = launch(g.dir, "relay", nil, filepath.Join(g.bin, "relay"), "--config", g.path("relay.json"), "--tls-dir", g.path("tls"),
		"--admission-socket", socket, "--pod-ip", podIP, "--listen", loopback(g.port), "--metrics-addr", loopback(ports[2])); err != nil {
		return err
	}
	return g.relay.settle(ctx, func() bool { return ready(ports[2]) })
}

// ready asks a container what Kubernetes would.
func ready(port int) bool {
	resp, err := (&http.Client{Timeout: time.Second}).Get("http://" + loopback(port) + "/readyz")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func (g *gatewayPod) stop() {
	for _, p := range []**process{&g.relay, &g.gateway} {
		if *p != nil {
			(*p).stop()
			*p = nil
		}
	}
}

func (g *gatewayPod) processes() []*process { return []*process{g.relay, g.gateway} }

func (g *gatewayPod) dialRaw(resume bool) (stream, error) {
	return g.dial(resume, func(c *tls.Conn, ticket string) (*wiretest.Client, error) {
		return wiretest.OpenRaw(c, gatewayName, ticket)
	})
}

func (g *gatewayPod) dialTSGU(resume bool) (stream, error) {
	return g.dial(resume, func(c *tls.Conn, ticket string) (*wiretest.Client, error) {
		return wiretest.OpenTSGU(c, gatewayName, ticket, g.target)
	})
}

func (g *gatewayPod) dial(resume bool, open func(c *tls.Conn, ticket string) (*wiretest.Client, error)) (stream, error) {
	ticket, err := g.ticket()
	if err != nil {
		return nil, err
	}
	g.resume.Store(resume)
	tc, err := g.clients.dial(loopback(g.port), resume, &clientLegs)
	if err != nil {
		return nil, err
	}
	tc.SetDeadline(time.Now().Add(patience))
	c, err := open(tc, ticket)
	if err != nil {
		tc.Close()
		return nil, err // not c, which as a stream would not be nil
	}
	return c, nil
}

// orchestrate answers a gateway's request as a broker would whose host accepts at once.
func (g *gatewayPod) orchestrate(m *nats.Msg) {
	var req wirebus.ConnectRequest
	if err := json.Unmarshal(m.Data, &req); err != nil {
		return
	}
	reply, err := json.Marshal(wirebus.ConnectReply{Pool: pool, Host: host})
	if err == nil {
		err = m.Respond(reply)
	}
	if err != nil {
		return
	}
	go func() {
		s, err := g.join(req.JoinSecret)
		if err != nil {
			slog.Error("the host's agent could not join", "error", err)
			return
		}
		g.meet.host(s)
	}()
}

// join dials the relay as an agent does.
func (g *gatewayPod) join(secret []byte) (stream, error) {
	c, err := g.agents.dial(loopback(g.port), g.resume.Load(), &hostLegs)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET /rendezvous/v1/join HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: rendezvous-join/1\r\nAuthorization: Bearer %s\r\nRendezvous-Instance: %s\r\n\r\n",
		gatewayName, base64.RawURLEncoding.EncodeToString(secret), instance)
	rest, _, err := wiretest.Switched(c)
	if err != nil {
		c.Close()
		return nil, err
	}
	return &agentLeg{c, rest}, nil
}

// agentLeg is a host's end: what came with the 101 is read first.
type agentLeg struct {
	*tls.Conn
	rest []byte
}

func (a *agentLeg) Read(p []byte) (int, error) {
	if len(a.rest) > 0 {
		n := copy(p, a.rest)
		a.rest = a.rest[n:]
		return n, nil
	}
	return a.Conn.Read(p)
}
