package agent

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
)

// Files of one generation beside mtls.CertFile, mtls.KeyFile and mtls.CAFile.
const (
	memberFile  = "membership.json"
	rdpCertFile = "rdp.crt"
	rdpKeyFile  = "rdp.key"
	// currentFile holds the name of the generation in force. Its replacement is the one atomic step of a save.
	currentFile = "current"
)

// errNoState says that this machine has not enrolled yet.
var errNoState = errors.New("not enrolled")

// member is this host's membership in a pool: what enrolment or renewal answered, with the keys.
type member struct {
	Namespace string   `json:"namespace"`
	Workspace string   `json:"workspace"`
	Pool      string   `json:"pool"`
	Host      string   `json:"host"`
	BusURLs   []string `json:"busUrls"`
	// TokenHash is the SHA-256, in hex, of the registration token that it came with; empty where an older release saved it.
	TokenHash string `json:"tokenHash,omitempty"`

	ClientCertificate, ClientKey, BusCA string `json:"-"` // PEM
	RDPCertificate, RDPKey              string `json:"-"` // PEM, empty where the host keeps its own

	dir    string // of the generation; set by save and load
	client *x509.Certificate
	rdp    *x509.Certificate // nil where the host keeps its own
}

func (m *member) id() identity.ID { return identity.Agent(m.Namespace, m.Workspace, m.Pool, m.Host) }

// notAfter is when the first of the certificates ends.
func (m *member) notAfter() time.Time {
	if m.rdp != nil && m.rdp.NotAfter.Before(m.client.NotAfter) {
		return m.rdp.NotAfter
	}
	return m.client.NotAfter
}

// check reads the certificates and holds them against the keys and the names that they must carry.
func (m *member) check() error {
	pair, err := tls.X509KeyPair([]byte(m.ClientCertificate), []byte(m.ClientKey))
	if err != nil {
		return fmt.Errorf("client certificate: %w", err)
	}
	id, err := identity.FromCertificate(pair.Leaf)
	if err != nil {
		return err
	}
	if id != m.id() {
		return fmt.Errorf("client certificate: it names %s, want %s", id, m.id())
	}
	m.client = pair.Leaf
	if m.RDPCertificate == "" {
		return nil
	}
	if pair, err = tls.X509KeyPair([]byte(m.RDPCertificate), []byte(m.RDPKey)); err != nil {
		return fmt.Errorf("RDP certificate: %w", err)
	}
	m.rdp = pair.Leaf
	return nil
}

// store is the state folder: one folder per generation of certificates, each complete before `current` names it, so
// that a crash at any point leaves either the old or the new.
type store struct{ dir string }

func (s store) prepare() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("--state-dir: %w", err)
	}
	if err := secureDir(s.dir); err != nil {
		return fmt.Errorf("--state-dir: keep others out of %s: %w", s.dir, err)
	}
	return nil
}

func (s store) load() (*member, error) {
	name, err := os.ReadFile(filepath.Join(s.dir, currentFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, errNoState
	}
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(s.dir, filepath.Base(strings.TrimSpace(string(name))))
	m := &member{dir: dir}
	data, err := os.ReadFile(filepath.Join(dir, memberFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, memberFile), err)
	}
	for file, to := range m.files() {
		data, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil && (!errors.Is(err, os.ErrNotExist) || to == &m.ClientCertificate || to == &m.ClientKey) {
			return nil, err
		}
		*to = string(data)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return m, nil
}

func (m *member) files() map[string]*string {
	return map[string]*string{
		mtls.CertFile: &m.ClientCertificate, mtls.KeyFile: &m.ClientKey, mtls.CAFile: &m.BusCA,
		rdpCertFile: &m.RDPCertificate, rdpKeyFile: &m.RDPKey,
	}
}

// save makes m, which has passed check, the generation in force and drops the older ones.
func (s store) save(m *member) error {
	tmp, err := os.MkdirTemp(s.dir, "new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(tmp, memberFile), data, 0o600); err != nil {
		return err
	}
	for file, text := range m.files() {
		if *text == "" {
			continue
		}
		if err := writeSynced(filepath.Join(tmp, file), []byte(*text), 0o600); err != nil {
			return err
		}
	}
	name := "gen-" + time.Now().UTC().Format("20060102T150405.000000000")
	m.dir = filepath.Join(s.dir, name)
	if err := os.Rename(tmp, m.dir); err != nil {
		return err
	}
	if err := writeAtomic(filepath.Join(s.dir, currentFile), []byte(name+"\n"), 0o600); err != nil {
		return err
	}
	// The old generation must not go before the new one is sure to stay.
	if err := syncDir(s.dir); err != nil {
		return err
	}
	s.prune(name)
	return nil
}

// prune removes what no longer counts. Leftovers do no harm, so errors don't matter.
func (s store) prune(keep string) {
	entries, _ := os.ReadDir(s.dir)
	for _, e := range entries {
		old := strings.HasPrefix(e.Name(), "gen-") && e.Name() != keep
		if old || strings.HasPrefix(e.Name(), "new-") {
			os.RemoveAll(filepath.Join(s.dir, e.Name()))
		}
	}
}

// writeAtomic replaces path so that a reader sees the old or the new content and nothing between.
func writeAtomic(path string, data []byte, mode os.FileMode) error {
	return writeAtomicFor(-1, path, data, mode)
}

// writeAtomicFor does so, and gives the file to a group, unless that is negative.
func writeAtomicFor(gid int, path string, data []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := writeSynced(tmp, data, mode); err != nil {
		return err
	}
	if gid >= 0 {
		if err := os.Chown(tmp, -1, gid); err != nil {
			return err
		}
	}
	return os.Rename(tmp, path)
}

func writeSynced(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	// The umask narrows the mode of a new file, and an old one keeps its own.
	err = f.Chmod(mode)
	if err == nil {
		_, err = f.Write(data)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
