package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// Account is one workspace that the user signed in to.
type Account struct {
	// URL is the workspace's, https://HOST[:PORT].
	URL       string              `json:"url"`
	Workspace brokerapi.Workspace `json:"workspace"`
	// CA (PEM) was given at login; it verifies the workspace, its gateways and its identity provider, besides the
	// machine's own roots.
	CA           string    `json:"ca,omitempty"`
	User         string    `json:"user,omitempty"`
	IDToken      string    `json:"idToken"`
	RefreshToken string    `json:"refreshToken,omitempty"`
	Expiry       time.Time `json:"expiry"`
	// ClientSecret is what the provider in TokensOf wants of this client besides, where it knows no public ones. The
	// workspace doesn't have it: whoever runs the provider hands it out.
	ClientSecret string `json:"clientSecret,omitempty"`
	// RedirectPort is the port that the provider knows the redirect by; 0 where it takes any.
	RedirectPort int `json:"redirectPort,omitempty"`
	// TokensOf gave the tokens. The workspace may name another by now.
	TokensOf Provider `json:"tokensOf"`
}

// Provider is whom tokens are of: an identity provider, its client, and the CA that it was known by.
type Provider struct {
	IssuerURL string `json:"issuerURL"`
	ClientID  string `json:"clientID"`
	// CA is the SHA-256, in hex, of the certificates that the workspace named for it; empty where it named none.
	CA string `json:"ca,omitempty"`
}

// providerOf is the one that a workspace names.
func providerOf(w brokerapi.Workspace) Provider {
	return Provider{IssuerURL: w.IssuerURL, ClientID: w.ClientID, CA: fingerprint(w.IssuerCA)}
}

// fingerprint tells one CA bundle from another by its certificates, whatever stands around them.
func fingerprint(bundle string) string {
	var all []string
	for block, rest := pem.Decode([]byte(bundle)); block != nil; block, rest = pem.Decode(rest) {
		sum := sha256.Sum256(block.Bytes)
		all = append(all, hex.EncodeToString(sum[:]))
	}
	if len(all) == 0 {
		return ""
	}
	sort.Strings(all)
	sum := sha256.Sum256([]byte(strings.Join(all, "\n")))
	return hex.EncodeToString(sum[:])
}

// changes says, for a person, in what a workspace's provider differs from p.
func (p Provider) changes(w brokerapi.Workspace) (list []string) {
	now := providerOf(w)
	if p.IssuerURL != now.IssuerURL {
		list = append(list, fmt.Sprintf("its identity provider was %q and is %q", p.IssuerURL, now.IssuerURL))
	}
	if p.ClientID != now.ClientID {
		list = append(list, fmt.Sprintf("its client was %q and is %q", p.ClientID, now.ClientID))
	}
	if p.CA != now.CA {
		list = append(list, "the CA that it names for its identity provider is another")
	}
	return list
}

// Store keeps the accounts, one file each that only the user may read, and which of them is the current one.
type Store struct{ Dir string }

// DefaultStore is in the user's configuration folder.
func DefaultStore() (Store, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return Store{}, fmt.Errorf("no folder for the configuration: %w", err)
	}
	return Store{Dir: filepath.Join(dir, "rendezvous")}, nil
}

// key names an account's file: host and port, as one path element.
func key(workspaceURL string) string {
	u, err := url.Parse(workspaceURL)
	if err != nil {
		return "invalid"
	}
	return strings.NewReplacer(":", "_", "[", "", "]", "").Replace(strings.ToLower(u.Host))
}

func (s Store) path(name string) string {
	return filepath.Join(s.Dir, "workspaces", name+".json")
}

// Save writes an account.
func (s Store) Save(a *Account) error {
	data, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	return writePrivate(s.path(key(a.URL)), data)
}

// lockAgain is how often a lock that another rdv has is tried.
const lockAgain = 20 * time.Millisecond

// lock keeps other rdvs from renewing an account's tokens meanwhile, until unlock or the end of ctx.
func (s Store) lock(ctx context.Context, a *Account) (unlock func(), err error) {
	path := filepath.Join(s.Dir, "workspaces", key(a.URL)+".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		got, err := tryLock(f)
		if got {
			return func() { f.Close() }, nil
		}
		if err == nil {
			select {
			case <-time.After(lockAgain):
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
}

// Use makes an account the current one.
func (s Store) Use(a *Account) error {
	return writePrivate(filepath.Join(s.Dir, "current"), []byte(key(a.URL)+"\n"))
}

// Delete forgets an account.
func (s Store) Delete(a *Account) error {
	if cur, _ := s.current(); cur == key(a.URL) {
		if err := os.Remove(filepath.Join(s.Dir, "current")); err != nil {
			return err
		}
	}
	return os.Remove(s.path(key(a.URL)))
}

func (s Store) current() (string, error) {
	data, err := os.ReadFile(filepath.Join(s.Dir, "current"))
	return strings.TrimSpace(string(data)), err
}

// List gives all accounts, by URL.
func (s Store) List() ([]*Account, error) {
	files, err := filepath.Glob(filepath.Join(s.Dir, "workspaces", "*.json"))
	if err != nil {
		return nil, err
	}
	sort.Strings(files)
	var list []*Account
	for _, f := range files {
		a, err := s.read(f)
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, nil
}

func (s Store) read(path string) (*Account, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	a := &Account{}
	if err := json.Unmarshal(data, a); err != nil {
		return nil, fmt.Errorf("%s: %w: remove it and run `rdv login` again", path, err)
	}
	if a.TokensOf == (Provider{}) { // written by an rdv that saved a workspace only with tokens of its provider
		a.TokensOf = providerOf(a.Workspace)
	}
	return a, nil
}

// Find gives the account that selector means: its URL, host or workspace name; the current one where it is empty.
func (s Store) Find(selector string) (*Account, error) {
	all, err := s.List()
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, errors.New("not signed in to any workspace: run `rdv login https://WORKSPACE-HOST`")
	}
	if selector == "" {
		cur, _ := s.current()
		for _, a := range all {
			if key(a.URL) == cur || len(all) == 1 {
				return a, nil
			}
		}
		return nil, fmt.Errorf("which workspace? name one with --workspace: %s", names(all))
	}
	var found []*Account
	for _, a := range all {
		u, _ := url.Parse(a.URL)
		if selector == a.Workspace.Name || strings.TrimRight(selector, "/") == a.URL || u != nil && (selector == u.Host || selector == u.Hostname()) {
			found = append(found, a)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, fmt.Errorf("not signed in to workspace %q, only to: %s: run `rdv login` for it first", selector, names(all))
	}
	return nil, fmt.Errorf("workspace %q could be any of: %s: give its URL", selector, names(found))
}

func names(list []*Account) string {
	var urls []string
	for _, a := range list {
		urls = append(urls, a.Workspace.Name+" ("+a.URL+")")
	}
	return strings.Join(urls, ", ")
}

// writePrivate replaces a file that only the user may read.
func writePrivate(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// workspaceURL reads what a person types: a URL or a host.
func workspaceURL(text string) (string, error) {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return "", fmt.Errorf("%q is not a workspace's URL: it looks like https://WORKSPACE-HOST", text)
	}
	return "https://" + strings.ToLower(u.Host), nil
}
