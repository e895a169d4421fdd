package mtls

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/identity"
)

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

var serial int64

func issue(t *testing.T, ca *authority, tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial++
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = big.NewInt(serial), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := tmpl, key
	if ca != nil {
		parent, signer = ca.cert, ca.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func newCA(t *testing.T) *authority {
	cert, key, text := issue(t, nil, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return &authority{cert, key, text}
}

func (ca *authority) write(t *testing.T, dir string, id identity.ID, usages ...x509.ExtKeyUsage) {
	t.Helper()
	_, key, text := issue(t, ca, &x509.Certificate{URIs: []*url.URL{id.URI()}, DNSNames: []string{"bus.test"}, ExtKeyUsage: usages})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{CertFile: text, KeyFile: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), CAFile: ca.pem} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func reloader(t *testing.T, ca *authority, id identity.ID, usages ...x509.ExtKeyUsage) *Reloader {
	t.Helper()
	dir := t.TempDir()
	ca.write(t, dir, id, usages...)
	r, err := NewReloader(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// handshake returns what each end says.
func handshake(t *testing.T, client, server *tls.Config) (clientErr, serverErr error) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		s, err := l.Accept()
		if err == nil {
			// TLS 1.3's client has finished before the server looks at its certificate: only a byte back says it is accepted.
			_, err = s.Write([]byte{1})
			s.Close()
		}
		done <- err
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), client)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	return err, <-done
}

const (
	asClient = x509.ExtKeyUsageClientAuth
	asServer = x509.ExtKeyUsageServerAuth
)

func TestRoles(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	broker := reloader(t, ca, identity.Broker("ns", "ws"), asServer, asClient)
	server := broker.MutualServerConfig(AllowRole("ns", "ws", identity.RoleAgent))
	toBroker := AllowRole("ns", "ws", identity.RoleBroker)
	for name, c := range map[string]struct {
		client *tls.Config
		server *tls.Config
		want   string // part of either end's error; empty where the handshake is to succeed
	}{
		"agent":                 {reloader(t, ca, identity.Agent("ns", "ws", "p", "h"), asClient).ClientConfig("bus.test", toBroker), server, ""},
		"gateway as agent":      {reloader(t, ca, identity.Gateway("ns", "ws", "g"), asClient).ClientConfig("bus.test", toBroker), server, `takes role "agent"`},
		"ticket signer":         {reloader(t, ca, identity.TicketSigner("ns", "ws"), asClient).ClientConfig("bus.test", toBroker), server, `takes role "agent"`},
		"other workspace":       {reloader(t, ca, identity.Agent("ns", "ws2", "p", "h"), asClient).ClientConfig("bus.test", toBroker), server, "workspace ns/ws"},
		"other CA":              {reloader(t, other, identity.Agent("ns", "ws", "p", "h"), asClient).ClientConfig("bus.test", toBroker), server, "unknown authority"},
		"no certificate":        {&tls.Config{InsecureSkipVerify: true}, server, "certificate"},
		"server's usage":        {reloader(t, ca, identity.Agent("ns", "ws", "p", "h"), asServer).ClientConfig("bus.test", toBroker), server, "usage"},
		"wrong server name":     {reloader(t, ca, identity.Agent("ns", "ws", "p", "h"), asClient).ClientConfig("else.test", toBroker), server, "else.test"},
		"server is no broker":   {reloader(t, ca, identity.Agent("ns", "ws", "p", "h"), asClient).ClientConfig("bus.test", toBroker), reloader(t, ca, identity.Gateway("ns", "ws", "g"), asServer).MutualServerConfig(AllowRole("ns", "ws", identity.RoleAgent)), `takes role "broker"`},
		"server of another CA":  {reloader(t, ca, identity.Agent("ns", "ws", "p", "h"), asClient).ClientConfig("", toBroker), reloader(t, other, identity.Broker("ns", "ws"), asServer).ServerConfig(), "unknown authority"},
		"any name where unsaid": {reloader(t, ca, identity.Agent("ns", "ws", "p", "h"), asClient).ClientConfig("", toBroker), server, ""},
	} {
		cerr, serr := handshake(t, c.client, c.server)
		switch {
		case c.want == "" && (cerr != nil || serr != nil):
			t.Errorf("%s: client %v, server %v", name, cerr, serr)
		case c.want != "" && (serr == nil && cerr == nil || !contains(cerr, c.want) && !contains(serr, c.want)):
			t.Errorf("%s: client %v, server %v; want an error with %q", name, cerr, serr, c.want)
		}
	}
}

func contains(err error, s string) bool { return err != nil && strings.Contains(err.Error(), s) }

func TestReload(t *testing.T) {
	ca := newCA(t)
	r := reloader(t, ca, identity.Broker("ns", "ws"), asServer)
	first := r.Certificate().Leaf.SerialNumber
	if err := r.Reload(); err != nil || r.Certificate().Leaf.SerialNumber.Cmp(first) != 0 {
		t.Errorf("an unchanged folder gave another certificate, %v", err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, CertFile), []byte("half a certifi"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Reload(); err == nil || r.Certificate().Leaf.SerialNumber.Cmp(first) != 0 {
		t.Errorf("a bad certificate took the good one's place, %v", err)
	}
	ca.write(t, r.dir, identity.Broker("ns", "ws"), asServer)
	if err := r.Reload(); err != nil || r.Certificate().Leaf.SerialNumber.Cmp(first) == 0 {
		t.Errorf("the new certificate is not served, %v", err)
	}
}

func TestNewReloaderNeedsACertificate(t *testing.T) {
	if _, err := NewReloader(t.TempDir(), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("an empty folder is no error")
	}
}
