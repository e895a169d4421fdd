package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// proxyV1 and proxyV2 are headers as HAProxy writes them, for a client at an address.
func proxyV1(client string) string {
	from := netip.MustParseAddrPort(client)
	to, family := "198.51.100.9", "TCP4"
	if from.Addr().Is6() {
		to, family = "2001:db8::9", "TCP6"
	}
	return fmt.Sprintf("PROXY %s %s %s %d 443\r\n", family, from.Addr(), to, from.Port())
}

func proxyV2(client string) string {
	from := netip.MustParseAddrPort(client)
	a, of := from.Addr().AsSlice(), byte(0x11)
	if from.Addr().Is6() {
		of = 0x21
	}
	body := append(append(a, a...), 0, 0, 1, 187)
	binary.BigEndian.PutUint16(body[2*len(a):], from.Port())
	return proxyHeaderV2(0x21, of, string(body)+"\xea\x00\x04vpce") // with a TLV
}

func proxyHeaderV2(command, of byte, rest string) string {
	return string(binary.BigEndian.AppendUint16([]byte("\r\n\r\n\x00\r\nQUIT\n"+string([]byte{command, of})), uint16(len(rest)))) + rest
}

const (
	proxyLocal   = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
	proxyUnknown = "PROXY UNKNOWN\r\n"
)

// behind has clients and agents come through a load balancer that sends that header; none where it is empty.
func (s *stack) behind(header string) {
	s.wrap = func(c net.Conn) net.Conn {
		if header != "" {
			io.WriteString(c, header)
		}
		return c
	}
}

// believing is a relay that believes headers from loopback.
func believing(o *Options, _ *fakeAdmission) { o.Config.ProxyNetworks = []string{"127.0.0.0/8"} }

// glued sends the header and the ClientHello at once; chopped sends the header in single bytes.
type glued struct {
	net.Conn
	header string
}

func (c *glued) Write(p []byte) (int, error) {
	_, err := c.Conn.Write(append([]byte(c.header), p...))
	c.header = ""
	return len(p), err
}

func chopped(c net.Conn, header string) {
	for i := range header {
		io.WriteString(c, header[i:i+1])
		if i%7 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

// The client's address reaches admission, timelines and logs, whatever client and header.
func TestProxyHeaderIsBelieved(t *testing.T) {
	for name, c := range map[string]struct{ header, client string }{
		"v1 IPv4": {proxyV1("203.0.113.7:50123"), "203.0.113.7:50123"},
		"v1 IPv6": {proxyV1("[2001:db8::7]:50123"), "[2001:db8::7]:50123"},
		"v2 IPv4": {proxyV2("203.0.113.7:50123"), "203.0.113.7:50123"},
		"v2 IPv6": {proxyV2("[2001:db8::7]:50123"), "[2001:db8::7]:50123"},
		// These name nobody, and leave the connection its own address.
		"v1 unknown": {proxyUnknown, ""},
		"v2 local":   {proxyLocal, ""},
		"v2 Unix":    {proxyHeaderV2(0x21, 0x31, strings.Repeat("x", 216)), ""},
		"none":       {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var asked []string
			s := newStack(t, func(o *Options, f *fakeAdmission) {
				believing(o, f)
				connect := f.connect
				f.connect = func(ctx context.Context, r *admission.ConnectRequest) *admission.ConnectResponse {
					asked = append(asked, r.ClientAddr)
					return connect(ctx, r)
				}
			})
			s.behind(c.header)
			for _, mode := range modes {
				asked = nil
				client, a := s.session(mode)
				client.Write([]byte("x"))
				expect(t, a, "x")
				a.Write([]byte("y"))
				expect(t, client, "y")
				if len(asked) != 1 || c.client != "" && asked[0] != c.client || c.client == "" && !strings.HasPrefix(asked[0], "127.0.0.1:") {
					t.Errorf("%s: admission was asked about %v, want %q", mode, asked, c.client)
				}
				activity := client.header.Get("Activity-Id")
				eventually(t, "the step is reported", func() bool {
					for _, r := range s.adm.list() {
						if p := r.GetStep(); p != nil && p.ActivityId == activity && p.Step == trace.StepDialGateway {
							return c.client == "" || strings.HasSuffix(p.Detail, " from "+c.client)
						}
					}
					return false
				})
				client.Close()
				a.Close()
			}
			s.dialRaw("forged", "")
			if c.client != "" && !strings.Contains(s.log.String(), `"peer":"`+c.client+`"`) {
				t.Error("the log doesn't tell the client's address")
			}
			s.idle()
			if strings.Contains(s.log.String(), `"level":"WARN"`) {
				t.Error("something was warned of")
			}
		})
	}
	for name, wrap := range map[string]func(c net.Conn) net.Conn{
		"with the ClientHello": func(c net.Conn) net.Conn { return &glued{c, proxyV2("203.0.113.7:1")} },
		"in single bytes":      func(c net.Conn) net.Conn { chopped(c, proxyV2("203.0.113.7:1")); return c },
		"with many TLVs": func(c net.Conn) net.Conn {
			return &glued{c, proxyHeaderV2(0x21, 0x11, strings.Repeat("\x01", 12+4000))}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, believing)
			s.wrap = wrap
			c, a := s.session(transportTSGU)
			c.Write([]byte("x"))
			expect(t, a, "x")
		})
	}
}

// Where headers aren't believed the client is told, in the form that it reads, and the log tells once what to set.
func TestProxyHeaderIsRefused(t *testing.T) {
	const field = "spec.service.proxyProtocol.networks of Gateway gateway-a"
	for name, networks := range map[string][]string{"switched off": nil, "from another network": {"10.0.0.0/8", "::1/128"}} {
		for version, header := range map[string]string{"v1": proxyV1("203.0.113.7:50123"), "v2": proxyV2("203.0.113.7:50123"), "LOCAL": proxyLocal, "UNKNOWN": proxyUnknown} {
			t.Run(name+" "+version, func(t *testing.T) {
				s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Config.ProxyNetworks = networks })
				s.behind(header)
				for range 3 {
					_, resp, e := s.dialRaw(testTicket, "")
					if e == nil || e.Code != refusal.ProxyHeader || !strings.Contains(e.Message, field) || e.ActivityID == "" || resp.StatusCode != http.StatusServiceUnavailable {
						t.Fatalf("raw: %s, %v", resp.Status, e)
					}
					if !strings.Contains(resp.Status, "PROXY protocol") {
						t.Errorf("FreeRDP shows %q", resp.Status)
					}
					eventually(t, "it is reported", func() bool { return len(s.failed(e.ActivityID)) > 0 })
					if p := s.failed(e.ActivityID)[0]; p.ClientAddr != trace.UnknownClient {
						t.Errorf("reported from %s", p.ClientAddr)
					}
				}
				if _, _, _, e := s.openOut(newGUID()); e == nil || e.Code != refusal.ProxyHeader {
					t.Errorf("legacy: %v", e)
				}
				for _, instance := range []string{testInstance, "10-0-0-2"} { // nor is it passed on
					if _, err := s.dialAgent(make([]byte, 32), instance, s.addr); err == nil || !strings.Contains(err.Error(), string(refusal.ProxyHeader)) {
						t.Errorf("agent: %v", err)
					}
				}
				c, err := s.dial(s.addr, testHost)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if resp, body := s.request(c, bufio.NewReader(c), "POST /api/arm/v2/connections HTTP/1.1\nHost: gw\nContent-Length: 0"); resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), `"Message":"The load balancer before gateway gateway-a`) {
					t.Errorf("ARM: %s %s", resp.Status, body)
				}
				if n := strings.Count(s.log.String(), `"level":"WARN"`); n != 1 || !strings.Contains(s.log.String(), `"field":"`+field+`"`) {
					t.Errorf("%d warnings", n)
				}
				s.behind("")
				s.session(transportRaw)
			})
		}
	}
}

// What can't be read is no client's, and says so in the log.
func TestProxyHeadersThatAreBroken(t *testing.T) {
	for name, c := range map[string]struct {
		networks []string
		header   string
		warned   string
	}{
		"v1":                  {[]string{"127.0.0.0/8"}, "PROXY TCP4 x y 1 2\r\n", "not of TCP4"},
		"v1, no end":          {[]string{"127.0.0.0/8"}, "PROXY TCP4 " + strings.Repeat("1", 200), "longer than 107"},
		"v2":                  {[]string{"127.0.0.0/8"}, proxyHeaderV2(0x21, 0x11, "x"), "too few"},
		"v2, too long":        {[]string{"127.0.0.0/8"}, proxyHeaderV2(0x21, 0x11, strings.Repeat("x", 60000)), "more than 4096"},
		"v2, of nobody's":     {nil, proxyHeaderV2(0x21, 0x11, strings.Repeat("x", 60000)), "spec.service.proxyProtocol.networks"},
		"two headers":         {[]string{"127.0.0.0/8"}, proxyV1("203.0.113.7:1") + proxyV1("203.0.113.8:1"), ""},
		"text":                {[]string{"127.0.0.0/8"}, "PROXIMA\r\n", ""},
		"cut, then TLS bytes": {[]string{"127.0.0.0/8"}, proxyV1("203.0.113.7:1")[:20], "version 1"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, func(o *Options, _ *fakeAdmission) {
				o.Config.ProxyNetworks, o.Config.HandshakeTimeoutSeconds = c.networks, 2
			})
			s.behind(c.header)
			if conn, err := s.dial(s.addr, testHost); err == nil {
				conn.Close()
				t.Fatal("TLS began")
			}
			s.idle()
			if log := s.log.String(); c.warned != "" && !strings.Contains(log, c.warned) || (c.warned != "") != strings.Contains(log, `"level":"WARN"`) {
				t.Errorf("want a warning of %q", c.warned)
			}
			s.behind("")
			s.session(transportRaw)
		})
	}
}

// A header that doesn't come, or not all of it, takes a stranger's place and time, and no more.
func TestSlowProxyHeader(t *testing.T) {
	for name, part := range map[string]string{"nothing": "", "a byte": "P", "half": proxyV2("203.0.113.7:1")[:20], "no ClientHello": proxyV2("203.0.113.7:1")} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, func(o *Options, f *fakeAdmission) {
				believing(o, f)
				o.Config.HandshakeTimeoutSeconds = 1
			})
			c, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, part)
			c.SetReadDeadline(time.Now().Add(patience))
			if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("it may stay")
			}
			s.idle()
		})
	}
}

// One client has its share of the places, however it comes, and the load balancer as such has no share at all.
func TestProxiedSourcesAreBounded(t *testing.T) {
	const places = 64
	s := newStack(t, func(o *Options, f *fakeAdmission) {
		believing(o, f)
		o.Config.MaxPending, o.Config.HandshakeTimeoutSeconds = places, 60
	})
	silent := func(header string) net.Conn {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		io.WriteString(c, header)
		return c
	}
	for n := range places / 4 * 3 { // each from somewhere else
		silent(proxyV1(fmt.Sprintf("203.0.113.%d:1", n)))
	}
	eventually(t, "they are there", func() bool { return s.relay.strangers.Len() == places/4*3 })
	var flood []net.Conn
	for range 2 * places {
		flood = append(flood, silent(proxyV2("198.51.100.66:1")))
	}
	eventually(t, "the flood is bounded", func() bool { return s.relay.strangers.Len() <= places })
	gone(t, flood[0])
	s.behind(proxyV1("192.0.2.1:1"))
	s.session(transportTSGU)
}

// Both channels of a client are compared by the address that the load balancer tells.
func TestProxiedChannelsPairByAddress(t *testing.T) {
	s := newStack(t, believing)
	id := newGUID()
	s.behind(proxyV2("203.0.113.7:1"))
	if _, _, _, e := s.openOut(id); e != nil {
		t.Fatal(e)
	}
	s.behind(proxyV2("203.0.113.8:1"))
	if _, e := s.openIn(id); e == nil || !strings.Contains(e.Message, "203.0.113.8") {
		t.Errorf("somebody else's IN channel: %v", e)
	}
	s.behind(proxyV2("203.0.113.7:2"))
	if _, e := s.openIn(id); e != nil {
		t.Error(e)
	}
}

// A connection for another pod is passed on as it came behind its header.
func TestProxiedAgentForAnotherPod(t *testing.T) {
	other := newStack(t, nil)
	s := newStack(t, func(o *Options, f *fakeAdmission) {
		believing(o, f)
		o.Instance = "10-0-0-2"
		f.route = func(*admission.RouteRequest) *admission.RouteResponse {
			return &admission.RouteResponse{Address: other.addr}
		}
	})
	s.roots = other.roots
	s.wrap = func(c net.Conn) net.Conn { return &glued{c, proxyV2("203.0.113.7:1")} }
	if _, err := s.dialAgent(make([]byte, 32), testInstance, s.addr); err == nil || !strings.Contains(err.Error(), string(refusal.JoinUnknown)) {
		t.Errorf("got %v, want the other pod's refusal", err)
	}
}

// Load balancers ask one path, by GET or HEAD, with or without a header, by name or by address, and take a 200 alone.
func TestHealthCheck(t *testing.T) {
	for name, header := range map[string]string{"plain": "", "LOCAL": proxyLocal, "UNKNOWN": proxyUnknown, "v2": proxyV2("203.0.113.7:1")} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, believing)
			s.behind(header)
			ask := func(head string) int {
				tcp, err := net.Dial("tcp", s.addr)
				if err != nil {
					t.Fatal(err)
				}
				c := tls.Client(s.wrap(tcp), &tls.Config{InsecureSkipVerify: true}) // and no name
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				io.WriteString(c, strings.ReplaceAll(head, "\n", "\r\n")+"\r\n\r\n")
				all, err := io.ReadAll(c)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(all))), nil)
				if err != nil {
					t.Fatal(err)
				}
				return resp.StatusCode
			}
			for _, head := range []string{
				"GET /healthz HTTP/1.1\nHost: 10.0.0.1\nUser-Agent: ELB-HealthChecker/2.0\nConnection: close",
				"HEAD /healthz HTTP/1.1\nHost: 10.0.0.1\nConnection: close",
				"GET /healthz HTTP/1.0",
				"GET /healthz/ HTTP/1.0",
			} {
				if status := ask(head); status != http.StatusOK {
					t.Errorf("%q: %d", head, status)
				}
			}
			if status := ask("POST /healthz HTTP/1.0"); status != http.StatusNotFound {
				t.Errorf("POST: %d", status)
			}
			s.session(transportRaw) // holds the drain up
			s.stop()
			eventually(t, "it drains", func() bool { return s.relay.draining.Load() })
			if status := ask("GET /healthz HTTP/1.0"); status != http.StatusServiceUnavailable {
				t.Errorf("while it drains: %d", status)
			}
		})
	}
}

// A health check that was set up without TLS is told so; what is no HTTP is told nothing.
func TestHTTPWithoutTLS(t *testing.T) {
	s := newStack(t, believing)
	for says, want := range map[string]string{
		"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n":             "HTTP/1.1 400 Speak TLS here: use https, for health checks too\r\n",
		proxyLocal + "HEAD / HTTP/1.0\r\n\r\n":                 "HTTP/1.1 400 Speak TLS here",
		"OPTIONS / HTTP/1.0\r\n\r\n":                           "HTTP/1.1 400 Speak TLS here",
		"RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\r\n\r\n": "HTTP/1.1 400 Speak TLS here",
		"SSH-2.0-OpenSSH_9.2\r\n":                              "",
		"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00":         "", // RDP itself
	} {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, says)
		c.SetReadDeadline(time.Now().Add(patience))
		got, err := io.ReadAll(c)
		c.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) || want == "" && strings.Contains(string(got), "HTTP") || !strings.HasPrefix(string(got), want) {
			t.Errorf("%q: %q, %v", says, got, err)
		}
	}
	s.idle()
}
