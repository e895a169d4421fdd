package broker

import (
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
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	ns, ws   = "ns", "ws"
	patience = 20 * time.Second
	activity = "00000000-0000-4000-8000-000000000001"
)

// provider is an identity provider; it returns its URL, its CA and a token for alice.
func provider(t *testing.T) (issuer string, ca []byte, token string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var s *httptest.Server
	s = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "openid-configuration") {
			json.NewEncoder(w).Encode(map[string]string{"issuer": s.URL, "jwks_uri": s.URL + "/keys"})
			return
		}
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Use: "sig"}}})
	}))
	t.Cleanup(s.Close)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err = jwt.Signed(signer).Claims(map[string]any{
		"iss": s.URL, "aud": "rdv", "sub": "1", "exp": time.Now().Add(time.Hour).Unix(), "email": "alice", "groups": []string{"engineers"},
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return s.URL, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), token
}

func call(t *testing.T, ca *testca.CA, method, url, token string, body, answer any) *http.Response {
	t.Helper()
	data, _ := json.Marshal(body)
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if raw, ok := answer.(*[]byte); ok {
		*raw = text
	} else if answer != nil {
		if err := json.Unmarshal(text, answer); err != nil {
			t.Fatalf("%s %s: %s", method, url, text)
		}
	}
	return res
}

// TestAllTheWay enrols a host, signs a user in, downloads a file, and connects with the ticket in it: steps 0 to 9 with
// everything real but Kubernetes, the agent and the gateway.
func TestAllTheWay(t *testing.T) {
	ca := testca.New(t, "ca")
	dir := func(s testca.Spec) string { return ca.Dir(ca.Issue(s)) }
	public := testca.IdentitySpec(identity.Broker(ns, ws))
	public.URIs = nil
	issuer, oidcCA, token := provider(t)
	configDir := t.TempDir()
	if err := os.WriteFile(filepath.Join(configDir, oidcCAFile), oidcCA, 0o600); err != nil {
		t.Fatal(err)
	}
	secret := make([]byte, 32)
	rand.Read(secret)
	registration := "rdvreg.ns.pool.-." + base64.RawURLEncoding.EncodeToString(secret)
	hash := sha256.Sum256([]byte(registration))

	world := fake.New(&model.Snapshot{
		Workspace: &model.Workspace{
			Name: ws, OIDC: model.OIDC{IssuerURL: issuer, Audiences: []string{"rdv"}, UsernameClaim: "email", GroupsClaim: "groups"}, TicketLifetime: time.Hour,
			Resources: []model.Resource{{Name: "desk", Type: model.Desktop, Pool: "pool", Groups: []string{"engineers"}}},
		},
		Pools: map[string]*model.Pool{"pool": {
			Name: "pool", Generation: 1, MaxSessions: 1, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 5 * time.Second,
			Registration: model.Registration{TokenHash: hex.EncodeToString(hash[:]), Expires: time.Now().Add(time.Hour)},
		}},
		Gateways: []*model.Gateway{{Name: "gw", Hostname: "gw.test", Port: 443, Ready: true}},
	})
	world.Signer = func(r model.CertificateRequest) ([]byte, error) { return ca.SignCSR(r.CSR), nil }

	ctx, stop := context.WithCancel(t.Context())
	started, done := make(chan Addresses, 1), make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{
			Config: config.Broker{Namespace: ns, Workspace: ws, BusURLs: []string{"tls://bus"}, InternalIssuer: config.Issuer{Name: "internal"}}, ConfigDir: configDir,
			TLSDir: dir(public), BusDir: dir(testca.IdentitySpec(identity.Broker(ns, ws))), SigningDir: dir(testca.Spec{CommonName: "Publisher"}),
			TicketsDir: ca.Dir(ca.IssueEd25519(testca.IdentitySpec(identity.TicketSigner(ns, ws)))),
			Name:       "broker-0", Host: "127.0.0.1", FeedPort: -1, BusPort: -1, BusWebSocketPort: -1, BusRoutePort: -1, SessionsPort: -1, MetricsAddr: "127.0.0.1:0",
			Inventory: world, Log: slog.New(slog.DiscardHandler), Started: func(a Addresses) { started <- a },
		})
	}()
	var a Addresses
	select {
	case a = <-started:
	case err := <-done:
		t.Fatal(err)
	}
	feed, monitor := "https://"+a.Feed.String(), "http://"+a.Metrics.String()
	if res := call(t, ca, "GET", monitor+"/readyz", "", nil, nil); res.StatusCode != http.StatusOK {
		t.Fatalf("readyz: %s", res.Status)
	}

	eventually := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("never happened: %s", what)
			}
		}
	}

	// The listener for the operator takes its identity, of this workspace, and no other.
	for id, want := range map[identity.ID]bool{
		identity.Operator(ns, ws): true, identity.Operator(ns, "other"): false, identity.Agent(ns, ws, "pool", "h1"): false,
		identity.Gateway(ns, ws, "gw"): false, identity.Broker(ns, ws): false,
	} {
		r := ca.Reloader(id)
		conf := mtls.ClientConfig(*r.Certificate(), r.Roots(), "", mtls.AllowRole(ns, ws, identity.RoleBroker))
		hc := &http.Client{Transport: &http.Transport{TLSClientConfig: conf}}
		res, err := hc.Get("https://" + a.Sessions.String() + brokerapi.PathAllSessions)
		if err == nil {
			res.Body.Close()
		}
		if ok := err == nil && res.StatusCode == http.StatusOK; ok != want {
			t.Errorf("%s lists all sessions: %t (%v)", id, ok, err)
		}
		hc.CloseIdleConnections()
	}

	// 0: a machine enrols and comes on the bus with what it got.
	id := identity.Agent(ns, ws, "pool", "h1")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr := func() string {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URI()}}, key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	}
	var enrolled brokerapi.EnrollResponse
	call(t, ca, "POST", feed+brokerapi.PathEnroll, "", brokerapi.EnrollRequest{Token: registration, Host: "h1", ClientCSR: csr()}, &enrolled)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	if enrolled.BusCA != string(ca.PEM) || len(enrolled.BusURLs) != 1 {
		t.Fatalf("%+v", enrolled)
	}
	dial := func(r *mtls.Reloader, id identity.ID) *nats.Conn {
		nc, err := nats.Connect("tls://"+a.Bus.String(), nats.Secure(r.ClientConfig("127.0.0.1", mtls.AllowRole(ns, ws, identity.RoleBroker))),
			nats.CustomInboxPrefix(bus.InboxPrefix(id)), nats.NoReconnect(), nats.Timeout(patience))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	agent := dial(testca.NewReloader(t, ca.Dir([]byte(enrolled.ClientCertificate), keyPEM)), id)
	configured := make(chan bus.HostConfig, 10)
	if _, err := agent.Subscribe(bus.HostConfigSubject("pool", "h1"), func(m *nats.Msg) {
		var c bus.HostConfig
		json.Unmarshal(m.Data, &c)
		configured <- c
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.Subscribe(bus.HostConnectSubject("pool", "h1"), func(m *nats.Msg) { m.Respond([]byte(`{}`)) }); err != nil {
		t.Fatal(err)
	}
	report, _ := json.Marshal(bus.HostReport{Boot: "1", Sequence: 1, RDPReady: true})
	agent.Publish(bus.ReportSubject("pool", "h1"), report)
	select {
	case c := <-configured:
		if c.MaxSessions != 1 {
			t.Errorf("%+v", c)
		}
	case <-time.After(patience):
		t.Fatal("the agent was not configured")
	}
	world.EditHost("h1", func(h *model.Host) { h.Enrolment.At = h.Enrolment.At.Add(-time.Minute) }) // for it must not be so soon after
	renewal, _ := json.Marshal(brokerapi.RenewRequest{ClientCSR: csr()})
	m, err := agent.Request(bus.RenewSubject("pool", "h1"), renewal, patience)
	var renewed brokerapi.RenewResponse
	if err != nil || json.Unmarshal(m.Data, &renewed) != nil || renewed.Err != nil || renewed.ClientCertificate == "" || renewed.BusCA == "" {
		t.Fatalf("renewal: %+v %v", renewed, err)
	}

	// 3 to 6: alice's token, list and file.
	var list brokerapi.Resources
	call(t, ca, "GET", feed+brokerapi.PathResources, token, nil, &list)
	if list.User != "alice" || len(list.Resources) != 1 || len(list.Gateways) != 1 {
		t.Fatalf("%+v", list)
	}
	var file []byte
	call(t, ca, "GET", feed+list.Resources[0].RDPFile+"?gateway=gw&activity="+activity, token, nil, &file)
	ticket := regexp.MustCompile(`gatewayaccesstoken:s:([^\r]+)`).FindSubmatch(bytes.ReplaceAll(file, []byte{0}, nil))
	if ticket == nil {
		t.Fatalf("no ticket in %q", file)
	}

	// 8 and 9: a gateway asks with the ticket.
	gw := dial(ca.Reloader(identity.Gateway(ns, ws, "gw")), identity.Gateway(ns, ws, "gw"))
	ask := func() bus.ConnectReply {
		data, _ := json.Marshal(bus.ConnectRequest{ActivityID: activity, SessionID: rand.Text(), Ticket: string(ticket[1]), Gateway: "gw", Deadline: time.Now().Add(patience)})
		m, err := gw.Request(bus.SubjectConnect, data, patience)
		var reply bus.ConnectReply
		if err != nil || json.Unmarshal(m.Data, &reply) != nil {
			t.Fatal(err)
		}
		return reply
	}
	if reply := ask(); reply.Err != nil || reply.Host != "h1" {
		t.Fatalf("%+v", reply)
	}
	// A gateway with a good certificate that the workspace does not pick isn't told of the others.
	unpicked := dial(ca.Reloader(identity.Gateway(ns, ws, "old")), identity.Gateway(ns, ws, "old"))
	unpicked.Publish(bus.SubjectGateways, []byte("{}"))
	eventually("it is refused", func() bool { return errors.Is(unpicked.LastError(), nats.ErrPermissionViolation) })
	unpicked.Close()
	var events []trace.Event
	eventually("the activity is whole", func() bool {
		call(t, ca, "GET", feed+brokerapi.PathActivities+activity, token, nil, &events)
		return len(events) >= 4
	})
	steps := map[int]bool{}
	for _, e := range events {
		steps[e.Step] = true
	}
	if !steps[trace.StepValidate] || !steps[trace.StepFeed] || !steps[trace.StepOrchestrate] {
		t.Errorf("steps %v", events)
	}
	var metrics []byte
	call(t, ca, "GET", monitor+"/metrics", "", nil, &metrics)
	for _, want := range []string{
		`rendezvous_broker_connects_total{result="accepted"} 1`, `rendezvous_broker_hosts 1`, `rendezvous_broker_hosts_local 1`, `rendezvous_broker_bus_clients 2`,
		`rendezvous_broker_enrolments_total{kind="pool",result="ok"} 1`, `rendezvous_broker_enrolments_total{kind="renewal",result="ok"} 1`,
	} {
		if !strings.Contains(string(metrics), want) {
			t.Errorf("no %s in the metrics", want)
		}
	}

	// The grant is withdrawn: the same ticket no longer connects.
	world.Edit(func(s *model.Snapshot) {
		w := *s.Workspace
		w.Resources = []model.Resource{{Name: "desk", Pool: "pool"}}
		s.Workspace = &w
	})
	if reply := ask(); reply.Err == nil || reply.Err.Code != refusal.NotGranted {
		t.Fatalf("%+v", reply)
	}

	// The host is one key: a good certificate of its name over another is not let in, and its own is not once the enrolment
	// is revoked, the host is deleted, or made again.
	mine := ca.Dir([]byte(enrolled.ClientCertificate), keyPEM)
	refused := func(what string, r *mtls.Reloader) {
		t.Helper()
		nc, err := nats.Connect("tls://"+a.Bus.String(), nats.Secure(r.ClientConfig("127.0.0.1", mtls.AllowRole(ns, ws, identity.RoleBroker))),
			nats.CustomInboxPrefix(bus.InboxPrefix(id)), nats.NoReconnect(), nats.Timeout(patience))
		if err == nil {
			nc.Close()
			t.Errorf("%s: let in", what)
		} else if !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("another key", ca.Reloader(id))
	if err := agent.Flush(); err != nil {
		t.Fatalf("the host itself: %v", err)
	}
	world.EditHost("h1", func(h *model.Host) { h.Revoke = "stolen" })
	eventually("the revoked host's agent is dropped", agent.IsClosed)
	refused("revoked", testca.NewReloader(t, mine))
	eventually("the revocation is recorded", func() bool {
		e := world.Snapshot().Hosts["h1"].Enrolment
		return e.Key == "" && e.RevokedFor == "stolen"
	})
	world.EditHost("h1", func(h *model.Host) { h.Revoke = "" })
	refused("the annotation was taken back", testca.NewReloader(t, mine))
	world.Edit(func(s *model.Snapshot) { delete(s.Hosts, "h1") })
	refused("deleted", testca.NewReloader(t, mine))
	world.EditHost("h1", func(h *model.Host) { h.Pool = "pool" })
	refused("made again", testca.NewReloader(t, mine))

	// A stop sends clients away and ends without an error.
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(shutdownTimeout + patience):
		t.Fatal("the broker does not stop")
	}
	eventually("the gateway is sent away", gw.IsClosed)
}
