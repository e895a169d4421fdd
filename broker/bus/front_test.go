package bus

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/internal/testca"
	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// knock opens a connection that says no more than that.
func knock(t *testing.T, addr net.Addr, says string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	io.WriteString(c, says)
	return c
}

// dropped says that the other side ended a connection, whatever it said before.
func dropped(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, c)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// Strangers are bounded, one source to a share, those who have said nothing first; agents come in and stay.
func TestStrangersAreBounded(t *testing.T) {
	ca := testca.New(t, "ca")
	var mu sync.Mutex
	ended := map[string]int{}
	s := start(t, ca, Options{Ended: func(why string) { mu.Lock(); defer mu.Unlock(); ended[why]++ }})
	before := mustDial(t, s, ca, agentA)
	for _, addr := range []net.Addr{s.Addr(), s.WebSocketAddr()} {
		first := knock(t, addr, "")
		const more = strangers / 2
		for range more {
			knock(t, addr, "")
		}
		if !dropped(first) {
			t.Error("the first may stay")
		}
		eventually(t, "one source has a share", func() bool { return s.Strangers() == strangers/4 })
	}
	mustDial(t, s, ca, agentB)
	nc, err := dial("wss://"+s.WebSocketAddr().String(), ca.Reloader(gateway), gateway)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	// Those who speak, and then don't go on, are strangers all the same.
	speaking := knock(t, s.Addr(), "\x16\x03\x01")
	for range strangers / 2 {
		knock(t, s.Addr(), "\x16")
	}
	if !dropped(speaking) {
		t.Error("who began to speak may stay")
	}
	if n := s.Strangers(); n > strangers/4 {
		t.Errorf("%d strangers from one address", n)
	}
	if !before.IsConnected() || !nc.IsConnected() || s.Clients() != 3 {
		t.Errorf("%d clients are left of 3", s.Clients())
	}
	mu.Lock()
	defer mu.Unlock()
	if ended["limit"] < strangers/2 {
		t.Errorf("counted: %v", ended)
	}
}

// A stranger learns that this is a bus, and not whose, where, or of which version.
func TestGreetingTellsNothing(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{Name: "demo-broker-5d8f-x2x"})
	c := knock(t, s.Addr(), "")
	c.SetReadDeadline(time.Now().Add(patience))
	line := make([]byte, 4096)
	n, err := c.Read(line)
	text, ok := strings.CutPrefix(string(line[:n]), "INFO ")
	var info map[string]any
	if err != nil || !ok || json.Unmarshal([]byte(text), &info) != nil {
		t.Fatalf("%q, %v", line[:n], err)
	}
	for _, tells := range []string{"x2x", ns, ws, "go1", "127.0.0.1", `"version"`, "git_commit", "server_name", "cluster"} {
		if strings.Contains(text, tells) {
			t.Errorf("%q in %s", tells, text)
		}
	}
	if info["tls_required"] != true || info["max_payload"] != float64(maxPayload) {
		t.Errorf("it tells %v", info)
	}
	// Inside TLS clients learn all of it: they tell by it which of their connections is meant.
	nc := mustDial(t, s, ca, agentA)
	eventually(t, "it knows the server", func() bool {
		id, err := nc.GetClientID()
		return err == nil && id != 0 && nc.ConnectedServerName() == "demo-broker-5d8f-x2x"
	})
	if nc.MaxPayload() != maxPayload || !nc.HeadersSupported() {
		t.Errorf("payload %d, headers %v", nc.MaxPayload(), nc.HeadersSupported())
	}
}

// While many say nothing those who come wait for their greeting, and get it.
func TestGreetingUnderAFlood(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	for range calm + 1 {
		knock(t, s.Addr(), "")
	}
	eventually(t, "they are there", func() bool { return s.front.door.Mute() > calm })
	mustDial(t, s, ca, agentA)
}

const (
	proxyV1    = "PROXY TCP4 203.0.113.7 198.51.100.9 50123 443\r\n"
	proxyV2    = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xcb\x00\x71\x07\xc6\x33\x64\x09\xc3\xcb\x01\xbb"
	proxyLocal = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
)

// proxied is a dialer through a load balancer that sends a header.
type proxied string

func (p proxied) Dial(network, address string) (net.Conn, error) {
	c, err := net.Dial(network, address)
	if err == nil {
		_, err = io.WriteString(c, string(p))
	}
	return c, err
}

func TestProxyHeaders(t *testing.T) {
	ca := testca.New(t, "ca")
	urls := func(s *Server) []string {
		return []string{"tls://" + s.Addr().String(), "wss://" + s.WebSocketAddr().String()}
	}
	t.Run("believed", func(t *testing.T) {
		log := &wiretest.Log{}
		s := start(t, ca, Options{Log: slog.New(slog.NewJSONHandler(log, nil)), Callers: config.Callers{ProxyNetworks: []string{"127.0.0.0/8"}},
			Admit: func(id identity.ID, _ string, _ time.Time) error {
				if id == agentB {
					return errors.New("not this one")
				}
				return nil
			}})
		for _, url := range urls(s) {
			for _, header := range []string{proxyV1, proxyV2, proxyLocal, ""} {
				nc, err := dial(url, ca.Reloader(agentA), agentA, nats.SetCustomDialer(proxied(header)))
				if err != nil {
					t.Fatalf("%s with %q: %v", url, header, err)
				}
				nc.Close()
			}
			if _, err := dial(url, ca.Reloader(agentB), agentB, nats.SetCustomDialer(proxied(proxyV2))); err == nil {
				t.Fatal("let in")
			}
			// The server's own lines tell the client's address, too.
			c, err := proxied(proxyV1).Dial("tcp", strings.TrimPrefix(strings.TrimPrefix(url, "tls://"), "wss://"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
			if !dropped(c) {
				t.Error("it may go on without TLS")
			}
		}
		eventually(t, "the log tells addresses", func() bool {
			return strings.Count(log.String(), `"remote":"203.0.113.7:50123"`) == 2 && strings.Count(log.String(), "203.0.113.7:50123") >= 4
		})
	})
	t.Run("not believed", func(t *testing.T) {
		log := &wiretest.Log{}
		s := start(t, ca, Options{Log: slog.New(slog.NewJSONHandler(log, nil))})
		for _, url := range urls(s) {
			for _, header := range []string{proxyV1, proxyV2} {
				if nc, err := dial(url, ca.Reloader(agentA), agentA, nats.SetCustomDialer(proxied(header))); err == nil {
					nc.Close()
					t.Errorf("%s: let in", url)
				}
			}
		}
		if !strings.Contains(log.String(), `"field":"spec.broker.bus.service.proxyProtocol.networks of Workspace ws"`) {
			t.Errorf("logged %s", log.String())
		}
	})
	if _, err := Start(t.Context(), Options{Namespace: ns, Workspace: ws, Name: "x", Host: "127.0.0.1", Port: -1, WebSocketPort: -1, RoutePort: -1,
		TLS: ca.Reloader(identity.Broker(ns, ws)), Callers: config.Callers{ProxyNetworks: []string{"x"}}}); err == nil {
		t.Error("started with a network that is none")
	}
}

// Large messages both ways, slow readers and a server that goes: all as without what is in between.
func TestFrontCarries(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	broker := own(t, s)
	for _, url := range []string{"tls://" + s.Addr().String(), "wss://" + s.WebSocketAddr().String()} {
		nc, err := dial(url, ca.Reloader(agentA), agentA)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		echo(t, nc, wirebus.HostConnectSubject("pool", "a"))
		for _, size := range []int{1, 1 << 10, 32 << 10, 1 << 20} {
			sent := bytes.Repeat([]byte{7}, size)
			m, err := broker.Request(wirebus.HostConnectSubject("pool", "a"), sent, patience)
			if err != nil || !bytes.Equal(m.Data, sent) {
				t.Fatalf("%s, %d bytes: %v", url, size, err)
			}
		}
		nc.Close()
	}
	eventually(t, "they have left", func() bool { return s.Clients() == 0 })
	left := mustDial(t, s, ca, agentB)
	closed := make(chan struct{})
	left.SetClosedHandler(func(*nats.Conn) { close(closed) })
	s.Close()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Error("the client does not notice")
	}
	if c, err := net.Dial("tcp", s.Addr().String()); err == nil {
		c.Close()
		t.Error("the listener is open")
	}
}
