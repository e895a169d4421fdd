package wiretest

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/wsframe"
)

// serve answers one connection with what comes after its request's head.
func serve(t *testing.T, answer func(c net.Conn, r *http.Request)) *tls.Conn {
	t.Helper()
	s := httptest.NewTLSServer(nil) // for its certificate alone
	t.Cleanup(s.Close)
	l, err := tls.Listen("tcp", "127.0.0.1:0", s.TLS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		if r, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			answer(c, r)
		}
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestOpenRaw(t *testing.T) {
	c, err := OpenRaw(serve(t, func(c net.Conn, r *http.Request) {
		if r.Host != "gw.example.test" || r.Header.Get("Authorization") != "Bearer secret" {
			io.WriteString(c, "HTTP/1.1 400 not what was to come\r\n\r\n")
			return
		}
		// What comes with the answer is part of the session.
		b := wsframe.AppendFrame([]byte("HTTP/1.1 101 Switching Protocols\r\nactivity-id: abc\r\n\r\n"), wsframe.Binary, []byte("hello"))
		c.Write(wsframe.AppendFrame(b, wsframe.Close, wsframe.ClosePayload(1001, "drained")))
		io.Copy(io.Discard, c)
	}), "gw.example.test", "secret")
	if err != nil {
		t.Fatal(err)
	}
	if c.Activity != "abc" {
		t.Errorf("activity %q", c.Activity)
	}
	got, err := io.ReadAll(c)
	if string(got) != "hello" || err == nil || !strings.Contains(err.Error(), "1001 drained") {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestRefused(t *testing.T) {
	_, err := OpenTSGU(serve(t, func(c net.Conn, r *http.Request) {
		io.WriteString(c, "HTTP/1.1 503 gateway is full\r\nContent-Length: 4\r\n\r\nbody")
	}), "gw.example.test", "secret", "pool")
	if err == nil || !strings.Contains(err.Error(), "503 gateway is full") || strings.Contains(err.Error(), "body") {
		t.Errorf("refused with %v", err)
	}
}
