package relay

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
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wiretest"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

const (
	testHost     = "gw.example.test"
	testInstance = "10-0-0-1"
	testTicket   = "good-ticket"
	testTarget   = "pool.ns.rdv.internal"
	// testConnection is the id of an OUT channel that isn't there.
	testConnection = "{0f0e0d0c-0b0a-4908-8706-050403020100}"
)

// patience bounds waits for what must happen; no test asserts on how long it takes.
const patience = 20 * time.Second

// writeCertificate makes a self-signed server certificate for testHost in dir.
func writeCertificate(t testing.TB, dir string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: testHost}, DNSNames: []string{testHost},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{mtls.CertFile: {Type: "CERTIFICATE", Bytes: der}, mtls.KeyFile: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return pool
}

// fakeAdmission is the gateway container's end: the real gRPC, with answers that a test chooses.
type fakeAdmission struct {
	admission.UnimplementedAdmissionServer
	authenticate func(*admission.AuthenticateRequest) *admission.AuthenticateResponse
	connect      func(context.Context, *admission.ConnectRequest) *admission.ConnectResponse
	enter        func(*admission.EnterRequest) *admission.EnterResponse
	route        func(*admission.RouteRequest) *admission.RouteResponse
	peers        []*admission.Peer
	commands     chan *admission.RelayCommand

	mu      sync.Mutex
	reports []*admission.RelayReport
}

func (f *fakeAdmission) Authenticate(_ context.Context, r *admission.AuthenticateRequest) (*admission.AuthenticateResponse, error) {
	return f.authenticate(r), nil
}

// Connect checks the ticket too, as the gateway container does, and then asks f.connect.
func (f *fakeAdmission) Connect(ctx context.Context, r *admission.ConnectRequest) (*admission.ConnectResponse, error) {
	auth := f.authenticate(&admission.AuthenticateRequest{ActivityId: r.ActivityId, Ticket: r.Ticket, ClientAddr: r.ClientAddr})
	resp := &admission.ConnectResponse{Error: auth.Error}
	if auth.Error == nil {
		resp = f.connect(ctx, r)
	}
	resp.ActivityId, resp.Workspace, resp.User, resp.Resource = auth.ActivityId, auth.Workspace, auth.User, auth.Resource
	return resp, nil
}

func (f *fakeAdmission) Route(_ context.Context, r *admission.RouteRequest) (*admission.RouteResponse, error) {
	return f.route(r), nil
}

func (f *fakeAdmission) Peers(context.Context, *admission.PeersRequest) (*admission.PeersResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &admission.PeersResponse{Peers: f.peers}, nil
}

func (f *fakeAdmission) Report(s grpc.BidiStreamingServer[admission.RelayReport, admission.RelayCommand]) error {
	go func() {
		for {
			select {
			case c := <-f.commands:
				s.Send(c)
			case <-s.Context().Done():
				return
			}
		}
	}()
	for {
		m, err := s.Recv()
		if err != nil {
			return nil
		}
		f.mu.Lock()
		if b := m.GetBatch(); b != nil {
			f.reports = append(f.reports, b.Reports...)
		} else {
			f.reports = append(f.reports, m)
		}
		f.mu.Unlock()
	}
}

// stack is a relay that serves, with a fake admission beside it and an agent that dials as soon as it is told.
type stack struct {
	t      testing.TB
	relay  *Relay
	adm    *fakeAdmission
	addr   string
	roots  *x509.CertPool
	agents chan *agentLeg
	log    *wiretest.Log
	wrap   func(net.Conn) net.Conn // what clients and agents dial through, where set
	from   netip.Addr              // whom clients and agents dial from, where set
	maxTLS uint16                  // the newest version that they speak, where set
	conf   *tls.Config             // what the relay serves
	reload *mtls.Reloader
	dir    string // of its certificate
	stop   context.CancelFunc
	// stopAdmission stops the gateway container.
	stopAdmission func()
	ran           chan error
}

type agentLeg struct {
	*tls.Conn
	r      *bufio.Reader
	secret []byte
}

func (a *agentLeg) Read(p []byte) (int, error) { return a.r.Read(p) }

// serveAdmission serves f on a Unix socket and dials it.
func serveAdmission(t testing.TB, f *fakeAdmission) (client admission.AdmissionClient, stop func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "a.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := admission.NewServer()
	admission.RegisterAdmissionServer(srv, f)
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	cc, err := admission.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return admission.NewAdmissionClient(cc), srv.Stop
}

// newStack starts it all; change may alter the options, and the admission's answers.
func newStack(t testing.TB, change func(*Options, *fakeAdmission)) *stack {
	t.Helper()
	s := &stack{t: t, agents: make(chan *agentLeg, 100), log: &wiretest.Log{}, ran: make(chan error, 1)}
	s.adm = &fakeAdmission{commands: make(chan *admission.RelayCommand, 10)}
	s.adm.authenticate = func(r *admission.AuthenticateRequest) *admission.AuthenticateResponse {
		if r.Ticket != testTicket {
			return &admission.AuthenticateResponse{Error: &admission.Error{Code: string(refusal.TicketInvalid), Message: "The ticket was refused: download it again."}}
		}
		return &admission.AuthenticateResponse{Workspace: "demo", User: "alice", Resource: "desk", Target: testTarget}
	}
	s.adm.connect = func(ctx context.Context, r *admission.ConnectRequest) *admission.ConnectResponse {
		secret := bytes.Clone(r.JoinSecret)
		go func() {
			if a, err := s.dialAgent(secret, r.Instance, s.addr); err == nil {
				s.agents <- a
			}
		}()
		return &admission.ConnectResponse{Host: "pool/host-1"}
	}
	s.adm.route = func(*admission.RouteRequest) *admission.RouteResponse {
		return &admission.RouteResponse{Error: &admission.Error{Code: string(refusal.UnknownInstance), Message: "no such instance"}}
	}
	dir := t.TempDir()
	s.roots = writeCertificate(t, dir)
	log := slog.New(slog.NewJSONHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	reload, err := mtls.NewReloader(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	s.reload, s.dir = reload, dir
	o := Options{
		Config:   config.Relay{Gateway: "gateway-a", Hostname: testHost, JoinTimeoutSeconds: 10, HandshakeTimeoutSeconds: 10, DrainDeadlineSeconds: 20},
		Instance: testInstance, TLS: reload.ServerConfig(), Log: log,
		CloseGrace: 2 * time.Second,
	}
	o.Admission, s.stopAdmission = serveAdmission(t, s.adm)
	if change != nil {
		change(&o, s.adm)
	}
	s.conf = o.TLS
	if s.relay, err = New(o); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	go func() { s.ran <- s.relay.Run(ctx, l) }()
	t.Cleanup(func() {
		s.relay.endAll(refusal.DrainDeadline, "the test ends")
		cancel()
		select {
		case <-s.ran:
		case <-time.After(patience):
			t.Error("the relay did not stop")
		}
		if t.Failed() {
			t.Log(s.log.String())
		}
	})
	return s
}

func (s *stack) dial(addr, serverName string) (*tls.Conn, error) {
	d := net.Dialer{Timeout: patience}
	if s.from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(s.from, 0))
	}
	tcp, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	if s.wrap != nil {
		tcp = s.wrap(tcp)
	}
	c := tls.Client(tcp, &tls.Config{RootCAs: s.roots, ServerName: serverName, InsecureSkipVerify: serverName != testHost, MaxVersion: s.maxTLS})
	c.SetDeadline(time.Now().Add(patience))
	if err := c.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return c, nil
}

// trickle writes in small pieces, so that TLS records arrive in parts.
type trickle struct {
	net.Conn
	r *mrand.Rand
}

func (c *trickle) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = c.Conn.Write(p[n:min(len(p), n+1+c.r.IntN(700))])
		n += m
		if c.r.IntN(8) == 0 {
			time.Sleep(50 * time.Microsecond)
		}
	}
	return n, err
}

// dialAgent joins with a secret. A refusal is an error that holds the body.
func (s *stack) dialAgent(secret []byte, instance, addr string) (*agentLeg, error) {
	c, err := s.dial(addr, instance+".join."+testHost)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET /rendezvous/v1/join HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: %s\r\nAuthorization: Bearer %s\r\n%s: %s\r\n\r\n",
		testHost, joinProtocol, base64.RawURLEncoding.EncodeToString(secret), headerInstance, instance)
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		c.Close()
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(resp.Body)
		c.Close()
		return nil, fmt.Errorf("%d %s", resp.StatusCode, body)
	}
	return &agentLeg{Conn: c, r: r, secret: secret}, nil
}

// agent is the next agent leg that joined.
func (s *stack) agent() *agentLeg {
	s.t.Helper()
	select {
	case a := <-s.agents:
		s.t.Cleanup(func() { a.Close() })
		return a
	case <-time.After(patience):
		s.t.Fatal("no agent joined")
		return nil
	}
}

// eventually waits for what must come true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// request sends a request and reads the answer's head and, where there is one, its body.
func (s *stack) request(c *tls.Conn, r *bufio.Reader, head string) (*http.Response, []byte) {
	s.t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, strings.ReplaceAll(head, "\n", "\r\n")+"\r\n\r\n"); err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		s.t.Fatalf("no answer: %v", err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, nil
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, body
}

const upgradeHeaders = "Host: gw\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="

// rdpClient is a client that has its WebSocket, or both channels of the legacy form: Conn is the IN channel then.
type rdpClient struct {
	*tls.Conn
	out    *tls.Conn // the OUT channel of the legacy form
	t      testing.TB
	tsgu   bool
	header http.Header
	r      *bufio.Reader
	ws     wsframe.Decoder
	ts     tsgu.Decoder
	in     []byte // read from TLS
	msg    []byte // payload not looked at yet
	data   []byte // RDP bytes not read yet
	closed string // the WebSocket close that came
	status *uint32
	notes  []string // service messages
	keeps  int
}

// dialRaw gets a raw session, or the refusal.
func (s *stack) dialRaw(ticket, extra string) (*rdpClient, *http.Response, *refusal.Error) {
	s.t.Helper()
	c, err := s.dial(s.addr, testHost)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	r := bufio.NewReader(c)
	head := "GET /rendezvous/v1/connect HTTP/1.1\n" + upgradeHeaders + extra
	if ticket != "" {
		head += "\nAuthorization: Bearer " + ticket
	}
	resp, body := s.request(c, r, head)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		c.Close()
		return nil, resp, decodeRefusal(s.t, body)
	}
	c.SetDeadline(time.Time{})
	return &rdpClient{Conn: c, t: s.t, r: r, header: resp.Header}, resp, nil
}

func decodeRefusal(t testing.TB, body []byte) *refusal.Error {
	t.Helper()
	var e brokerapi.ErrorBody
	if err := json.Unmarshal(body, &e); err != nil || e.Error == nil {
		t.Fatalf("the body is no refusal: %q", body)
	}
	return e.Error
}

// dialTSGU gets as far as the 101.
func (s *stack) dialTSGU(extra string) *rdpClient {
	s.t.Helper()
	c, err := s.dial(s.addr, testHost)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	r := bufio.NewReader(c)
	resp, body := s.request(c, r, "RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\n"+upgradeHeaders+extra)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		s.t.Fatalf("%s %s", resp.Status, body)
	}
	return &rdpClient{Conn: c, t: s.t, r: r, tsgu: true, header: resp.Header}
}

// open goes through the whole handshake and returns the last packet's status, 0 when the channel is open.
func (c *rdpClient) open(ticket, target string) (last tsgu.Type, status uint32) {
	c.t.Helper()
	c.packet(&tsgu.HandshakeRequest{Major: 1, ExtAuth: tsgu.ExtAuthPAA})
	hs, err := tsgu.ParseHandshakeResponse(c.want(tsgu.TypeHandshakeResponse))
	if err != nil || hs.Error != 0 {
		return tsgu.TypeHandshakeResponse, hs.Error
	}
	create := &tsgu.TunnelCreate{Caps: tsgu.CapIdleTimeout | tsgu.CapServiceMessage}
	create.SetCookie(ticket)
	c.packet(create)
	tr, err := tsgu.ParseTunnelResponse(c.want(tsgu.TypeTunnelResponse))
	if err != nil || tr.Status != 0 {
		return tsgu.TypeTunnelResponse, tr.Status
	}
	c.packet(&tsgu.TunnelAuth{ClientName: tsgu.NewText("box")})
	ar, err := tsgu.ParseTunnelAuthResponse(c.want(tsgu.TypeTunnelAuthResponse))
	if err != nil || ar.Error != 0 {
		return tsgu.TypeTunnelAuthResponse, ar.Error
	}
	c.packet(&tsgu.ChannelCreate{Port: 3389, Protocol: 3, Names: []tsgu.Text{tsgu.NewText(target)}})
	cr, err := tsgu.ParseChannelResponse(c.want(tsgu.TypeChannelResponse))
	if err != nil {
		c.t.Fatal(err)
	}
	return tsgu.TypeChannelResponse, cr.Error
}

// dialTunnel gets as far as before the first packet, in one of TSGU's forms.
func (s *stack) dialTunnel(mode string) *rdpClient {
	s.t.Helper()
	if mode == transportLegacy {
		return s.dialLegacy(newGUID())
	}
	return s.dialTSGU("")
}

// closedWith says that the WebSocket was closed with a text that begins so; the legacy form has no such text.
func (c *rdpClient) closedWith(prefix string) bool {
	return c.out != nil && c.closed == "" || c.out == nil && strings.HasPrefix(c.closed, prefix)
}

// openOut gets an OUT channel of the legacy form, its seed read, or the refusal.
func (s *stack) openOut(id string) (*tls.Conn, *bufio.Reader, http.Header, *refusal.Error) {
	s.t.Helper()
	c, err := s.dial(s.addr, testHost)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\r\nHost: gw\r\nRDG-Connection-Id: {%s}\r\nContent-Length: 0\r\n\r\n", id)
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		c.Close()
		return nil, nil, nil, decodeRefusal(s.t, body)
	}
	if resp.ContentLength != -1 || len(resp.TransferEncoding) > 0 {
		s.t.Fatalf("the OUT channel's answer has a length: %v", resp.Header)
	}
	if _, err := io.ReadFull(r, make([]byte, seedLen)); err != nil {
		s.t.Fatal(err)
	}
	return c, r, resp.Header, nil
}

// openIn gets an IN channel of the legacy form, or the refusal.
func (s *stack) openIn(id string) (*tls.Conn, *refusal.Error) {
	s.t.Helper()
	c, err := s.dial(s.addr, testHost)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	head := "RDG_IN_DATA /remoteDesktopGateway/ HTTP/1.1\nHost: gw\nRDG-Connection-Id: {" + id + "}\n"
	if resp, body := s.request(c, bufio.NewReader(c), head+"Content-Length: 0"); resp.StatusCode != http.StatusOK {
		c.Close()
		return nil, decodeRefusal(s.t, body)
	}
	fmt.Fprint(c, strings.ReplaceAll(head, "\n", "\r\n")+"Transfer-Encoding: chunked\r\n\r\n")
	return c, nil
}

// dialLegacy gets both channels.
func (s *stack) dialLegacy(id string) *rdpClient {
	s.t.Helper()
	out, r, header, e := s.openOut(id)
	if e != nil {
		s.t.Fatal(e)
	}
	in, e := s.openIn(id)
	if e != nil {
		s.t.Fatal(e)
	}
	return &rdpClient{Conn: in, out: out, t: s.t, r: r, tsgu: true, header: header}
}

var maskKey = [4]byte{1, 2, 3, 4}

func (c *rdpClient) packet(p packet) {
	c.t.Helper()
	if _, err := c.Conn.Write(c.message(p.Append(nil))); err != nil {
		c.t.Fatal(err)
	}
}

// want reads packets up to one type and returns its body.
func (c *rdpClient) want(typ tsgu.Type) []byte {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	defer c.SetReadDeadline(time.Time{})
	for {
		ev, err := c.event()
		if err != nil {
			c.t.Fatalf("waiting for packet %#x: %v (closed %q)", typ, err, c.closed)
		}
		if ev.Type == typ {
			return bytes.Clone(ev.Body)
		}
	}
}

// event is the next TSGU packet or part of DATA, or in raw mode payload dressed as DATA.
func (c *rdpClient) event() (tsgu.Event, error) {
	for {
		for len(c.msg) > 0 {
			if !c.tsgu {
				ev := tsgu.Event{Type: tsgu.TypeData, Body: c.msg}
				c.msg = nil
				return ev, nil
			}
			n, ev, err := c.ts.Decode(c.msg)
			c.msg = c.msg[n:]
			if err != nil {
				return ev, err
			}
			switch ev.Type {
			case tsgu.None:
				continue
			case tsgu.TypeKeepAlive:
				c.keeps++
			case tsgu.TypeServiceMessage:
				m, _ := tsgu.ParseServiceMessage(ev.Body)
				c.notes = append(c.notes, m.Message.String())
			case tsgu.TypeCloseChannel:
				p, _ := tsgu.ParseCloseChannel(ev.Body, false)
				c.status = &p.Status
			}
			return ev, nil
		}
		if len(c.in) == 0 {
			buf := make([]byte, 32<<10)
			n, err := c.r.Read(buf)
			if n == 0 {
				return tsgu.Event{}, err
			}
			c.in = buf[:n]
		}
		if c.out != nil {
			c.msg, c.in = c.in, nil
			continue
		}
		n, ev, err := c.ws.Decode(c.in)
		c.in = c.in[n:]
		if err != nil {
			return tsgu.Event{}, err
		}
		switch ev.Op {
		case wsframe.Binary:
			c.msg = ev.Payload
		case wsframe.Close:
			code, reason := wsframe.ParseClose(ev.Payload)
			c.closed = fmt.Sprintf("%d %s", code, reason)
		case wsframe.Pong:
			c.notes = append(c.notes, "pong "+string(ev.Payload))
		}
	}
}

// Read gives RDP bytes.
func (c *rdpClient) Read(p []byte) (int, error) {
	for len(c.data) == 0 {
		ev, err := c.event()
		if err != nil {
			return 0, err
		}
		if ev.Type == tsgu.TypeData {
			c.data = ev.Body
		}
	}
	n := copy(p, c.data)
	c.data = c.data[n:]
	return n, nil
}

// frame is RDP bytes as this client sends them.
func (c *rdpClient) frame(p []byte) []byte {
	if c.tsgu {
		p = tsgu.AppendData(nil, p)
	}
	return c.message(p)
}

// message is a TSGU packet, or RDP bytes in raw mode, as this client sends it.
func (c *rdpClient) message(p []byte) []byte {
	if c.out != nil {
		return append(append(fmt.Appendf(nil, "%x\r\n", len(p)), p...), "\r\n"...)
	}
	return wsframe.AppendMaskedFrame(nil, wsframe.Binary, p, maskKey)
}

func (c *rdpClient) SetDeadline(t time.Time) error {
	if c.out != nil {
		c.out.SetDeadline(t)
	}
	return c.Conn.SetDeadline(t)
}

func (c *rdpClient) SetReadDeadline(t time.Time) error {
	if c.out != nil {
		return c.out.SetReadDeadline(t)
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *rdpClient) Close() error {
	if c.out != nil {
		defer c.out.Close()
	}
	return c.Conn.Close()
}

// Write sends RDP bytes as one packet in one frame.
func (c *rdpClient) Write(p []byte) (int, error) {
	if _, err := c.Conn.Write(c.frame(p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// expect reads exactly want.
func expect(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

// session gets a joined pair in one of the modes.
func (s *stack) session(mode string) (*rdpClient, *agentLeg) {
	s.t.Helper()
	var c *rdpClient
	if mode == transportRaw {
		var e *refusal.Error
		if c, _, e = s.dialRaw(testTicket, ""); e != nil {
			s.t.Fatal(e)
		}
	} else {
		c = s.dialTunnel(mode)
		if typ, status := c.open(testTicket, testTarget); status != 0 {
			s.t.Fatalf("packet %#x refused with %#x", typ, status)
		}
	}
	a := s.agent()
	deadline := time.Now().Add(2 * patience)
	c.SetDeadline(deadline)
	a.SetDeadline(deadline)
	return c, a
}

var modes = []string{transportRaw, transportTSGU, transportLegacy}

// sessionReports are the reports so far, by kind.
func (f *fakeAdmission) list() []*admission.RelayReport {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*admission.RelayReport(nil), f.reports...)
}

func (t *halves) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.open)
}
