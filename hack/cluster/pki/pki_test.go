package pki

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

func TestLeafVerifiesForItsRoleOnly(t *testing.T) {
	ca, other := authority(t, "cluster"), authority(t, "other")
	server, err := ca.Issue(Leaf{CommonName: "api", Hosts: []string{"api.example", "10.0.0.1"}, Server: true})
	if err != nil {
		t.Fatal(err)
	}
	client, err := ca.Issue(Leaf{CommonName: "system:node:n", Organization: []string{"system:nodes"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		leaf  *Pair
		root  *Pair
		host  string
		usage x509.ExtKeyUsage
		ok    bool
	}{
		{"server by name", server, ca, "api.example", x509.ExtKeyUsageServerAuth, true},
		{"server by address", server, ca, "10.0.0.1", x509.ExtKeyUsageServerAuth, true},
		{"server by another name", server, ca, "other.example", x509.ExtKeyUsageServerAuth, false},
		{"server under another authority", server, other, "api.example", x509.ExtKeyUsageServerAuth, false},
		{"client", client, ca, "", x509.ExtKeyUsageClientAuth, true},
		{"client as a server", client, ca, "", x509.ExtKeyUsageServerAuth, false},
	} {
		roots := x509.NewCertPool()
		roots.AddCert(tc.root.Cert)
		_, err := tc.leaf.Cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: tc.host, KeyUsages: []x509.ExtKeyUsage{tc.usage}})
		if (err == nil) != tc.ok {
			t.Errorf("%s: verification says %v", tc.name, err)
		}
	}
	if got := client.Cert.Subject.Organization; len(got) != 1 || got[0] != "system:nodes" {
		t.Errorf("organization = %q", got)
	}
}

func TestWritePairLoads(t *testing.T) {
	dir := t.TempDir()
	ca := authority(t, "cluster")
	if err := ca.Write(dir, "ca"); err != nil {
		t.Fatal(err)
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(filepath.Join(dir, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %o", info.Mode().Perm())
	}
}

func authority(t *testing.T, name string) *Pair {
	t.Helper()
	ca, err := NewCA(name)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}
