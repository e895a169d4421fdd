package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// runs starts a broker whose users are one provider's, and returns alice's token and the log.
func runs(t *testing.T, ca *testca.CA, feed config.Callers) (a Addresses, token string, log *wiretest.Log) {
	t.Helper()
	public := testca.IdentitySpec(identity.Broker(ns, ws))
	public.URIs = nil
	issuer, oidcCA, token := provider(t)
	configDir := t.TempDir()
	if err := os.WriteFile(filepath.Join(configDir, oidcCAFile), oidcCA, 0o600); err != nil {
		t.Fatal(err)
	}
	world := fake.New(&model.Snapshot{Workspace: &model.Workspace{Name: ws, OIDC: model.OIDC{IssuerURL: issuer, Audiences: []string{"rdv"}, UsernameClaim: "email"}, TicketLifetime: time.Hour}})
	dir := func(s testca.Spec) string { return ca.Dir(ca.Issue(s)) }
	log = &wiretest.Log{}
	ctx, stop := context.WithCancel(t.Context())
	started, done := make(chan Addresses, 1), make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{
			Config: config.Broker{Namespace: ns, Workspace: ws, BusURLs: []string{"tls://bus"}, InternalIssuer: config.Issuer{Name: "internal"}, Feed: feed}, ConfigDir: configDir,
			TLSDir: dir(public), BusDir: dir(testca.IdentitySpec(identity.Broker(ns, ws))), SigningDir: dir(testca.Spec{CommonName: "Publisher"}),
			TicketsDir: ca.Dir(ca.IssueEd25519(testca.IdentitySpec(identity.TicketSigner(ns, ws)))),
			Name:       "broker-0", Host: "127.0.0.1", FeedPort: -1, BusPort: -1, BusWebSocketPort: -1, BusRoutePort: -1, SessionsPort: -1, MetricsAddr: "127.0.0.1:0",
			Inventory: world, Log: slog.New(slog.NewJSONHandler(log, nil)), Started: func(a Addresses) { started <- a },
		})
	}()
	select {
	case a = <-started:
	case err := <-done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return a, token, log
}

// through is an HTTP client whose connections begin with a header.
func through(ca *testca.CA, header string) *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			_, err = io.WriteString(c, header)
		}
		return c, err
	}}}
}

const proxyHeader = "PROXY TCP4 203.0.113.7 198.51.100.9 50123 443\r\n"

func TestFeedBehindProxyProtocol(t *testing.T) {
	const field = "spec.broker.service.proxyProtocol.networks of Workspace ws"
	for name, c := range map[string]struct {
		callers config.Callers
		header  string
		health  int
		log     string
	}{
		"believed":      {config.Callers{ProxyNetworks: []string{"127.0.0.0/8"}}, proxyHeader, http.StatusOK, `"remote":"203.0.113.7:50123"`},
		"no header":     {config.Callers{ProxyNetworks: []string{"127.0.0.0/8"}}, "", http.StatusOK, `"remote":"127.0.0.1:`},
		"not believed":  {config.Callers{}, proxyHeader, http.StatusServiceUnavailable, `"field":"` + field + `"`},
		"another's, v2": {config.Callers{ProxyNetworks: []string{"10.0.0.0/8"}}, "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00", http.StatusServiceUnavailable, `"field":"` + field + `"`},
	} {
		t.Run(name, func(t *testing.T) {
			ca := testca.New(t, "ca")
			a, _, log := runs(t, ca, c.callers)
			client := through(ca, c.header)
			defer client.CloseIdleConnections()
			feed := "https://" + a.Feed.String()
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				req, _ := http.NewRequestWithContext(t.Context(), method, feed+"/healthz", nil)
				resp, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.StatusCode != c.health {
					t.Errorf("%s /healthz: %s", method, resp.Status)
				}
			}
			resp, err := client.Get(feed + brokerapi.PathResources)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			text, _ := io.ReadAll(resp.Body)
			code := refusal.TokenMissing
			if c.health != http.StatusOK {
				code = refusal.ProxyHeader
			}
			if !strings.Contains(string(text), string(code)) || code == refusal.ProxyHeader && !strings.Contains(string(text), "ask your administrator to set "+field) {
				t.Errorf("%s %s", resp.Status, text)
			}
			if !strings.Contains(log.String(), c.log) {
				t.Errorf("want %s in the log:\n%s", c.log, log.String())
			}
		})
	}
}

// Every listener is bounded, and a flood at one takes nothing from who is known, nor from who comes.
func TestEveryListenerIsBounded(t *testing.T) {
	ca := testca.New(t, "ca")
	a, token, _ := runs(t, ca, config.Callers{})
	client := through(ca, "")
	defer client.CloseIdleConnections()
	signedIn := func() {
		t.Helper()
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "https://"+a.Feed.String()+brokerapi.PathResources, nil)
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status)
		}
	}
	var dials int
	inner := client.Transport.(*http.Transport).DialContext
	client.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		dials++
		return inner(ctx, network, address)
	}
	signedIn()
	for name, l := range map[string]struct {
		addr   net.Addr
		places int
	}{"feed": {a.Feed, feedStrangers}, "sessions": {a.Sessions, 64}, "metrics": {a.Metrics, 64}} {
		t.Run(name, func(t *testing.T) {
			var first net.Conn
			for range l.places/4 + 8 {
				c, err := net.Dial("tcp", l.addr.String())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if first == nil {
					first = c
				}
			}
			first.SetReadDeadline(time.Now().Add(patience))
			if _, err := first.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the first stranger may stay")
			}
			if resp, err := through(ca, "").Get(fmt.Sprintf("http://%s/metrics", a.Metrics)); err != nil {
				t.Error(err)
			} else {
				text, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if want := fmt.Sprintf(`rendezvous_broker_strangers_ended_total{listener="%s",reason="limit"}`, name); !strings.Contains(string(text), want) {
					t.Errorf("no %s in the metrics", want)
				}
			}
			if resp, err := through(ca, "").Get("https://" + a.Feed.String() + "/healthz"); err != nil || resp.StatusCode != http.StatusOK {
				t.Errorf("the feed: %v, %v", resp, err)
			} else {
				resp.Body.Close()
			}
		})
	}
	signedIn()
	if dials != 1 {
		t.Errorf("the user's connection was lost to the flood: %d dials", dials)
	}
	r := ca.Reloader(identity.Operator(ns, ws))
	operator := &http.Client{Transport: &http.Transport{TLSClientConfig: mtls.ClientConfig(*r.Certificate(), r.Roots(), "", mtls.AllowRole(ns, ws, identity.RoleBroker))}}
	defer operator.CloseIdleConnections()
	if resp, err := operator.Get("https://" + a.Sessions.String() + brokerapi.PathAllSessions); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("the operator: %v, %v", resp, err)
	} else {
		resp.Body.Close()
	}
}
