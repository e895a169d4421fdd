package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/mtls"
)

// A machine whose only way out is an HTTP proxy: enrolment, control channel and join all go by CONNECT, with the proxy from the
// environment or from a flag, and say what it answered.
func TestProxyOnly(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	go http.Serve(l, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		user, password, _ := (&http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}).BasicAuth()
		mu.Lock()
		asked = append(asked, r.Method+" "+r.Host+" "+user+":"+password)
		mu.Unlock()
		http.Error(rw, "not for this test", http.StatusForbidden)
	}))
	took := func() []string { mu.Lock(); defer mu.Unlock(); a := asked; asked = nil; return a }

	dir := t.TempDir()
	ca, cert, key := proxyIdentity(t)
	must(t, os.WriteFile(filepath.Join(dir, mtls.CAFile), ca, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, mtls.CertFile), cert, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, mtls.KeyFile), key, 0o600))
	creds, err := mtls.NewReloader(dir, slog.New(slog.DiscardHandler))
	must(t, err)
	secret := filepath.Join(dir, "proxy-auth")
	must(t, os.WriteFile(secret, []byte("me:s3cret\n"), 0o600))
	proxy := "http://" + l.Addr().String()
	broker := Options{Broker: "https://broker.rdv.invalid", StateDir: dir, Host: "host-1"}

	for name, c := range map[string]struct {
		env, credentials string
		flags            func(*Options)
	}{
		"environment": {"http://you:pw@" + l.Addr().String(), "you:pw", func(*Options) {}},
		"flag":        {"", "me:s3cret", func(o *Options) { o.Proxy, o.ProxyAuthFile = proxy, secret }},
	} {
		t.Run(name, func(t *testing.T) {
			for _, v := range []string{"HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"} {
				t.Setenv(v, "")
			}
			t.Setenv("HTTPS_PROXY", c.env)
			o := broker
			c.flags(&o)
			a, err := New(o)
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			check := func(what, address string, err error) {
				t.Helper()
				if want := []string{"CONNECT " + address + " " + c.credentials}; !slices.Equal(took(), want) {
					t.Errorf("%s: the proxy was not asked once for %s", what, address)
				}
				_, password, _ := strings.Cut(c.credentials, ":")
				if err == nil || !strings.Contains(err.Error(), proxy) || !strings.Contains(err.Error(), "403 Forbidden") || strings.Contains(err.Error(), password) {
					t.Errorf("%s: %v: want the proxy and its answer, without the password", what, err)
				}
			}
			client, err := a.brokerClient()
			must(t, err)
			check("enrolment", "broker.rdv.invalid:443", a.call(ctx, client, "GET", "t", nil, &struct{}{}))
			_, err = joinBy(ctx, a.dialer(), bus.HostConnect{Address: "gateway-a.rdv.invalid:443", ServerName: "gateway-a.rdv.invalid", Instance: "10-0-0-1"}, nil)
			check("join", "gateway-a.rdv.invalid:443", err)
			m := &member{Namespace: "ns", Workspace: "demo", Pool: "linux", Host: "host-1"}
			for _, address := range []string{"broker.rdv.invalid:4222", "broker.rdv.invalid:443"} {
				scheme := map[bool]string{true: "tls://", false: "wss://"}[strings.HasSuffix(address, "4222")]
				_, _, err = a.dialBusURL(scheme+address, m, creds)
				check(scheme, address, err)
			}

			t.Setenv("NO_PROXY", "rdv.invalid")
			if u, err := a.dialer().For("gateway-a.rdv.invalid:443"); u != nil || err != nil {
				t.Errorf("NO_PROXY: %v, %v", u, err)
			}
		})
	}

	for name, o := range map[string]Options{
		"a password in the flag":      {Proxy: "http://me:s3cret@proxy"},
		"credentials without a proxy": {ProxyAuthFile: secret},
	} {
		o.Broker, o.StateDir, o.Host = broker.Broker, dir, "h"
		if _, err := New(o); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// proxyIdentity is a certificate of its own authority.
func proxyIdentity(t *testing.T) (ca, cert, key []byte) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	must(t, err)
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	p, err := x509.MarshalPKCS8PrivateKey(k)
	must(t, err)
	return cert, cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: p})
}
