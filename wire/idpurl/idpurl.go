// Package idpurl is what rdv, brokers and the operator demand of an identity provider's addresses before they visit them: a
// discovery document (OpenID Connect Discovery 1.0) comes from outside, and what it names is sent secrets, opened in the
// user's browser, or asked for from inside the cluster's network.
//
//	an address       https, without user and fragment, of at most 2 KiB; http only where issuer and address are both loopback
//	a redirect       at most MaxRedirects, of GET only, from https to https
package idpurl

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// MaxRedirects bounds how often one request is sent elsewhere.
const MaxRedirects = 3

const (
	// maxAddress bounds an address, in bytes.
	maxAddress = 2048
	// maxShown bounds an address in an error, in bytes: errors become conditions.
	maxShown = 200
)

// Endpoints are the addresses in a discovery document that anything of ours visits.
type Endpoints struct {
	Authorization       string `json:"authorization_endpoint"`
	Token               string `json:"token_endpoint"`
	DeviceAuthorization string `json:"device_authorization_endpoint"`
	JWKS                string `json:"jwks_uri"`
}

// Check holds the addresses that the document has against the rules.
func (e Endpoints) Check(issuer string) error {
	return cmp.Or(
		check("authorization_endpoint", e.Authorization, issuer),
		check("token_endpoint", e.Token, issuer),
		check("device_authorization_endpoint", e.DeviceAuthorization, issuer),
		check("jwks_uri", e.JWKS, issuer),
	)
}

// CheckIssuer holds an issuer's own URL against the rules.
func CheckIssuer(issuer string) error {
	if issuer == "" {
		return errors.New("no issuer is named")
	}
	return check("issuer", issuer, issuer)
}

// check passes an address that is absent: whether it may be is the caller's to know.
func check(name, address, issuer string) error {
	if address == "" {
		return nil
	}
	u, err := url.Parse(address)
	if err == nil && len(address) <= maxAddress && u.Host != "" && u.User == nil && u.Fragment == "" {
		if u.Scheme == "https" || u.Scheme == "http" && isLoopback(u.Hostname()) && issuerIsLoopback(issuer) {
			return nil
		}
	}
	return fmt.Errorf("%s is %q: it must be an https:// URL without user and fragment, of at most %d bytes", name, shown(address), maxAddress)
}

func issuerIsLoopback(issuer string) bool {
	u, err := url.Parse(issuer)
	return err == nil && isLoopback(u.Hostname())
}

// isLoopback says whether a host is this machine's own.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return strings.EqualFold(host, "localhost") || ip != nil && ip.IsLoopback()
}

// IsWebPage says whether an address may be handed to a browser. A desktop's opener takes other schemes as well, and runs
// programs for some of them.
func IsWebPage(address string) bool {
	u, err := url.Parse(address)
	return err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Host != ""
}

// CheckRedirect is an http.Client's.
func CheckRedirect(next *http.Request, via []*http.Request) error {
	first, last := via[0], via[len(via)-1]
	switch {
	case len(via) > MaxRedirects:
		return fmt.Errorf("%s redirects more than %d times", first.URL.Host, MaxRedirects)
	case first.Method != http.MethodGet: // its body may be a secret
		return fmt.Errorf("%s redirects a %s, which is not followed", first.URL.Host, first.Method)
	case next.URL.Scheme == "https":
		return nil
	case next.URL.Scheme == "http" && last.URL.Scheme == "http" && isLoopback(next.URL.Hostname()) && isLoopback(last.URL.Hostname()):
		return nil
	}
	return fmt.Errorf("%s redirects to %s://%s, which is not https", first.URL.Host, next.URL.Scheme, next.URL.Host)
}
