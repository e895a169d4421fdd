package gateway

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/types/known/timestamppb"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

const (
	ns           = "ns"
	testInstance = "10-0-0-1"
	testTarget   = "pool.ns.rdv.internal"
	patience     = 20 * time.Second
)

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// authority is a workspace's internal CA.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, cert, key}
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// certificate signs one for id.
func (a *authority) certificate(id identity.ID, public crypto.PublicKey) []byte {
	a.t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{id.URI()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, public, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// issue writes tls.crt, tls.key and ca.crt for id into dir.
func (a *authority) issue(id identity.ID, dir string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	write(a.t, dir, mtls.CertFile, pemOf("CERTIFICATE", a.certificate(id, key.Public())))
	write(a.t, dir, mtls.KeyFile, pemOf("PRIVATE KEY", pkcs8))
	write(a.t, dir, mtls.CAFile, pemOf("CERTIFICATE", a.cert.Raw))
}

func write(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// world is one workspace: its CA, its ticket key, its bus with a broker's connection on it.
type world struct {
	t      testing.TB
	name   string
	ca     *authority
	signer ed25519.PrivateKey
	server *natsserver.Server
	broker *nats.Conn
}

// newWorld makes a workspace and writes the gateway's files for it under dir.
func newWorld(t testing.TB, dir, name string) *world {
	t.Helper()
	w := &world{t: t, name: name, ca: newAuthority(t)}
	var public ed25519.PublicKey
	public, w.signer, _ = ed25519.GenerateKey(rand.Reader)
	w.ca.issue(identity.Gateway(ns, name, "gateway-a"), filepath.Join(dir, name))
	write(t, filepath.Join(dir, name), config.TicketCert, pemOf("CERTIFICATE", w.ca.certificate(identity.TicketSigner(ns, name), public)))
	w.serve(-1)
	return w
}

// serve starts a real NATS server with mutual TLS as a broker would, and connects a broker to it.
func (w *world) serve(port int) {
	w.t.Helper()
	dir := w.t.TempDir()
	w.ca.issue(identity.Broker(ns, w.name), dir)
	certs, err := mtls.NewReloader(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := natsserver.NewServer(&natsserver.Options{Host: "127.0.0.1", Port: port, NoLog: true, NoSigs: true, TLS: true,
		TLSConfig: certs.MutualServerConfig(func(identity.ID) error { return nil })})
	if err != nil {
		w.t.Fatal(err)
	}
	s.Start()
	w.t.Cleanup(s.Shutdown)
	if !s.ReadyForConnections(patience) {
		w.t.Fatal("no NATS server")
	}
	w.server = s
	w.broker, err = nats.Connect(s.ClientURL(), nats.Secure(certs.ClientConfig("", func(identity.ID) error { return nil })), nats.NoReconnect())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(w.broker.Close)
}

// answer has a broker answer connects.
func (w *world) answer(f func(bus.ConnectRequest) bus.ConnectReply) {
	w.t.Helper()
	if _, err := w.broker.QueueSubscribe(bus.SubjectConnect, bus.Brokers, func(m *nats.Msg) {
		var r bus.ConnectRequest
		if err := json.Unmarshal(m.Data, &r); err != nil {
			w.t.Error(err)
		}
		data, _ := json.Marshal(f(r))
		m.Respond(data)
	}); err != nil {
		w.t.Fatal(err)
	}
	if err := w.broker.Flush(); err != nil {
		w.t.Fatal(err)
	}
}

// ticket signs one; change may spoil the claims.
func (w *world) ticket(change func(*ticket.Claims)) string {
	w.t.Helper()
	c := ticket.Claims{ID: "1", Namespace: ns, Workspace: w.name, User: "alice", Resource: "desk", Target: testTarget,
		IssuedAt: time.Now().Add(-time.Minute), Expires: time.Now().Add(time.Hour)}
	if change != nil {
		change(&c)
	}
	raw, err := ticket.Sign(c, w.signer)
	if err != nil {
		w.t.Fatal(err)
	}
	return raw
}

func (w *world) spec() config.GatewayWorkspace {
	return config.GatewayWorkspace{Name: w.name, BusURLs: []string{w.server.ClientURL()}}
}

// start serves a gateway for the workspaces and dials its socket, as the relay does.
func start(t testing.TB, dir string, specs []config.GatewayWorkspace, change func(*Options)) (*Gateway, admission.AdmissionClient) {
	t.Helper()
	o := Options{Instance: testInstance, WorkspacesDir: dir, ReportEvery: 50 * time.Millisecond, Refresh: 20 * time.Millisecond, Patience: 300 * time.Millisecond,
		Config: config.Gateway{Namespace: ns, Gateway: "gateway-a", Hostname: "gw", PeersHost: "gateway-a-relays", MaxSessions: 7, Workspaces: specs}}
	if change != nil {
		change(&o)
	}
	g, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "admission.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- g.Run(ctx, l) }()
	cc, err := admission.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case <-ran:
		case <-time.After(patience):
			t.Error("the gateway did not stop")
		}
		cc.Close()
	})
	t.Cleanup(stop)
	stoppers.Store(g, stop)
	eventually(t, "serving", g.serving.Load)
	return g, admission.NewAdmissionClient(cc)
}

// stoppers stop a gateway before its test ends.
var stoppers sync.Map

func connectRequest(raw, target string) *admission.ConnectRequest {
	return &admission.ConnectRequest{ActivityId: "act-1", SessionId: "s1", Ticket: raw, Target: target, ClientAddr: "192.0.2.1:5", Transport: "raw-websocket",
		Instance: testInstance, JoinSecret: []byte("0123456789abcdef0123456789abcdef"), Deadline: timestamppb.New(time.Now().Add(patience))}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestConnect(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "demo")
	var got bus.ConnectRequest
	w.answer(func(r bus.ConnectRequest) bus.ConnectReply {
		got = r
		return bus.ConnectReply{Pool: "linux", Host: "host-1"}
	})
	g, client := start(t, dir, []config.GatewayWorkspace{w.spec()}, nil)
	eventually(t, "ready", func() bool { return g.Ready() == nil })
	raw := w.ticket(func(c *ticket.Claims) { c.ActivityID = "ticket-activity"; c.RedirectFlags = 8 })
	auth, err := client.Authenticate(within(t), &admission.AuthenticateRequest{ActivityId: "relay-activity", Ticket: raw})
	if err != nil || auth.Error != nil {
		t.Fatal(err, auth)
	}
	if auth.Workspace != "demo" || auth.User != "alice" || auth.Resource != "desk" || auth.Target != testTarget || auth.RedirectFlags != 8 {
		t.Errorf("Authenticate gave %v", auth)
	}
	if auth.ActivityId != "ticket-activity" {
		t.Errorf("activity %q, want the ticket's", auth.ActivityId)
	}
	resp, err := client.Connect(within(t), connectRequest(raw, strings.ToUpper(testTarget)))
	if err != nil || resp.Error != nil || resp.Host != "linux/host-1" {
		t.Fatal(err, resp)
	}
	if got.Gateway != "gateway-a" || got.Instance != testInstance || got.SessionID != "s1" || got.ActivityID != "ticket-activity" || got.Ticket != raw || len(got.JoinSecret) != 32 || got.Deadline.IsZero() {
		t.Errorf("the broker was asked %+v", got)
	}

	// A raw client's Connect comes first, and says the same.
	for range 2 {
		resp, err = client.Connect(within(t), connectRequest(raw, ""))
		if err != nil || resp.Error != nil || resp.Host != "linux/host-1" {
			t.Fatal(err, resp)
		}
		if resp.ActivityId != "ticket-activity" || resp.Workspace != "demo" || resp.User != "alice" || resp.Resource != "desk" {
			t.Errorf("Connect gave %v", resp)
		}
	}
}

// TestVerifiedTickets: a ticket is checked again but for one Connect, under the same keys of a workspace that is served.
func TestVerifiedTickets(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct {
		between func(w *workspace)
		expires time.Duration
		later   time.Duration
		known   bool
	}{
		"at once":           {nil, time.Hour, time.Second, true},
		"too late":          {nil, time.Hour, verifiedLife, false},
		"the ticket is old": {nil, time.Second, time.Second, false},
		"other keys":        {func(w *workspace) { w.keys.Store(&[]ed25519.PublicKey{}) }, time.Hour, 0, false},
		"no longer served":  {func(w *workspace) { w.close() }, time.Hour, 0, false},
	} {
		w := &workspace{stop: func() {}}
		w.keys.Store(&[]ed25519.PublicKey{})
		var known verifiedTickets
		known.put("raw", ticket.Claims{User: "alice", Expires: now.Add(tt.expires)}, w, now)
		if tt.between != nil {
			tt.between(w)
		}
		if claims, of := known.take("raw", now.Add(tt.later)); (of == w) != tt.known || (claims.User == "alice") != tt.known {
			t.Errorf("%s: known is %v", name, of != nil)
		}
		if _, of := known.take("raw", now); of != nil {
			t.Errorf("%s: good for two connects", name)
		}
	}
	var known verifiedTickets
	w := &workspace{}
	for i := range 3 * maxVerified {
		known.put(fmt.Sprint(i), ticket.Claims{Expires: now.Add(time.Hour)}, w, now)
	}
	if len(known.m) > maxVerified {
		t.Errorf("%d tickets are kept", len(known.m))
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	w, other, silent := newWorld(t, dir, "demo"), newWorld(t, dir, "other"), newWorld(t, dir, "silent")
	w.answer(func(r bus.ConnectRequest) bus.ConnectReply {
		return bus.ConnectReply{Err: refusal.New(refusal.NoHost, "no host: start one")}
	})
	away := config.GatewayWorkspace{Name: "away", BusURLs: []string{"tls://127.0.0.1:1"}}
	awayWorld := newWorld(t, dir, "away")
	unset := config.GatewayWorkspace{Name: "unset", BusURLs: []string{"tls://127.0.0.1:1"}}
	g, client := start(t, dir, []config.GatewayWorkspace{w.spec(), silent.spec(), away, unset}, nil)
	eventually(t, "connected", func() bool {
		return g.workspace("demo").connected.Load() && g.workspace("silent").connected.Load()
	})

	good := w.ticket(nil)
	forged := good[:len(good)-6] + "AAAAAA"
	stolen := *w
	stolen.signer = other.signer
	unsetWorld := *w
	unsetWorld.name = "unset"
	tests := []struct {
		name, ticket, target string
		code                 refusal.Code
		says                 string // the way out, or the object
		early                bool   // Authenticate refuses already
	}{
		{"no ticket", "", "", refusal.TicketMissing, "rdv connect", true},
		{"no JWT", "abc", "", refusal.TicketInvalid, "again", true},
		{"forged signature", forged, "", refusal.TicketInvalid, "again", true},
		{"another workspace's key", stolen.ticket(nil), "", refusal.TicketInvalid, "again", true},
		{"a workspace not served", other.ticket(nil), "", refusal.TicketInvalid, "other", true},
		{"another namespace", w.ticket(func(c *ticket.Claims) { c.Namespace = "evil" }), "", refusal.TicketInvalid, "evil/demo", true},
		{"a namespace that is no name", w.ticket(func(c *ticket.Claims) { c.Namespace = "call 555" }), "", refusal.TicketInvalid, "no workspace", true},
		{"expired", w.ticket(func(c *ticket.Claims) { c.Expires = time.Now().Add(-time.Minute) }), "", refusal.TicketExpired, "refresh the feed", true},
		{"workspace without keys", unsetWorld.ticket(nil), "", refusal.BrokerAway, "unset", true},
		{"wrong target", good, "evil.example", refusal.WrongTarget, "evil.example", false},
		{"broker says no", good, "", refusal.NoHost, "start one", false},
		{"nobody answers", silent.ticket(nil), "", refusal.BrokerAway, "silent", false},
		{"bus away", awayWorld.ticket(nil), "", refusal.BrokerAway, "away", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			auth, err := client.Authenticate(within(t), &admission.AuthenticateRequest{ActivityId: "a", Ticket: tt.ticket})
			if err != nil {
				t.Fatal(err)
			}
			if (auth.Error != nil) != tt.early {
				t.Errorf("Authenticate said %v", auth.Error)
			}
			resp, err := client.Connect(within(t), connectRequest(tt.ticket, tt.target))
			if err != nil {
				t.Fatal(err)
			}
			if resp.Error.GetCode() != string(tt.code) || !strings.Contains(resp.Error.GetMessage(), tt.says) {
				t.Errorf("Connect said %v; want %s and %q", resp.Error, tt.code, tt.says)
			}
			if tt.early && auth.Error.GetCode() != string(tt.code) {
				t.Errorf("Authenticate said %v; want %s", auth.Error, tt.code)
			}
		})
	}
	if err := g.Ready(); err != nil {
		t.Errorf("broken workspaces took the gateway down: %v", err)
	}
}

func TestBrokerOfAnotherRoleIsRefused(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "demo")
	// A bus whose certificate is an agent's of the same CA.
	rogueDir := t.TempDir()
	w.ca.issue(identity.Agent(ns, "demo", "pool", "host"), rogueDir)
	cert, err := tls.LoadX509KeyPair(filepath.Join(rogueDir, mtls.CertFile), filepath.Join(rogueDir, mtls.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	rogue, err := natsserver.NewServer(&natsserver.Options{Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, TLS: true,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}})
	if err != nil {
		t.Fatal(err)
	}
	rogue.Start()
	t.Cleanup(rogue.Shutdown)
	rogue.ReadyForConnections(patience)
	var log wiretest.Log
	g, _ := start(t, dir, []config.GatewayWorkspace{{Name: "demo", BusURLs: []string{rogue.ClientURL()}}}, func(o *Options) {
		o.Log = slog.New(slog.NewJSONHandler(&log, nil))
	})
	eventually(t, "the refusal is logged", func() bool { return strings.Contains(log.String(), "this connection takes role") })
	if g.Ready() == nil || g.workspace("demo").connected.Load() {
		t.Error("the gateway took an agent's certificate for a broker's")
	}
}

func TestBusThatReturnsIsUsedAgain(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "demo")
	g, client := start(t, dir, []config.GatewayWorkspace{w.spec()}, func(o *Options) { o.Patience = patience })
	eventually(t, "connected", func() bool { return g.Ready() == nil })
	var port int
	fmt.Sscanf(w.server.Addr().String(), "127.0.0.1:%d", &port)
	w.server.Shutdown()
	w.server.WaitForShutdown()
	eventually(t, "disconnected", func() bool { return !g.workspace("demo").nc.Load().IsConnected() })
	answered := make(chan *admission.ConnectResponse, 1)
	ctx := within(t)
	go func() {
		resp, _ := client.Connect(ctx, connectRequest(w.ticket(nil), ""))
		answered <- resp
	}()
	w.serve(port)
	w.answer(func(bus.ConnectRequest) bus.ConnectReply { return bus.ConnectReply{Pool: "p", Host: "h"} })
	if resp := <-answered; resp.GetHost() != "p/h" {
		t.Errorf("a connect during the blink got %v", resp)
	}
}

// relayStream opens a Report stream as a relay.
func relayStream(t testing.TB, client admission.AdmissionClient, sessions ...*admission.Session) admission.Admission_ReportClient {
	t.Helper()
	stream, err := client.Report(within(t))
	if err != nil {
		t.Fatal(err)
	}
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Snapshot{Snapshot: &admission.Snapshot{Instance: testInstance, Sessions: sessions}}})
	return stream
}

func send(t testing.TB, stream admission.Admission_ReportClient, m *admission.RelayReport) {
	t.Helper()
	if err := stream.Send(m); err != nil {
		t.Fatal(err)
	}
}

func TestReports(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "demo")
	reports := make(chan bus.GatewayReport, 1000)
	w.broker.Subscribe(bus.AllGatewayReports, func(m *nats.Msg) {
		var r bus.GatewayReport
		if err := json.Unmarshal(m.Data, &r); err != nil || m.Subject != bus.GatewayReportSubject("gateway-a", testInstance) {
			t.Errorf("%s: %s", m.Subject, m.Data)
		}
		reports <- r
	})
	events := make(chan trace.Event, 10)
	w.broker.Subscribe(bus.AllTraces, func(m *nats.Msg) {
		var e trace.Event
		if err := json.Unmarshal(m.Data, &e); err != nil || m.Subject != "rdv.trace.gateway.gateway-a" {
			t.Errorf("%s: %s", m.Subject, m.Data)
		}
		events <- e
	})
	w.broker.Flush()
	g, client := start(t, dir, []config.GatewayWorkspace{w.spec()}, nil)
	eventually(t, "ready", func() bool { return g.Ready() == nil })
	until := func(what string, ok func(bus.GatewayReport) bool) {
		t.Helper()
		for {
			select {
			case r := <-reports:
				if ok(r) {
					return
				}
			case <-time.After(patience):
				t.Fatalf("never reported: %s", what)
			}
		}
	}
	until("an idle pod", func(r bus.GatewayReport) bool { return r.Sessions == 0 && r.MaxSessions == 7 && !r.Draining })
	stream := relayStream(t, client, &admission.Session{SessionId: "s1", Workspace: "demo"})
	until("the snapshot", func(r bus.GatewayReport) bool { return r.Sessions == 1 })
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Started{Started: &admission.Session{SessionId: "s2", Workspace: "demo"}}})
	until("a session more", func(r bus.GatewayReport) bool { return r.Sessions == 2 })
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Ended{Ended: &admission.Ended{Session: &admission.Session{SessionId: "s1"}, Reason: "client-closed"}}})
	until("one less", func(r bus.GatewayReport) bool { return r.Sessions == 1 })
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Draining{Draining: &admission.Draining{}}})
	until("draining", func(r bus.GatewayReport) bool { return r.Draining })

	auth, err := client.Authenticate(within(t), &admission.AuthenticateRequest{ActivityId: "act", Ticket: w.ticket(nil)})
	if err != nil || auth.Error != nil {
		t.Fatal(err, auth)
	}
	at := time.Now().UTC().Truncate(time.Microsecond)
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Step{Step: &admission.Step{ActivityId: "act", Workspace: "demo", Step: 11,
		At: timestamppb.New(at), DurationMicros: 1500, Detail: "d", Error: "host-timeout"}}})
	want := trace.Event{ActivityID: "act", Step: 11, Component: "relay/" + testInstance, At: at, Duration: 1500 * time.Microsecond, Detail: "d", Error: "host-timeout", User: "alice"}
	select {
	case e := <-events:
		if e != want {
			t.Errorf("event %+v, want %+v", e, want)
		}
	case <-time.After(patience):
		t.Error("no trace event")
	}

	// In a batch, and of a connect whose answer the relay never heard: it knows its own activity id and no workspace.
	resp, err := client.Connect(within(t), connectRequest(w.ticket(func(c *ticket.Claims) { c.ActivityID = "the-ticket's" }), "wrong"))
	if err != nil || resp.Error.GetCode() != string(refusal.WrongTarget) {
		t.Fatal(err, resp)
	}
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Batch{Batch: &admission.Batch{Reports: []*admission.RelayReport{
		{Report: &admission.RelayReport_Step{Step: &admission.Step{ActivityId: "nobody's", Step: 2, At: timestamppb.New(at)}}},
		{Report: &admission.RelayReport_Step{Step: &admission.Step{ActivityId: "act-1", Step: 3, At: timestamppb.New(at)}}},
		{Report: &admission.RelayReport_Started{Started: &admission.Session{SessionId: "s3", Workspace: "demo"}}},
	}}}})
	want = trace.Event{ActivityID: "the-ticket's", Step: 3, Component: "relay/" + testInstance, At: at, User: "alice"}
	select {
	case e := <-events:
		if e != want {
			t.Errorf("event %+v, want %+v", e, want)
		}
	case <-time.After(patience):
		t.Error("no trace event of the batch")
	}
	until("the batch", func(r bus.GatewayReport) bool { return r.Sessions == 2 && r.Draining })

	// A relay that lost its stream tells all again: what it no longer has is gone.
	stream.CloseSend()
	relayStream(t, client, &admission.Session{SessionId: "s9"}, &admission.Session{SessionId: "s8"}, &admission.Session{SessionId: "s7"})
	until("the new snapshot", func(r bus.GatewayReport) bool { return r.Sessions == 3 && !r.Draining })

	stop, _ := stoppers.Load(g)
	stop.(func())()
	until("the container's end", func(r bus.GatewayReport) bool { return r.Draining })
	select {
	case r := <-reports:
		t.Errorf("another report after the last: %+v", r)
	case <-time.After(150 * time.Millisecond):
	}
}

func TestWorkspaceEndsOnlyItsOwnSessions(t *testing.T) {
	dir := t.TempDir()
	a, b := newWorld(t, dir, "a"), newWorld(t, dir, "b")
	g, client := start(t, dir, []config.GatewayWorkspace{a.spec(), b.spec()}, nil)
	eventually(t, "both connected", func() bool {
		return g.workspace("a").connected.Load() && g.workspace("b").connected.Load()
	})
	stream := relayStream(t, client, &admission.Session{SessionId: "of-a", Workspace: "a"}, &admission.Session{SessionId: "of-b", Workspace: "b"})
	eventually(t, "snapshot taken", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.live) == 2 })
	order := func(w *world, id string) {
		data, _ := json.Marshal(bus.EndSession{SessionID: id, Reason: "because"})
		if err := w.broker.Publish(bus.GatewayEndSubject("gateway-a", testInstance), data); err != nil {
			t.Fatal(err)
		}
		w.broker.Flush()
	}
	eventually(t, "a and b listen", func() bool {
		return a.server.NumSubscriptions() > 0 && b.server.NumSubscriptions() > 0
	})
	order(b, "of-a")
	order(b, "of-b")
	cmd, err := stream.Recv()
	if err != nil || cmd.GetEnd().GetSessionId() != "of-b" || cmd.GetEnd().GetReason() != "because" {
		t.Errorf("the relay was told %v, %v; want of-b's end and nothing before it", cmd, err)
	}
}

func TestConfigurationChanges(t *testing.T) {
	dir := t.TempDir()
	a, b := newWorld(t, dir, "a"), newWorld(t, dir, "b")
	g, client := start(t, dir, []config.GatewayWorkspace{a.spec()}, nil)
	authenticate := func(w *world) string {
		resp, err := client.Authenticate(within(t), &admission.AuthenticateRequest{Ticket: w.ticket(nil)})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Error.GetCode()
	}
	if got := authenticate(b); got != string(refusal.TicketInvalid) {
		t.Errorf("b before it is configured: %q", got)
	}
	kept := g.workspace("a")
	g.SetConfig(config.Gateway{Namespace: ns, Gateway: "gateway-a", Workspaces: []config.GatewayWorkspace{a.spec(), b.spec()}})
	if got := authenticate(b); got != "" {
		t.Errorf("b after: %q", got)
	}
	if g.workspace("a") != kept {
		t.Error("a was connected anew, though nothing about it changed")
	}
	g.SetConfig(config.Gateway{Namespace: ns, Gateway: "gateway-a", Workspaces: []config.GatewayWorkspace{b.spec()}})
	if got := authenticate(a); got != string(refusal.TicketInvalid) {
		t.Errorf("a after it is gone: %q", got)
	}
	eventually(t, "a's bus is let go", func() bool { return a.server.NumClients() == 1 })
}

func TestTicketKeyIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "demo")
	_, client := start(t, dir, []config.GatewayWorkspace{w.spec()}, nil)
	old := w.ticket(nil)
	public, key, _ := ed25519.GenerateKey(rand.Reader)
	w.signer = key
	fresh := w.ticket(nil)
	code := func(raw string) string {
		resp, err := client.Authenticate(within(t), &admission.AuthenticateRequest{Ticket: raw})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Error.GetCode()
	}
	if code(old) != "" || code(fresh) != string(refusal.TicketInvalid) {
		t.Fatalf("before: old %q, fresh %q", code(old), code(fresh))
	}
	path := filepath.Join(dir, "demo")
	write(t, path, config.TicketCert, []byte("rubbish"))
	time.Sleep(60 * time.Millisecond) // a few refreshes: rubbish must not take the old key away
	if code(old) != "" {
		t.Error("a bad file took the key away")
	}
	write(t, path, config.TicketCert, pemOf("CERTIFICATE", w.ca.certificate(identity.Agent(ns, "demo", "p", "h"), public)))
	time.Sleep(60 * time.Millisecond)
	if code(fresh) == "" {
		t.Error("an agent's certificate signs tickets")
	}
	write(t, path, config.TicketCert, pemOf("CERTIFICATE", w.ca.certificate(identity.TicketSigner(ns, "demo"), public)))
	eventually(t, "the new key is believed and the old one isn't", func() bool {
		return code(fresh) == "" && code(old) == string(refusal.TicketInvalid)
	})
}

func TestRoute(t *testing.T) {
	peers := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::ffff:10.0.0.2")}
	var fail error
	lookup := func(_ context.Context, host string) ([]netip.Addr, error) {
		if host != "gateway-a-relays" {
			t.Errorf("looked up %q", host)
		}
		return slices.Clone(peers), fail
	}
	_, known := start(t, t.TempDir(), nil, func(o *Options) { o.Lookup = lookup })
	_, fresh := start(t, t.TempDir(), nil, func(o *Options) { o.Lookup = lookup })
	for _, tt := range []struct {
		instance, address string
		code              refusal.Code
		fail              error
	}{
		{"10-0-0-2", "10.0.0.2:8443", "", nil},
		{"10-0-0-3", "", refusal.UnknownInstance, nil},
		{testInstance, "", refusal.UnknownInstance, nil},
		{"kubernetes", "", refusal.UnknownInstance, nil},
		{"", "", refusal.UnknownInstance, nil},
		{"10-0-0-2", "10.0.0.2:8443", "", errors.New("no DNS")}, // known a moment ago
	} {
		client := known
		fail = tt.fail
		resp, err := client.Route(within(t), &admission.RouteRequest{Instance: tt.instance})
		if err != nil || resp.Address != tt.address || resp.Error.GetCode() != string(tt.code) {
			t.Errorf("%q: %v, %v; want %q, %q", tt.instance, resp, err, tt.address, tt.code)
		}
	}
	fail = errors.New("no DNS")
	if resp, err := fresh.Route(within(t), &admission.RouteRequest{Instance: "10-0-0-2"}); err != nil || resp.Error.GetCode() != string(refusal.Internal) {
		t.Errorf("without DNS: %v, %v", resp, err)
	}
}

// Whatever strangers ask for, the resolver is asked a few times a second, and a pod that has just come is found soon.
func TestLookUpsAreBounded(t *testing.T) {
	var asked, there atomic.Int32
	_, client := start(t, t.TempDir(), nil, func(o *Options) {
		o.Lookup = func(context.Context, string) ([]netip.Addr, error) {
			asked.Add(1)
			time.Sleep(10 * time.Millisecond)
			addrs := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
			return addrs[:1+there.Load()], nil
		}
	})
	began := time.Now()
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			if i%2 == 0 {
				client.Route(within(t), &admission.RouteRequest{Instance: fmt.Sprintf("10-1-0-%d", i)})
			} else {
				client.Peers(within(t), &admission.PeersRequest{})
			}
		})
	}
	all.Wait()
	if n, most := asked.Load(), int32(2+time.Since(began)/relaysAnew); n > most {
		t.Errorf("200 requests made %d look-ups, want at most %d", n, most)
	}
	there.Store(1)
	eventually(t, "the new pod is found", func() bool {
		resp, err := client.Route(within(t), &admission.RouteRequest{Instance: "10-0-0-2"})
		return err == nil && resp.Error == nil
	})
	before := asked.Load()
	for range 100 {
		client.Route(within(t), &admission.RouteRequest{Instance: "10-0-0-2"})
	}
	if n := asked.Load() - before; n > 1 {
		t.Errorf("what is known was looked up %d times", n)
	}
}

func TestPeers(t *testing.T) {
	own, err := admission.InstanceAddr(testInstance)
	if err != nil {
		t.Fatal(err)
	}
	var fail error
	_, client := start(t, t.TempDir(), nil, func(o *Options) {
		o.Lookup = func(_ context.Context, host string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("10.0.0.7"), own, netip.MustParseAddr("::ffff:10.0.0.8"), netip.MustParseAddr("fd00::9")}, fail
		}
	})
	resp, err := client.Peers(within(t), &admission.PeersRequest{})
	if err != nil || resp.Error != nil {
		t.Fatal(resp, err)
	}
	var got []string
	for _, p := range resp.Peers {
		got = append(got, p.Instance+" "+p.Address)
	}
	want := []string{"10-0-0-7 10.0.0.7:8443", "10-0-0-8 10.0.0.8:8443", "fd00-0000-0000-0000-0000-0000-0000-0009 [fd00::9]:8443"}
	if !slices.Equal(got, want) {
		t.Errorf("peers %q, want %q: all but this pod", got, want)
	}
	fail = errors.New("no DNS")
	time.Sleep(relaysAnew)
	if resp, err := client.Peers(within(t), &admission.PeersRequest{}); err != nil || resp.Error.GetCode() != string(refusal.Internal) || len(resp.Peers) > 0 {
		t.Errorf("%v, %v", resp, err)
	}
}

func TestListenTakesOverAStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	first.(interface{ SetUnlinkOnClose(bool) }).SetUnlinkOnClose(false)
	first.Close() // as a killed process leaves it
	second, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", fi.Mode(), err)
	}
	file := filepath.Join(t.TempDir(), "f")
	os.WriteFile(file, nil, 0o600)
	if _, err := Listen(file); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("a file in the way: %v", err)
	}
}
