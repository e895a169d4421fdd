// Package proxydial dials as this machine's environment says: directly, or by CONNECT through an HTTP proxy. Which
// addresses go by the proxy is decided as golang.org/x/net/http/httpproxy documents it: HTTPS_PROXY and NO_PROXY, in capitals
// or small letters, and never the loopback.
package proxydial

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/http/httpproxy"
)

const (
	// maxAnswer bounds the head of a proxy's answer, in bytes.
	maxAnswer = 16 << 10
	// maxReason bounds what an error repeats of it.
	maxReason = 120
)

// Dialer dials. The zero value follows the environment.
type Dialer struct {
	// Proxy is used in place of HTTPS_PROXY, where not nil; NO_PROXY still applies.
	Proxy *url.URL
	// Net makes TCP connections.
	Net net.Dialer
}

// ParseProxy checks a proxy's URL as a flag gives it. It holds no password, which a list of processes would show: that comes
// as USER:PASSWORD in auth, and may be empty.
func ParseProxy(raw, auth string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" {
		return nil, errors.New("not the URL of an HTTP proxy: write http://HOST:PORT or https://HOST:PORT")
	}
	if u.User != nil {
		return nil, errors.New("it holds a user name or password, which every list of processes would show: put USER:PASSWORD into a file")
	}
	if auth = strings.TrimSpace(auth); auth != "" {
		user, password, ok := strings.Cut(auth, ":")
		if !ok || user == "" {
			return nil, errors.New("its credentials must be USER:PASSWORD")
		}
		u.User = url.UserPassword(user, password)
	}
	return u, nil
}

// For gives the proxy for an address (HOST:PORT), nil where it is dialled directly.
func (d Dialer) For(address string) (*url.URL, error) {
	env := httpproxy.FromEnvironment()
	if d.Proxy != nil {
		env.HTTPSProxy = d.Proxy.String()
	}
	u, err := env.ProxyFunc()(&url.URL{Scheme: "https", Host: address})
	if err != nil {
		// The error repeats the variable, which may hold a password.
		return nil, errors.New("HTTPS_PROXY is not a valid URL: write http://HOST:PORT")
	}
	return u, nil
}

// name is what may be said of a proxy: no user, no password.
func name(u *url.URL) string { return u.Scheme + "://" + u.Host }

// DialContext connects to an address, directly or through its proxy.
func (d Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	proxy, err := d.For(address)
	if err != nil {
		return nil, err
	}
	if proxy == nil {
		return d.Net.DialContext(ctx, network, address)
	}
	conn, err := d.connect(ctx, network, proxy, address)
	if err != nil {
		return nil, fmt.Errorf("proxy %s: %w", name(proxy), err)
	}
	return conn, nil
}

func (d Dialer) connect(ctx context.Context, network string, proxy *url.URL, address string) (_ net.Conn, err error) {
	port := proxy.Port()
	switch {
	case proxy.Scheme != "http" && proxy.Scheme != "https":
		return nil, fmt.Errorf("a proxy of kind %q is not supported: use an http or https one", proxy.Scheme)
	case port != "":
	case proxy.Scheme == "https":
		port = "443"
	default:
		port = "80"
	}
	conn, err := d.Net.DialContext(ctx, network, net.JoinHostPort(proxy.Hostname(), port))
	if err != nil {
		return nil, fmt.Errorf("it can't be reached: %w", err)
	}
	raw := conn
	defer func() {
		if err != nil {
			raw.Close()
		}
	}()
	if deadline, ok := ctx.Deadline(); ok {
		raw.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Now()) })
	defer stop()
	if proxy.Scheme == "https" {
		secure := tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: proxy.Hostname()})
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
		conn = secure
	}
	head := "CONNECT " + address + " HTTP/1.1\r\nHost: " + address + "\r\n"
	if u := proxy.User; u != nil {
		password, _ := u.Password()
		head += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)) + "\r\n"
	}
	if _, err := io.WriteString(conn, head+"\r\n"); err != nil {
		return nil, fmt.Errorf("CONNECT %s: %w", address, err)
	}
	bound := &io.LimitedReader{R: conn, N: maxAnswer}
	r := bufio.NewReader(bound)
	res, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	switch network := net.Error(nil); {
	case errors.As(err, &network), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("no answer to CONNECT %s: %w", address, err)
	case err != nil: // which repeats what came
		return nil, fmt.Errorf("no answer to CONNECT %s in HTTP: %q", address, clip(err.Error()))
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answered %q to CONNECT %s%s", clip(res.Status), address, hint(res.StatusCode))
	}
	if !stop() {
		return nil, ctx.Err()
	}
	raw.SetDeadline(time.Time{})
	bound.N = math.MaxInt64
	if r.Buffered() > 0 { // a server that speaks first, such as NATS
		return &early{Conn: conn, r: r}, nil
	}
	return conn, nil
}

func hint(status int) string {
	switch status {
	case http.StatusProxyAuthRequired:
		return ": it wants a user name and password"
	case http.StatusForbidden, http.StatusMethodNotAllowed:
		return ": it must allow CONNECT to that address and port"
	}
	return ""
}

// clip bounds what somebody else wrote.
func clip(s string) string {
	if len(s) > maxReason {
		return s[:maxReason] + "…"
	}
	return s
}

// early is a connection of which some bytes came with the proxy's answer.
type early struct {
	net.Conn
	r *bufio.Reader
}

func (c *early) Read(p []byte) (int, error) {
	if c.r.Buffered() > 0 {
		return c.r.Read(p)
	}
	return c.Conn.Read(p)
}
