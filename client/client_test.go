package client

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/clock"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// world is a workspace as a client sees it: an identity provider, a broker and gateways, all behind real TLS of one CA.
type world struct {
	t        *testing.T
	ca       string
	caFile   string
	caCert   *x509.Certificate
	caKey    *ecdsa.PrivateKey
	issuer   *httptest.Server
	broker   *httptest.Server
	gateways []brokerapi.Gateway
	signer   jose.Signer
	keys     jose.JSONWebKeySet
	lifetime time.Duration // of ID tokens

	mu         sync.Mutex
	codes      map[string]url.Values // authorization code -> the request that it answers
	polls      int                   // of the device flow
	refreshes  int
	posted     []trace.Event
	recent     []trace.Summary
	downloads  []url.Values
	userAgents map[string]bool
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, lifetime: time.Hour, codes: map[string]url.Values{}, userAgents: map[string]bool{}}
	w.caKey, w.caCert = newCA(t)
	w.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.caCert.Raw}))
	w.caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(w.caFile, []byte(w.ca), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.keys = jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}}
	w.issuer = w.serve(w.issuerMux())
	w.broker = w.serve(w.brokerMux())
	return w
}

func newCA(t *testing.T) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

// serve runs h with a certificate of the world's CA.
func (w *world) serve(h http.Handler) *httptest.Server {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, w.caCert, key.Public(), w.caKey)
	if err != nil {
		w.t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.Config.ErrorLog = nil
	s.StartTLS()
	w.t.Cleanup(s.Close)
	return s
}

func (w *world) idToken(nonce string) string {
	claims := map[string]any{
		"iss": w.issuer.URL, "aud": "rdv", "sub": "u1", "preferred_username": "alice",
		"iat": time.Now().Unix(), "exp": time.Now().Add(w.lifetime).Unix(),
	}
	if nonce != "" {
		claims["nonce"] = nonce
	}
	raw, err := jwt.Signed(w.signer).Claims(claims).Serialize()
	if err != nil {
		w.t.Error(err)
	}
	return raw
}

func answer(rw http.ResponseWriter, status int, v any) {
	rw.Header().Set("Content-Type", "application/json")
	rw.WriteHeader(status)
	json.NewEncoder(rw).Encode(v)
}

// issuerMux is an OpenID provider with the code flow, PKCE demanded, the device flow and refresh tokens.
func (w *world) issuerMux() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(rw http.ResponseWriter, _ *http.Request) {
		answer(rw, 200, map[string]any{
			"issuer": w.issuer.URL, "authorization_endpoint": w.issuer.URL + "/auth", "token_endpoint": w.issuer.URL + "/token",
			"jwks_uri": w.issuer.URL + "/keys", "device_authorization_endpoint": w.issuer.URL + "/device/code",
			"id_token_signing_alg_values_supported": []string{"ES256"},
		})
	})
	mux.HandleFunc("GET /keys", func(rw http.ResponseWriter, _ *http.Request) { answer(rw, 200, w.keys) })
	mux.HandleFunc("GET /auth", func(rw http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("code_challenge_method") != "S256" || q.Get("client_id") != "rdv" || !strings.HasPrefix(q.Get("redirect_uri"), "http://localhost:") {
			http.Error(rw, "bad request", 400)
			return
		}
		code := random()
		w.mu.Lock()
		w.codes[code] = q
		w.mu.Unlock()
		http.Redirect(rw, r, q.Get("redirect_uri")+"?"+url.Values{"code": {code}, "state": {q.Get("state")}}.Encode(), http.StatusSeeOther)
	})
	mux.HandleFunc("POST /device/code", func(rw http.ResponseWriter, _ *http.Request) {
		answer(rw, 200, map[string]any{
			"device_code": "dev", "user_code": "ABCD-EFGH", "verification_uri": w.issuer.URL + "/device",
			"verification_uri_complete": w.issuer.URL + "/device?user_code=ABCD-EFGH", "expires_in": 300, "interval": 1,
		})
	})
	mux.HandleFunc("POST /token", func(rw http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		w.mu.Lock()
		defer w.mu.Unlock()
		nonce := ""
		switch r.Form.Get("grant_type") {
		case "authorization_code":
			q, ok := w.codes[r.Form.Get("code")]
			delete(w.codes, r.Form.Get("code"))
			sum := sha256.Sum256([]byte(r.Form.Get("code_verifier")))
			if !ok || base64.RawURLEncoding.EncodeToString(sum[:]) != q.Get("code_challenge") || r.Form.Get("redirect_uri") != q.Get("redirect_uri") {
				answer(rw, 400, map[string]string{"error": "invalid_grant"})
				return
			}
			nonce = q.Get("nonce")
		case "urn:ietf:params:oauth:grant-type:device_code":
			if w.polls++; w.polls < 2 {
				answer(rw, 400, map[string]string{"error": "authorization_pending"})
				return
			}
		case "refresh_token":
			if r.Form.Get("refresh_token") != "refresh" {
				answer(rw, 400, map[string]string{"error": "invalid_grant"})
				return
			}
			w.refreshes++
		default:
			answer(rw, 400, map[string]string{"error": "unsupported_grant_type"})
			return
		}
		answer(rw, 200, map[string]any{"access_token": "x", "token_type": "Bearer", "refresh_token": "refresh", "id_token": w.idToken(nonce), "expires_in": 3600})
	})
	return mux
}

const rdpText = "full address:s:linux.demo.rdv.internal\r\ngatewayhostname:s:%s\r\ngatewayaccesstoken:s:secret.ticket\r\n" +
	"gatewayusagemethod:i:1\r\nuse multimon:i:0\r\nsignscope:s:Full Address\r\nsignature:s:AAAA\r\n"

func (w *world) brokerMux() http.Handler {
	mux := http.NewServeMux()
	refuse := func(rw http.ResponseWriter, r *http.Request, status int, code refusal.Code, message string) {
		answer(rw, status, brokerapi.ErrorBody{Error: refusal.New(code, "%s", message).With(cmp.Or(r.Header.Get(brokerapi.HeaderActivity), newActivity()))})
	}
	signedIn := func(h http.HandlerFunc) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			raw, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
			tok, err := jwt.ParseSigned(raw, []jose.SignatureAlgorithm{jose.ES256})
			var claims jwt.Claims
			if err == nil {
				err = tok.Claims(w.keys.Keys[0].Key, &claims)
			}
			if err == nil {
				err = claims.Validate(jwt.Expected{Time: time.Now()})
			}
			if err != nil {
				refuse(rw, r, 401, refusal.TokenExpired, "The token expired.")
				return
			}
			h(rw, r)
		}
	}
	mux.HandleFunc("GET "+brokerapi.PathWorkspace, func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.userAgents[r.UserAgent()] = true
		w.mu.Unlock()
		answer(rw, 200, brokerapi.Workspace{Name: "demo", DisplayName: "Demo", IssuerURL: w.issuer.URL, ClientID: "rdv", Scopes: []string{"openid"}, IssuerCA: w.ca})
	})
	mux.HandleFunc("GET "+brokerapi.PathResources, signedIn(func(rw http.ResponseWriter, _ *http.Request) {
		answer(rw, 200, brokerapi.Resources{User: "alice", Gateways: w.gateways, Resources: []brokerapi.Resource{
			{Name: "linux-desktop", DisplayName: "Linux", Type: "Desktop", HostPool: "linux", RDPFile: brokerapi.PathResources + "/linux-desktop.rdp"},
			{Name: "elsewhere", Type: "Desktop", HostPool: "linux", RDPFile: "/other/../x"},
		}})
	}))
	mux.HandleFunc("GET "+brokerapi.PathResources+"/linux-desktop.rdp", signedIn(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.downloads = append(w.downloads, r.URL.Query())
		w.mu.Unlock()
		for _, g := range w.gateways {
			if g.Name == r.URL.Query().Get("gateway") {
				if r.URL.Query().Get("form") == brokerapi.FormARM {
					io.WriteString(rw, "resourceprovider:s:arm\r\n")
				}
				fmt.Fprintf(rw, rdpText, net.JoinHostPort(g.Hostname, strconv.Itoa(int(g.Port))))
				return
			}
		}
		refuse(rw, r, 404, refusal.UnknownResource, "No such gateway.")
	}))
	mux.HandleFunc("POST "+brokerapi.PathActivities+"{id}", signedIn(func(rw http.ResponseWriter, r *http.Request) {
		var events []trace.Event
		if err := json.NewDecoder(r.Body).Decode(&events); err != nil {
			w.t.Error(err)
		}
		w.mu.Lock()
		w.posted = append(w.posted, events...)
		w.mu.Unlock()
		rw.WriteHeader(204)
	}))
	mux.HandleFunc("GET "+brokerapi.PathWhoAmI, signedIn(func(rw http.ResponseWriter, _ *http.Request) {
		answer(rw, 200, brokerapi.Identity{User: "alice", UserClaim: "email", GroupsClaim: "groups", GroupsNotice: "you have no groups\x1b[2J", Claims: []string{"aud", "realm_access.roles"},
			Resources: []brokerapi.IdentityResource{{Name: "desk", HostPool: "linux", Account: "ali", AccountClaim: "upn"}, {Name: "own", HostPool: "mine"}, {Name: "no", HostPool: "x", Problem: "no account"}}})
	}))
	mux.HandleFunc("GET "+brokerapi.PathActivities+"{$}", signedIn(func(rw http.ResponseWriter, _ *http.Request) {
		w.mu.Lock()
		defer w.mu.Unlock()
		answer(rw, 200, w.recent)
	}))
	mux.HandleFunc("GET "+brokerapi.PathActivities+"{id}", signedIn(func(rw http.ResponseWriter, _ *http.Request) {
		w.mu.Lock()
		defer w.mu.Unlock()
		answer(rw, 200, w.posted)
	}))
	return mux
}

// gateway adds one; status is what it answers to a ping.
func (w *world) gateway(name string, connections int32, status int) {
	s := w.serve(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(status) }))
	w.addGateway(name, s.Listener.Addr().String(), connections)
}

func (w *world) addGateway(name, addr string, connections int32) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		w.t.Fatal(err)
	}
	n, _ := strconv.Atoi(port)
	w.gateways = append(w.gateways, brokerapi.Gateway{Name: name, Hostname: host, Port: int32(n), PingPath: "/rendezvous/v1/ping", Connections: connections})
}

// client is a signed-out rdv. Its browser follows the page that it is given, as a person would.
func (w *world) client() (c *Client, out, errs *wiretest.Log) {
	out, errs = &wiretest.Log{}, &wiretest.Log{}
	pool := x509.NewCertPool()
	pool.AddCert(w.caCert)
	browser := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	c = &Client{Store: Store{Dir: w.t.TempDir()}, Out: out, Err: errs, UserAgent: "rdv/test", openBrowser: func(page string) error {
		go func() {
			res, err := browser.Get(page)
			if err != nil {
				w.t.Error(err)
				return
			}
			defer res.Body.Close()
			if body, _ := io.ReadAll(res.Body); !strings.Contains(string(body), "signed in") {
				w.t.Errorf("the browser shows %q", body)
			}
		}()
		return nil
	}}
	return c, out, errs
}

func (w *world) login() (c *Client, out, errs *wiretest.Log) {
	w.t.Helper()
	c, out, errs = w.client()
	if err := c.Login(w.t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile}); err != nil {
		w.t.Fatal(err)
	}
	out.Reset()
	return c, out, errs
}

func TestLoginBrowser(t *testing.T) {
	w := newWorld(t)
	c, out, errs := w.client()
	if err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile}); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); len(lines) != 1 || !strings.HasPrefix(lines[0], w.issuer.URL+"/auth?") {
		t.Errorf("standard output is %q, want the page's URL alone", out)
	}
	if !strings.Contains(errs.String(), "signed in to workspace demo as alice") {
		t.Errorf("standard error lacks the result: %q", errs)
	}
	a, err := c.Store.Find("")
	if err != nil {
		t.Fatal(err)
	}
	if a.User != "alice" || a.RefreshToken != "refresh" || a.CA != w.ca {
		t.Errorf("saved account: %+v", a)
	}
	fi, err := os.Stat(c.Store.path(key(a.URL)))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the account's file: %v, %v; want mode 0600", fi.Mode(), err)
	}
	if !w.userAgents["rdv/test"] {
		t.Errorf("user agents: %v", w.userAgents)
	}
}

func TestLoginDevice(t *testing.T) {
	w := newWorld(t)
	c, out, errs := w.client()
	if err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile, Device: true}); err != nil {
		t.Fatal(err)
	}
	if want := w.issuer.URL + "/device?user_code=ABCD-EFGH\n"; out.String() != want {
		t.Errorf("standard output is %q, want %q", out, want)
	}
	if !strings.Contains(errs.String(), "ABCD-EFGH") {
		t.Errorf("standard error lacks the code: %q", errs)
	}
	if w.polls != 2 {
		t.Errorf("%d polls, want 2: pending, then the token", w.polls)
	}
}

// A page that did not come from our provider must not end the sign-in, neither well nor badly.
func TestLoginIgnoresForeignAnswers(t *testing.T) {
	w := newWorld(t)
	c, _, _ := w.client()
	follow := c.openBrowser
	c.openBrowser = func(page string) error {
		u, _ := url.Parse(page)
		res, err := http.Get(u.Query().Get("redirect_uri") + "?code=stolen&state=forged")
		if err != nil {
			return err
		}
		res.Body.Close()
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("a forged answer got %s", res.Status)
		}
		return follow(page)
	}
	if err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile}); err != nil {
		t.Fatal(err)
	}
}

func TestLoginErrors(t *testing.T) {
	w := newWorld(t)
	tests := []struct {
		name string
		o    LoginOptions
		want string
	}{
		{"not https", LoginOptions{URL: "http://x"}, "is not a workspace's URL"},
		{"no such CA file", LoginOptions{URL: w.broker.URL, CAFile: "/nowhere"}, "--ca-file: open /nowhere"},
		{"CA unknown", LoginOptions{URL: w.broker.URL}, "rdv login --ca-file"},
		{"not a workspace", LoginOptions{URL: w.issuer.URL, CAFile: w.caFile}, "is that the URL of a Rendezvous workspace?"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, _, _ := w.client()
			err := c.Login(t.Context(), tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestRefresh(t *testing.T) {
	w := newWorld(t)
	c, out, _ := w.login()
	a, _ := c.Store.Find("")
	a.Expiry = time.Now().Add(time.Second)
	if err := c.Store.Save(a); err != nil {
		t.Fatal(err)
	}
	if err := c.List(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if w.refreshes != 1 {
		t.Errorf("%d refreshes, want 1", w.refreshes)
	}
	if !strings.Contains(out.String(), "linux-desktop") {
		t.Errorf("list: %s", out)
	}
	if a, _ = c.Store.Find(""); time.Until(a.Expiry) < time.Minute {
		t.Errorf("the new expiry was not saved: %s", a.Expiry)
	}

	a.Expiry, a.RefreshToken = time.Now(), "revoked"
	c.Store.Save(a)
	if err := c.List(t.Context(), false); err == nil || !strings.Contains(err.Error(), "run `rdv login "+w.broker.URL+"` again") {
		t.Errorf("a revoked refresh token: %v", err)
	}
}

func TestRefusalNamesWayOut(t *testing.T) {
	w := newWorld(t)
	c, _, _ := w.login()
	a, _ := c.Store.Find("")
	w.lifetime = -time.Minute
	a.IDToken = w.idToken("") // expired, whatever the account believes
	c.Store.Save(a)
	err := c.List(t.Context(), false)
	var r *refusal.Error
	if !errors.As(err, &r) || r.Code != refusal.TokenExpired || r.ActivityID == "" {
		t.Fatalf("error %v, want the refusal with its activity id", err)
	}
	if !strings.Contains(err.Error(), "rdv login") {
		t.Errorf("%v lacks the way out", err)
	}
}

func TestLogout(t *testing.T) {
	w := newWorld(t)
	c, _, _ := w.login()
	if err := c.Logout(); err != nil {
		t.Fatal(err)
	}
	if err := c.List(t.Context(), false); err == nil || !strings.Contains(err.Error(), "not signed in") {
		t.Errorf("list after logout: %v", err)
	}
	entries, _ := filepath.Glob(filepath.Join(c.Store.Dir, "*", "*"))
	if len(entries) != 0 {
		t.Errorf("logout left %v", entries)
	}
}

// fakeClient is an RDP client that says what it was given. Its name decides how it is given it.
func fakeClient(t *testing.T, name, script string) (path, saw string) {
	t.Helper()
	dir := t.TempDir()
	path, saw = filepath.Join(dir, name), filepath.Join(dir, "saw")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nsaw="+saw+"\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path, saw
}

// The feed gets to choose of those that are equally near, and of no others.
func TestNearest(t *testing.T) {
	ordered, _ := rank([]Measured{
		measured("far", 25*time.Millisecond, 0), measured("b", 9*time.Millisecond, 1), measured("a", time.Millisecond, 3),
		{Gateway: brokerapi.Gateway{Name: "dead"}, Problem: "refused"},
	})
	if got := strings.Join(nearest(ordered), " "); got != "b a" {
		t.Errorf("got %q, want b a: the emptiest of the nearest first", got)
	}
}

func measured(name string, trip time.Duration, connections int32) Measured {
	return Measured{Gateway: brokerapi.Gateway{Name: name, Connections: connections}, RoundTrip: trip}
}

func TestConnectTSGU(t *testing.T) {
	w := newWorld(t)
	w.gateway("busy", 9, 204)
	w.gateway("idle", 1, 204)
	w.gateway("broken", 0, 500)
	c, _, errs := w.login()
	program, saw := fakeClient(t, "some-client", `{ stat -c %a "$1"; cat "$1"; echo "$1"; shift; echo "args: $@"; echo "$SSL_CERT_FILE"; } > $saw; exit 7`)

	err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", RDPClient: program, Args: []string{"/u:alice", "/size:80%"}})
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 7 {
		t.Fatalf("error %v, want the client's exit code 7", err)
	}
	data, readErr := os.ReadFile(saw)
	if readErr != nil {
		t.Fatal(readErr)
	}
	got := string(data)
	for _, want := range []string{"600\n", "gatewayaccesstoken:s:secret.ticket", "signature:s:AAAA", "args: /u:alice /size:80%", "ca.pem"} {
		if !strings.Contains(got, want) {
			t.Errorf("the client saw no %q in:\n%s", want, got)
		}
	}
	lines := strings.Split(strings.TrimSpace(got), "\n")
	if file := lines[len(lines)-3]; !strings.HasSuffix(file, ".rdp") {
		t.Errorf("no file name in %q", got)
	} else if _, err := os.Stat(filepath.Dir(file)); !os.IsNotExist(err) {
		t.Errorf("%s is still there", file)
	}

	if len(w.downloads) != 1 || slices.Contains(w.downloads[0]["gateway"], "broken") || w.downloads[0].Get("activity") != exit.Activity {
		t.Errorf("downloads: %v, want one for a gateway that answers, with activity %s", w.downloads, exit.Activity)
	}
	if !strings.Contains(errs.String(), "activity "+exit.Activity+"\n") {
		t.Errorf("the activity id was not printed: %q", errs)
	}
	steps := map[int]trace.Event{}
	for _, e := range w.posted {
		steps[e.Step] = e
		if e.ActivityID != exit.Activity || e.At.IsZero() || e.Component != "rdv" {
			t.Errorf("posted step: %+v", e)
		}
	}
	for _, n := range []int{trace.StepSubscribe, trace.StepAuthenticate, trace.StepPassToken, trace.StepStore, trace.StepDialGateway} {
		if _, ok := steps[n]; !ok {
			t.Errorf("step %d was not posted", n)
		}
	}
	if d := steps[trace.StepDialGateway].Detail; !strings.Contains(d, "broken silent") {
		t.Errorf("step 7 does not say what was weighed: %q", d)
	}
}

func TestConnectRaw(t *testing.T) {
	w := newWorld(t)
	w.gateway("a", 0, 204)
	c, _, _ := w.login()
	program, saw := fakeClient(t, "xfreerdp3", `{ echo "shown: $@"; cat <&3; } > $saw; cp "$(sed -n 2p $saw)" $saw.rdp`)
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Mode: ModeRaw, RDPClient: program, Args: []string{"/u:alice"}}); err != nil {
		t.Fatal(err)
	}
	data, _ := os.ReadFile(saw)
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	g := w.gateways[0]
	want := fmt.Sprintf("/gateway:url:wss://%s:%d/rendezvous/v1/connect,bearer:secret.ticket", g.Hostname, g.Port)
	if len(lines) != 4 || lines[0] != "shown: /args-from:fd:3" || lines[2] != want || lines[3] != "/u:alice" {
		t.Errorf("the client was given:\n%s\nwant only /args-from:fd:3 shown, then the file, %s and /u:alice", data, want)
	}
	file, err := os.ReadFile(saw + ".rdp")
	if err != nil {
		t.Fatal(err)
	}
	if text := string(file); strings.Contains(text, "gateway") || strings.Contains(text, "sign") || !strings.Contains(text, "full address:s:linux.demo.rdv.internal\r\n") {
		t.Errorf("raw mode's file:\n%s", text)
	}
}

// What raw and ARM mode pass by /args-from only FreeRDP 3 understands, whoever names the client.
func TestModesNeedFreeRDP3(t *testing.T) {
	w := newWorld(t)
	w.gateway("a", 0, 204)
	c, _, _ := w.login()
	for _, tt := range []struct {
		name, version string
		ok            bool
	}{
		{"xfreerdp", "2.11.7", false},
		{"xfreerdp-2.3", "2.3.0", false}, // a digit in the name says nothing
		{"remmina", "1.4.39", false},
		{"xfreerdp", "3.15.0", true},
	} {
		for _, mode := range []string{ModeRaw, ModeARM} {
			program, saw := fakeClient(t, tt.name, `[ "$1" = --version ] && { echo "This is FreeRDP version `+tt.version+`"; exit 255; }; echo "$@" >$saw`)
			err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Mode: mode, RDPClient: program})
			_, started := os.Stat(saw)
			if tt.ok && err != nil || !tt.ok && (err == nil || !strings.Contains(err.Error(), "is not FreeRDP 3") || started == nil) {
				t.Errorf("%s %s in mode %s: %v, started: %t", tt.name, tt.version, mode, err, started == nil)
			}
		}
	}
	program, _ := fakeClient(t, "xfreerdp", "exit 0")
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", RDPClient: program}); err != nil {
		t.Errorf("any version is good otherwise: %v", err)
	}
}

// Remmina hands its file to the process that runs already, and ends at once.
func TestClientThatHandsOver(t *testing.T) {
	w := newWorld(t)
	w.gateway("a", 0, 204)
	c, _, errs := w.login()
	program, saw := fakeClient(t, "remmina", `( sleep 1; cat "$2" >$saw.part; mv $saw.part $saw ) >/dev/null 2>&1 & echo "$2" >$saw.name; exit 0`)
	began := time.Now()
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", RDPClient: program}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > handOverTime/2 {
		t.Errorf("rdv waited for %s though the file was read", took)
	}
	var got []byte
	for end := time.Now().Add(5 * time.Second); len(got) == 0 && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		got, _ = os.ReadFile(saw)
	}
	if !strings.Contains(string(got), "gatewayaccesstoken:s:secret.ticket") {
		t.Errorf("the running client read %q; rdv said %s", got, errs)
	}
	name, _ := os.ReadFile(saw + ".name")
	if _, err := os.Stat(strings.TrimSpace(string(name))); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", name, err)
	}

	// One that read its file and ended is not waited for.
	program, _ = fakeClient(t, "remmina", `cat "$2" >/dev/null`)
	began = time.Now()
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", RDPClient: program}); err != nil || time.Since(began) > handOverBlind/2 {
		t.Errorf("%v after %s", err, time.Since(began))
	}
}

func TestClientEndedBySignal(t *testing.T) {
	w := newWorld(t)
	w.gateway("a", 0, 204)
	c, _, _ := w.login()
	program, _ := fakeClient(t, "xfreerdp", "kill -SEGV $$")
	err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", RDPClient: program})
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 128+11 || !strings.Contains(err.Error(), "xfreerdp was ended by a signal (segmentation fault)") {
		t.Errorf("got %v", err)
	}
}

// In ARM mode the file stays as it was signed, and FreeRDP is told the ticket and where to look for a sign-in beside it.
func TestConnectARM(t *testing.T) {
	w := newWorld(t)
	w.gateway("a", 0, 204)
	c, _, _ := w.login()
	program, saw := fakeClient(t, "xfreerdp3", `{ echo "shown: $@"; cat <&3; } > $saw; cp "$(sed -n 2p $saw)" $saw.rdp`)
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Mode: ModeARM, RDPClient: program, Args: []string{"/u:alice"}}); err != nil {
		t.Fatal(err)
	}
	data, _ := os.ReadFile(saw)
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	if len(lines) != 5 || lines[0] != "shown: /args-from:fd:3" || lines[2] != "/gateway:type:arm,bearer:secret.ticket" || lines[3] != "/azure:ad:"+strings.TrimPrefix(w.broker.URL, "https://") || lines[4] != "/u:alice" {
		t.Errorf("the client was given:\n%s", data)
	}
	file, err := os.ReadFile(saw + ".rdp")
	if err != nil {
		t.Fatal(err)
	}
	if text := string(file); !strings.Contains(text, "resourceprovider:s:arm\r\n") || !strings.Contains(text, "signature:s:AAAA\r\n") {
		t.Errorf("ARM mode's file:\n%s", text)
	}
}

func TestConnectPrint(t *testing.T) {
	w := newWorld(t)
	w.gateway("a", 0, 204)
	c, out, _ := w.login()
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Print: true}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), "full address:s:") || !strings.Contains(out.String(), "signature:s:AAAA\r\n") {
		t.Errorf("printed %q, want the file unchanged", out)
	}
	out.Reset()
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Mode: ModeRaw, Print: true}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), "/v:linux.demo.rdv.internal\n/gateway:url:wss://") {
		t.Errorf("printed %q, want FreeRDP's arguments", out)
	}
}

// A gateway that the user names is not measured: the RDP client may have a way to it that rdv has not.
func TestConnectNamedGateway(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	silent := l.Addr().String()
	l.Close() // nobody answers there now
	w.addGateway("down", silent, 0)
	c, _, _ := w.login()
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Gateway: "down", Print: true}); err != nil {
		t.Errorf("--gateway: %v", err)
	}
}

// rdv measures by the proxy that its environment names.
func TestMeasureByProxy(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go http.Serve(l, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		http.Error(rw, r.Method, http.StatusForbidden)
	}))
	t.Setenv("NO_PROXY", "")
	t.Setenv("HTTPS_PROXY", "http://"+l.Addr().String())
	w := newWorld(t)
	w.addGateway("far", "gateway.rdv.invalid:443", 0)
	c, out, _ := w.login()
	if err := c.Gateways(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "proxy http://"+l.Addr().String()+": it answered \"403 Forbidden\" to CONNECT gateway.rdv.invalid:443") {
		t.Errorf("%s: want what the proxy answered", out)
	}
}

func TestConnectErrors(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	silent := l.Addr().String()
	l.Close() // nobody answers there now
	w.addGateway("down", silent, 0)
	tests := []struct {
		name string
		o    ConnectOptions
		want string
	}{
		{"unknown resource", ConnectOptions{Resource: "nope", Print: true}, `grants alice no resource "nope", but: linux-desktop`},
		{"foreign path", ConnectOptions{Resource: "elsewhere", Print: true}, "no path of a feed"},
		{"unknown gateway", ConnectOptions{Resource: "linux-desktop", Gateway: "x", Print: true}, "--gateway x: workspace demo has: down"},
		{"no gateway answers", ConnectOptions{Resource: "linux-desktop", Print: true}, "no gateway of workspace demo can be reached: down"},
		{"unknown mode", ConnectOptions{Resource: "linux-desktop", Mode: "vnc"}, "--mode"},
		{"no such client", ConnectOptions{Resource: "linux-desktop", RDPClient: "/nowhere/freerdp"}, "--rdp-client /nowhere/freerdp: not found"},
	}
	c, _, _ := w.login()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := c.Connect(t.Context(), tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestGatewaysAndExplain(t *testing.T) {
	w := newWorld(t)
	w.gateway("near", 0, 204)
	w.gateway("broken", 0, 500)
	c, out, _ := w.login()
	if err := c.Gateways(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || !strings.HasPrefix(lines[1], "near ") || !strings.HasSuffix(strings.TrimSpace(lines[1]), "yes") || !strings.Contains(lines[2], "500") {
		t.Errorf("gateways:\n%s", out)
	}
	if err := c.Explain(t.Context(), "nonsense", false); err == nil || !strings.Contains(err.Error(), "no activity id") {
		t.Errorf("explain nonsense: %v", err)
	}
	if err := c.Explain(t.Context(), newActivity(), false); err == nil || !strings.Contains(err.Error(), "knows nothing of activity") {
		t.Errorf("explain unknown: %v", err)
	}
}

func TestWhoAmI(t *testing.T) {
	w := newWorld(t)
	c, out, errs := w.login()
	if err := c.WhoAmI(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"alice", "from claim email", "none", "aud, realm_access.roles", "ali (from claim upn)", "(the host asks)", "none: no account"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if !strings.Contains(errs.String(), "you have no groups") || strings.Contains(errs.String(), "\x1b") {
		t.Errorf("told: %q", errs)
	}
}

// A clock that is minutes off is named, in place of tokens that have expired.
func TestClockThatIsOff(t *testing.T) {
	for name, c := range map[string]struct {
		off  time.Duration // of this machine
		want string
	}{
		"behind": {-20 * time.Minute, "20 minutes behind 127.0.0.1's: set it right"},
		"ahead":  {20 * time.Minute, "20 minutes ahead of 127.0.0.1's: set it right"},
		"fine":   {0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c2, _, _ := w.login()
			c2.watch().Now = func() time.Time { return time.Now().Add(c.off) }
			check := func(what string, err error) {
				t.Helper()
				if err == nil || !strings.Contains(err.Error(), c.want) || c.want == "" && strings.Contains(err.Error(), "clock") {
					t.Errorf("%s: %v, want %q", what, err, c.want)
				}
			}
			a, _ := c2.Store.Find("")
			w.lifetime = -time.Minute // the provider's token is over as it comes
			a.Expiry = time.Now()
			c2.Store.Save(a)
			check("a renewal", c2.List(t.Context(), false))
			a.IDToken, a.Expiry = w.idToken(""), time.Now().Add(time.Hour) // what rdv takes for good
			c2.Store.Save(a)
			check("the broker's refusal", c2.List(t.Context(), false))
			check("a sign-in", c2.Login(t.Context(), LoginOptions{URL: w.broker.URL}))
		})
	}
}

// A user whose client showed a failure and no id finds the refusal: rdv tells it, and lists the latest ones.
func TestRefusalsAreFound(t *testing.T) {
	w := newWorld(t)
	w.gateway("a", 0, 204)
	c, out, errs := w.login()
	at := time.Now().Add(time.Minute)
	w.recent = []trace.Summary{
		{ActivityID: "a3", At: at, Step: 7, Error: "protocol-error", Detail: "no header\x1b[2J", Anonymous: true},
		{ActivityID: "a2", At: at.Add(-time.Hour), Step: 8, Error: "ticket-expired", Detail: "long ago"},
		{ActivityID: "a1", At: at.Add(-2 * time.Hour), Step: trace.StepRDP, Detail: "fine"},
	}
	program, _ := fakeClient(t, "some-client", "exit 131")
	err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", RDPClient: program})
	if err == nil || !strings.Contains(errs.String(), "refused: no header [2J (protocol-error, activity a3)\n") || strings.Contains(errs.String(), "long ago") {
		t.Errorf("%v; told: %q", err, errs)
	}
	if err := c.Recent(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 4 || !strings.Contains(lines[1], "ERROR protocol-error") || !strings.Contains(lines[1], "before any ticket") ||
		!strings.Contains(lines[2], "a2") || !strings.Contains(lines[3], "ok") || strings.Contains(out.String(), "\x1b") {
		t.Errorf("listed:\n%s", out)
	}
	out.Reset()
	w.recent[1].ActivityID = newActivity()
	if err := c.ExplainLast(t.Context(), false); err != nil || !strings.Contains(out.String(), "activity "+w.recent[1].ActivityID) {
		t.Errorf("--last: %v\n%s", err, out)
	}
	w.recent = nil
	if err := c.ExplainLast(t.Context(), false); err == nil {
		t.Error("--last of nothing")
	}
}

// Measuring is bounded: a gateway that accepts and never speaks must not hold up the others.
func TestMeasureIsBounded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := newWorld(t)
	w.gateway("good", 0, 204)
	w.addGateway("mute", l.Addr().String(), 0)
	f := &feed{account: &Account{CA: w.ca}, activity: newActivity(), clock: &clock.Watch{}}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	ordered, ok := rank(f.measure(ctx, w.gateways))
	if !ok || ordered[0].Name != "good" || ordered[0].RoundTrip <= 0 || ordered[1].Problem == "" {
		t.Errorf("measured %+v", ordered)
	}
}
