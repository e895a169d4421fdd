// Package mtls is TLS from files that change: a certificate, its key and the CA that verifies the peer are read again
// when they change on disk, without a restart. A bad new file keeps the old certificate.
package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"rendezvous.dev/rendezvous/wire/identity"
)

// Files of a cert-manager Secret, as mounted.
const (
	CertFile = "tls.crt"
	KeyFile  = "tls.key"
	CAFile   = "ca.crt"
)

// material is one consistent reading of the files.
type material struct {
	cert  *tls.Certificate
	roots *x509.CertPool
	stamp string
}

// Reloader serves the newest good certificate of one folder. Safe for concurrent use.
type Reloader struct {
	dir     string
	log     *slog.Logger
	current atomic.Pointer[material]
}

// NewReloader reads dir once; the first reading must succeed. ca.crt may be absent where only a certificate is wanted.
func NewReloader(dir string, log *slog.Logger) (*Reloader, error) {
	r := &Reloader{dir: dir, log: log}
	m, err := r.read()
	if err != nil {
		return nil, err
	}
	r.current.Store(m)
	return r, nil
}

// Poll reads the folder again where it changed, every interval, until done is closed. Kubernetes swaps a mounted
// Secret by renaming a symbolic link, which polling sees as surely as notification does, and with less to go wrong.
func (r *Reloader) Poll(done <-chan struct{}, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			r.Reload()
		}
	}
}

// Reload reads the folder now, where it changed. It returns the error that made it keep the old certificate.
func (r *Reloader) Reload() error {
	if r.stamp() == r.current.Load().stamp {
		return nil
	}
	m, err := r.read()
	if err != nil {
		r.log.Error("kept the old certificate", "dir", r.dir, "error", err)
		return err
	}
	r.current.Store(m)
	r.log.Info("certificate reloaded", "dir", r.dir, "notAfter", m.cert.Leaf.NotAfter)
	return nil
}

// Certificate is the newest good certificate, with Leaf set.
func (r *Reloader) Certificate() *tls.Certificate { return r.current.Load().cert }

// Roots is the newest CA pool, nil where the folder has no ca.crt.
func (r *Reloader) Roots() *x509.CertPool { return r.current.Load().roots }

func (r *Reloader) stamp() string {
	s := ""
	for _, name := range []string{CertFile, KeyFile, CAFile} {
		if fi, err := os.Stat(filepath.Join(r.dir, name)); err == nil {
			s += fmt.Sprintf("%s %d %d;", name, fi.Size(), fi.ModTime().UnixNano())
		}
	}
	return s
}

func (r *Reloader) read() (*material, error) {
	m := &material{stamp: r.stamp()}
	cert, err := tls.LoadX509KeyPair(filepath.Join(r.dir, CertFile), filepath.Join(r.dir, KeyFile))
	if err != nil {
		return nil, fmt.Errorf("mtls: %s: %w", r.dir, err)
	}
	m.cert = &cert
	ca, err := os.ReadFile(filepath.Join(r.dir, CAFile))
	switch {
	case os.IsNotExist(err):
	case err != nil:
		return nil, fmt.Errorf("mtls: %w", err)
	default:
		m.roots = x509.NewCertPool()
		if !m.roots.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("mtls: %s holds no certificate", filepath.Join(r.dir, CAFile))
		}
	}
	return m, nil
}

// ServerConfig serves the certificate to any client. ALPN stays empty, so that HTTP/1.1 is spoken.
func (r *Reloader) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return r.Certificate(), nil },
	}
}

// MutualServerConfig also demands a client certificate of the same CA whose identity allow accepts.
func (r *Reloader) MutualServerConfig(allow func(identity.ID) error) *tls.Config {
	c := r.ServerConfig()
	c.ClientAuth = tls.RequireAnyClientCert
	c.VerifyConnection = func(cs tls.ConnectionState) error { return r.verify(cs, x509.ExtKeyUsageClientAuth, "", allow) }
	return c
}

// ClientConfig shows the certificate and demands that the server's is of the same CA, carries serverName (where it is
// not empty) and an identity that allow accepts.
func (r *Reloader) ClientConfig(serverName string, allow func(identity.ID) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ServerName: serverName,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return r.Certificate(), nil
		},
		// The CA may be renewed while we run, so verification happens below against the newest pool, not RootCAs.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return r.verify(cs, x509.ExtKeyUsageServerAuth, serverName, allow)
		},
	}
}

// ClientConfig is Reloader.ClientConfig with a certificate that isn't a file's.
func ClientConfig(cert tls.Certificate, roots *x509.CertPool, serverName string, allow func(identity.ID) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: serverName, Certificates: []tls.Certificate{cert},
		InsecureSkipVerify: true, // VerifyConnection does it
		VerifyConnection: func(cs tls.ConnectionState) error {
			return verify(cs, roots, x509.ExtKeyUsageServerAuth, serverName, allow)
		},
	}
}

func (r *Reloader) verify(cs tls.ConnectionState, usage x509.ExtKeyUsage, name string, allow func(identity.ID) error) error {
	roots := r.Roots()
	if roots == nil {
		return fmt.Errorf("mtls: %s has no %s to verify the peer with", r.dir, CAFile)
	}
	return verify(cs, roots, usage, name, allow)
}

func verify(cs tls.ConnectionState, roots *x509.CertPool, usage x509.ExtKeyUsage, name string, allow func(identity.ID) error) error {
	leaf := cs.PeerCertificates[0]
	opts := x509.VerifyOptions{Roots: roots, DNSName: name, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{usage}}
	for _, c := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		return fmt.Errorf("mtls: peer: %w", err)
	}
	id, err := identity.FromCertificate(leaf)
	if err != nil {
		return err
	}
	return allow(id)
}

// AllowRole accepts the identities of one workspace in one role.
func AllowRole(namespace, workspace string, role identity.Role) func(identity.ID) error {
	return func(id identity.ID) error {
		if id.Namespace != namespace || id.Workspace != workspace || id.Role != role {
			return fmt.Errorf("the certificate is %s's; this connection takes role %q of workspace %s/%s", id, role, namespace, workspace)
		}
		return nil
	}
}
