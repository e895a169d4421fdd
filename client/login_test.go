package client

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// at has the issuer ask f first; what f answers itself goes no further.
func (w *world) at(path string, f func(http.ResponseWriter, *http.Request) (answered bool)) {
	old := w.issuer.Config.Handler
	w.issuer.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path != path || !f(rw, r) {
			old.ServeHTTP(rw, r)
		}
	})
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// A provider that knows one redirect URI, port and all.
func TestLoginAtAFixedPort(t *testing.T) {
	w := newWorld(t)
	port := freePort(t)
	var wrong atomic.Int32
	w.at("/auth", func(rw http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("redirect_uri") == fmt.Sprintf("http://localhost:%d/callback", port) {
			return false
		}
		wrong.Add(1)
		http.Error(rw, "redirect_uri is not registered", 400)
		return true
	})
	c, _, _ := w.client()
	o := LoginOptions{URL: w.broker.URL, CAFile: w.caFile, RedirectPort: port}
	if err := c.Login(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	o.RedirectPort = 0 // the next login knows it
	if err := c.Login(t.Context(), o); err != nil || wrong.Load() != 0 {
		t.Fatal(err, wrong.Load())
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := c.Login(t.Context(), o); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("port %d", port)) || !strings.Contains(err.Error(), "--redirect-port") {
		t.Errorf("the port is taken: %v", err)
	}
}

// A provider that knows no public clients. The secret goes to it alone, and comes from the user's file, not from the workspace.
func TestLoginWithAClientSecret(t *testing.T) {
	const secret = "s3cr:et/ü"
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, methods := range map[string][]string{
		"in a header, as it is where nothing is said": nil,
		"in a header":            {"client_secret_post", "client_secret_basic"},
		"in the body":            {"client_secret_post", "private_key_jwt"},
		"in no way that we know": {"private_key_jwt"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.at("/.well-known/openid-configuration", func(rw http.ResponseWriter, r *http.Request) bool {
				doc := map[string]any{"issuer": w.issuer.URL, "authorization_endpoint": w.issuer.URL + "/auth", "token_endpoint": w.issuer.URL + "/token",
					"jwks_uri": w.issuer.URL + "/keys", "id_token_signing_alg_values_supported": []string{"ES256"}}
				if methods != nil {
					doc["token_endpoint_auth_methods_supported"] = methods
				}
				answer(rw, 200, doc)
				return true
			})
			var asked atomic.Int32
			w.at("/token", func(rw http.ResponseWriter, r *http.Request) bool {
				asked.Add(1)
				r.ParseForm()
				_, header, _ := r.BasicAuth()
				header, _ = url.QueryUnescape(header)
				body := r.PostForm.Get("client_secret")
				if name == "in the body" && body == secret && header == "" || strings.HasPrefix(name, "in a header") && header == secret && body == "" {
					return false
				}
				answer(rw, 401, map[string]string{"error": "invalid_client"})
				return true
			})
			c, _, _ := w.client()
			err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile, SecretFile: file})
			if name == "in no way that we know" {
				if err == nil || !strings.Contains(err.Error(), "private_key_jwt") || asked.Load() != 0 {
					t.Errorf("got %v after %d requests", err, asked.Load())
				}
				return
			}
			if err != nil || asked.Load() != 1 {
				t.Fatalf("%v after %d requests: a code may be shown once", err, asked.Load())
			}
			a, _ := c.Store.Find("")
			a.Expiry = time.Now()
			c.Store.Save(a)
			if err := c.List(t.Context(), false); err != nil {
				t.Errorf("a renewal: %v", err)
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		w := newWorld(t)
		w.at("/token", func(rw http.ResponseWriter, r *http.Request) bool {
			r.ParseForm()
			if _, _, ok := r.BasicAuth(); ok || r.PostForm.Get("client_id") != "rdv" {
				t.Errorf("a public client came with a header: %t, and client_id %q", ok, r.PostForm.Get("client_id"))
			}
			return false
		})
		w.login()
	})
	t.Run("an empty file", func(t *testing.T) {
		w := newWorld(t)
		c, _, _ := w.client()
		empty := filepath.Join(t.TempDir(), "empty")
		os.WriteFile(empty, nil, 0o600)
		if err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile, SecretFile: empty}); err == nil || !strings.Contains(err.Error(), "--client-secret-file") {
			t.Errorf("got %v", err)
		}
	})
}

// A secret is the provider's that wanted it, whatever the workspace names later.
func TestSecretStaysWithItsProvider(t *testing.T) {
	w := newWorld(t)
	c, _, _ := w.login()
	a, _ := c.Store.Find("")
	a.ClientSecret = "secret"
	c.Store.Save(a)
	var sent atomic.Bool
	evil := newWorld(t)
	evil.ca, evil.caCert, evil.caKey = w.ca, w.caCert, w.caKey
	evil.issuer = evil.serve(evil.issuerMux())
	evil.at("/token", func(_ http.ResponseWriter, r *http.Request) bool {
		r.ParseForm()
		_, _, basic := r.BasicAuth()
		sent.Store(basic || r.PostForm.Has("client_secret"))
		return false
	})
	w.names(func(ws *brokerapi.Workspace) { ws.IssuerURL = evil.issuer.URL })
	if err := c.Login(t.Context(), LoginOptions{URL: w.broker.URL, CAFile: w.caFile}); err != nil {
		t.Fatal(err)
	}
	if a, _ := c.Store.Find(""); sent.Load() || a.ClientSecret != "" || a.TokensOf.IssuerURL != evil.issuer.URL {
		t.Errorf("sent: %t, kept: %q, for %s", sent.Load(), a.ClientSecret, a.TokensOf.IssuerURL)
	}
}
