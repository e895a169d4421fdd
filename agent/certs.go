package agent

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/rdpkey"
)

// clientCSR asks for the bus identity: one URI name and nothing else.
func clientCSR(id identity.ID, keyPEM []byte) (string, error) {
	return csr(&x509.CertificateRequest{URIs: []*url.URL{id.URI()}}, keyPEM)
}

// rdpCSR asks for the certificate that the RDP server shows.
func rdpCSR(id identity.ID, keyPEM []byte) (string, error) {
	names := brokerapi.RDPNames(id.Namespace, id.Pool, id.Host)
	req := &x509.CertificateRequest{DNSNames: names}
	// Old clients show the common name to the user. X.520 bounds it at 64 characters.
	if len(names[0]) <= 64 {
		req.Subject = pkix.Name{CommonName: names[0]}
	}
	return csr(req, keyPEM)
}

func csr(template *x509.CertificateRequest, keyPEM []byte) (string, error) {
	key, _, err := rdpkey.Parse(keyPEM)
	if err != nil {
		return "", err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

// fingerprint is the SHA-256 of a certificate in lower-case hex.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// installer gives the RDP server its certificate (PEM).
type installer interface {
	Install(certificate, key []byte) error
}

// dirInstaller writes the files that xrdp and the desktop image read. The key is open to xrdp's group, where the machine
// has one, or else to that of the process.
type dirInstaller struct {
	dir string
	gid int // -1 where there is no such group
}

// xrdpGroup has the user in it as which xrdp runs on Debian: not root.
const xrdpGroup = "xrdp"

func newDirInstaller(dir string) dirInstaller {
	d := dirInstaller{dir, -1}
	if os.Geteuid() != 0 {
		return d
	}
	if g, err := user.LookupGroup(xrdpGroup); err == nil {
		if n, err := strconv.Atoi(g.Gid); err == nil {
			d.gid = n
		}
	}
	return d
}

func (d dirInstaller) Install(certificate, key []byte) error {
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return err
	}
	// The key first: a server that starts between the two fails once, and one with a new certificate over the old
	// key would fail no less.
	if err := writeAtomicFor(d.gid, filepath.Join(d.dir, mtls.KeyFile), key, 0o640); err != nil {
		return err
	}
	return writeAtomic(filepath.Join(d.dir, mtls.CertFile), certificate, 0o644)
}
