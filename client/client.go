// Package client is what `rdv` does for a desktop user: sign in to a workspace, list what may be used, measure and
// choose the gateway, start the user's own RDP client on a fresh signed file, and show the timeline of a connect.
//
//	store.go     the accounts, in the user's configuration folder
//	login.go     steps 1 and 2: OpenID Connect with PKCE (RFC 8252) or the device flow (RFC 8628)
//	feed.go      steps 3 to 6: the broker's HTTPS interface
//	measure.go   step 7: round trips to the gateways, and the choice
//	connect.go   the whole of a connect
//	rdpfile.go   reading .rdp files
//	launch.go    finding and starting the RDP client
//	handover.go  clients that hand the file on to another process
//	explain.go   the timeline
//	clean.go     what others wrote, for a terminal
//	whoami.go    the token as the workspace reads it
//	sessions.go  the user's own sessions
package client

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"rendezvous.dev/rendezvous/wire/clock"
	"rendezvous.dev/rendezvous/wire/idpurl"
)

// Client does the work of one rdv command.
type Client struct {
	Store Store
	// Workspace selects the account; empty is the current one.
	Workspace string
	// Out gets results, Err everything else that a person reads.
	Out, Err io.Writer
	// UserAgent says which rdv this is.
	UserAgent string

	// clock notices that this machine's is off.
	clock *clock.Watch
	// openBrowser is replaced in tests.
	openBrowser func(url string) error
}

// watch is the one that all requests go by.
func (c *Client) watch() *clock.Watch {
	if c.clock == nil {
		c.clock = &clock.Watch{}
	}
	return c.clock
}

// requestTimeout bounds one request to the broker or the identity provider.
const requestTimeout = 30 * time.Second

// roots are the machine's own CAs and the given PEM bundles.
func roots(bundles ...string) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	for _, b := range bundles {
		if b != "" && !pool.AppendCertsFromPEM([]byte(b)) {
			return nil, errors.New("the CA bundle holds no PEM certificate")
		}
	}
	return pool, nil
}

// httpClient trusts the machine's own CAs and the given bundles.
func (c *Client) httpClient(bundles ...string) (*http.Client, error) {
	pool, err := roots(bundles...)
	if err != nil {
		return nil, err
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}
	return &http.Client{Transport: agentHeader{c.watch().Transport(t), c.UserAgent}, Timeout: requestTimeout, CheckRedirect: idpurl.CheckRedirect}, nil
}

// agentHeader names this program in each request.
type agentHeader struct {
	next http.RoundTripper
	name string
}

func (a agentHeader) RoundTrip(r *http.Request) (*http.Response, error) {
	if a.name != "" {
		r = r.Clone(r.Context())
		r.Header.Set("User-Agent", a.name)
	}
	return a.next.RoundTrip(r)
}

// readCA reads --ca-file; none is fine.
func readCA(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("--ca-file: %w", err)
	}
	if _, err := roots(string(data)); err != nil {
		return "", fmt.Errorf("--ca-file: %s: %w", path, err)
	}
	return string(data), nil
}

// newActivity makes an activity id: a random GUID (RFC 9562, version 4), in lower case.
func newActivity() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
