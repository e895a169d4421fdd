package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/rdpkey"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// world is what an agent meets: a broker's enrolment, a bus, a gateway and an RDP server, all over real TLS.
type world struct {
	t        *testing.T
	ca       *authority // of everything here; in a cluster there are several
	broker   *httptest.Server
	nats     *server.Server
	conn     *nats.Conn // a broker's
	busURLs  []string
	webPort  int
	gateway  *gateway
	rdp      *rdpServer
	dir      string // RDP certificate
	token    string // file
	lifetime time.Duration

	mu        sync.Mutex
	answer    func(w http.ResponseWriter, token string) bool // refuses an enrolment where it returns true
	enrolled  []brokerapi.EnrollRequest
	lose      bool                         // the answers of enrolments
	rdpKey    rdpkey.Kind                  // that the pool chooses
	admit     func(*x509.Certificate) bool // whom the bus lets in, nil for all
	busy      bool                         // refuses the next renewal
	older     bool                         // the brokers are of a release without bus.HostDisplaced
	config    *bus.HostConfig              // what this host must hold to
	renewals  int
	reports   []bus.HostReport
	traces    []trace.Event
	desktops  map[desktop]bool // that the agent sees, nil for none ever
	busAgents []string         // client certificates' serials, as they connected
}

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
}

// sign issues a certificate for the names in tmpl.
func (a *authority) sign(t *testing.T, tmpl x509.Certificate, public any, lifetime time.Duration) string {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = serial, time.Now().Add(-time.Second), time.Now().Add(lifetime)
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, &tmpl, a.cert, public, a.key)
	must(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// pair issues a certificate with its key.
func (a *authority) pair(t *testing.T, tmpl x509.Certificate) (certPEM, keyPEM string) {
	t.Helper()
	k, err := rdpkey.Kind{}.Generate()
	must(t, err)
	key, _, err := rdpkey.Parse(k)
	must(t, err)
	return a.sign(t, tmpl, key.Public(), time.Hour), string(k)
}

func (a *authority) config(t *testing.T, tmpl x509.Certificate) *tls.Config {
	t.Helper()
	c, k := a.pair(t, tmpl)
	pair, err := tls.X509KeyPair([]byte(c), []byte(k))
	must(t, err)
	return &tls.Config{Certificates: []tls.Certificate{pair}}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const (
	namespace, workspace, pool, host = "demo", "office", "linux", "linux-1"
	gatewayName                      = "gw.example"
)

var loopback = []net.IP{net.IPv4(127, 0, 0, 1)}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, ca: newAuthority(t), dir: t.TempDir(), lifetime: time.Hour, token: filepath.Join(t.TempDir(), "token")}
	must(t, os.WriteFile(w.token, []byte("rdvreg.demo.linux.-.good\n"), 0o600))
	w.startBus()
	w.startBroker()
	w.gateway = startGateway(t, w.ca.config(t, x509.Certificate{DNSNames: []string{gatewayName}}))
	w.rdp = startRDP(t, w.dir)
	return w
}

func (w *world) startBroker() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+brokerapi.PathEnroll, func(rw http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.answer != nil && w.answer(rw, token) {
			return
		}
		json.NewEncoder(rw).Encode(brokerapi.PreEnroll{Namespace: namespace, Workspace: workspace, Pool: pool, RDPCertificate: true, RDPKey: w.rdpKey})
	})
	mux.HandleFunc("POST "+brokerapi.PathEnroll, func(rw http.ResponseWriter, r *http.Request) {
		var req brokerapi.EnrollRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			w.t.Error(err)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.enrolled = append(w.enrolled, req)
		if w.lose {
			panic(http.ErrAbortHandler)
		}
		json.NewEncoder(rw).Encode(brokerapi.EnrollResponse{
			Namespace: namespace, Workspace: workspace, Pool: pool, Host: req.Host,
			Certificates: w.certificates(brokerapi.RenewRequest{ClientCSR: req.ClientCSR, RDPCSR: req.RDPCSR}),
			BusURLs:      w.busURLs, BusCA: w.ca.pem,
		})
	})
	w.broker = httptest.NewUnstartedServer(mux)
	w.broker.TLS = w.ca.config(w.t, x509.Certificate{IPAddresses: loopback})
	w.broker.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	w.broker.StartTLS()
	w.t.Cleanup(w.broker.Close)
}

// certificates checks the CSRs as a broker must and signs them.
func (w *world) certificates(req brokerapi.RenewRequest) brokerapi.Certificates {
	var c brokerapi.Certificates
	client := parseCSR(w.t, req.ClientCSR)
	id := identity.Agent(namespace, workspace, pool, host)
	if len(client.URIs) != 1 || client.URIs[0].String() != id.String() || len(client.DNSNames)+len(client.IPAddresses)+len(client.EmailAddresses) > 0 {
		w.t.Errorf("client CSR asks for %v %v, want %s alone", client.URIs, client.DNSNames, id)
	}
	c.ClientCertificate = w.ca.sign(w.t, x509.Certificate{URIs: client.URIs}, client.PublicKey, w.lifetime)
	if req.RDPCSR != "" {
		rdp := parseCSR(w.t, req.RDPCSR)
		if want := brokerapi.RDPNames(namespace, pool, host); !slices.Equal(rdp.DNSNames, want) {
			w.t.Errorf("RDP CSR asks for %v, want %v", rdp.DNSNames, want)
		}
		c.RDPCertificate = w.ca.sign(w.t, x509.Certificate{DNSNames: rdp.DNSNames}, rdp.PublicKey, w.lifetime)
	}
	return c
}

func parseCSR(t *testing.T, text string) *x509.CertificateRequest {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Errorf("no PEM: %q", text)
		return &x509.CertificateRequest{}
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		t.Error(err)
		return &x509.CertificateRequest{}
	}
	return csr
}

// Check gives a connection the permissions of its identity, as the brokers do.
func (w *world) Check(c server.ClientAuthentication) bool {
	cs := c.GetTLSConnectionState()
	if cs == nil || len(cs.PeerCertificates) == 0 {
		return false
	}
	id, err := identity.FromCertificate(cs.PeerCertificates[0])
	if err != nil {
		return false
	}
	p, err := bus.PermissionsFor(id)
	if err != nil {
		return false
	}
	if id.Role == identity.RoleAgent {
		w.mu.Lock()
		admitted := w.admit == nil || w.admit(cs.PeerCertificates[0])
		w.mu.Unlock()
		if !admitted {
			return false
		}
		w.mu.Lock()
		w.busAgents = append(w.busAgents, cs.PeerCertificates[0].SerialNumber.String())
		w.mu.Unlock()
	}
	if w.older {
		p.Subscribe = slices.DeleteFunc(p.Subscribe, func(s string) bool { return s == bus.HostDisplacedSubject(pool, host) })
	}
	c.RegisterUser(&server.User{Permissions: &server.Permissions{
		Publish: &server.SubjectPermission{Allow: p.Publish}, Subscribe: &server.SubjectPermission{Allow: p.Subscribe},
		Response: &server.ResponsePermission{MaxMsgs: 1, Expires: time.Minute},
	}})
	return true
}

func (w *world) startBus() {
	t := w.t
	dir := t.TempDir()
	c, k := w.ca.pair(t, x509.Certificate{IPAddresses: loopback, URIs: []*url.URL{identity.Broker(namespace, workspace).URI()}})
	for name, text := range map[string]string{mtls.CertFile: c, mtls.KeyFile: k, mtls.CAFile: w.ca.pem} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	creds, err := mtls.NewReloader(dir, slog.New(slog.DiscardHandler))
	must(t, err)
	conf := creds.MutualServerConfig(func(identity.ID) error { return nil })
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	w.webPort = free.Addr().(*net.TCPAddr).Port
	must(t, free.Close())
	w.nats, err = server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, TLSConfig: conf, TLSTimeout: 5, CustomClientAuthentication: w, NoSigs: true, NoLog: true,
		Websocket: server.WebsocketOpts{Host: "127.0.0.1", Port: w.webPort, TLSConfig: conf},
	})
	must(t, err)
	w.nats.Start()
	t.Cleanup(w.nats.Shutdown)
	if !w.nats.ReadyForConnections(10 * time.Second) {
		t.Fatal("the bus did not start")
	}
	w.busURLs = []string{"tls://" + w.nats.Addr().String()}

	w.conn, err = nats.Connect(w.busURLs[0], nats.Secure(creds.ClientConfig("127.0.0.1", mtls.AllowRole(namespace, workspace, identity.RoleBroker))))
	must(t, err)
	t.Cleanup(w.conn.Close)
	subscribe := func(subject string, h func(*nats.Msg)) {
		_, err := w.conn.Subscribe(subject, h)
		must(t, err)
	}
	subscribe(bus.AllReports, func(m *nats.Msg) {
		var r bus.HostReport
		json.Unmarshal(m.Data, &r)
		w.mu.Lock()
		w.reports = append(w.reports, r)
		want := w.config
		w.mu.Unlock()
		if want != nil && r.ConfigGeneration != want.Generation { // as brokers do
			w.configure(*want)
		}
	})
	subscribe(bus.AllTraces, func(m *nats.Msg) {
		var e trace.Event
		json.Unmarshal(m.Data, &e)
		w.mu.Lock()
		w.traces = append(w.traces, e)
		w.mu.Unlock()
	})
	subscribe(bus.AllRenewals, func(m *nats.Msg) {
		var req brokerapi.RenewRequest
		json.Unmarshal(m.Data, &req)
		w.mu.Lock()
		w.renewals++
		w.lifetime = time.Hour // once is enough for a test
		res := brokerapi.RenewResponse{Certificates: w.certificates(req)}
		if w.busy {
			res, w.busy = brokerapi.RenewResponse{Err: refusal.New(refusal.IssuerAway, "It renewed a moment ago.")}, false
		}
		w.mu.Unlock()
		data, _ := json.Marshal(res)
		m.Respond(data)
	})
	must(t, w.conn.Flush())
}

// options of an agent in this world, impatient.
func (w *world) options() Options {
	ca := filepath.Join(w.t.TempDir(), "ca.pem")
	must(w.t, os.WriteFile(ca, []byte(w.ca.pem), 0o600))
	return Options{
		Broker: w.broker.URL, CAFile: ca, TokenFile: w.token, Host: host, StateDir: shortDir(w.t), RDPAddr: w.rdp.addr, RDPCertDir: w.dir,
		Drain: 10 * time.Second, Version: "test", Log: slog.New(slog.DiscardHandler),
		desktops: w.look,
		timing: timing{look: 10 * time.Millisecond, probeReady: 50 * time.Millisecond, probeAgain: 50 * time.Millisecond, probeUnready: 20 * time.Millisecond, retryMin: 10 * time.Millisecond,
			retryMax: 50 * time.Millisecond, refusedMax: 50 * time.Millisecond, closeGrace: time.Second, joinMin: 500 * time.Millisecond},
	}
}

// shortDir is a folder whose path leaves room for a Unix socket's name.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "rdv")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "state")
}

// run starts an agent; stop ends it and waits.
func (w *world) run(o Options) (stop func()) {
	w.t.Helper()
	a, err := New(o)
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	once := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				w.t.Errorf("the agent ended with: %v", err)
			}
		case <-time.After(30 * time.Second):
			w.t.Error("the agent did not stop")
		}
	})
	w.t.Cleanup(once)
	return once
}

// ready configures the host and waits until it says that it is ready under this configuration.
func (w *world) ready(c bus.HostConfig) {
	w.t.Helper()
	w.eventually("a first report", func() bool { return len(w.reports) > 0 })
	w.mu.Lock()
	w.config = &c
	w.mu.Unlock()
	w.configure(c)
	w.eventually("a ready host with the configuration", func() bool {
		r := w.last()
		return r.RDPReady && r.ConfigGeneration == c.Generation
	})
}

func (w *world) configure(c bus.HostConfig) {
	data, _ := json.Marshal(c)
	if err := w.conn.Publish(bus.HostConfigSubject(pool, host), data); err != nil {
		w.t.Error(err)
	}
}

// assumed counts the reported sessions that take no place; w.mu is held.
func (w *world) assumed() (n int) {
	for _, s := range w.last().Sessions {
		if s.Assumed {
			n++
		}
	}
	return n
}

// last is the newest report; w.mu is held.
func (w *world) last() bus.HostReport {
	if len(w.reports) == 0 {
		return bus.HostReport{}
	}
	return w.reports[len(w.reports)-1]
}

func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		w.mu.Lock()
		good := ok()
		w.mu.Unlock()
		if good {
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t.Fatalf("no %s; last report: %+v", what, w.last())
}

// request is what a broker sends for one session.
func (w *world) request(session string) bus.HostConnect {
	secret := make([]byte, 32)
	rand.Read(secret)
	return bus.HostConnect{
		ActivityID: "activity-" + session, SessionID: session, User: "alice", Resource: "desktop", Address: w.gateway.addr,
		ServerName: gatewayName, CABundle: w.ca.pem, Instance: "gateway-a-0", JoinSecret: secret, Deadline: time.Now().Add(time.Second),
	}
}

// other is request by another user, who has nothing on the host to come back to.
func (w *world) other(session string) bus.HostConnect {
	req := w.request(session)
	req.User = "other"
	return req
}

func (w *world) connect(req bus.HostConnect) *refusal.Error {
	w.t.Helper()
	data, _ := json.Marshal(req)
	msg, err := w.conn.Request(bus.HostConnectSubject(pool, host), data, 10*time.Second)
	must(w.t, err)
	var reply bus.HostReply
	must(w.t, json.Unmarshal(msg.Data, &reply))
	return reply.Err
}

// gateway takes joins as a relay does, and tells the test of each.
type gateway struct {
	addr  string
	joins chan *joined

	mu     sync.Mutex
	refuse func(w io.Writer) bool
}

// joined is one agent leg.
type joined struct {
	net.Conn
	r      io.Reader
	sni    string
	header http.Header
}

func (j *joined) Read(p []byte) (int, error) { return j.r.Read(p) }

func startGateway(t *testing.T, conf *tls.Config) *gateway {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	g := &gateway{addr: l.Addr().String(), joins: make(chan *joined, 16)}
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go g.serve(tls.Server(raw, conf))
		}
	}()
	return g
}

func (g *gateway) serve(c *tls.Conn) {
	r := bufio.NewReader(c)
	req, err := http.ReadRequest(r)
	if err != nil {
		c.Close()
		return
	}
	g.mu.Lock()
	refuse := g.refuse
	g.mu.Unlock()
	if refuse != nil && refuse(c) {
		c.Close()
		return
	}
	// The first bytes of the session travel with the answer, so that a reader who drops what it buffered is caught.
	io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: rendezvous-join/1\r\n\r\n"+string(negotiationRequest))
	g.joins <- &joined{Conn: c, r: r, sni: c.ConnectionState().ServerName, header: req.Header}
}

// rdpServer negotiates as xrdp does and then echoes inside TLS.
type rdpServer struct {
	addr string
	dir  string
	// from gets the address of each client that came from one of its own, which probes don't.
	from chan string
}

func startRDP(t *testing.T, dir string) *rdpServer {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	s := &rdpServer{addr: l.Addr().String(), dir: dir, from: make(chan string, 99)}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(c)
		}
	}()
	return s
}

func (s *rdpServer) serve(c net.Conn) {
	defer c.Close()
	var b [19]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return
	}
	if from, _, _ := net.SplitHostPort(c.RemoteAddr().String()); from != "127.0.0.1" {
		s.from <- from
	}
	c.Write([]byte{3, 0, 0, 19, 14, 0xd0, 0, 0, 0x12, 0x34, 0, 2, 0, 8, 0, protocolTLS, 0, 0, 0})
	pair, err := tls.LoadX509KeyPair(filepath.Join(s.dir, mtls.CertFile), filepath.Join(s.dir, mtls.KeyFile))
	if err != nil {
		return
	}
	inner := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair}})
	io.Copy(inner, inner)
	inner.CloseWrite()
}

// client plays the RDP client on a joined leg: it reads the confirm, opens TLS to the host's name and gives the stream.
func (w *world) client(j *joined) *tls.Conn {
	w.t.Helper()
	must(w.t, readConfirm(j))
	roots := x509.NewCertPool()
	roots.AddCert(w.ca.cert)
	inner := tls.Client(j, &tls.Config{RootCAs: roots, ServerName: brokerapi.PoolName(namespace, pool)})
	must(w.t, inner.Handshake())
	return inner
}

func (w *world) echo(c io.ReadWriter, text string) {
	w.t.Helper()
	_, err := io.WriteString(c, text)
	must(w.t, err)
	got := make([]byte, len(text))
	_, err = io.ReadFull(c, got)
	must(w.t, err)
	if string(got) != text {
		w.t.Errorf("the host echoed %q, want %q", got, text)
	}
}

func TestSession(t *testing.T) {
	w := newWorld(t)
	w.run(w.options())
	w.ready(bus.HostConfig{Generation: 3, MaxSessions: 2, ReportEvery: 60})

	r := w.last()
	if r.Pool != pool || r.Host != host || r.AgentVersion != "test" || r.Boot == "" || r.Leaving {
		t.Errorf("report: %+v", r)
	}
	installed, err := tls.LoadX509KeyPair(filepath.Join(w.dir, mtls.CertFile), filepath.Join(w.dir, mtls.KeyFile))
	must(t, err)
	if r.CertificateFingerprint != fingerprint(installed.Leaf) {
		t.Errorf("reported fingerprint %s, the installed certificate's is %s", r.CertificateFingerprint, fingerprint(installed.Leaf))
	}

	req := w.request("s1")
	if refused := w.connect(req); refused != nil {
		t.Fatal(refused)
	}
	j := <-w.gateway.joins
	if want := "gateway-a-0.join." + gatewayName; j.sni != want {
		t.Errorf("SNI %q, want %q", j.sni, want)
	}
	for name, want := range map[string]string{
		"Authorization": "Bearer " + base64.RawURLEncoding.EncodeToString(req.JoinSecret), "Rendezvous-Instance": "gateway-a-0",
		brokerapi.HeaderActivity: req.ActivityID, "Upgrade": joinProtocol,
	} {
		if got := j.header.Get(name); got != want {
			t.Errorf("join header %s is %q, want %q", name, got, want)
		}
	}
	c := w.client(j)
	w.echo(c, strings.Repeat("a desktop ", 100_000))
	w.eventually("report of the active session", func() bool {
		s := w.last().Sessions
		return len(s) == 1 && s[0].SessionID == "s1" && s[0].User == "alice" && s[0].State == bus.SessionActive
	})
	w.eventually("trace of steps 9 and 10", func() bool { return len(w.traces) >= 2 })
	for i, step := range []int{trace.StepOrchestrate, trace.StepReverse} {
		if e := w.traces[i]; e.Step != step || e.ActivityID != req.ActivityID || e.Error != "" || e.Component != "agent/"+host {
			t.Errorf("trace %d: %+v", i, e)
		}
	}

	// The client leaves; the host's last word still arrives, and the place is free again.
	must(t, c.CloseWrite())
	must(t, j.Conn.(*tls.Conn).CloseWrite())
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		t.Errorf("after the client's end: %q, %v", rest, err)
	}
	w.eventually("report without the session", func() bool { return len(w.last().Sessions) == w.assumed() })
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	w.run(w.options())
	w.eventually("a first report", func() bool { return strings.Contains(w.last().Message, "limits") })
	if refused := w.connect(w.request("early")); refused == nil || refused.Code != refusal.HostNotReady || refused.ActivityID == "" {
		t.Errorf("before any configuration: %v", refused)
	}
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})

	first := w.request("s1")
	if refused := w.connect(first); refused != nil {
		t.Fatal(refused)
	}
	j := <-w.gateway.joins
	if refused := w.connect(w.other("s2")); refused == nil || refused.Code != refusal.HostFull {
		t.Errorf("over the limit: %v", refused)
	}
	if refused := w.connect(first); refused != nil {
		t.Errorf("the same session again: %v", refused)
	}
	select {
	case <-w.gateway.joins:
		t.Error("the same session was dialled twice")
	case <-time.After(50 * time.Millisecond):
	}
	bad := w.request("s3")
	bad.JoinSecret = nil
	if refused := w.connect(bad); refused == nil || refused.Code != refusal.BadRequest {
		t.Errorf("without a secret: %v", refused)
	}
	j.Close()
	w.eventually("a free place", func() bool { return len(w.last().Sessions) == w.assumed() })

	w.ready(bus.HostConfig{Generation: 2, MaxSessions: 1, Draining: true, DrainReason: "new disk"})
	if refused := w.connect(w.other("s4")); refused == nil || refused.Code != refusal.HostDraining || !strings.Contains(refused.Message, "new disk") {
		t.Errorf("while draining: %v", refused)
	}
	// A recreated object begins at generation 1 again, and still counts.
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	if refused := w.connect(w.request("s5")); refused != nil {
		t.Errorf("after the drain: %v", refused)
	}
	(<-w.gateway.joins).Close()
}

// A place that no join fills is given back, with the reason in the timeline.
func TestFailedJoins(t *testing.T) {
	other := newAuthority(t)
	tests := []struct {
		name   string
		refuse func(io.Writer) bool
		change func(*bus.HostConnect)
		code   refusal.Code
	}{
		{name: "refused by the gateway", code: refusal.JoinUnknown, refuse: func(c io.Writer) bool {
			body, _ := json.Marshal(brokerapi.ErrorBody{Error: refusal.New(refusal.JoinUnknown, "Used before.")})
			fmt.Fprintf(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			return true
		}},
		{name: "refused with a code that nobody knows", code: refusal.Protocol, refuse: func(c io.Writer) bool {
			body, _ := json.Marshal(brokerapi.ErrorBody{Error: refusal.New(refusal.Code(strings.Repeat("x", 1000)), "Made up.")})
			fmt.Fprintf(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			return true
		}},
		{name: "no gateway", code: refusal.Protocol, refuse: func(c io.Writer) bool {
			io.WriteString(c, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
			return true
		}},
		{name: "hangs up", code: refusal.Internal, refuse: func(io.Writer) bool { return true }},
		{name: "another CA", code: refusal.Internal, change: func(r *bus.HostConnect) { r.CABundle = other.pem }},
		{name: "another name", code: refusal.Internal, change: func(r *bus.HostConnect) { r.ServerName = "other.example" }},
		{name: "nobody there", code: refusal.Internal, change: func(r *bus.HostConnect) { r.Address = "127.0.0.1:1" }},
	}
	w := newWorld(t)
	w.run(w.options())
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w.gateway.mu.Lock()
			w.gateway.refuse = tt.refuse
			w.gateway.mu.Unlock()
			req := w.request(fmt.Sprint("s", i))
			req.Deadline = time.Now().Add(200 * time.Millisecond)
			if tt.change != nil {
				tt.change(&req)
			}
			if refused := w.connect(req); refused != nil {
				t.Fatalf("the place of the session before was not given back: %v", refused)
			}
			w.eventually("trace of the failure", func() bool {
				return slices.ContainsFunc(w.traces, func(e trace.Event) bool {
					return e.ActivityID == req.ActivityID && e.Step == trace.StepReverse && e.Error == string(tt.code)
				})
			})
			w.eventually("free place", func() bool { return len(w.last().Sessions) == w.assumed() })
			select {
			case <-w.gateway.joins:
				t.Error("it joined all the same")
			default:
			}
		})
	}
}

// Renewal changes keys, certificates and the control channel under a running session.
func TestRenewal(t *testing.T) {
	w := newWorld(t)
	w.lifetime = 4 * time.Second
	w.run(w.options())
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	if refused := w.connect(w.request("s1")); refused != nil {
		t.Fatal(refused)
	}
	c := w.client(<-w.gateway.joins)
	w.echo(c, "before")
	w.mu.Lock()
	before, first := w.last().CertificateFingerprint, slices.Clone(w.busAgents)
	w.mu.Unlock()
	w.eventually("a renewed certificate at the RDP server and a channel with the new one", func() bool {
		r := w.last()
		return w.renewals == 1 && r.CertificateFingerprint != before && r.RDPReady && w.busAgents[len(w.busAgents)-1] != first[0]
	})
	w.echo(c, "after")
	if refused := w.connect(w.other("s2")); refused == nil || refused.Code != refusal.HostFull {
		t.Errorf("over the new channel: %v, want the host to know its session still", refused)
	}
	if len(w.enrolled) != 1 {
		t.Errorf("%d enrolments, want 1", len(w.enrolled))
	}
}

// The pool chooses the kind of the RDP server's key. A host that has another renews, also where it is refused at first.
func TestChosenRDPKey(t *testing.T) {
	w := newWorld(t)
	w.rdpKey = rdpkey.Kind{Algorithm: rdpkey.RSA, Size: 2048, Encoding: rdpkey.PKCS1}
	o := w.options()
	stop := w.run(o)
	installed := func() (k rdpkey.Kind) {
		data, err := os.ReadFile(filepath.Join(w.dir, mtls.KeyFile))
		if err == nil {
			_, k, err = rdpkey.Parse(data)
		}
		if err != nil {
			t.Error(err)
		}
		return k
	}
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1, RDPKey: w.rdpKey})
	if k := installed(); k != w.rdpKey || w.renewals != 0 {
		t.Errorf("enrolled with a key of %v, after %d renewals", k, w.renewals)
	}
	next := rdpkey.Kind{Algorithm: rdpkey.ECDSA, Size: 384, Encoding: rdpkey.PKCS8}
	w.mu.Lock()
	w.busy = true // for the first renewal
	w.mu.Unlock()
	w.ready(bus.HostConfig{Generation: 2, MaxSessions: 1, RDPKey: next})
	w.eventually("a renewal with the other key", func() bool { return w.renewals == 2 && installed() == next })
	// A broker of before says nothing of keys: what is there stays.
	w.ready(bus.HostConfig{Generation: 3, MaxSessions: 1})
	stop()
	w.run(o)
	w.ready(bus.HostConfig{Generation: 4, MaxSessions: 1, RDPKey: next})
	if k := installed(); k != next || w.renewals != 2 {
		t.Errorf("in the end the key is of %v, after %d renewals", k, w.renewals)
	}
}

func TestRestart(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	stop := w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	boot := w.last().Boot
	stop()
	w.eventually("report of leaving", func() bool { return w.last().Leaving })
	must(t, os.Remove(w.token))
	w.run(o)
	w.eventually("a report after the restart", func() bool { return w.last().Boot != boot && !w.last().Leaving })
	if len(w.enrolled) != 1 {
		t.Errorf("%d enrolments, want 1", len(w.enrolled))
	}
}

// An expired certificate is replaced where there is a token, and named where there is none.
func TestExpired(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	w.lifetime = 50 * time.Millisecond
	a, err := New(o)
	must(t, err)
	_, err = a.Enroll(t.Context())
	must(t, err)
	time.Sleep(60 * time.Millisecond)

	must(t, os.Rename(w.token, w.token+".away"))
	if _, err = a.Enroll(t.Context()); !errors.Is(err, errNoToken) || !strings.Contains(err.Error(), w.token) {
		t.Errorf("expired and no token: %v", err)
	}
	must(t, os.Rename(w.token+".away", w.token))
	w.lifetime = time.Hour
	_, err = a.Enroll(t.Context())
	must(t, err)
	_, err = a.Enroll(t.Context())
	must(t, err)
	if len(w.enrolled) != 2 {
		t.Errorf("%d enrolments, want 2: none with a good certificate", len(w.enrolled))
	}
}

func TestEnrolmentRefused(t *testing.T) {
	w := newWorld(t)
	attempts := map[string]int{}
	w.answer = func(rw http.ResponseWriter, token string) bool {
		attempts[token]++
		switch {
		case !strings.HasSuffix(token, ".good"):
			rw.WriteHeader(http.StatusForbidden)
			json.NewEncoder(rw).Encode(brokerapi.ErrorBody{Error: refusal.New(refusal.RegistrationExpired, "The token of HostPool linux expired.").With("act-1")})
			return true
		case attempts[token] == 1: // what passes is tried again
			rw.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		return false
	}
	must(t, os.WriteFile(w.token, []byte("rdvreg.demo.linux.-.old"), 0o600))
	o := w.options()
	a, err := New(o)
	must(t, err)
	_, err = a.Enroll(t.Context())
	if !errors.Is(err, &refusal.Error{Code: refusal.RegistrationExpired}) || !strings.Contains(err.Error(), "act-1") {
		t.Errorf("`agent enroll` with an expired token: %v", err)
	}
	w.run(o)
	w.eventually("second attempt of the service", func() bool { return attempts["rdvreg.demo.linux.-.old"] >= 3 })
	must(t, os.WriteFile(w.token, []byte("rdvreg.demo.linux.-.good"), 0o600))
	w.eventually("enrolment with the new token", func() bool { return len(w.enrolled) == 1 })
}

// A machine whose clock is off is told so, and not that a certificate is not valid.
func TestEnrolmentByAClockThatIsOff(t *testing.T) {
	w := newWorld(t)
	w.answer = func(rw http.ResponseWriter, _ string) bool {
		rw.Header().Set("Date", time.Now().Add(-2*time.Hour).UTC().Format(http.TimeFormat))
		rw.WriteHeader(http.StatusForbidden)
		json.NewEncoder(rw).Encode(brokerapi.ErrorBody{Error: refusal.New(refusal.RegistrationExpired, "expired")})
		return true
	}
	a, err := New(w.options())
	must(t, err)
	_, err = a.Enroll(t.Context())
	if !errors.Is(err, &refusal.Error{Code: refusal.RegistrationExpired}) || !strings.Contains(err.Error(), "this machine's clock is 2 hours ahead of 127.0.0.1's: set it right") {
		t.Errorf("got %v", err)
	}
}

// Where the plain port is closed to us, the control channel goes by WebSocket.
func TestWebSocketChannel(t *testing.T) {
	w := newWorld(t)
	w.busURLs = []string{fmt.Sprintf("wss://127.0.0.1:%d", w.webPort), "tls://127.0.0.1:1"}
	w.run(w.options())
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	if refused := w.connect(w.request("s1")); refused != nil {
		t.Error(refused)
	}
	(<-w.gateway.joins).Close()
}

// A stopping agent takes no session, keeps those that it has, and ends when the last one does.
func TestDrain(t *testing.T) {
	w := newWorld(t)
	stop := w.run(w.options())
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 2})
	if refused := w.connect(w.request("s1")); refused != nil {
		t.Fatal(refused)
	}
	c := w.client(<-w.gateway.joins)
	stopped := make(chan struct{})
	go func() { defer close(stopped); stop() }()
	w.eventually("leaving report with the session", func() bool { return w.last().Leaving && len(w.last().Sessions) == 1 })
	if refused := w.connect(w.request("s2")); refused == nil || refused.Code != refusal.HostDraining {
		t.Errorf("while stopping: %v", refused)
	}
	w.echo(c, "still here")
	select {
	case <-stopped:
		t.Fatal("the agent stopped over a running session")
	default:
	}
	c.NetConn().Close()
	<-stopped
}

// A host whose RDP server shows a stranger's certificate is not ready, and says what to do.
func TestForeignRDPCertificate(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	o.RDPCertDir = t.TempDir() // not where the server reads
	c, k := w.ca.pair(t, x509.Certificate{DNSNames: []string{"snakeoil"}})
	must(t, os.WriteFile(filepath.Join(w.dir, mtls.CertFile), []byte(c), 0o600))
	must(t, os.WriteFile(filepath.Join(w.dir, mtls.KeyFile), []byte(k), 0o600))
	w.run(o)
	w.eventually("report that names the certificate", func() bool {
		return !w.last().RDPReady && strings.Contains(w.last().Message, "without the name "+brokerapi.PoolName(namespace, pool))
	})
	h, err := CheckHealth(t.Context(), o.StateDir)
	if err != nil || !h.Enrolled || h.Ready() {
		t.Errorf("health: %+v, %v", h, err)
	}
}

func TestHealth(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	if _, err := CheckHealth(t.Context(), o.StateDir); err == nil {
		t.Error("health of no agent")
	}
	stop := w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	h, err := CheckHealth(t.Context(), o.StateDir)
	if err != nil || !h.Ready() {
		t.Errorf("health: %+v, %v", h, err)
	}
	fi, err := os.Stat(filepath.Join(o.StateDir, socketName))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi, err)
	}
	stop()
	if _, err := CheckHealth(t.Context(), o.StateDir); err == nil {
		t.Error("health of a stopped agent")
	}
}

// The agent must come back however often its broker goes.
func TestReconnect(t *testing.T) {
	w := newWorld(t)
	w.run(w.options())
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	for range 3 {
		w.mu.Lock()
		had := len(w.busAgents)
		w.mu.Unlock()
		for _, c := range agentConns(t, w.nats) {
			must(t, w.nats.DisconnectClientByID(c))
		}
		w.eventually("new control channel", func() bool { return len(w.busAgents) > had })
	}
	w.ready(bus.HostConfig{Generation: 2, MaxSessions: 1})
}

func agentConns(t *testing.T, s *server.Server) (ids []uint64) {
	z, err := s.Connz(&server.ConnzOptions{})
	must(t, err)
	for _, c := range z.Conns {
		if strings.HasPrefix(c.Name, "agent ") {
			ids = append(ids, c.Cid)
		}
	}
	return ids
}

func TestStateFiles(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	a, err := New(o)
	must(t, err)
	_, err = a.Enroll(t.Context())
	must(t, err)
	must(t, filepath.Walk(o.StateDir, func(path string, fi os.FileInfo, err error) error {
		if err == nil && runtime.GOOS != "windows" && fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, fi.Mode())
		}
		return err
	}))
	m, err := a.store.load()
	must(t, err)

	// A crash before `current` changes leaves the old generation; one while it is written, the old as well.
	must(t, os.MkdirAll(filepath.Join(o.StateDir, "new-crashed"), 0o700))
	must(t, os.WriteFile(filepath.Join(o.StateDir, "current.new"), []byte("gen-half"), 0o600))
	again, err := a.store.load()
	must(t, err)
	if again.dir != m.dir || again.ClientKey != m.ClientKey {
		t.Errorf("after a crash: %s, want %s", again.dir, m.dir)
	}
	// A certificate that does not fit its key is no membership.
	must(t, os.WriteFile(filepath.Join(m.dir, mtls.KeyFile), bytes.Repeat([]byte("x"), 10), 0o600))
	if _, err := a.store.load(); err == nil {
		t.Error("a broken key was loaded")
	}
}

// look gives the test's desktops.
func (w *world) look() map[desktop]bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.desktops)
}

func (w *world) setDesktops(attached map[desktop]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.desktops = attached
}

// pam asks as PAM's helper does, where the account is there already, and says whether PAM lets the user in.
func (w *world) pam(o Options, account, from string, uid uint32) (string, bool) {
	w.t.Helper()
	c, err := net.Dial("unix", filepath.Join(o.LoginDir, login.SocketName))
	must(w.t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	r := bufio.NewReader(c)
	answer := ""
	for _, line := range []string{fmt.Sprintf(`{"user":%q,"remote":%q,"service":"xrdp-sesman"}`, account, from), fmt.Sprintf(`{"uid":%d}`, uid)} {
		io.WriteString(c, line+"\n") // an agent that refuses has hung up
		if answer, err = r.ReadString('\n'); err != nil {
			return err.Error(), false
		}
	}
	return answer, strings.Contains(answer, `"ok":true`)
}

// A user who leaves the desktop without logging out keeps it, is reported with it, and gets back to it while the host
// drains and is full, also after the agent's restart; nobody else does.
func TestDisconnectedDesktop(t *testing.T) {
	if os.Geteuid() != 0 || runtime.GOOS != "linux" {
		t.Skip("only root is answered on the login socket")
	}
	w := newWorld(t)
	o := w.options()
	o.LoginDir, o.LoginShared = filepath.Join(filepath.Dir(o.StateDir), "login"), true
	stop := w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	d := desktop{uid: "10001", display: 10}
	as := func(req bus.HostConnect) bus.HostConnect {
		req.Account, req.Proof = &bus.Account{Name: req.User, Create: true, UID: 10001}, "proof of "+req.User
		if req.User != "alice" {
			req.Account.UID = 10002
		}
		return req
	}
	join := func(id string) *joined {
		t.Helper()
		if refused := w.connect(as(w.request(id))); refused != nil {
			t.Fatal(refused)
		}
		j := <-w.gateway.joins
		from := <-w.rdp.from
		if answer, ok := w.pam(o, "other", from, 10002); ok {
			t.Fatalf("somebody else logged in by alice's connection: %s", answer)
		}
		if answer, ok := w.pam(o, "alice", from, 10001); !ok {
			t.Fatalf("alice did not log in: %s", answer)
		}
		return j
	}
	reported := func(state, session string) {
		t.Helper()
		w.eventually(state+" session of alice", func() bool {
			s := w.last().Sessions
			return len(s) == 1 && s[0].User == "alice" && s[0].State == state && s[0].SessionID == session && !s[0].Assumed &&
				s[0].Account == "alice" && s[0].Proof == "proof of alice"
		})
	}
	j := join("s1")
	reported(bus.SessionActive, "s1")
	w.setDesktops(map[desktop]bool{d: true})
	time.Sleep(50 * time.Millisecond) // some looks
	reported(bus.SessionActive, "s1")
	j.Close()
	w.setDesktops(map[desktop]bool{d: false})
	reported(bus.SessionDisconnected, "")
	if n := w.last().LoginsRefused["wrong-account"]; n != 1 {
		t.Errorf("%d refused logins are reported, want 1", n)
	}

	stop()
	w.run(o)
	w.ready(bus.HostConfig{Generation: 2, MaxSessions: 1, Draining: true})
	reported(bus.SessionDisconnected, "")
	if refused := w.connect(as(w.other("s2"))); refused == nil || refused.Code != refusal.HostDraining {
		t.Errorf("another user on a draining host: %v", refused)
	}
	w.ready(bus.HostConfig{Generation: 3, MaxSessions: 1})
	if refused := w.connect(as(w.other("s3"))); refused == nil || refused.Code != refusal.HostFull {
		t.Errorf("another user beside a desktop that takes the only place: %v", refused)
	}
	w.ready(bus.HostConfig{Generation: 4, MaxSessions: 1, Draining: true})
	j = join("s4")
	w.setDesktops(map[desktop]bool{d: true})
	reported(bus.SessionActive, "s4")

	// The client lost its gateway and comes again before its old connection is missed: it takes that one's place.
	again := join("s5")
	w.eventually("end of the old connection", func() bool {
		s := w.last().Sessions
		return len(s) == 1 && s[0].SessionID == "s5" && s[0].State == bus.SessionActive
	})
	j.Close()
	again.Close()
	w.setDesktops(map[desktop]bool{})
	w.eventually("nothing after the logout", func() bool { return len(w.last().Sessions) == 0 })
}

// A host on which others than the brokers' people could log in takes no sessions, says so, and is ready once that is mended.
func TestUnsafeLogins(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	o.LoginDir = filepath.Join(filepath.Dir(o.StateDir), "login")
	var unsafe atomic.Bool
	unsafe.Store(true)
	o.guarded = func() error {
		if unsafe.Load() {
			return errors.New("everybody can speak to sesman")
		}
		return nil
	}
	w.run(o)
	w.eventually("a report that says what to do", func() bool {
		r := w.last()
		return !r.RDPReady && strings.Contains(r.Message, "everybody can speak to sesman") && strings.Contains(r.Message, "agent login install")
	})
	unsafe.Store(false)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
}
