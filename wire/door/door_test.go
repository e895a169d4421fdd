package door

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/wiretest"
)

// patience bounds waits for what must happen.
const patience = 20 * time.Second

const field = "spec.broker.service.proxyProtocol.networks of Workspace demo"

// stand is an HTTPS server behind a door, which answers whom it sees.
type stand struct {
	*Door
	t    *testing.T
	addr string
	log  *wiretest.Log
	hold chan struct{} // requests for /hold wait until it is closed

	mu    sync.Mutex
	ended map[string]int
}

func newStand(t *testing.T, o Options) *stand {
	t.Helper()
	s := &stand{t: t, log: &wiretest.Log{}, hold: make(chan struct{}), ended: map[string]int{}}
	o.Field, o.Log = field, slog.New(slog.NewTextHandler(s.log, nil))
	o.Ended = func(why string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ended[why]++
	}
	if o.Patience == 0 {
		o.Patience = patience
	}
	var err error
	if s.Door, err = New(o); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := From(r.Context())
		switch r.URL.Path {
		case "/vouch":
			c.Vouch()
		case "/hold":
			<-s.hold
		}
		fmt.Fprintf(w, "%s %q", r.RemoteAddr, c.Unbelieved())
	}))
	server.Config.ConnContext = ConnContext
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	server.Listener.Close()
	server.Listener = s.Listen(l)
	server.StartTLS()
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(s.hold) })
	return s
}

// ask sends a header and a request, and keeps the connection.
func (s *stand) ask(header, path string) (net.Conn, string, error) {
	s.t.Helper()
	tcp, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { tcp.Close() })
	io.WriteString(tcp, header)
	c := tls.Client(tcp, &tls.Config{InsecureSkipVerify: true})
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
	if path == "/hold" {
		return c, "", nil
	}
	buf := make([]byte, 4096)
	n, err := c.Read(buf)
	_, body, _ := strings.Cut(string(buf[:n]), "\r\n\r\n")
	return c, body, err
}

func (s *stand) silent() net.Conn {
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// closed says that a connection was ended by the other side.
func closed(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(patience))
	_, err := c.Read(make([]byte, 1))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

const (
	v1    = "PROXY TCP4 203.0.113.7 198.51.100.9 50123 443\r\n"
	v2    = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xcb\x00\x71\x07\xc6\x33\x64\x09\xc3\xcb\x01\xbb"
	local = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
)

func TestAddresses(t *testing.T) {
	loopback := config.Callers{ProxyNetworks: []string{"127.0.0.0/8"}}
	for name, c := range map[string]struct {
		callers config.Callers
		header  string
		remote  string // begins so
		field   string
	}{
		"no header":            {config.Callers{}, "", "127.0.0.1:", ""},
		"none of a proxy":      {loopback, "", "127.0.0.1:", ""},
		"version 1":            {loopback, v1, "203.0.113.7:50123 ", ""},
		"version 2":            {loopback, v2, "203.0.113.7:50123 ", ""},
		"a health check":       {loopback, local, "127.0.0.1:", ""},
		"of nobody's":          {config.Callers{}, v2, "127.0.0.1:", field},
		"of another network's": {config.Callers{ProxyNetworks: []string{"10.0.0.0/8"}}, v1, "127.0.0.1:", field},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, Options{Places: 64, Callers: c.callers})
			_, body, err := s.ask(c.header, "/")
			if err != nil || !strings.HasPrefix(body, c.remote) || !strings.HasSuffix(body, fmt.Sprintf(" %q", c.field)) {
				t.Errorf("%q, %v", body, err)
			}
			if warned := strings.Contains(s.log.String(), "level=WARN"); warned != (c.field != "") || warned && !strings.Contains(s.log.String(), field) {
				t.Errorf("logged %q", s.log.String())
			}
		})
	}
	if _, err := New(Options{Callers: config.Callers{ProxyNetworks: []string{"x"}}}); err == nil {
		t.Error("a network that is none")
	}
}

// Silent connections of one source have a quarter of the places; whoever speaks gets in, and stays once it is vouched for.
func TestStrangersAreBounded(t *testing.T) {
	const places = 64
	s := newStand(t, Options{Places: places})
	known, _, err := s.ask("", "/vouch")
	if err != nil {
		t.Fatal(err)
	}
	asking, _, err := s.ask("", "/hold")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is being served", func() bool { return s.Strangers() == 1 && s.Mute() == 0 })
	first := s.silent()
	for range 3 * places {
		s.silent()
	}
	if !closed(first) {
		t.Error("the first silent one may stay")
	}
	eventually(t, "the rest is a share", func() bool { return s.Strangers() == places/4 })
	if s.Mute() != places/4-1 {
		t.Errorf("%d are mute: who has spoken had to go", s.Mute())
	}
	if _, body, err := s.ask("", "/"); err != nil {
		t.Errorf("somebody honest: %q, %v", body, err)
	}
	fmt.Fprint(known, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if n, err := known.Read(make([]byte, 4096)); n == 0 {
		t.Errorf("who is known has gone: %v", err)
	}
	asking.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended[EndedLimit] < 2*places {
		t.Errorf("counted: %v", s.ended)
	}
}

// A proxy's connections count for whom they bring, where it says so, and for nobody where nothing can be known.
func TestProxiesAreNoSource(t *testing.T) {
	const places = 64
	for name, callers := range map[string]config.Callers{"hidden": {AddressesHidden: true}, "a proxy's": {ProxyNetworks: []string{"127.0.0.0/8"}}} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, Options{Places: places, Callers: callers})
			for range 2 * places {
				s.silent()
			}
			eventually(t, "all places are taken", func() bool { return s.Strangers() == places })
			if name == "hidden" {
				return
			}
			for range places {
				io.WriteString(s.silent(), v1)
			}
			eventually(t, "of one client there is a share", func() bool { return s.Strangers() <= places })
			if _, body, err := s.ask(v2, "/"); err != nil {
				t.Errorf("%q, %v", body, err)
			}
		})
	}
}

func TestSilenceEnds(t *testing.T) {
	for name, said := range map[string]string{"nothing": "", "a byte of a header": "P", "half a header": v2[:20], "a header alone": v2} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, Options{Places: 64, Patience: time.Second, Callers: config.Callers{ProxyNetworks: []string{"127.0.0.0/8"}}})
			c := s.silent()
			io.WriteString(c, said)
			if !closed(c) {
				t.Error("it may stay")
			}
			eventually(t, "its place is free", func() bool { return s.Strangers() == 0 })
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.ended[EndedSilent] != 1 {
				t.Errorf("counted: %v", s.ended)
			}
		})
	}
	t.Run("what can't be read", func(t *testing.T) {
		s := newStand(t, Options{Places: 64, Callers: config.Callers{ProxyNetworks: []string{"127.0.0.0/8"}}})
		c := s.silent()
		io.WriteString(c, "PROXY nonsense\r\n")
		if !closed(c) {
			t.Error("it may stay")
		}
		eventually(t, "it is counted", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.ended[EndedProxy] == 1 })
		if !strings.Contains(s.log.String(), "can't be read") {
			t.Errorf("logged %q", s.log.String())
		}
	})
}

// A listener that closes ends those who have said nothing.
func TestClose(t *testing.T) {
	d, err := New(Options{Places: 64, Patience: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	behind := d.Listen(l)
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, "it is there", func() bool { return d.Strangers() == 1 })
	behind.Close()
	if !closed(c) {
		t.Error("it may stay")
	}
	if _, err := behind.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	eventually(t, "it has gone", func() bool { return d.Strangers() == 0 })
}
