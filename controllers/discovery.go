package controllers

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/event"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/idpurl"
	"rendezvous.dev/rendezvous/wire/jwks"
)

const (
	discoveryTimeout = 5 * time.Second
	discoveryRetry   = 20 * time.Second
	discoveryRefresh = time.Minute
	discoveryAtOnce  = 4
)

// Discovery asks identity providers for their discovery documents, aside from the reconcilers: Check answers at once
// with what is known, and an answer that comes in later wakes the Workspace that waits for it.
type Discovery struct {
	// Fetch asks one provider. Defaults to an HTTPS request. Tests set it.
	Fetch func(ctx context.Context, issuerURL, caBundle string) error
	// Now defaults to time.Now.
	Now func() time.Time

	events chan event.TypedGenericEvent[*rdv.Workspace]
	slots  chan struct{}

	mu      sync.Mutex
	entries map[types.NamespacedName]*discoveryEntry
}

type discoveryEntry struct {
	of      [sha256.Size]byte // issuer URL and CA bundle
	asking  bool
	known   bool
	err     error
	checked time.Time
}

// DiscoveryResult is what is known of a provider.
type DiscoveryResult struct {
	Known bool
	Err   error
	// Next is when to call Check again.
	Next time.Duration
}

// NewDiscovery makes a Discovery with its defaults.
func NewDiscovery() *Discovery {
	return &Discovery{
		Fetch:   fetchDiscovery,
		Now:     time.Now,
		events:  make(chan event.TypedGenericEvent[*rdv.Workspace], 64),
		slots:   make(chan struct{}, discoveryAtOnce),
		entries: map[types.NamespacedName]*discoveryEntry{},
	}
}

// Check says what is known of a workspace's provider, and has it asked where that is too old. Before the first answer to
// a question nothing is known.
func (d *Discovery) Check(workspace types.NamespacedName, issuerURL, caBundle string) DiscoveryResult {
	d.mu.Lock()
	defer d.mu.Unlock()
	question := sha256.Sum256([]byte(issuerURL + "\x00" + caBundle))
	entry := d.entries[workspace]
	if entry == nil || entry.of != question {
		entry = &discoveryEntry{of: question}
		d.entries[workspace] = entry
	}
	life := discoveryRefresh
	if entry.err != nil {
		life = discoveryRetry
	}
	left := life - d.Now().Sub(entry.checked)
	if !entry.known || left <= 0 {
		if !entry.asking {
			entry.asking = true
			go d.ask(workspace, entry, issuerURL, caBundle)
		}
		left = discoveryRetry
	}
	return DiscoveryResult{Known: entry.known, Err: entry.err, Next: left}
}

// Forget drops what is known for a workspace that is gone.
func (d *Discovery) Forget(workspace types.NamespacedName) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.entries, workspace)
}

func (d *Discovery) ask(workspace types.NamespacedName, entry *discoveryEntry, issuerURL, caBundle string) {
	d.slots <- struct{}{}
	ctx, cancel := context.WithTimeout(context.Background(), discoveryTimeout)
	err := d.Fetch(ctx, issuerURL, caBundle)
	cancel()
	<-d.slots

	d.mu.Lock()
	changed := !entry.known || fmt.Sprint(entry.err) != fmt.Sprint(err)
	entry.asking, entry.known, entry.err, entry.checked = false, true, err, d.Now()
	current := d.entries[workspace] == entry
	d.mu.Unlock()
	if changed && current {
		d.events <- event.TypedGenericEvent[*rdv.Workspace]{Object: &rdv.Workspace{
			ObjectMeta: metav1.ObjectMeta{Namespace: workspace.Namespace, Name: workspace.Name},
		}}
	}
}

// fetchDiscovery gets a provider's discovery document, and reads the keys that it names. Its errors hold nothing that changes
// from try to try, since they become conditions.
func fetchDiscovery(ctx context.Context, issuerURL, caBundle string) error {
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if strings.TrimSpace(caBundle) != "" {
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM([]byte(caBundle)) {
			return errors.New("the CA bundle holds no PEM certificate")
		}
	}
	client := idpurl.Client(issuerURL, tlsConfig)
	_, endpoints, err := idpurl.Discover(ctx, client, issuerURL)
	if cause := (*url.Error)(nil); errors.As(err, &cause) {
		return errors.New(stableReason(ctx, err))
	}
	if err != nil {
		return err
	}
	// Discovery alone signs nobody in: brokers need a key that they can use.
	if _, err := jwks.Fetch(ctx, client, endpoints.JWKS); err != nil {
		if cause := (*url.Error)(nil); errors.As(err, &cause) {
			return fmt.Errorf("its keys (jwks_uri) %s: %s", endpoints.JWKS, stableReason(ctx, err))
		}
		return fmt.Errorf("its keys (jwks_uri): %w", err)
	}
	return nil
}

// stableReason says why a request failed without the ports and addresses that differ from try to try.
func stableReason(ctx context.Context, err error) string {
	var unknownCA x509.UnknownAuthorityError
	var wrongName x509.HostnameError
	var invalid x509.CertificateInvalidError
	var dns *net.DNSError
	var forbidden *idpurl.ForbiddenAddress
	switch {
	case errors.As(err, &forbidden):
		return fmt.Sprintf("it is at a %s address, at which no identity provider is asked", forbidden.Kind)
	case errors.As(err, &unknownCA):
		return "its certificate is signed by a CA that is not trusted: set spec.identity.oidc.caBundle or caBundleRef"
	case errors.As(err, &wrongName):
		return "its certificate is for another name"
	case errors.As(err, &invalid):
		return "its certificate is not valid: " + invalid.Error()
	case errors.As(err, &dns):
		return fmt.Sprintf("the name %q can't be resolved", dns.Name)
	case ctx.Err() != nil:
		return fmt.Sprintf("no answer within %s", discoveryTimeout)
	case errors.Is(err, syscall.ECONNREFUSED):
		return "the connection is refused"
	}
	return "the request failed: " + lastCause(err)
}

// lastCause is the innermost error, which carries no addresses.
func lastCause(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}
