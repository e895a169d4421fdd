package idpurl

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"testing"
)

func TestForbiddenAddresses(t *testing.T) {
	for addr, kind := range map[string]string{
		"169.254.169.254": "link-local", "169.254.170.23": "link-local", "::ffff:169.254.169.254": "link-local", "fe80::a9fe:a9fe": "link-local", "fe80::1%eth0": "link-local",
		"64:ff9b::a9fe:a9fe": "link-local",
		"fd00:ec2::254":      "cloud platform's", "fd00:ec2::23": "cloud platform's", "fd20:ce::254": "cloud platform's", "168.63.129.16": "cloud platform's",
		"100.100.100.200": "cloud platform's", "192.0.0.192": "cloud platform's", "fd00:c1::a9fe:a9fe": "cloud platform's",
		"127.0.0.1": "loopback", "127.8.8.8": "loopback", "::1": "loopback", "::ffff:127.0.0.1": "loopback", "0.0.0.0": "loopback", "::": "loopback", "64:ff9b::7f00:1": "loopback",
		"224.0.0.1": "multicast", "ff02::1": "multicast",
		"10.96.0.10": "", "172.16.1.1": "", "192.168.1.1": "", "100.64.0.1": "", "fd12:3456::1": "", "203.0.113.7": "", "2001:db8::1": "", "168.63.129.17": "", "64:ff9b::cb00:7107": "",
	} {
		err := guard{}.check(netip.MustParseAddr(addr))
		var f *ForbiddenAddress
		if kind == "" && err != nil || kind != "" && (!errors.As(err, &f) || f.Kind != kind) {
			t.Errorf("%s: %v, want %q", addr, err, kind)
		}
		if err := (guard{loopback: true}).check(netip.MustParseAddr(addr)); (err != nil) != (kind != "" && kind != "loopback") {
			t.Errorf("%s for a provider on loopback: %v", addr, err)
		}
	}
}

// What a provider names is looked at as it is dialled: a name that resolves there, and where a redirect leads.
func TestClient(t *testing.T) {
	hits := 0
	inner := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits++ }))
	defer inner.Close()
	port := inner.Listener.Addr().(*net.TCPAddr).Port
	conf := &tls.Config{InsecureSkipVerify: true}
	at := func(host string) string { return (&url.URL{Scheme: "https", Host: netJoin(host, port)}).String() }
	for name, c := range map[string]struct {
		issuer, address string
		kind            string
	}{
		"loopback's own":     {at("127.0.0.1"), at("127.0.0.1"), ""},
		"loopback by name":   {at("localhost"), at("localhost"), ""},
		"loopback":           {"https://id.example.com", at("127.0.0.1"), "loopback"},
		"a name for it":      {"https://id.example.com", at("localhost"), "loopback"},
		"metadata":           {"https://id.example.com", "https://169.254.169.254/latest/meta-data/", "link-local"},
		"metadata, mapped":   {"https://id.example.com", "https://[::ffff:a9fe:a9fe]/", "link-local"},
		"of a loopback's":    {at("127.0.0.1"), "https://169.254.169.254/latest/meta-data/", "link-local"},
		"the wrong protocol": {"https://id.example.com", "https://[fd00:ec2::254]/latest/meta-data/", "cloud platform's"},
	} {
		t.Run(name, func(t *testing.T) {
			hits = 0
			resp, err := Client(c.issuer, conf).Get(c.address)
			if err == nil {
				resp.Body.Close()
			}
			var f *ForbiddenAddress
			switch {
			case c.kind == "" && (err != nil || hits != 1):
				t.Errorf("%v, %d requests", err, hits)
			case c.kind != "" && (!errors.As(err, &f) || f.Kind != c.kind || hits != 0):
				t.Errorf("%v, %d requests; want a %s address refused", err, hits, c.kind)
			}
		})
	}
	t.Run("a redirect", func(t *testing.T) {
		sends := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://169.254.169.254/latest/meta-data/", http.StatusFound)
		}))
		defer sends.Close()
		_, err := Client(sends.URL, conf).Get(sends.URL)
		var f *ForbiddenAddress
		if !errors.As(err, &f) || f.Kind != "link-local" {
			t.Errorf("got %v", err)
		}
	})
}

// A proxy of the environment may be on loopback, as a sidecar's is; what it is asked for may not, as far as that can be told.
func TestClientByProxy(t *testing.T) {
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.Host)
		http.Error(w, "no", http.StatusForbidden)
	}))
	defer proxy.Close()
	t.Setenv("HTTPS_PROXY", proxy.URL)
	t.Setenv("NO_PROXY", "")
	c := Client("https://id.example.com", nil)
	if _, err := c.Get("https://id.example.com/x"); err == nil || !strings.Contains(err.Error(), "Forbidden") {
		t.Errorf("got %v, want the proxy's answer", err)
	}
	_, err := c.Get("https://169.254.169.254/x")
	var f *ForbiddenAddress
	if !errors.As(err, &f) || len(asked) != 1 || asked[0] != "CONNECT id.example.com:443" {
		t.Errorf("got %v; the proxy was asked for %v", err, asked)
	}
}

func netJoin(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
