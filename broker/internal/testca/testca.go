// Package testca makes certificate authorities and certificates for the broker's tests.
package testca

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
)

// CA is a certificate authority of one test.
type CA struct {
	t    testing.TB
	Cert *x509.Certificate
	PEM  []byte
	key  *ecdsa.PrivateKey
}

// New makes an authority.
func New(t testing.TB, name string) *CA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	return &CA{t: t, Cert: cert, PEM: pemBlock("CERTIFICATE", der), key: key}
}

// Spec is what a certificate says.
type Spec struct {
	CommonName string
	URIs       []*url.URL
	DNSNames   []string
	IPs        []net.IP
	NotAfter   time.Time // an hour from now if zero
	Usages     []x509.ExtKeyUsage
}

// Issue makes a certificate and its PKCS #8 key, in PEM.
func (ca *CA) Issue(s Spec) (cert, key []byte) {
	ca.t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(ca.t, err)
	return ca.sign(s, priv.Public()), privatePEM(ca.t, priv)
}

// IssueEd25519 is Issue with the kind of key that tickets need.
func (ca *CA) IssueEd25519(s Spec) (cert, key []byte) {
	ca.t.Helper()
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	check(ca.t, err)
	return ca.sign(s, pub), privatePEM(ca.t, priv)
}

// SignCSR answers a request with all that it asks for.
func (ca *CA) SignCSR(csrPEM []byte) []byte {
	ca.t.Helper()
	block, _ := pem.Decode(csrPEM)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	check(ca.t, err)
	return ca.sign(Spec{CommonName: csr.Subject.CommonName, URIs: csr.URIs, DNSNames: csr.DNSNames}, csr.PublicKey)
}

func (ca *CA) sign(s Spec, pub any) []byte {
	if s.NotAfter.IsZero() {
		s.NotAfter = time.Now().Add(time.Hour)
	}
	if s.Usages == nil {
		s.Usages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(ca.t), Subject: pkix.Name{CommonName: s.CommonName}, URIs: s.URIs, DNSNames: s.DNSNames, IPAddresses: s.IPs,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: s.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: s.Usages,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, pub, ca.key)
	check(ca.t, err)
	return pemBlock("CERTIFICATE", der)
}

// Dir writes a folder like a mounted cert-manager Secret.
func (ca *CA) Dir(cert, key []byte) string {
	ca.t.Helper()
	dir := ca.t.TempDir()
	WriteDir(ca.t, dir, cert, key, ca.PEM)
	return dir
}

// WriteDir writes or replaces the three files of a mounted Secret.
func WriteDir(t testing.TB, dir string, cert, key, ca []byte) {
	t.Helper()
	for name, data := range map[string][]byte{mtls.CertFile: cert, mtls.KeyFile: key, mtls.CAFile: ca} {
		check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
}

// Reloader is a certificate of one identity, also good for 127.0.0.1.
func (ca *CA) Reloader(id identity.ID) *mtls.Reloader {
	ca.t.Helper()
	return NewReloader(ca.t, ca.Dir(ca.Issue(IdentitySpec(id))))
}

// IdentitySpec is a certificate of one identity, also good for 127.0.0.1.
func IdentitySpec(id identity.ID) Spec {
	return Spec{URIs: []*url.URL{id.URI()}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}}
}

// NewReloader reads a folder.
func NewReloader(t testing.TB, dir string) *mtls.Reloader {
	t.Helper()
	r, err := mtls.NewReloader(dir, slog.New(slog.DiscardHandler))
	check(t, err)
	return r
}

func privatePEM(t testing.TB, key any) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	return pemBlock("PRIVATE KEY", der)
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func serial(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	check(t, err)
	return n
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// CSR asks for a common name with a key (PEM, PKCS #8).
func CSR(t testing.TB, key []byte, commonName string) []byte {
	t.Helper()
	block, _ := pem.Decode(key)
	priv, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	check(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: commonName}}, priv)
	check(t, err)
	return pemBlock("CERTIFICATE REQUEST", der)
}
