package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/stage"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
)

const gatewayURL = "https://gateway-a.rdv.test"

// refused does the request and asserts that it is turned down for this reason, with a message and an activity id.
func refused(t *testing.T, method, url, bearer string, body string, want refusal.Code, says ...string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	assertRefused(t, req, want, says...)
}

func assertRefused(t *testing.T, req *http.Request, want refusal.Code, says ...string) {
	t.Helper()
	resp, err := w.HTTP().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	var answer brokerapi.ErrorBody
	if err := json.Unmarshal(data, &answer); err != nil || answer.Error == nil {
		t.Fatalf("%s %s: %s, want a refusal for %s, got %.300s", req.Method, req.URL, resp.Status, want, data)
	}
	e := answer.Error
	if e.Code != want || resp.StatusCode < 400 {
		t.Errorf("%s %s: %s: %v; want %s", req.Method, req.URL, resp.Status, e, want)
	}
	if id := resp.Header.Get(brokerapi.HeaderActivity); len(id) != 36 || e.ActivityID != id {
		t.Errorf("%s: activity id %q in the header, %q in the body", want, id, e.ActivityID)
	}
	if len(e.Message) < 20 {
		t.Errorf("%s: the message %q helps nobody", want, e.Message)
	}
	for _, s := range says {
		if !strings.Contains(e.Message, s) {
			t.Errorf("%s: the message %q does not name %q", want, e.Message, s)
		}
	}
	t.Logf("%s: %s", want, e.Message)
}

func token(t *testing.T, user, clientID string) string {
	t.Helper()
	tok, err := w.Token(t.Context(), user, clientID)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestTokensRefused(t *testing.T) {
	feed := stage.WorkspaceURL + brokerapi.PathResources
	good := token(t, "alice", "rdv")
	refused(t, "GET", feed, "", "", refusal.TokenMissing)
	refused(t, "GET", feed, token(t, "alice", "other"), "", refusal.TokenWrongAudience)
	parts := strings.Split(good, ".")
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"` + stage.Issuer + `","aud":"rdv","email":"alice@example.test","exp":99999999999}`))
	refused(t, "GET", feed, strings.Join(parts, "."), "", refusal.TokenInvalid)
	refused(t, "GET", feed+"/no-such-thing.rdp", good, "", refusal.UnknownResource, "no-such-thing")
	refused(t, "GET", feed+"/linux-desktop.rdp", token(t, "carol", "rdv"), "", refusal.NotGranted, "linux-desktop")

	var listed brokerapi.Resources
	get(t, feed, token(t, "carol", "rdv"), &listed)
	if len(listed.Resources) != 0 {
		t.Errorf("carol, to whom nothing is granted, is shown %v", listed.Resources)
	}
	get(t, feed, good, &listed)
	if len(listed.Resources) != 2 {
		t.Errorf("alice is shown %v, want both sample resources", listed.Resources)
	}
}

// get asks the feed for a JSON document.
func get(t *testing.T, url, bearer string, into any) {
	t.Helper()
	if err := json.Unmarshal(download(t, url, bearer), into); err != nil {
		t.Fatalf("%s: %v", url, err)
	}
}

func download(t *testing.T, url, bearer string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+bearer)
	resp, err := w.HTTP().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s %v: %.300s", url, resp.Status, err, data)
	}
	return data
}

func TestExpiredTokenRefused(t *testing.T) {
	claims := strings.Split(w.early, ".")[1]
	data, err := base64.RawURLEncoding.DecodeString(claims)
	if err != nil {
		t.Fatal(err)
	}
	var c struct{ Exp int64 }
	if err := json.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	wait := time.Until(time.Unix(c.Exp, 0)) + 2*time.Second
	if wait > 4*time.Minute {
		t.Fatalf("the sample Dex's tokens live for %s more; they are to expire within a test", wait)
	}
	time.Sleep(max(0, wait))
	refused(t, "GET", stage.WorkspaceURL+brokerapi.PathResources, w.early, "", refusal.TokenExpired)
	// rdv itself refreshes, and goes on.
	if _, err := w.alice.Rdv(t.Context(), "list"); err != nil {
		t.Errorf("after the token's expiry: %v", err)
	}
}

// ticketOf downloads alice's connection file and returns the ticket in it.
func ticketOf(t *testing.T, resource string) string {
	t.Helper()
	file := decodeRDP(download(t, stage.WorkspaceURL+brokerapi.PathResources+"/"+resource+".rdp", token(t, "alice", "rdv")))
	for line := range strings.Lines(file) {
		if tick, ok := strings.CutPrefix(strings.TrimSpace(line), "gatewayaccesstoken:s:"); ok {
			return tick
		}
	}
	t.Fatalf("the file of %s holds no ticket:\n%s", resource, file)
	return ""
}

func decodeRDP(data []byte) string {
	if len(data) < 2 || data[0] != 0xff || data[1] != 0xfe {
		return string(data)
	}
	var b strings.Builder
	for i := 2; i+1 < len(data); i += 2 {
		b.WriteRune(rune(data[i]) | rune(data[i+1])<<8)
	}
	return b.String()
}

// connectRefused asks the gateway for a raw connect with a ticket.
func connectRefused(t *testing.T, tick string, want refusal.Code, says ...string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, gatewayURL+"/rendezvous/v1/connect", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "websocket")
	req.Header.Set("Sec-WebSocket-Version", "13")
	req.Header.Set("Sec-WebSocket-Key", base64.StdEncoding.EncodeToString([]byte("0123456789abcdef")))
	if tick != "" {
		req.Header.Set("Authorization", "Bearer "+tick)
	}
	assertRefused(t, req, want, says...)
}

func TestTicketsRefused(t *testing.T) {
	good := ticketOf(t, "linux-desktop")
	key := signingKey(t)
	claims, err := ticket.Verify(good, key.Public().(ed25519.PublicKey), stage.Namespace, "demo", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sign := func(change func(*ticket.Claims), with ed25519.PrivateKey) string {
		c := claims
		change(&c)
		s, err := ticket.Sign(c, with)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	_, stranger, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	connectRefused(t, "", refusal.TicketMissing)
	connectRefused(t, "nonsense", refusal.TicketInvalid)
	connectRefused(t, sign(func(*ticket.Claims) {}, stranger), refusal.TicketInvalid)
	i := strings.LastIndexByte(good, '.')
	altered := []byte(good)
	altered[i-3] ^= 1
	connectRefused(t, string(altered), refusal.TicketInvalid)
	connectRefused(t, sign(func(c *ticket.Claims) { c.Expires = time.Now().Add(-time.Minute) }, key), refusal.TicketExpired)
	// The broker authorises against the Workspace as it is now: a rightly signed ticket for what is not granted fails.
	connectRefused(t, sign(func(c *ticket.Claims) { c.User, c.Groups = "carol@example.test", nil }, key), refusal.NotGranted, "carol@example.test")
	connectRefused(t, sign(func(c *ticket.Claims) { c.Resource = "gone" }, key), refusal.UnknownResource, "gone")
}

// signingKey reads the workspace's ticket key, as only a cluster administrator may.
func signingKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	var s corev1.Secret
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "demo-tickets"}, &s); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(s.Data["tls.key"])
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(ed25519.PrivateKey)
}

// Through a real client, a refusal reaches the user too: FreeRDP ends, and the activity says why.
func TestClientIsToldWhy(t *testing.T) {
	// Whoever left a desktop on a draining host gets back to it, so nobody may have one.
	if err := w.paintPods(t.Context(), w.podColor); err != nil {
		t.Fatal(err)
	}
	_, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "patch", "sessionhost", "linux-0", "--type=merge", "-p", `{"spec":{"drain":{"mode":"NoNewSessions","reason":"kernel update"}}}`)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if _, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "sessionhost", "linux-0", "--type=json", "-p", `[{"op":"remove","path":"/spec/drain"}]`); err != nil {
			t.Error(err)
		}
		if err := eventually(ctx, 30*time.Second, func() error { return w.hostReady(ctx, "linux-0") }); err != nil {
			t.Error(err)
		}
	})
	if err := eventually(t.Context(), 30*time.Second, func() error {
		var sh rdv.SessionHost
		if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "linux-0"}, &sh); err != nil {
			return err
		}
		if sh.Status.Agent == nil || !sh.Status.Agent.DrainAcknowledged {
			return fmt.Errorf("the drain is not acknowledged: %+v", sh.Status.Agent)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	d, err := w.alice.Connect(t.Context(), "linux-desktop", "tsgu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	if code, err := d.ExitCode(ctx); err != nil || code == 0 {
		t.Errorf("the client ended with %d, %v, although no host takes sessions", code, err)
	}
	explain, err := w.alice.Rdv(t.Context(), "explain", d.ActivityID)
	if err != nil || !strings.Contains(explain, "kernel update") || !strings.Contains(explain, string(refusal.NoHost)) {
		t.Errorf("the timeline does not say why (%v):\n%s", err, explain)
	}
	connectRefused(t, ticketOf(t, "linux-desktop"), refusal.NoHost, "kernel update")

	// In the ARM form FreeRDP shows the reason itself, and ends with code 0.
	if d, err = w.alice.Connect(t.Context(), "linux-desktop", "arm"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	if code, err := d.ExitCode(ctx); err != nil || !strings.Contains(d.Output(), "kernel update") || !strings.Contains(d.Output(), "activity "+d.ActivityID+")") {
		t.Errorf("the client ended with %d, %v, and says:\n%s", code, err, tail(d.Output(), 20))
	}
}

// A host that is on its way is waited for: FreeRDP's ARM form asks again by itself, and shows what for.
func TestClientWaitsForAHost(t *testing.T) {
	var host rdv.SessionHost
	key := client.ObjectKey{Namespace: stage.Namespace, Name: "linux-0"}
	if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "delete", "pod", "linux-0", "--grace-period=5"); err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), time.Minute, func() error {
		if err := w.Client.Get(t.Context(), key, &host); err != nil {
			return err
		}
		if host.Status.Agent == nil || host.Status.Agent.Connected {
			return errors.New("linux-0 is still connected")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	d := showDesktop(t, "linux-desktop", "arm", w.podColor)
	if !strings.Contains(d.Output(), "A host of pool linux is starting") {
		t.Errorf("the client did not say what it waits for; the pod was back before it asked?\n%s", tail(d.Output(), 30))
	}
}

// probeHost is a session host that the test plays itself, to misbehave.
type probeHost struct {
	name string
	cert tls.Certificate
	enr  brokerapi.EnrollResponse
}

// rdpPools are the sample pools that issue RDP certificates.
var rdpPools = []string{"machines", "linux"}

// enrollRequest makes the request for a host of the pool.
func enrollRequest(t *testing.T, tok, pool, host string) (brokerapi.EnrollRequest, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr := func(tmpl x509.CertificateRequest) string {
		der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	}
	in := brokerapi.EnrollRequest{Token: tok, Host: host,
		ClientCSR: csr(x509.CertificateRequest{URIs: []*url.URL{identity.Agent(stage.Namespace, "demo", pool, host).URI()}})}
	if slices.Contains(rdpPools, pool) {
		in.RDPCSR = csr(x509.CertificateRequest{DNSNames: brokerapi.RDPNames(stage.Namespace, pool, host)})
	}
	return in, key
}

func enrollProbe(t *testing.T, tok, pool, host string) probeHost {
	t.Helper()
	in, key := enrollRequest(t, tok, pool, host)
	body, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := w.HTTP().Post(stage.WorkspaceURL+brokerapi.PathEnroll, "application/json", strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	p := probeHost{name: host}
	if err := json.Unmarshal(data, &p.enr); err != nil || resp.StatusCode/100 != 2 {
		t.Fatalf("enrolling %s: %s: %s", host, resp.Status, data)
	}
	t.Cleanup(func() {
		if err := removeHost(context.WithoutCancel(t.Context()), w.Client, host); err != nil {
			t.Error(err)
		}
	})
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p.cert, err = tls.X509KeyPair([]byte(p.enr.ClientCertificate), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// busURL is the control channel's address as this machine reaches it.
const busURL = "tls://demo-bus.rdv.test:4222"

// dialBus opens a control channel with a certificate.
func dialBus(t *testing.T, cert *tls.Certificate, prefix string, violations chan<- error) (*nats.Conn, error) {
	t.Helper()
	var ca corev1.Secret
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "demo-broker-identity"}, &ca); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca.Data["ca.crt"])
	cfg := &tls.Config{RootCAs: roots, ServerName: "demo-bus." + stage.Namespace + ".svc"}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	opts := []nats.Option{nats.Secure(cfg), nats.SetCustomDialer(busDialer{}), nats.NoReconnect(), nats.Timeout(10 * time.Second),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if violations != nil {
				violations <- err
			}
		})}
	if prefix != "" {
		opts = append(opts, nats.CustomInboxPrefix(prefix))
	}
	nc, err := nats.Connect(busURL, opts...)
	if err == nil {
		t.Cleanup(nc.Close)
	}
	return nc, err
}

func secretCert(t *testing.T, name string) *tls.Certificate {
	t.Helper()
	var s corev1.Secret
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: name}, &s); err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(s.Data["tls.crt"], s.Data["tls.key"])
	if err != nil {
		t.Fatal(err)
	}
	return &cert
}

func poolToken(t *testing.T, pool string) string {
	t.Helper()
	var s corev1.Secret
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: pool + "-registration"}, &s); err != nil {
		t.Fatal(err)
	}
	return string(s.Data["token"])
}

func TestRolesAreKeptApart(t *testing.T) {
	agent := enrollProbe(t, poolToken(t, "machines"), "machines", "e2e-roles")
	id := identity.Agent(stage.Namespace, "demo", "machines", "e2e-roles")

	violations := make(chan error, 8)
	nc, err := dialBus(t, &agent.cert, bus.InboxPrefix(id), violations)
	if err != nil {
		t.Fatalf("an agent's own certificate is refused: %v", err)
	}
	violates := func(what string, try func() error) {
		t.Helper()
		err := try()
		nc.Flush()
		select {
		case err = <-violations:
		case <-time.After(3 * time.Second):
		}
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), "permissions violation") {
			t.Errorf("an agent may %s: %v", what, err)
		}
	}
	violates("ask for sessions as a gateway", func() error { return nc.Publish(bus.SubjectConnect, []byte("{}")) })
	violates("report for another host", func() error { return nc.Publish(bus.ReportSubject("machines", outside), []byte("{}")) })
	violates("listen for another host's sessions", func() error {
		_, err := nc.SubscribeSync(bus.HostConnectSubject("machines", outside))
		return err
	})
	violates("read another host's replies", func() error { _, err := nc.SubscribeSync("_INBOX.>"); return err })
	violates("listen to everything", func() error { _, err := nc.SubscribeSync(">"); return err })

	for name, cert := range map[string]*tls.Certificate{
		"no certificate":                       nil,
		"the ticket signer's certificate":      secretCert(t, "demo-tickets"),
		"the gateway's public certificate":     secretCert(t, "gateway-a-tls"),
		"the workspace's signing certificate":  secretCert(t, "demo-signing"),
		"the broker's public feed certificate": secretCert(t, "demo-tls"),
	} {
		if _, err := dialBus(t, cert, "", nil); err == nil {
			t.Errorf("the bus takes %s", name)
		}
	}
}

func TestRegistrationRefused(t *testing.T) {
	enroll := stage.WorkspaceURL + brokerapi.PathEnroll
	body := func(tok, host string) string {
		in, _ := enrollRequest(t, tok, "machines", host)
		data, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	old := poolToken(t, "machines")
	parts := strings.Split(old, ".")
	parts[len(parts)-1] = strings.Repeat("A", len(parts[len(parts)-1]))
	refused(t, "POST", enroll, "", body(strings.Join(parts, "."), "e2e-reg"), refusal.RegistrationInvalid, "machines")

	// A host's own token enrols it once.
	host := &rdv.SessionHost{ObjectMeta: meta("e2e-once"), Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "machines"}}}
	if err := w.Client.Create(t.Context(), host); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Client.Delete(context.WithoutCancel(t.Context()), host) })
	var own string
	if err := eventually(t.Context(), 30*time.Second, func() error {
		var s corev1.Secret
		if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "e2e-once-registration"}, &s); err != nil {
			return err
		}
		own = string(s.Data["token"])
		var sh rdv.SessionHost
		if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(host), &sh); err != nil {
			return err
		}
		if sh.Status.Registration.TokenHash == "" {
			return errors.New("the host's token is not announced yet")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // the brokers' caches
	enrollProbe(t, own, "machines", "e2e-once")
	refused(t, "POST", enroll, "", body(own, "e2e-once"), refusal.RegistrationSpent, "e2e-once")

	// Rotation revokes the pool's token.
	if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "annotate", "hostpool", "machines", "--overwrite", rdv.AnnotationRotate+"="+fmt.Sprint(time.Now().UnixNano())); err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), 30*time.Second, func() error {
		if poolToken(t, "machines") == old {
			return errors.New("the token is not rotated")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	refused(t, "POST", enroll, "", body(old, "e2e-reg"), refusal.RegistrationInvalid, "machines")
}

// A host that promises nothing, and one that promises and doesn't come; then a join secret that is used twice.
func TestMisbehavingHosts(t *testing.T) {
	pool := &rdv.HostPool{ObjectMeta: meta("e2e-probe"), Spec: rdv.HostPoolSpec{WorkspaceRef: rdv.LocalReference{Name: "demo"}, Type: rdv.Pooled}}
	two := int32(2)
	pool.Spec.Health.ConnectTimeoutSeconds = &two
	if err := w.Client.Create(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context())
	patch := func(op string) {
		if _, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "workspace", "demo", "--type=json", "-p", op); err != nil {
			t.Error(err)
		}
	}
	patch(`[{"op":"add","path":"/spec/resources/-","value":{"name":"probe","type":"Desktop","hostPoolRef":{"name":"e2e-probe"},"access":{"users":["alice@example.test"]}}}]`)
	t.Cleanup(func() {
		patch(`[{"op":"remove","path":"/spec/resources/2"}]`)
		w.Client.Delete(ctx, pool)
	})
	var tick string
	if err := eventually(t.Context(), 30*time.Second, func() error {
		var l brokerapi.Resources
		get(t, stage.WorkspaceURL+brokerapi.PathResources, token(t, "alice", "rdv"), &l)
		if len(l.Resources) != 3 {
			return fmt.Errorf("alice is shown %v", l.Resources)
		}
		tick = ticketOf(t, "probe")
		var s corev1.Secret
		return w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "e2e-probe-registration"}, &s)
	}); err != nil {
		t.Fatal(err)
	}
	connectRefused(t, tick, refusal.NoHost, "e2e-probe")

	time.Sleep(time.Second)
	probe := enrollProbe(t, poolToken(t, "e2e-probe"), "e2e-probe", "e2e-probe-1")
	id := identity.Agent(stage.Namespace, "demo", "e2e-probe", "e2e-probe-1")
	nc, err := dialBus(t, &probe.cert, bus.InboxPrefix(id), nil)
	if err != nil {
		t.Fatal(err)
	}
	report := func(gen int64) {
		data, _ := json.Marshal(bus.HostReport{Pool: "e2e-probe", Host: "e2e-probe-1", Boot: "e2e", Sequence: uint64(time.Now().UnixNano()), ConfigGeneration: gen, AgentVersion: "e2e", OS: "linux", RDPReady: true})
		nc.Publish(bus.ReportSubject("e2e-probe", "e2e-probe-1"), data)
		nc.Flush()
	}
	if _, err := nc.Subscribe(bus.HostConfigSubject("e2e-probe", "e2e-probe-1"), func(m *nats.Msg) {
		var c bus.HostConfig
		if json.Unmarshal(m.Data, &c) == nil {
			report(c.Generation)
		}
	}); err != nil {
		t.Fatal(err)
	}
	silent := true
	asked := make(chan bus.HostConnect, 4)
	if _, err := nc.Subscribe(bus.HostConnectSubject("e2e-probe", "e2e-probe-1"), func(m *nats.Msg) {
		var c bus.HostConnect
		if err := json.Unmarshal(m.Data, &c); err != nil {
			t.Error(err)
		}
		if !silent {
			reply, _ := json.Marshal(bus.HostReply{})
			m.Respond(reply)
		}
		asked <- c
	}); err != nil {
		t.Fatal(err)
	}
	report(0)
	time.Sleep(2 * time.Second)
	report(0)

	connectRefused(t, tick, refusal.HostTimeout, "e2e-probe-1")
	<-asked
	silent = false
	report(0)
	// It accepts, and joins twice with the one secret: the second time is refused.
	done := make(chan struct{})
	go func() {
		defer close(done)
		c := <-asked
		status, _ := join(t, c)
		if status != http.StatusSwitchingProtocols {
			t.Errorf("the first join was answered with %d", status)
		}
		status, e := join(t, c)
		if status == http.StatusSwitchingProtocols || e == nil || e.Code != refusal.JoinUnknown {
			t.Errorf("the replayed join was answered with %d, %v", status, e)
		}
	}()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, gatewayURL+"/rendezvous/v1/connect", nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==", "Authorization": "Bearer " + tick} {
		req.Header.Set(k, v)
	}
	resp, err := w.HTTP().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(resp.Body)
		t.Fatalf("the connect was answered with %s: %s", resp.Status, body)
	}
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Error("the host was not asked")
	}
}

// join dials the gateway as an agent does and returns the answer.
func join(t *testing.T, c bus.HostConnect) (int, *refusal.Error) {
	conn, err := stage.Dialer().Dial("tcp", c.Address)
	if err != nil {
		t.Error(err)
		return 0, nil
	}
	t.Cleanup(func() { conn.Close() })
	cfg := w.TLS()
	cfg.ServerName = c.ServerName
	tc := tls.Client(conn, cfg)
	fmt.Fprintf(tc, "GET /rendezvous/v1/join HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: rendezvous-join/1\r\nAuthorization: Bearer %s\r\nRendezvous-Instance: %s\r\nActivity-Id: %s\r\n\r\n",
		c.ServerName, base64.RawURLEncoding.EncodeToString(c.JoinSecret), c.Instance, c.ActivityID)
	tc.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 4096)
	n, err := tc.Read(buf)
	if err != nil {
		t.Error(err)
		return 0, nil
	}
	head, body, _ := strings.Cut(string(buf[:n]), "\r\n\r\n")
	var status int
	fmt.Sscanf(head, "HTTP/1.1 %d", &status)
	var answer brokerapi.ErrorBody
	json.Unmarshal([]byte(body), &answer)
	return status, answer.Error
}
