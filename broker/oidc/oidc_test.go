package oidc

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// idp is an identity provider of one test.
type idp struct {
	*httptest.Server
	t     testing.TB
	key   *ecdsa.PrivateKey
	kid   string
	away  atomic.Bool
	asked atomic.Int32
}

func newIDP(t testing.TB) *idp {
	p := &idp{t: t}
	p.rotate("k1")
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(map[string]any{"issuer": p.URL, "jwks_uri": p.URL + "/keys", "authorization_endpoint": p.URL, "token_endpoint": p.URL})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		p.asked.Add(1)
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: p.key.Public(), KeyID: p.kid, Algorithm: "ES256", Use: "sig"}}})
	})
	p.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p.away.Load() {
			http.Error(w, "down for maintenance", http.StatusServiceUnavailable)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(p.Close)
	return p
}

func (p *idp) rotate(kid string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	p.key, p.kid = key, kid
}

func (p *idp) token(claims map[string]any) string {
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: p.key, KeyID: p.kid}}, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	raw, err := jwt.Signed(s).Claims(claims).Serialize()
	if err != nil {
		p.t.Fatal(err)
	}
	return raw
}

type fixture struct {
	*Validator
	idp *idp
	now time.Time
	cfg model.OIDC
}

func setUp(t testing.TB) *fixture {
	f := &fixture{idp: newIDP(t), now: time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)}
	ca := filepath.Join(t.TempDir(), "oidc-ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.idp.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	f.cfg = model.OIDC{IssuerURL: f.idp.URL, ClientID: "rdv", Audiences: []string{"rdv", "also"}, UsernameClaim: "email", GroupsClaim: "groups"}
	f.Validator = New(Options{
		Config: func() (model.OIDC, bool) { return f.cfg, f.cfg.IssuerURL != "" },
		CAFile: ca, Now: func() time.Time { return f.now },
	})
	return f
}

func (f *fixture) claims(edit map[string]any) map[string]any {
	c := map[string]any{
		"iss": f.idp.URL, "aud": "rdv", "sub": "1", "exp": f.now.Add(time.Hour).Unix(), "iat": f.now.Unix(),
		"email": "alice@example.com", "email_verified": true, "groups": []string{"engineers"},
	}
	for k, v := range edit {
		if v == nil {
			delete(c, k)
		} else {
			c[k] = v
		}
	}
	return c
}

func code(err error) refusal.Code {
	var r *refusal.Error
	if errors.As(err, &r) {
		return r.Code
	}
	return ""
}

func TestValidate(t *testing.T) {
	f := setUp(t)
	good := f.idp.token(f.claims(nil))
	other := newIDP(t)
	hmac, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte("0123456789abcdef0123456789abcdef")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	symmetric, _ := jwt.Signed(hmac).Claims(f.claims(nil)).Serialize()
	parts := strings.Split(good, ".")
	for _, c := range []struct {
		name, token string
		code        refusal.Code
		says        string
		groups      []string
	}{
		{name: "good", token: good, groups: []string{"engineers"}},
		{name: "one of several audiences", token: f.idp.token(f.claims(map[string]any{"aud": []string{"x", "also"}})), groups: []string{"engineers"}},
		{name: "one group as a string", token: f.idp.token(f.claims(map[string]any{"groups": "ops"})), groups: []string{"ops"}},
		{name: "no groups", token: f.idp.token(f.claims(map[string]any{"groups": nil}))},
		{name: "none", token: "", code: refusal.TokenMissing, says: "sign in"},
		{name: "rubbish", token: "a.b.c", code: refusal.TokenInvalid},
		{name: "too long", token: strings.Repeat("a", maxToken+1), code: refusal.TokenInvalid, says: "longer"},
		{name: "altered", token: parts[0] + "." + parts[1] + "x." + parts[2], code: refusal.TokenInvalid, says: "signature"},
		{name: "another's signature", token: other.token(f.claims(nil)), code: refusal.TokenInvalid, says: "signature"},
		{name: "a shared secret", token: symmetric, code: refusal.TokenInvalid},
		{name: "no signature", token: "eyJhbGciOiJub25lIn0." + parts[1] + ".", code: refusal.TokenInvalid},
		{name: "another issuer", token: f.idp.token(f.claims(map[string]any{"iss": "https://else"})), code: refusal.TokenInvalid, says: `"https://else" issued it`},
		{name: "expired", token: f.idp.token(f.claims(map[string]any{"exp": f.now.Unix()})), code: refusal.TokenExpired, says: "expired at 2030-01-01T12:00:00Z"},
		{name: "no expiry", token: f.idp.token(f.claims(map[string]any{"exp": nil})), code: refusal.TokenExpired},
		{name: "not yet", token: f.idp.token(f.claims(map[string]any{"nbf": f.now.Add(time.Hour).Unix()})), code: refusal.TokenInvalid, says: "not valid yet"},
		{name: "another audience", token: f.idp.token(f.claims(map[string]any{"aud": "other"})), code: refusal.TokenWrongAudience, says: `for ["other"]`},
		{name: "no user", token: f.idp.token(f.claims(map[string]any{"email": nil})), code: refusal.TokenInvalid, says: `no claim "email"`},
		{name: "an unverified address", token: f.idp.token(f.claims(map[string]any{"email_verified": false})), code: refusal.TokenInvalid, says: "not verified"},
	} {
		t.Run(c.name, func(t *testing.T) {
			u, err := f.Validate(t.Context(), c.token)
			if code(err) != c.code || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want code %q saying %q", err, c.code, c.says)
			}
			if err == nil && (u.Name != "alice@example.com" || !slices.Equal(u.Groups, c.groups)) {
				t.Fatalf("got %+v", u)
			}
		})
	}
}

func TestProviderAway(t *testing.T) {
	f := setUp(t)
	f.idp.away.Store(true)
	token := f.idp.token(f.claims(map[string]any{"exp": f.now.Add(1000 * time.Hour).Unix()}))
	check := func(when string, want refusal.Code) {
		t.Helper()
		if _, err := f.Validate(t.Context(), token); code(err) != want {
			t.Fatalf("%s: got %v, want %q", when, err, want)
		}
	}
	check("never reached", refusal.IdentityAway)
	if doc := f.Discovery(); doc != nil {
		t.Errorf("a discovery document of nobody: %s", doc)
	}
	f.idp.away.Store(false)
	check("reached, but asked a moment ago", refusal.IdentityAway)
	f.now = f.now.Add(retryAfter)
	check("reached", "")
	if doc := string(f.Discovery()); !strings.Contains(doc, `"jwks_uri"`) || !strings.Contains(doc, f.idp.URL) {
		t.Errorf("the discovery document is kept as %q", doc)
	}
	f.idp.away.Store(true)
	f.now = f.now.Add(MaxStale)
	check("away, keys kept", "")
	f.now = f.now.Add(time.Second)
	check("away for too long", refusal.IdentityAway)
	f.idp.away.Store(false)
	f.now = f.now.Add(retryAfter)
	check("back", "")
}

func TestRotatedKeys(t *testing.T) {
	f := setUp(t)
	old := f.idp.token(f.claims(nil))
	if _, err := f.Validate(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	f.idp.rotate("k2")
	f.now = f.now.Add(retryAfter)
	if _, err := f.Validate(t.Context(), f.idp.token(f.claims(nil))); err != nil {
		t.Fatalf("a token of the new key: %v", err)
	}
	if _, err := f.Validate(t.Context(), old); code(err) != refusal.TokenInvalid {
		t.Fatalf("a token of the withdrawn key: %v", err)
	}
	// Forged tokens must not have us ask the provider each time.
	before := f.idp.asked.Load()
	f.idp.kid = "unknown"
	for range 10 {
		f.Validate(t.Context(), newIDP(t).token(f.claims(nil)))
	}
	if n := f.idp.asked.Load() - before; n > 1 {
		t.Fatalf("10 forged tokens made %d requests to the provider", n)
	}
}

func TestChangedIssuer(t *testing.T) {
	f := setUp(t)
	if _, err := f.Validate(t.Context(), f.idp.token(f.claims(nil))); err != nil {
		t.Fatal(err)
	}
	next := newIDP(t)
	// The next provider's certificate is httptest's too, so the CA file stays.
	token := next.token(f.claims(map[string]any{"iss": next.URL}))
	if _, err := f.Validate(t.Context(), token); code(err) != refusal.TokenInvalid {
		t.Fatalf("before the change: %v", err)
	}
	f.cfg.IssuerURL = next.URL
	if _, err := f.Validate(t.Context(), token); err != nil {
		t.Fatalf("after the change: %v", err)
	}
	if _, err := f.Validate(t.Context(), f.idp.token(f.claims(nil))); code(err) != refusal.TokenInvalid {
		t.Fatalf("the old issuer's token: %v", err)
	}
}

// What a discovery document may have the broker ask for, and where a provider may send it.
func TestDiscoveryRefused(t *testing.T) {
	visited := false
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { visited = true }))
	t.Cleanup(plain.Close)
	document := func(field, address string) func(*fixture, http.ResponseWriter) {
		return func(f *fixture, w http.ResponseWriter) {
			doc := map[string]any{"issuer": f.idp.URL, "jwks_uri": f.idp.URL + "/keys", "authorization_endpoint": f.idp.URL, "token_endpoint": f.idp.URL}
			doc[field] = address
			json.NewEncoder(w).Encode(doc)
		}
	}
	redirect := func(to string) func(*fixture, http.ResponseWriter) {
		return func(f *fixture, w http.ResponseWriter) {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	}
	for _, c := range []struct {
		name, path string
		answer     func(*fixture, http.ResponseWriter)
		err        string // empty for a document that is fine
	}{
		{"as it should be", "/.well-known/openid-configuration", document("device_authorization_endpoint", "https://id.example.com/device"), ""},
		{"keys by http", "/.well-known/openid-configuration", document("jwks_uri", "http://id.example.com/keys"), "jwks_uri is"},
		{"token endpoint by http", "/.well-known/openid-configuration", document("token_endpoint", "http://id.example.com/token"), "token_endpoint is"},
		{"sign-in page of another scheme", "/.well-known/openid-configuration", document("authorization_endpoint", "search-ms:query=x"), "authorization_endpoint is"},
		{"device endpoint by http", "/.well-known/openid-configuration", document("device_authorization_endpoint", "http://id.example.com/device"), "device_authorization_endpoint is"},
		{"a page that isn't for the user", "/.well-known/openid-configuration", func(_ *fixture, w http.ResponseWriter) { http.Error(w, "inner secret", http.StatusForbidden) }, "answers 403 Forbidden"},
		{"keys that aren't for the user", "/keys", func(_ *fixture, w http.ResponseWriter) { http.Error(w, "inner secret", http.StatusForbidden) }, "answers 403 Forbidden"},
		{"document redirects to http", "/.well-known/openid-configuration", redirect(plain.URL), "which is not https"},
		{"document redirects without end", "/.well-known/openid-configuration", redirect("/.well-known/openid-configuration"), "redirects more than 3 times"},
		{"keys redirect to http", "/keys", redirect(plain.URL), "which is not https"},
		{"document redirects to the cloud's metadata", "/.well-known/openid-configuration", redirect("https://169.254.169.254/latest/meta-data/"), "link-local"},
		{"keys are the cloud's metadata", "/.well-known/openid-configuration", document("jwks_uri", "https://169.254.169.254/latest/meta-data/"), "link-local"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := setUp(t)
			old := f.idp.Config.Handler
			f.idp.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == c.path {
					c.answer(f, w)
					return
				}
				old.ServeHTTP(w, r)
			})
			_, err := f.Validate(t.Context(), f.idp.token(f.claims(nil)))
			switch {
			case c.err == "" && err != nil:
				t.Error(err)
			case c.err != "" && (!errors.Is(err, &refusal.Error{Code: refusal.IdentityAway}) || !strings.Contains(err.Error(), c.err)):
				t.Errorf("got %v, want %s with %q", err, refusal.IdentityAway, c.err)
			case err != nil && strings.Contains(err.Error(), "inner secret"): // whoever signs in reads it
				t.Errorf("what the address answers is told: %v", err)
			}
		})
	}
	if visited {
		t.Error("the provider had the broker ask an http:// address")
	}
}

// As of when the groups are, and whether they are all.
func TestSignedIn(t *testing.T) {
	f := setUp(t)
	sources := map[string]any{"src1": map[string]string{"endpoint": "https://graph.example.com/x"}}
	for name, c := range map[string]struct {
		edit      map[string]any
		at        time.Time
		elsewhere bool
	}{
		"a token of a minute ago": {map[string]any{"iat": f.now.Add(-time.Minute).Unix()}, f.now.Add(-time.Minute), false},
		"of a clock ahead":        {map[string]any{"iat": f.now.Add(time.Hour).Unix()}, f.now, false},
		"no time":                 {map[string]any{"iat": nil}, time.Time{}, false},
		"no groups":               {map[string]any{"groups": nil}, f.now, false},
		"groups elsewhere":        {map[string]any{"groups": nil, "_claim_names": map[string]string{"groups": "src1"}, "_claim_sources": sources}, f.now, true},
		"another claim elsewhere": {map[string]any{"groups": nil, "_claim_names": map[string]string{"photo": "src1"}, "_claim_sources": sources}, f.now, false},
		"too many groups":         {map[string]any{"groups": nil, "hasgroups": true}, f.now, true},
	} {
		t.Run(name, func(t *testing.T) {
			u, err := f.Validate(t.Context(), f.idp.token(f.claims(c.edit)))
			if err != nil || !u.SignedIn.Equal(c.at) || !u.GroupsComplete() != c.elsewhere {
				t.Errorf("got %v, %v, %v; want %v, %v", u.SignedIn, u.GroupsProblem, err, c.at, c.elsewhere)
			}
		})
	}
}

// Who is in many groups can sign in: the ticket names few of them.
func TestBigToken(t *testing.T) {
	f := setUp(t)
	for n, ok := range map[int]bool{200: true, 500: true, 1000: true, 2000: false} {
		var groups []string
		for i := range n {
			groups = append(groups, fmt.Sprintf("%08x-1111-2222-3333-%012x", i, i))
		}
		raw := f.idp.token(f.claims(map[string]any{"groups": groups}))
		if u, err := f.Validate(t.Context(), raw); (err == nil) != ok || ok && len(u.Groups) != n {
			t.Errorf("%d groups in %d bytes: %d, %v", n, len(raw), len(u.Groups), err)
		}
	}
}

// A key of a kind that isn't known here doesn't spoil those beside it.
func TestForeignKey(t *testing.T) {
	for name, foreign := range map[string]string{
		"Ed448":          `{"kty":"OKP","use":"sig","crv":"Ed448","kid":"e","x":"` + strings.Repeat("A", 76) + `"}`,
		"X25519":         `{"kty":"OKP","use":"enc","crv":"X25519","kid":"x","x":"` + strings.Repeat("A", 43) + `"}`,
		"another family": `{"kty":"AKP","alg":"ML-DSA-44","kid":"m","pub":"AAAA"}`,
		"no key":         `7`,
	} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t)
			good, err := json.Marshal(jose.JSONWebKey{Key: f.idp.key.Public(), KeyID: f.idp.kid, Algorithm: "ES256", Use: "sig"})
			if err != nil {
				t.Fatal(err)
			}
			old := f.idp.Config.Handler
			f.idp.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/keys" {
					fmt.Fprintf(w, `{"keys":[%s,%s]}`, foreign, good)
					return
				}
				old.ServeHTTP(w, r)
			})
			var log bytes.Buffer
			f.o.Log = slog.New(slog.NewTextHandler(&log, nil))
			for range 3 {
				if _, err := f.Validate(t.Context(), f.idp.token(f.claims(nil))); err != nil {
					t.Error(err)
				}
				f.now = f.now.Add(retryAfter)
				f.refresh(t.Context(), f.cfg.IssuerURL)
			}
			if n := strings.Count(log.String(), "they are skipped"); n != 1 {
				t.Errorf("told %d times: %s", n, &log)
			}
		})
	}
}
