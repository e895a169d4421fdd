package controllers

import (
	"context"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

func TestFetchDiscovery(t *testing.T) {
	var answer func(w http.ResponseWriter, issuer string)
	const key = `{"kty":"OKP","crv":"Ed25519","use":"sig","kid":"k","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}` // RFC 8037
	const signing = `{"keys":[` + key + `]}`
	var server *httptest.Server
	server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if keys, ok := map[string]string{"/dex/keys": signing, "/dex/foreign": `{"keys":[{"kty":"AKP"},` + key + `]}`,
			"/dex/useless": `{"keys":[{"kty":"AKP","kid":"x"}]}`, "/dex/page": "<html>"}[r.URL.Path]; ok {
			_, _ = w.Write([]byte(keys))
			return
		}
		if r.URL.Path != "/dex/.well-known/openid-configuration" {
			http.NotFound(w, r)
			return
		}
		answer(w, server.URL+"/dex")
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that refuse its certificate are part of the test
	server.StartTLS()
	defer server.Close()
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	good := func(w http.ResponseWriter, issuer string) {
		_, _ = w.Write([]byte(`{"issuer":"` + issuer + `","jwks_uri":"` + issuer + `/keys"}`))
	}
	closed := httptest.NewTLSServer(nil)
	closed.Close()
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		t.Error("an https:// request was followed to http://")
		good(w, server.URL+"/dex")
	}))
	defer plain.Close()
	naming := func(field, address string) func(http.ResponseWriter, string) {
		return func(w http.ResponseWriter, issuer string) {
			_, _ = w.Write([]byte(`{"issuer":"` + issuer + `","jwks_uri":"` + issuer + `/keys","` + field + `":"` + address + `"}`)) // of two the last counts
		}
	}
	redirect := func(to string) func(http.ResponseWriter, string) {
		return func(w http.ResponseWriter, _ string) {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusFound)
		}
	}

	for name, tc := range map[string]struct {
		issuer, ca string
		answer     func(http.ResponseWriter, string)
		err        string
	}{
		"good":                      {server.URL + "/dex", ca, good, ""},
		"unknown CA":                {server.URL + "/dex", "", good, "signed by a CA that is not trusted: set spec.identity.oidc.caBundle or caBundleRef"},
		"no PEM":                    {server.URL + "/dex", "rubbish", good, "the CA bundle holds no PEM certificate"},
		"wrong path":                {server.URL, ca, good, "answers 404 Not Found"},
		"slash too many":            {server.URL + "/dex/", ca, good, "names the issuer \"" + server.URL + "/dex\": write it exactly so"},
		"nobody there":              {closed.URL, ca, good, "the connection is refused"},
		"no such name":              {"https://no-such-name.invalid", ca, good, `the name "no-such-name.invalid" can't be resolved`},
		"a page, not JSON":          {server.URL + "/dex", ca, func(w http.ResponseWriter, _ string) { _, _ = w.Write([]byte("<html>")) }, "is no discovery document"},
		"a document of none":        {server.URL + "/dex", ca, func(w http.ResponseWriter, issuer string) { _, _ = w.Write([]byte(`{"issuer":"` + issuer + `"}`)) }, "names no keys"},
		"keys of other kinds too":   {server.URL + "/dex", ca, naming("jwks_uri", server.URL+"/dex/foreign"), ""},
		"keys of other kinds alone": {server.URL + "/dex", ca, naming("jwks_uri", server.URL+"/dex/useless"), "/dex/useless lists no key that this software can verify signatures with"},
		"a page in place of keys":   {server.URL + "/dex", ca, naming("jwks_uri", server.URL+"/dex/page"), "/dex/page is no key set"},
		"no keys there":             {server.URL + "/dex", ca, naming("jwks_uri", server.URL+"/dex/nothing"), "/dex/nothing answers 404"},
		"nobody at the keys' place": {server.URL + "/dex", ca, naming("jwks_uri", closed.URL), "the connection is refused"},
		"keys by http":              {server.URL + "/dex", ca, naming("jwks_uri", "http://id.example.com/keys"), `jwks_uri is "http://id.example.com/keys": it must be an https:// URL`},
		"a token endpoint by http":  {server.URL + "/dex", ca, naming("token_endpoint", "http://id.example.com/token"), "token_endpoint is"},
		"a sign-in page of no web":  {server.URL + "/dex", ca, naming("authorization_endpoint", "search-ms:query=x"), "authorization_endpoint is"},
		"a device endpoint by http": {server.URL + "/dex", ca, naming("device_authorization_endpoint", "http://id.example.com/device"), "device_authorization_endpoint is"},
		"an issuer without end": {server.URL + "/dex", ca, func(w http.ResponseWriter, _ string) {
			_, _ = w.Write([]byte(`{"issuer":"` + strings.Repeat("x", 1<<19) + `"}`))
		}, "names the issuer"},
		"an address without end":     {server.URL + "/dex", ca, naming("jwks_uri", "https://id.example.com/"+strings.Repeat("x", 1<<19)), "of at most 2048 bytes"},
		"a page for people":          {server.URL + "/dex", ca, func(w http.ResponseWriter, _ string) { http.Error(w, "inner secret", http.StatusForbidden) }, "answers 403 Forbidden"},
		"metadata of the cloud":      {"https://169.254.169.254", ca, good, "it is at a link-local address, at which no identity provider is asked"},
		"keys there":                 {server.URL + "/dex", ca, naming("jwks_uri", "https://[fd00:ec2::254]/keys"), "it is at a cloud platform's address"},
		"a redirect there":           {server.URL + "/dex", ca, redirect("https://169.254.169.254/"), "it is at a link-local address"},
		"a redirect to http":         {server.URL + "/dex", ca, redirect(plain.URL), "which is not https"},
		"a redirect that has no end": {server.URL + "/dex", ca, redirect("/dex/.well-known/openid-configuration"), "redirects more than 3 times"},
	} {
		t.Run(name, func(t *testing.T) {
			answer = tc.answer
			err := fetchDiscovery(t.Context(), tc.issuer, tc.ca)
			switch {
			case tc.err == "" && err != nil:
				t.Errorf("got %v, want none", err)
			case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
				t.Errorf("got %v, want one with %q", err, tc.err)
			case err != nil && (len(err.Error()) > 1000 || strings.Contains(err.Error(), "inner secret")): // it becomes a condition
				t.Errorf("%d bytes: %.100s", len(err.Error()), err)
			}
		})
	}
}

func TestDiscoveryAsksAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		answer := errors.New("down")
		d := NewDiscovery()
		d.Fetch = func(context.Context, string, string) error {
			asked++
			time.Sleep(time.Second)
			return answer
		}
		ws := types.NamespacedName{Namespace: "ns", Name: "demo"}
		check := func() DiscoveryResult { return d.Check(ws, "https://id", "") }

		if got := check(); got.Known {
			t.Errorf("known before it was asked: %+v", got)
		}
		check() // while the first question is on its way
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if event := <-d.events; event.Object.Name != "demo" {
			t.Errorf("woke %s", event.Object.Name)
		}
		if got := check(); !got.Known || got.Err == nil || got.Next <= 0 || got.Next > discoveryRetry {
			t.Errorf("after a failure: %+v", got)
		}
		if asked != 1 {
			t.Errorf("asked %d times, want once", asked)
		}
		// It heals: the old answer stands until the new one is there.
		answer = nil
		time.Sleep(discoveryRetry)
		if got := check(); got.Err == nil {
			t.Errorf("while it is asked again: %+v", got)
		}
		<-d.events
		if got := check(); !got.Known || got.Err != nil {
			t.Errorf("after the repair: %+v", got)
		}
		// A good answer is asked for again much later, and wakes nobody when it is the same.
		time.Sleep(discoveryRefresh)
		check()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if asked != 3 || len(d.events) != 0 {
			t.Errorf("asked %d times, %d events", asked, len(d.events))
		}
		// Another question is another matter.
		if got := d.Check(ws, "https://other", ""); got.Known {
			t.Errorf("another issuer is known: %+v", got)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		d.Forget(ws)
		if got := check(); got.Known {
			t.Errorf("forgotten, yet known: %+v", got)
		}
		time.Sleep(2 * time.Second)
	})
}
