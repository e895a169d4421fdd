package idpurl

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"golang.org/x/net/http/httpproxy"

	"rendezvous.dev/rendezvous/wire/metadata"
)

// Client is for asking an issuer, and the addresses that its discovery document names, from inside a cluster: it keeps to
// CheckRedirect, and connects to no address at which a cloud or the machine answers its own alone:
//
//	link-local, multicast, unspecified   among them the metadata services of most clouds
//	other metadata services              wire/metadata
//	loopback                             but for an issuer that is itself at a loopback address
//
// Private networks are allowed: a provider in the cluster has such an address. It looks at the address that is dialled, after
// the name was resolved. A proxy that the environment names is believed to resolve with the same care. One request, one
// connection.
func Client(issuer string, conf *tls.Config) *http.Client {
	g := guard{loopback: issuerIsLoopback(issuer)}
	proxy := httpproxy.FromEnvironment().ProxyFunc()
	dialer := &net.Dialer{Timeout: dialTimeout, Control: g.control}
	return &http.Client{CheckRedirect: CheckRedirect, Transport: &guarded{
		guard: g, proxy: proxy,
		direct: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true, DialContext: dialer.DialContext},
		proxied: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true,
			Proxy: func(r *http.Request) (*url.URL, error) { return proxy(r.URL) }},
	}}
}

const dialTimeout = 10 * time.Second

// guarded sends what goes by a proxy on without a look at the address that is dialled, which is the proxy's.
type guarded struct {
	guard
	proxy           func(*url.URL) (*url.URL, error)
	direct, proxied *http.Transport
}

// RoundTrip implements http.RoundTripper.
func (t *guarded) RoundTrip(r *http.Request) (*http.Response, error) {
	if addr, err := netip.ParseAddr(r.URL.Hostname()); err == nil {
		if err := t.check(addr); err != nil {
			return nil, err
		}
	}
	if via, err := t.proxy(r.URL); err != nil || via != nil {
		return t.proxied.RoundTrip(r)
	}
	return t.direct.RoundTrip(r)
}

// ForbiddenAddress says that no identity provider is asked at an address.
type ForbiddenAddress struct {
	Addr netip.Addr
	// Kind of address, such as link-local.
	Kind string
}

func (e *ForbiddenAddress) Error() string {
	return fmt.Sprintf("%s is a %s address, at which no identity provider is asked", e.Addr, e.Kind)
}

// nat64 is the prefix under which IPv4 addresses are reached from IPv6 (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

type guard struct {
	loopback bool // is allowed
}

func (g guard) check(addr netip.Addr) error {
	addr = addr.Unmap().WithZone("")
	if nat64.Contains(addr) {
		b := addr.As16()
		addr = netip.AddrFrom4([4]byte(b[12:]))
	}
	forbidden := func(kind string) error { return &ForbiddenAddress{addr, kind} }
	switch {
	case addr.IsLinkLocalUnicast():
		return forbidden("link-local")
	case addr.IsMulticast():
		return forbidden("multicast")
	case (addr.IsLoopback() || addr.IsUnspecified()) && !g.loopback:
		return forbidden("loopback")
	}
	for _, p := range metadata.Services {
		if p.Contains(addr) {
			return forbidden("cloud platform's")
		}
	}
	return nil
}

// control is a net.Dialer's: it is called with each address before it is connected to.
func (g guard) control(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("idpurl: %q is no address: %w", address, err)
	}
	return g.check(ap.Addr())
}
