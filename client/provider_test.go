package client

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/terminal"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// names has the broker name another provider from now on.
func (w *world) names(edit func(*brokerapi.Workspace)) {
	ws := brokerapi.Workspace{Name: "demo", DisplayName: "Demo", IssuerURL: w.issuer.URL, ClientID: "rdv", Scopes: []string{"openid"}, IssuerCA: w.ca}
	edit(&ws)
	old := w.broker.Config.Handler
	w.broker.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == brokerapi.PathWorkspace {
			answer(rw, 200, ws)
			return
		}
		old.ServeHTTP(rw, r)
	})
}

// other is a provider that nobody signed in at; it counts what it is sent.
func (w *world) other(edit func(document map[string]any)) (s *httptest.Server, tokens *atomic.Int32) {
	tokens = &atomic.Int32{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(rw http.ResponseWriter, _ *http.Request) {
		doc := map[string]any{"issuer": s.URL, "authorization_endpoint": s.URL + "/auth", "token_endpoint": s.URL + "/token", "jwks_uri": s.URL + "/keys"}
		if edit != nil {
			edit(doc)
		}
		answer(rw, 200, doc)
	})
	mux.HandleFunc("POST /token", func(rw http.ResponseWriter, _ *http.Request) {
		tokens.Add(1)
		answer(rw, 400, map[string]string{"error": "invalid_grant"})
	})
	s = w.serve(mux)
	return s, tokens
}

// The refresh token is for the provider that gave it, for the client that got it, and for the CA that it was known by.
func TestRefreshTokenStaysWithItsProvider(t *testing.T) {
	_, foreignCA := newCA(t)
	foreign := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: foreignCA.Raw}))
	for name, c := range map[string]struct {
		edit    func(w *world, evil string, ws *brokerapi.Workspace)
		expired bool
		says    string // empty where the sign-in goes on
	}{
		"nothing changed":                  {func(*world, string, *brokerapi.Workspace) {}, true, ""},
		"the bundle is written otherwise":  {func(w *world, _ string, ws *brokerapi.Workspace) { ws.IssuerCA = "# the CA\n" + w.ca + "\n" }, true, ""},
		"another issuer":                   {func(_ *world, evil string, ws *brokerapi.Workspace) { ws.IssuerURL = evil }, true, "its identity provider was"},
		"another issuer, token still good": {func(_ *world, evil string, ws *brokerapi.Workspace) { ws.IssuerURL = evil }, false, "its identity provider was"},
		"another client":                   {func(_ *world, _ string, ws *brokerapi.Workspace) { ws.ClientID = "other" }, true, `its client was "rdv" and is "other"`},
		"another CA":                       {func(_ *world, _ string, ws *brokerapi.Workspace) { ws.IssuerCA = foreign }, true, "the CA that it names"},
		"a CA more":                        {func(w *world, _ string, ws *brokerapi.Workspace) { ws.IssuerCA = w.ca + foreign }, true, "the CA that it names"},
		"no CA any more":                   {func(_ *world, _ string, ws *brokerapi.Workspace) { ws.IssuerCA = "" }, true, "the CA that it names"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.gateway("gateway-a", 0, 204)
			c1, _, _ := w.login()
			evil, got := w.other(nil)
			if c.expired {
				a, err := c1.Store.Find("")
				if err != nil {
					t.Fatal(err)
				}
				a.Expiry = time.Now().Add(time.Second)
				if err := c1.Store.Save(a); err != nil {
					t.Fatal(err)
				}
			}
			w.names(func(ws *brokerapi.Workspace) { c.edit(w, evil.URL, ws) })
			for range 2 { // what was refused once is not believed the next time
				err := c1.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Print: true})
				switch {
				case c.says == "" && err != nil:
					t.Error(err)
				case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "rdv login "+w.broker.URL)):
					t.Errorf("got %v, want %q and the way to sign in again", err, c.says)
				}
			}
			if got.Load() > 0 {
				t.Error("another provider was sent the refresh token")
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			if c.says != "" && w.refreshes > 0 {
				t.Error("the token was refreshed though the workspace names another provider")
			}
		})
	}
}

// A new sign-in takes the new provider, tells what changed, and is good from then on.
func TestSignInAgainAfterChange(t *testing.T) {
	w := newWorld(t)
	w.gateway("gateway-a", 0, 204)
	c, _, errs := w.login()
	old := w.issuer.URL
	w.issuer = w.serve(w.issuerMux())
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Print: true}); err == nil {
		t.Fatal("the sign-in at the old provider is still good")
	}
	if err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(errs.String(), "has changed since you last signed in: its identity provider was \""+old) {
		t.Errorf("the person isn't told what changed: %s", errs)
	}
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Print: true}); err != nil {
		t.Error(err)
	}
}

// An account of an older rdv has no provider written into it; its workspace was saved with that provider's tokens.
func TestAccountOfOlderVersion(t *testing.T) {
	w := newWorld(t)
	w.gateway("gateway-a", 0, 204)
	c, _, _ := w.login()
	path := c.Store.path(key(w.broker.URL))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	delete(m, "tokensOf")
	m["expiry"] = time.Now()
	if data, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Print: true}); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	evil, got := w.other(nil)
	w.names(func(ws *brokerapi.Workspace) { ws.IssuerURL = evil.URL })
	if err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Print: true}); err == nil || got.Load() > 0 {
		t.Errorf("got %v; the other provider was asked %d times", err, got.Load())
	}
}

// Whatever a discovery document names is opened, or asked, only where it is https.
func TestProviderAddresses(t *testing.T) {
	for name, c := range map[string]struct {
		edit   func(map[string]any)
		device bool
		says   string
	}{
		"a sign-in page of another scheme": {func(d map[string]any) {
			d["authorization_endpoint"] = "search-ms:query=x&crumb=location:\\\\evil\\share"
		}, false, "authorization_endpoint is"},
		"a sign-in page by http":    {func(d map[string]any) { d["authorization_endpoint"] = "http://id.example.com/auth" }, false, "authorization_endpoint is"},
		"a token endpoint by http":  {func(d map[string]any) { d["token_endpoint"] = "http://id.example.com/token" }, false, "token_endpoint is"},
		"a device endpoint by http": {func(d map[string]any) { d["device_authorization_endpoint"] = "http://id.example.com/device" }, true, "device_authorization_endpoint is"},
		"keys by http":              {func(d map[string]any) { d["jwks_uri"] = "http://id.example.com/keys" }, false, "jwks_uri is"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.issuer, _ = w.other(c.edit)
			cl, out, _ := w.client()
			cl.openBrowser = func(page string) error { t.Errorf("handed to the desktop's opener: %s", page); return nil }
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err := cl.Login(ctx, LoginOptions{URL: w.broker.URL, CAFile: w.caFile, Device: c.device})
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			}
			if out.String() != "" {
				t.Errorf("a page is shown to the person: %s", out)
			}
		})
	}
}

func TestDevicePageIsWebPage(t *testing.T) {
	w := newWorld(t)
	old := w.issuer.Config.Handler
	w.issuer.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/device/code" {
			answer(rw, 200, map[string]any{"device_code": "dev", "user_code": "A", "verification_uri": "search-ms:x", "expires_in": 300, "interval": 1})
			return
		}
		old.ServeHTTP(rw, r)
	})
	c, out, _ := w.client()
	err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile, Device: true})
	if err == nil || !strings.Contains(err.Error(), "is no web page") || out.String() != "" {
		t.Errorf("got %v, shown %q", err, out)
	}
}

// Neither the refresh token nor the ID token follows a redirect to where it is not for.
func TestRedirectsKeepTokens(t *testing.T) {
	var seen atomic.Int32
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { seen.Add(1) }))
	t.Cleanup(plain.Close)
	t.Run("token endpoint", func(t *testing.T) {
		w := newWorld(t)
		c, _, _ := w.login()
		elsewhere, got := w.other(nil)
		old := w.issuer.Config.Handler
		w.issuer.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				http.Redirect(rw, r, elsewhere.URL+"/token", http.StatusTemporaryRedirect)
				return
			}
			old.ServeHTTP(rw, r)
		})
		a, err := c.Store.Find("")
		if err != nil {
			t.Fatal(err)
		}
		a.Expiry = time.Now()
		if err := c.Store.Save(a); err != nil {
			t.Fatal(err)
		}
		if err := c.List(t.Context(), false); err == nil || !strings.Contains(err.Error(), "not followed") {
			t.Errorf("got %v", err)
		}
		if got.Load() > 0 {
			t.Error("the refresh token followed a redirect")
		}
	})
	t.Run("feed", func(t *testing.T) {
		w := newWorld(t)
		c, _, _ := w.login()
		w.broker.Config.Handler = http.RedirectHandler(plain.URL, http.StatusFound)
		if err := c.List(t.Context(), false); err == nil || !strings.Contains(err.Error(), "not https") {
			t.Errorf("got %v", err)
		}
	})
	if seen.Load() > 0 {
		t.Error("a request left https")
	}
}

func TestOneLine(t *testing.T) {
	if got := terminal.OneLine("a\x1b[2Jb\u009b31mc\u202ed\u2028e\n\u00e9"); strings.ContainsAny(got, "\x1b\u009b\u202e\u2028\n") || !strings.Contains(got, "\u00e9") {
		t.Errorf("%q", got)
	}
}

// Whatever a broker or a provider writes, in whatever rdv prints.
func TestOthersTextsAreClean(t *testing.T) {
	const evil = "E\x1b[2J\u009b31m\u202eL\u2028\U000e0041\n"
	bad := func(t *testing.T, what, text string) {
		t.Helper()
		if strings.ContainsAny(text, "\x1b\u009b\u202e\u2028\U000e0041") || !strings.Contains(text, "[2J") {
			t.Errorf("%s: %q", what, text)
		}
	}
	w := newWorld(t)
	w.gateways = []brokerapi.Gateway{{Name: evil, Region: evil, Hostname: "127.0.0.1" + evil, Port: 1}}
	c, out, errs := w.login()
	w.names(func(ws *brokerapi.Workspace) { ws.Name = evil })
	if err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL}); err != nil {
		t.Fatal(err)
	}
	bad(t, "login", errs.String())
	for what, print := range map[string]func(bool) error{
		"list":     func(asJSON bool) error { return c.List(t.Context(), asJSON) },
		"gateways": func(asJSON bool) error { return c.Gateways(t.Context(), asJSON) },
	} {
		for _, asJSON := range []bool{false, true} {
			out.Reset()
			if err := print(asJSON); err != nil {
				t.Fatal(err)
			}
			bad(t, what, out.String())
			var v any
			if asJSON && (json.Unmarshal([]byte(out.String()), &v) != nil || !strings.Contains(fmt.Sprint(v), evil)) {
				t.Errorf("%s: the JSON is not what it was: %s", what, out)
			}
		}
	}
	err := c.Connect(t.Context(), ConnectOptions{Resource: "linux-desktop", Print: true})
	bad(t, "no gateway", err.Error())

	old := w.broker.Config.Handler
	w.broker.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == brokerapi.PathResources {
			answer(rw, 403, map[string]any{"error": map[string]string{"code": evil, "message": evil + strings.Repeat("x", 1<<20), "activityId": evil}})
			return
		}
		old.ServeHTTP(rw, r)
	})
	err = c.List(t.Context(), false)
	if bad(t, "a refusal", err.Error()); len(err.Error()) > 4096 {
		t.Errorf("a refusal of %d bytes", len(err.Error()))
	}
	w.at("/token", func(rw http.ResponseWriter, _ *http.Request) bool {
		answer(rw, 400, map[string]string{"error": "invalid_grant", "error_description": evil})
		return true
	})
	a, _ := c.Store.Find("")
	a.Expiry = time.Now()
	c.Store.Save(a)
	bad(t, "the provider's answer", c.List(t.Context(), false).Error())
	bad(t, "the provider's answer to a sign-in", c.Login(t.Context(), LoginOptions{URL: w.broker.URL}).Error())
	w.at("/.well-known/openid-configuration", func(rw http.ResponseWriter, _ *http.Request) bool {
		answer(rw, 200, map[string]any{"issuer": evil})
		return true
	})
	if err := c.List(t.Context(), false); strings.ContainsAny(err.Error(), "\x1b\u009b\u202e") {
		t.Errorf("discovery: %q", err)
	}
}

// A provider that takes each refresh token once, and a second use for theft: several rdvs at one time renew once.
func TestOneRefreshAtATime(t *testing.T) {
	w := newWorld(t)
	c, _, _ := w.login()
	var mu sync.Mutex
	current, renewals, reused := "refresh", 0, 0
	old := w.issuer.Config.Handler
	w.issuer.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/token" {
			old.ServeHTTP(rw, r)
			return
		}
		r.ParseForm()
		mu.Lock()
		defer mu.Unlock()
		if r.Form.Get("refresh_token") != current {
			reused++
			answer(rw, 400, map[string]string{"error": "invalid_grant"})
			return
		}
		renewals++
		current = random()
		answer(rw, 200, map[string]any{"access_token": "x", "token_type": "Bearer", "refresh_token": current, "id_token": w.idToken(""), "expires_in": 3600})
	})
	a, err := c.Store.Find("")
	if err != nil {
		t.Fatal(err)
	}
	a.Expiry = time.Now()
	if err := c.Store.Save(a); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			each := *c
			each.Out, each.Err = &wiretest.Log{}, &wiretest.Log{}
			if err := each.List(t.Context(), false); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if renewals != 1 || reused != 0 {
		t.Errorf("%d renewals, and %d with a token that was used before", renewals, reused)
	}
	if a, err := c.Store.Find(""); err != nil || a.RefreshToken != current {
		t.Errorf("the newest refresh token isn't kept: %v", err)
	}
}

// An answer without an ID token (RFC 6749 demands none of a refresh) tells the way out.
func TestRefreshWithoutIDToken(t *testing.T) {
	w := newWorld(t)
	c, _, _ := w.login()
	old := w.issuer.Config.Handler
	w.issuer.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			answer(rw, 200, map[string]any{"access_token": "x", "token_type": "Bearer", "expires_in": 3600})
			return
		}
		old.ServeHTTP(rw, r)
	})
	a, err := c.Store.Find("")
	if err != nil {
		t.Fatal(err)
	}
	a.Expiry = time.Now()
	if err := c.Store.Save(a); err != nil {
		t.Fatal(err)
	}
	if err := c.List(t.Context(), false); err == nil || !strings.Contains(err.Error(), "run `rdv login "+w.broker.URL+"` again") {
		t.Errorf("got %v", err)
	}
}
