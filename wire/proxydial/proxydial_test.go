package proxydial

import (
	"bufio"
	"context"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// proxy answers each CONNECT with what answer says, and reports the requests.
func proxy(t *testing.T, answer string) (*url.URL, chan *http.Request) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	asked := make(chan *http.Request, 8)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r, err := http.ReadRequest(bufio.NewReader(c))
				if err != nil {
					return
				}
				asked <- r
				io.WriteString(c, answer)
				io.Copy(c, c)
			}()
		}
	}()
	return &url.URL{Scheme: "http", Host: l.Addr().String()}, asked
}

func clearEnv(t *testing.T) {
	for _, v := range []string{"HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"} {
		t.Setenv(v, "")
	}
}

// What a server says first may come in one piece with the proxy's answer.
func TestEarlyBytes(t *testing.T) {
	clearEnv(t)
	u, asked := proxy(t, "HTTP/1.1 200 Connection established\r\n\r\nINFO {}\r\n")
	u.User = url.UserPassword("me", "s3cret")
	c, err := (Dialer{Proxy: u}).DialContext(t.Context(), "tcp", "broker.rdv.invalid:4222")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := <-asked
	if r.Method != "CONNECT" || r.Host != "broker.rdv.invalid:4222" {
		t.Errorf("asked %s %s", r.Method, r.Host)
	}
	if want := "Basic " + base64.StdEncoding.EncodeToString([]byte("me:s3cret")); r.Header.Get("Proxy-Authorization") != want {
		t.Errorf("credentials: %q", r.Header.Get("Proxy-Authorization"))
	}
	b := make([]byte, 9)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "INFO {}\r\n" {
		t.Errorf("read %q, %v", b, err)
	}
	io.WriteString(c, "hello")
	if _, err := io.ReadFull(c, b[:5]); err != nil || string(b[:5]) != "hello" {
		t.Errorf("read %q, %v", b[:5], err)
	}
}

// Errors name the proxy and what it answered, and never its password.
func TestErrors(t *testing.T) {
	clearEnv(t)
	for answer, want := range map[string]string{
		"HTTP/1.1 403 Forbidden by policy 17\r\n\r\n":           "must allow CONNECT",
		"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n":    "user name and password",
		"HTTP/1.1 502 " + strings.Repeat("x", 900) + "\r\n\r\n": "502 xxx",
		"SSH-2.0-OpenSSH\r\n\r\n":                               "no answer to CONNECT",
	} {
		u, _ := proxy(t, answer)
		u.User = url.UserPassword("me", "s3cret")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := (Dialer{Proxy: u}).DialContext(ctx, "tcp", "gateway.rdv.invalid:443")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), u.Host) {
			t.Errorf("%.20q: %v, want %q and the proxy", answer, err, want)
		} else if strings.Contains(err.Error(), "s3cret") || len(err.Error()) > 400 {
			t.Errorf("%.20q: %v", answer, err)
		}
	}
}

func TestFor(t *testing.T) {
	clearEnv(t)
	t.Setenv("HTTPS_PROXY", "http://me:s3cret@proxy.rdv.invalid:3128")
	t.Setenv("NO_PROXY", "inside.example.com,10.0.0.0/8")
	for address, want := range map[string]string{
		"gateway.example.com:443": "http://proxy.rdv.invalid:3128", "inside.example.com:443": "", "a.inside.example.com:4222": "",
		"10.1.2.3:443": "", "127.0.0.1:4222": "", "192.0.2.1:443": "http://proxy.rdv.invalid:3128",
	} {
		u, err := (Dialer{}).For(address)
		got := ""
		if u != nil {
			got = name(u)
		}
		if err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", address, got, err, want)
		}
	}
}

func TestParseProxy(t *testing.T) {
	for raw, ok := range map[string]bool{
		"http://p:3128": true, "https://p": true, "p:3128": false, "socks5://p:1080": false, "http://me:pw@p:3128": false, "http://p/x": false, "": false,
	} {
		if _, err := ParseProxy(raw, ""); (err == nil) != ok {
			t.Errorf("%q: %v", raw, err)
		} else if err != nil && strings.Contains(err.Error(), "me:pw") {
			t.Errorf("%q: the error shows the password: %v", raw, err)
		}
	}
	u, err := ParseProxy("http://p:3128", "me:a:b\n")
	if err != nil || u.User.String() != "me:a%3Ab" {
		t.Errorf("%v, %v", u, err)
	}
	if _, err := ParseProxy("http://p", "nobody"); err == nil {
		t.Error("credentials without a password were taken")
	}
}
