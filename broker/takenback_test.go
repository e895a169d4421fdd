package broker_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"rendezvous.dev/rendezvous/agent"
	"rendezvous.dev/rendezvous/broker"
	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/gateway"
	"rendezvous.dev/rendezvous/relay"
	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// provider is an identity provider that signs whatever token is asked for.
type provider struct {
	*httptest.Server
	t   *testing.T
	key *ecdsa.PrivateKey
}

func newProvider(t *testing.T) *provider {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	p := &provider{t: t, key: key}
	p.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "openid-configuration") {
			json.NewEncoder(w).Encode(map[string]string{"issuer": p.URL, "jwks_uri": p.URL + "/keys"})
			return
		}
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Use: "sig"}}})
	}))
	t.Cleanup(p.Close)
	return p
}

func (p *provider) token(user string, issued time.Time, groups ...string) string {
	p.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: p.key, KeyID: "k"}}, nil)
	must(p.t, err)
	raw, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": p.URL, "aud": "rdv", "sub": user, "iat": issued.Unix(), "exp": time.Now().Add(time.Hour).Unix(), "email": user, "groups": groups,
	}).Serialize()
	must(p.t, err)
	return raw
}

// chain is broker, gateway, relay, agent and an RDP server that says everything again, all real but Kubernetes.
type chain struct {
	t     *testing.T
	ca    *testca.CA
	idp   *provider
	world *fake.World
	feed  string
	relay string
}

func newChain(t *testing.T) *chain {
	c := &chain{t: t, ca: testca.New(t, "ca"), idp: newProvider(t)}
	local := testca.IdentitySpec(identity.Broker(ns, ws))
	certPEM, keyPEM := c.ca.Issue(testca.Spec{IPs: local.IPs, DNSNames: []string{"localhost", "10-0-0-1.join.localhost"}})
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	must(t, err)
	serverTLS := &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	// The agent looks whether the RDP server is up, by its TLS; to the test's clients it says everything again.
	rdpAddr := listen(t, serverTLS, func(net.Conn) {}, func(s net.Conn) {
		defer s.Close()
		plain := &peeked{Conn: s.(*tls.Conn).NetConn()}
		plain.in = bufio.NewReader(plain.Conn)
		if first, err := plain.in.Peek(1); err == nil && first[0] == 22 {
			io.Copy(io.Discard, tls.Server(plain, serverTLS))
			return
		}
		io.Copy(plain.Conn, plain.in)
	})
	secret := make([]byte, 32)
	rand.Read(secret)
	registration := "rdvreg.ns.pool.-." + base64.RawURLEncoding.EncodeToString(secret)
	hash := sha256.Sum256([]byte(registration))

	listener, err := relay.Listen(t.Context(), "127.0.0.1:0")
	must(t, err)
	c.relay = listener.Addr().String()
	c.world = fake.New(&model.Snapshot{
		Workspace: &model.Workspace{
			Name: ws, OIDC: model.OIDC{IssuerURL: c.idp.URL, Audiences: []string{"rdv"}, UsernameClaim: "email", GroupsClaim: "groups"}, TicketLifetime: time.Hour,
			Resources: []model.Resource{{Name: "desk", Type: model.Desktop, Pool: "pool", Groups: []string{"engineers"}}},
		},
		Pools: map[string]*model.Pool{"pool": {
			Name: "pool", Generation: 1, MaxSessions: 9, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 5 * time.Second,
			Registration: model.Registration{TokenHash: hex.EncodeToString(hash[:]), Expires: time.Now().Add(time.Hour)},
		}},
		Gateways: []*model.Gateway{{Name: "gw", Hostname: "localhost", Port: int32(listener.Addr().(*net.TCPAddr).Port), Ready: true, CABundle: string(c.ca.PEM)}},
	})
	c.world.Signer = func(r model.CertificateRequest) ([]byte, error) { return c.ca.SignCSR(r.CSR), nil }

	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, data, 0o600))
		return path
	}
	write("oidc-ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.idp.Certificate().Raw}))
	busPort := freePort(t)
	busURLs := []string{fmt.Sprintf("tls://127.0.0.1:%d", busPort)}
	signerPEM, signerKey := c.ca.IssueEd25519(testca.IdentitySpec(identity.TicketSigner(ns, ws)))
	started := make(chan broker.Addresses, 1)
	run(t, func(ctx context.Context) error {
		return broker.Run(ctx, broker.Options{
			Config:    config.Broker{Namespace: ns, Workspace: ws, BusURLs: busURLs, InternalIssuer: config.Issuer{Name: "internal"}},
			ConfigDir: dir, TLSDir: c.ca.Dir(certPEM, keyPEM), BusDir: c.ca.Dir(c.ca.Issue(local)), SigningDir: c.ca.Dir(c.ca.Issue(testca.Spec{CommonName: "Publisher"})),
			TicketsDir: c.ca.Dir(signerPEM, signerKey),
			Name:       "broker-0", Host: "127.0.0.1", FeedPort: -1, BusPort: busPort, BusWebSocketPort: -1, BusRoutePort: -1, SessionsPort: -1, MetricsAddr: "127.0.0.1:0",
			Inventory: c.world, Log: slog.New(slog.DiscardHandler), Started: func(a broker.Addresses) { started <- a },
		})
	})
	c.feed = "https://" + (<-started).Feed.String()

	gwCert, gwKey := c.ca.Issue(testca.IdentitySpec(identity.Gateway(ns, ws, "gw")))
	testca.WriteDir(t, filepath.Dir(write(ws+"/"+config.TicketCert, signerPEM)), gwCert, gwKey, c.ca.PEM)
	gw, err := gateway.New(gateway.Options{
		Instance: "10-0-0-1", WorkspacesDir: dir,
		Config: config.Gateway{Namespace: ns, Gateway: "gw", Hostname: "localhost", MaxSessions: 9, Workspaces: []config.GatewayWorkspace{{Name: ws, BusURLs: busURLs}}},
	})
	must(t, err)
	socket := filepath.Join(c.short(), "a.sock")
	admissions, err := gateway.Listen(socket)
	must(t, err)
	run(t, func(ctx context.Context) error { return gw.Run(ctx, admissions) })
	cc, err := admission.Dial(socket)
	must(t, err)
	t.Cleanup(func() { cc.Close() })
	r, err := relay.New(relay.Options{
		Instance: "10-0-0-1", TLS: serverTLS, Admission: admission.NewAdmissionClient(cc), CloseGrace: 200 * time.Millisecond,
		Config: config.Relay{Gateway: "gw", Hostname: "localhost", DrainDeadlineSeconds: 1},
	})
	must(t, err)
	run(t, func(ctx context.Context) error { return r.Run(ctx, listener) })

	a, err := agent.New(agent.Options{
		Broker: c.feed, CAFile: write("ca", c.ca.PEM), TokenFile: write("token", []byte(registration)), Host: "h1", StateDir: filepath.Join(c.short(), "s"),
		RDPAddr: rdpAddr, UnixTable: write("table", nil), Version: "test", Log: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	run(t, a.Run)
	eventually(t, "the host is ready", func() bool {
		h := c.world.Snapshot().Hosts["h1"]
		return h != nil && h.Agent != nil && h.Agent.Connected && h.Agent.RDPReady
	})
	eventually(t, "the gateway is ready", func() bool { return gw.Ready() == nil })
	return c
}

// peeked is a connection of which the first byte was looked at.
type peeked struct {
	net.Conn
	in *bufio.Reader
}

func (p *peeked) Read(b []byte) (int, error) { return p.in.Read(b) }

// short is a folder whose path is short enough for a socket's.
func (c *chain) short() string {
	dir, err := os.MkdirTemp("", "rdv")
	must(c.t, err)
	c.t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (c *chain) tls() *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(c.ca.Cert)
	return &tls.Config{RootCAs: roots, ServerName: "localhost"}
}

func (c *chain) get(path, token string) (status int, body []byte) {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), "GET", c.feed+path, nil)
	must(c.t, err)
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: c.tls(), DisableKeepAlives: true}}).Do(req)
	must(c.t, err)
	defer res.Body.Close()
	body, err = io.ReadAll(res.Body)
	must(c.t, err)
	return res.StatusCode, body
}

// download gives the ticket in a connection file.
func (c *chain) download(token, activity string) string {
	c.t.Helper()
	status, file := c.get(brokerapi.PathResources+"/desk.rdp?gateway=gw&activity="+activity, token)
	found := regexp.MustCompile(`gatewayaccesstoken:s:([^\r]+)`).FindSubmatch(bytes.ReplaceAll(file, []byte{0}, nil))
	if status != 200 || found == nil {
		c.t.Fatalf("%d %s", status, file)
	}
	return string(found[1])
}

// open connects through the relay and hears the RDP server's first answer.
func (c *chain) open(raw string) (*wiretest.Client, error) {
	conn, err := tls.Dial("tcp", c.relay, c.tls())
	must(c.t, err)
	c.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	client, err := wiretest.OpenRaw(conn, "localhost", raw)
	if err != nil {
		return nil, err
	}
	must(c.t, write(client, []byte{3, 0, 0, 19, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 1, 0, 0, 0}))
	_, err = io.ReadFull(client, make([]byte, 19))
	return client, err
}

func write(w io.Writer, b []byte) error { _, err := w.Write(b); return err }

// TestTakenBackAllTheWay is of everything real but Kubernetes: a session that rests on what was taken back ends at the
// client within seconds, the next person's goes on, the ticket is good no more, and who may sign in again gets back.
func TestTakenBackAllTheWay(t *testing.T) {
	c := newChain(t)
	var revocations []model.Revocation
	revoke := func(r ...model.Revocation) {
		revocations = r
		c.world.Edit(func(s *model.Snapshot) {
			w := *s.Workspace
			w.Revocations = revocations
			s.Workspace = &w
		})
	}
	zoe, err := c.open(c.download(c.idp.token("zoe", time.Now(), "engineers"), "00000000-0000-4000-8000-00000000000f"))
	must(t, err)
	for i, step := range []struct {
		name string
		act  func(id string, issued time.Time)
		says string // to the client whose session ends, and when it comes back
		feed int    // the status of the feed, by the sign-in of before
	}{
		{"a ticket", func(id string, _ time.Time) { revoke(model.Revocation{Ticket: id}) }, "has taken this connection file back", 200},
		{"a user", func(string, time.Time) { revoke(model.Revocation{User: "alice", Reason: "left the company"}) }, "alice is disabled in workspace ws (left the company)", 403},
		{"a user as of a time", func(_ string, issued time.Time) {
			revoke(model.Revocation{User: "alice", Before: issued.Add(time.Second)})
		}, "sign in again", 401},
		{"a group, by a later sign-in", func(_ string, issued time.Time) {
			c.get(brokerapi.PathResources, c.idp.token("alice", issued.Add(time.Second), "friends"))
		}, "has left the group", 200},
	} {
		revoke()
		activity := fmt.Sprintf("00000000-0000-4000-8000-%012d", i)
		issued := time.Now().Add(time.Duration(i-10) * time.Minute)
		token := c.idp.token("alice", issued, "engineers")
		raw := c.download(token, activity)
		parsed, err := ticket.Parse(raw)
		must(t, err)
		claims := claimsOf(t, raw)
		if parsed.Workspace != ws || len(claims.ID) != 26 {
			t.Fatalf("%s: ticket %+v", step.name, claims)
		}
		alice, err := c.open(raw)
		must(t, err)

		begin := time.Now()
		step.act(claims.ID, issued)
		_, err = io.Copy(io.Discard, alice)
		if took := time.Since(begin); took > 5*time.Second || err == nil || !strings.Contains(err.Error(), "the gateway closed the session") {
			t.Errorf("%s: the client sees %v after %v", step.name, err, took)
		}
		if _, err := c.open(raw); err == nil || !strings.Contains(err.Error(), "refused: HTTP/1.1 403") {
			t.Errorf("%s: back with the same ticket: %v", step.name, err)
		}
		must(t, write(zoe, []byte("zoe")))
		if _, err := io.ReadFull(zoe, make([]byte, 3)); err != nil {
			t.Errorf("%s: somebody else's session: %v", step.name, err)
		}
		status, body := c.get(brokerapi.PathResources, token)
		if status != step.feed {
			t.Errorf("%s: the feed answers %d %s", step.name, status, body)
		}
		if step.feed == 403 { // until somebody thinks better of it
			revoke()
		}
		again := c.idp.token("alice", issued.Add(2*time.Second), "engineers")
		var events []trace.Event
		eventually(t, step.name+": the timeline tells of the end", func() bool {
			_, body := c.get(brokerapi.PathActivities+activity, again)
			json.Unmarshal(body, &events)
			return slices.ContainsFunc(events, func(e trace.Event) bool {
				return strings.HasPrefix(e.Detail, "ended: ") && strings.Contains(e.Detail, step.says) && strings.Contains(e.Detail, claims.ID)
			})
		})
		if _, err := c.open(c.download(again, fmt.Sprintf("00000000-0000-4000-9000-%012d", i))); err != nil {
			t.Errorf("%s: signed in again: %v", step.name, err)
		}
	}
}

// claimsOf reads a ticket as whoever holds it can.
func claimsOf(t *testing.T, raw string) (claims struct {
	ID string `json:"jti"`
}) {
	t.Helper()
	data, err := base64.RawURLEncoding.DecodeString(strings.Split(raw, ".")[1])
	must(t, err)
	must(t, json.Unmarshal(data, &claims))
	return claims
}
