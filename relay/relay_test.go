package relay

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// each runs a test in both modes, each with a relay of its own.
func each(t *testing.T, change func(*Options, *fakeAdmission), f func(t *testing.T, s *stack, mode string)) {
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) { f(t, newStack(t, change), mode) })
	}
}

func TestBytesPassBothWays(t *testing.T) {
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		for range 3 {
			c.Write([]byte("\x03client"))
			expect(t, a, "\x03client")
			a.Write([]byte("\x03host"))
			expect(t, c, "\x03host")
		}
		wantNotes := "[]"
		if mode != transportLegacy {
			wantNotes = "[pong hi]"
			if _, err := c.Conn.Write(wsframe.AppendMaskedFrame(nil, wsframe.Ping, []byte("hi"), maskKey)); err != nil {
				t.Fatal(err)
			}
		}
		c.Write([]byte("after")) // the pong comes before what the host answers to this
		expect(t, a, "after")
		a.Write([]byte("x"))
		expect(t, c, "x")
		if fmt.Sprint(c.notes) != wantNotes {
			t.Errorf("the ping was answered by %q", c.notes)
		}
		eventually(t, "all steps reported", func() bool {
			steps := map[uint32]bool{}
			for _, r := range s.adm.list() {
				if p := r.GetStep(); p != nil && p.ActivityId == c.header.Get("Activity-Id") && p.Workspace == "demo" && p.Error == "" {
					steps[p.Step] = true
				}
			}
			return steps[7] && steps[8] && steps[10] && steps[11] && steps[12]
		})
	})
}

// TestEveryByteArrivesInOrder: random pieces, random delays, both directions at once, frames cut and joined at random.
func TestEveryByteArrivesInOrder(t *testing.T) {
	const total = 3 << 20
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		s.wrap = func(c net.Conn) net.Conn { // TLS records arrive in parts, too
			return &trickle{c, rand.New(rand.NewPCG(uint64(c.LocalAddr().(*net.TCPAddr).Port), 0))}
		}
		c, a := s.session(mode)
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		stream := func(salt uint64) []byte {
			b := make([]byte, total)
			r := rand.NewChaCha8([32]byte{byte(seed), byte(salt)})
			r.Read(b)
			return b
		}
		up, down := stream(1), stream(2)
		var all sync.WaitGroup
		check := func(name string, from io.Reader, want []byte, r *rand.Rand) {
			got := 0
			buf := make([]byte, 70<<10)
			for got < len(want) {
				n, err := from.Read(buf[:1+r.IntN(len(buf))])
				if !bytes.Equal(buf[:n], want[got:got+n]) {
					t.Errorf("%s: wrong bytes at %d", name, got)
					return
				}
				got += n
				if err != nil {
					t.Errorf("%s: after %d of %d bytes: %v", name, got, len(want), err)
					return
				}
				if r.IntN(50) == 0 {
					time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
				}
			}
		}
		// What is sent is cut first into messages, then, apart from those, into writes.
		pieces := func(b []byte, r *rand.Rand, most int, f func([]byte)) {
			for len(b) > 0 {
				n := min(len(b), 1+r.IntN(most))
				if r.IntN(3) == 0 {
					n = min(n, 1+r.IntN(100))
				}
				f(b[:n])
				b = b[n:]
				if r.IntN(50) == 0 {
					time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
				}
			}
		}
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, 10))
			var framed []byte
			pieces(up, r, 40000, func(p []byte) {
				framed = append(framed, c.frame(p)...)
				if mode != transportLegacy && r.IntN(20) == 0 {
					framed = wsframe.AppendMaskedFrame(framed, wsframe.Pong, []byte("noise"), maskKey)
				}
				if c.tsgu && r.IntN(20) == 0 {
					framed = append(framed, c.message(tsgu.AppendKeepAlive(nil))...)
				}
			})
			pieces(framed, r, 50000, func(p []byte) { c.Conn.Write(p) })
		})
		all.Go(func() {
			pieces(down, rand.New(rand.NewPCG(seed, 11)), 90000, func(p []byte) { a.Write(p) })
		})
		all.Go(func() { check("client to host", a, up, rand.New(rand.NewPCG(seed, 12))) })
		all.Go(func() { check("host to client", c, down, rand.New(rand.NewPCG(seed, 13))) })
		all.Wait()
	})
}

// TestRandomCloseLosesNothingBefore: whatever one side wrote before its good-bye, the other reads.
func TestRandomCloseLosesNothingBefore(t *testing.T) {
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		for i := range 20 {
			c, a := s.session(mode)
			r := rand.New(rand.NewPCG(uint64(i), 7))
			data := bytes.Repeat([]byte("0123456789"), 1+r.IntN(30000))
			var from io.Reader
			if i%2 == 0 {
				from = c
				go func() { a.Write(data); a.CloseWrite() }()
			} else {
				from = a
				data = data[:min(len(data), 60000)] // one DATA packet
				go func() { c.Write(data); c.CloseWrite() }()
			}
			got, err := io.ReadAll(from)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("round %d: %d of %d bytes, %v", i, len(got), len(data), err)
			}
			c.Close()
			a.Close()
		}
	})
}

func TestHostEndsFirst(t *testing.T) {
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		a.Write([]byte("last words"))
		a.CloseWrite()
		got, err := io.ReadAll(c)
		if err != nil || string(got) != "last words" {
			t.Fatalf("the client read %q, %v", got, err)
		}
		if !c.closedWith("1000 host-closed; activity " + c.header.Get("Activity-Id")) {
			t.Errorf("the WebSocket was closed with %q", c.closed)
		}
		if c.tsgu && (c.status == nil || *c.status != 0) {
			t.Errorf("the channel was closed with %v, want status 0", c.status)
		}
		// The other direction still works, until its grace ends.
		c.Write([]byte("bye"))
		expect(t, a, "bye")
		c.Close()
		eventually(t, "ended", func() bool { return s.endReason(c) == hostClosed })
	})
}

func TestClientEndsFirst(t *testing.T) {
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		c.Write([]byte("bye"))
		if c.tsgu {
			c.packet(&tsgu.CloseChannel{Status: 0})
		} else {
			c.Conn.Write(wsframe.AppendMaskedFrame(nil, wsframe.Close, wsframe.ClosePayload(1000, ""), maskKey))
		}
		got, err := io.ReadAll(a)
		if err != nil || string(got) != "bye" {
			t.Fatalf("the agent read %q, %v", got, err)
		}
		a.Write([]byte("to the end")) // the host's direction still works
		expect(t, c, "to the end")
		a.Close()
		eventually(t, "ended", func() bool { return s.endReason(c) == clientClosed })
	})
}

// endReason is what the relay reported about the client's session, "" before.
func (s *stack) endReason(c *rdpClient) string {
	for _, r := range s.adm.list() {
		if e := r.GetEnded(); e != nil && e.Session.ActivityId == c.header.Get("Activity-Id") {
			return e.Reason
		}
	}
	return ""
}

// TestClientVanishes: no good-bye, while the host sends as fast as it can. Nothing may wait for the grace.
func TestClientVanishes(t *testing.T) {
	for _, how := range []string{"reset", "fin"} {
		t.Run(how, func(t *testing.T) {
			each(t, func(o *Options, _ *fakeAdmission) { o.CloseGrace = time.Hour }, func(t *testing.T, s *stack, mode string) {
				c, a := s.session(mode)
				flooding := make(chan error, 1)
				go func() {
					for {
						if _, err := a.Write(make([]byte, 16<<10)); err != nil {
							flooding <- err
							return
						}
					}
				}()
				io.ReadFull(c, make([]byte, 100<<10))
				tcp := c.NetConn().(*net.TCPConn)
				if how == "reset" {
					tcp.SetLinger(0)
				}
				tcp.Close()
				select {
				case <-flooding:
				case <-time.After(patience):
					t.Fatal("the host's leg goes on without a client")
				}
				eventually(t, "ended", func() bool { return s.endReason(c) == clientClosed })
			})
		})
	}
}

func TestHostVanishes(t *testing.T) {
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		tcp := a.NetConn().(*net.TCPConn)
		tcp.SetLinger(0)
		tcp.Close()
		io.ReadAll(c)
		if !c.closedWith("1001 host-closed") {
			t.Errorf("closed with %q", c.closed)
		}
		if c.tsgu && (c.status == nil || *c.status != tsgu.CloseAborted) {
			t.Errorf("the channel was closed with %v, want %#x", c.status, tsgu.CloseAborted)
		}
	})
}

// refusals are what the gateway container may say, and how each mode passes it on.
var refusals = []struct {
	code       refusal.Code
	early      bool // at Authenticate
	http       int
	tsguStatus uint32
}{
	{refusal.TicketMissing, true, 401, tsgu.ErrCookieBadPacket},
	{refusal.TicketInvalid, true, 401, tsgu.ErrCookieDenied},
	{refusal.TicketExpired, true, 401, tsgu.ErrCookieDenied},
	{refusal.NotGranted, false, 403, tsgu.ErrResourceAccessDenied},
	{refusal.Revoked, false, 403, tsgu.ErrResourceAccessDenied},
	{refusal.WrongTarget, false, 403, tsgu.ErrResourceAccessDenied},
	{refusal.UnknownResource, false, 404, tsgu.ErrResourceAccessDenied},
	{refusal.NoHost, false, 503, tsgu.ErrConnectFailed},
	{refusal.HostTimeout, false, 504, tsgu.ErrConnectFailed},
	{refusal.HostRefused, false, 503, tsgu.ErrConnectFailed},
	{refusal.HostFull, false, 503, tsgu.ErrMaxConnections},
	{refusal.BrokerAway, false, 503, tsgu.ErrInternal},
}

func TestRefusalsReachTheClient(t *testing.T) {
	var now atomic.Pointer[refusal.Code]
	var early atomic.Bool
	message := "Object desk is at fault: do this about it."
	s := newStack(t, func(_ *Options, f *fakeAdmission) {
		no := func() *admission.Error { return &admission.Error{Code: string(*now.Load()), Message: message} }
		f.authenticate = func(r *admission.AuthenticateRequest) *admission.AuthenticateResponse {
			if early.Load() {
				return &admission.AuthenticateResponse{Error: no()}
			}
			return &admission.AuthenticateResponse{Workspace: "demo", ActivityId: "AAAAAAAA-0000-4000-8000-00000000000A"}
		}
		f.connect = func(context.Context, *admission.ConnectRequest) *admission.ConnectResponse {
			return &admission.ConnectResponse{Error: no()}
		}
	})
	for _, tt := range refusals {
		t.Run(string(tt.code), func(t *testing.T) {
			now.Store(&tt.code)
			early.Store(tt.early)
			const given = "0f0e0d0c-0b0a-4908-8706-050403020100"
			want := given // the client's own id, until the ticket's replaces it
			if !tt.early {
				want = "aaaaaaaa-0000-4000-8000-00000000000a"
			}
			_, resp, e := s.dialRaw(testTicket, "\nActivity-Id: "+given)
			if resp.StatusCode != tt.http || e == nil || e.Code != tt.code || e.Message != message || e.ActivityID != want || resp.Header.Get("Activity-Id") != want {
				t.Errorf("raw: %s %v, header %q; want %d, %s, activity %s", resp.Status, e, resp.Header.Get("Activity-Id"), tt.http, tt.code, want)
			}
			if !strings.Contains(resp.Status, message) || !strings.Contains(resp.Status, want) {
				t.Errorf("the status line says %q; FreeRDP shows nothing else", resp.Status)
			}
			c := s.dialTSGU("\nRDG-Correlation-Id: {" + strings.ToUpper(given) + "}")
			if c.header.Get("Activity-Id") != given {
				t.Errorf("TSGU's 101 has Activity-Id %q, want %q", c.header.Get("Activity-Id"), given)
			}
			typ, status := c.open(testTicket, testTarget)
			wantType := tsgu.TypeChannelResponse
			if tt.early {
				wantType = tsgu.TypeTunnelResponse
			}
			if typ != wantType || status != tt.tsguStatus {
				t.Errorf("TSGU: packet %#x with %#x; want %#x with %#x", typ, status, wantType, tt.tsguStatus)
			}
			io.ReadAll(c)
			if c.closed != fmt.Sprintf("1008 %s; activity %s", tt.code, want) {
				t.Errorf("TSGU: closed with %q", c.closed)
			}
			if log := s.log.String(); strings.Count(log, `"code":"`+string(tt.code)+`"`) < 2 || !strings.Contains(log, `"activity":"`+want+`"`) {
				t.Error("the refusals are not in the log with their activity id")
			}
		})
	}
	if strings.Contains(s.log.String(), testTicket) {
		t.Error("the log holds a ticket")
	}
}

func TestTSGUHandshakeRefusals(t *testing.T) {
	s := newStack(t, nil)
	for _, tt := range []struct {
		name   string
		req    tsgu.HandshakeRequest
		status uint32
	}{
		{"no extended authentication", tsgu.HandshakeRequest{Major: 1}, tsgu.ErrUnsupportedAuthentication},
		{"NTLM", tsgu.HandshakeRequest{Major: 1, ExtAuth: tsgu.ExtAuthSSPINTLM}, tsgu.ErrUnsupportedAuthentication},
		{"newer version", tsgu.HandshakeRequest{Major: 2, ExtAuth: tsgu.ExtAuthPAA}, tsgu.ErrNotSupported},
		{"PAA among others", tsgu.HandshakeRequest{Major: 1, Minor: 3, ExtAuth: tsgu.ExtAuthPAA | tsgu.ExtAuthSmartCard}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, mode := range []string{transportTSGU, transportLegacy} {
				c := s.dialTunnel(mode)
				c.packet(&tt.req)
				resp, err := tsgu.ParseHandshakeResponse(c.want(tsgu.TypeHandshakeResponse))
				if err != nil || resp.Error != tt.status || resp.ExtAuth != tsgu.ExtAuthPAA || resp.Major != 1 {
					t.Errorf("%s: got %+v, %v; want status %#x", mode, resp, err, tt.status)
				}
			}
		})
	}
	for name, send := range map[string]func(c *rdpClient){
		"packet out of turn": func(c *rdpClient) { c.packet(&tsgu.TunnelAuth{}) },
		"text frame":         func(c *rdpClient) { c.Conn.Write(wsframe.AppendMaskedFrame(nil, wsframe.Text, []byte("x"), maskKey)) },
		"giant packet": func(c *rdpClient) {
			c.Conn.Write(wsframe.AppendMaskedFrame(nil, wsframe.Binary, []byte{4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, maskKey))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := s.dialTSGU("")
			send(c)
			io.ReadAll(c)
			if !strings.HasPrefix(c.closed, "1002 protocol-error; activity "+c.header.Get("Activity-Id")) {
				t.Errorf("closed with %q", c.closed)
			}
		})
	}
}

func TestTargetOfChannelCreate(t *testing.T) {
	asked := make(chan string, 1)
	s := newStack(t, func(_ *Options, f *fakeAdmission) {
		f.connect = func(_ context.Context, r *admission.ConnectRequest) *admission.ConnectResponse {
			asked <- r.Target
			return &admission.ConnectResponse{Error: &admission.Error{Code: string(refusal.NoHost), Message: "m"}}
		}
	})
	c := s.dialTSGU("")
	c.open(testTicket, "other.example")
	if got := <-asked; got != "other.example" {
		t.Errorf("asked for %q: what the client names must be passed on, for the gateway container to compare", got)
	}
}

func TestHTTPAnswers(t *testing.T) {
	s := newStack(t, nil)
	for _, tt := range []struct {
		name, head string
		status     int
		says       string
	}{
		{"legacy out without an id", "RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\nHost: x\nContent-Length: 0", 400, "RDG-Connection-Id"},
		{"legacy out with a body", "RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\nRDG-Connection-Id: " + testConnection + "\nContent-Length: 1", 400, "no body"},
		{"legacy in without an id", "RDG_IN_DATA /RemoteDesktopGateway HTTP/1.1\nHost: x\nTransfer-Encoding: chunked", 400, "RDG-Connection-Id"},
		{"legacy in without out", "RDG_IN_DATA /RemoteDesktopGateway HTTP/1.1\nRDG-Connection-Id: " + testConnection + "\nContent-Length: 0", 409, "opens it first"},
		{"legacy in with a plain body", "RDG_IN_DATA /RemoteDesktopGateway HTTP/1.1\nRDG-Connection-Id: " + testConnection + "\nContent-Length: 5", 400, "chunked"},
		{"legacy in with two lengths", "RDG_IN_DATA /RemoteDesktopGateway HTTP/1.1\nRDG-Connection-Id: " + testConnection + "\nContent-Length: 5\nTransfer-Encoding: chunked", 400, "both"},
		{"a hop's path", "GET /rendezvous/v1/pair HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: rendezvous-pair/1\nRDG-Connection-Id: " + testConnection, 404, "nothing at this path"},
		{"RPC out", "RPC_OUT_DATA /rpc/rpcproxy.dll HTTP/1.1\nHost: x", 404, "RPC over HTTP"},
		{"RPC", "RPC_IN_DATA /rpc/rpcproxy.dll?localhost:3388 HTTP/1.1\nHost: x", 404, "RPC over HTTP"},
		{"GET where TSGU is", "GET /remoteDesktopGateway/ HTTP/1.1\nHost: x", 405, "Method GET"},
		{"elsewhere", "GET / HTTP/1.1\nHost: x", 404, "nothing at this path"},
		{"raw without upgrade", "GET /rendezvous/v1/connect HTTP/1.1\nHost: x", 400, "\"Upgrade: websocket\""},
		{"an upgrade without a key", "GET /rendezvous/v1/connect HTTP/1.1\n" + strings.Replace(upgradeHeaders, "-Key:", "-Lock:", 1), 400, "\"Sec-WebSocket-Key\""},
		{"an upgrade of another version", "GET /rendezvous/v1/connect HTTP/1.1\n" + strings.Replace(upgradeHeaders, "13", "8", 1), 400, "\"Sec-WebSocket-Version: 13\""},
		{"two lengths", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nContent-Length: 0\nContent-Length: 54", 400, "Content-Length is repeated"},
		{"the same length twice", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nContent-Length: 0\ncontent-length: 0", 400, "Content-Length is repeated"},
		{"no length, then one", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nContent-Length:\nContent-Length: 54", 400, "not a number"},
		{"a list of lengths", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nContent-Length: 0, 54", 400, "not a number"},
		{"a negative length", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nContent-Length: -1", 400, "not a number"},
		{"a signed length", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nContent-Length: +0", 400, "not a number"},
		{"no transfer encoding, then one", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nTransfer-Encoding:\nTransfer-Encoding: chunked", 400, "chunked"},
		{"another transfer encoding", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nTransfer-Encoding: gzip, chunked", 400, "chunked"},
		{"chunked twice", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked", 400, "repeated"},
		{"two hosts", "GET /rendezvous/v1/ping HTTP/1.1\nHost: x\nHost: x", 400, "Host is repeated"},
		{"join without upgrade", "GET /rendezvous/v1/join HTTP/1.1\nHost: x", 400, "update the agent"},
		{"no ticket", "GET /rendezvous/v1/connect HTTP/1.1\n" + upgradeHeaders, 401, "again"},
		{"malformed", "NONSENSE", 400, "malformed"},
		{"long", "GET / HTTP/1.1\nX: " + strings.Repeat("x", maxHead), 431, "longer than"},
		{"HTTP/2", "GET / HTTP/2.0", 505, "HTTP/1.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := s.dial(s.addr, testHost)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			resp, body := s.request(c, bufio.NewReader(c), tt.head)
			e := decodeRefusal(t, body)
			if resp.StatusCode != tt.status || !strings.Contains(e.Message, tt.says) || e.ActivityID == "" || resp.Header.Get("Activity-Id") != e.ActivityID {
				t.Errorf("%s %v (header %q); want %d and %q", resp.Status, e, resp.Header.Get("Activity-Id"), tt.status, tt.says)
			}
		})
	}
	t.Run("ping, twice on one connection", func(t *testing.T) {
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		r := bufio.NewReader(c)
		for range 2 {
			if resp, _ := s.request(c, r, "GET /rendezvous/v1/ping HTTP/1.1\nHost: x"); resp.StatusCode != http.StatusNoContent || parseGUID(resp.Header.Get("Activity-Id")) == "" {
				t.Errorf("%s %v", resp.Status, resp.Header)
			}
		}
	})
	t.Run("a hidden request is not answered", func(t *testing.T) {
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprint(c, "GET /rendezvous/v1/ping HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 54\r\n\r\nGET /rendezvous/v1/ping HTTP/1.1\r\nHost: smuggled\r\n\r\n")
		all, _ := io.ReadAll(c)
		if n := strings.Count(string(all), "HTTP/1.1 "); n != 1 || !strings.HasPrefix(string(all), "HTTP/1.1 400") {
			t.Errorf("%d answers: %q", n, all)
		}
	})
	t.Run("the key of FreeRDP 2.11.7", func(t *testing.T) {
		const key = "VGBR@VFTW^RDEPL" // seen; no base64
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		head := "RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\n" + strings.Replace(upgradeHeaders, "dGhlIHNhbXBsZSBub25jZQ==", key, 1)
		resp, body := s.request(c, bufio.NewReader(c), head)
		if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Sec-WebSocket-Accept") != wsframe.AcceptKey(key) {
			t.Errorf("%s %s", resp.Status, body)
		}
	})
	t.Run("subprotocol binary is echoed", func(t *testing.T) {
		c := s.dialTSGU("\nSec-WebSocket-Protocol: binary")
		if c.header.Get("Sec-WebSocket-Protocol") != "binary" || c.header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
			t.Errorf("headers %v", c.header)
		}
	})
	t.Run("ticket in the query", func(t *testing.T) {
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if resp, body := s.request(c, bufio.NewReader(c), "GET /rendezvous/v1/connect?access_token="+testTicket+" HTTP/1.1\n"+upgradeHeaders); resp.StatusCode != 101 {
			t.Errorf("%s %s", resp.Status, body)
		}
		s.agent()
	})
	if strings.Contains(s.log.String(), testTicket) {
		t.Error("the log holds a ticket")
	}
}

func TestJoinSecretIsGoodOnce(t *testing.T) {
	s := newStack(t, nil)
	c, a := s.session(transportRaw)
	for name, secret := range map[string][]byte{"replayed": a.secret, "guessed": make([]byte, 32), "empty": nil} {
		_, err := s.dialAgent(secret, testInstance, s.addr)
		if err == nil || !strings.Contains(err.Error(), "403") || !strings.Contains(err.Error(), string(refusal.JoinUnknown)) || !strings.Contains(err.Error(), "connects again") || !strings.Contains(err.Error(), "activityId") {
			t.Errorf("%s secret: %v", name, err)
		}
	}
	c.Write([]byte("still")) // the session is none the worse
	expect(t, a, "still")
	if n := len(s.relay.joins.waiting); n != 0 {
		t.Errorf("%d joins wait", n)
	}
}

func TestJoinForAnotherInstance(t *testing.T) {
	s := newStack(t, nil)
	c, err := s.dial(s.addr, testHost) // as through a proxy that hides the server name
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	resp, body := s.request(c, bufio.NewReader(c), "GET /rendezvous/v1/join HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: "+joinProtocol+"\nAuthorization: Bearer AAAA\nRendezvous-Instance: 10-0-0-9")
	if e := decodeRefusal(t, body); resp.StatusCode != http.StatusMisdirectedRequest || e.Code != refusal.UnknownInstance || !strings.Contains(e.Message, "10-0-0-9") {
		t.Errorf("%s %v", resp.Status, e)
	}
}

// TestSpliceToPeer: two relays of one gateway; the agent reaches the wrong one.
func TestSpliceToPeer(t *testing.T) {
	holder := newStack(t, nil)
	door := newStack(t, func(o *Options, f *fakeAdmission) {
		o.Instance = "10-0-0-2"
		f.route = func(r *admission.RouteRequest) *admission.RouteResponse {
			if r.Instance != testInstance {
				return &admission.RouteResponse{Error: &admission.Error{Code: string(refusal.UnknownInstance), Message: "no"}}
			}
			return &admission.RouteResponse{Address: holder.addr}
		}
	})
	holder.adm.connect = func(_ context.Context, r *admission.ConnectRequest) *admission.ConnectResponse {
		secret := bytes.Clone(r.JoinSecret)
		go func() {
			a, err := holder.dialAgent(secret, testInstance, door.addr)
			if err != nil {
				t.Error(err)
				return
			}
			holder.agents <- a
		}()
		return &admission.ConnectResponse{Host: "pool/host"}
	}
	c, a := holder.session(transportTSGU)
	big := strings.Repeat("0123456789", 100000)
	go a.Write([]byte(big))
	expect(t, c, big)
	c.Write([]byte("up"))
	expect(t, a, "up")
	a.CloseWrite()
	io.ReadAll(c)
	c.Close()
	io.ReadAll(a)
	a.Close()
	eventually(t, "the splice ends", func() bool { door.relay.mu.Lock(); defer door.relay.mu.Unlock(); return door.relay.splices == 0 })

	if conn, err := holder.dial(door.addr, "10-9-9-9.join."+testHost); err == nil {
		conn.Close()
		t.Error("an instance that nobody knows was served")
	}
}

func TestHostThatNeverComes(t *testing.T) {
	each(t, func(o *Options, f *fakeAdmission) {
		o.Config.JoinTimeoutSeconds = 1
		f.connect = func(context.Context, *admission.ConnectRequest) *admission.ConnectResponse {
			return &admission.ConnectResponse{Host: "pool/sleepy"}
		}
	}, func(t *testing.T, s *stack, mode string) {
		if mode == transportRaw {
			_, resp, e := s.dialRaw(testTicket, "")
			if e == nil || e.Code != refusal.HostTimeout || !strings.Contains(e.Message, "pool/sleepy") || !strings.Contains(e.Message, "check the host's way out to "+testHost) || resp.StatusCode != 504 {
				t.Errorf("%s %v", resp.Status, e)
			}
		} else if typ, status := s.dialTunnel(mode).open(testTicket, testTarget); typ != tsgu.TypeChannelResponse || status != tsgu.ErrConnectFailed {
			t.Errorf("packet %#x, status %#x", typ, status)
		}
		s.idle()
	})
}

// idle waits until the relay holds nothing.
func (s *stack) idle() {
	s.t.Helper()
	eventually(s.t, "the relay is idle", func() bool {
		s.relay.mu.Lock()
		defer s.relay.mu.Unlock()
		s.relay.joins.mu.Lock()
		defer s.relay.joins.mu.Unlock()
		return s.relay.places.queue.Len() == 0 && len(s.relay.places.held) == 0 && len(s.relay.sessions) == 0 && len(s.relay.joins.waiting) == 0 && len(s.relay.conns) == 0 && s.relay.halves.len() == 0 && s.relay.strangers.Len() == 0
	})
}

func TestClientLeavesWhileItsHostIsComing(t *testing.T) {
	each(t, func(o *Options, f *fakeAdmission) {
		o.Config.JoinTimeoutSeconds = 3600
		f.connect = func(ctx context.Context, _ *admission.ConnectRequest) *admission.ConnectResponse {
			<-ctx.Done() // an orchestration that the client's leaving must end
			return &admission.ConnectResponse{}
		}
	}, func(t *testing.T, s *stack, mode string) {
		if mode == transportRaw {
			c, err := s.dial(s.addr, testHost)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(c, strings.ReplaceAll("GET /rendezvous/v1/connect HTTP/1.1\n"+upgradeHeaders+"\nAuthorization: Bearer "+testTicket+"\n\n", "\n", "\r\n"))
			eventually(t, "waiting", func() bool {
				s.relay.joins.mu.Lock()
				defer s.relay.joins.mu.Unlock()
				return len(s.relay.joins.waiting) == 1
			})
			c.Close()
		} else {
			c := s.dialTunnel(mode)
			c.packet(&tsgu.HandshakeRequest{Major: 1, ExtAuth: tsgu.ExtAuthPAA})
			create := &tsgu.TunnelCreate{}
			create.SetCookie(testTicket)
			c.packet(create)
			c.packet(&tsgu.TunnelAuth{})
			c.packet(&tsgu.ChannelCreate{Port: 3389, Protocol: 3, Names: []tsgu.Text{tsgu.NewText(testTarget)}})
			eventually(t, "waiting", func() bool {
				s.relay.joins.mu.Lock()
				defer s.relay.joins.mu.Unlock()
				return len(s.relay.joins.waiting) == 1
			})
			c.Close()
		}
		s.idle()
		if strings.Contains(s.log.String(), string(refusal.HostTimeout)) {
			t.Error("the host was blamed")
		}
	})
}

func TestLimits(t *testing.T) {
	each(t, func(o *Options, _ *fakeAdmission) { o.Config.MaxSessions = 1 }, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		_, resp, e := s.dialRaw(testTicket, "")
		if e == nil || e.Code != refusal.GatewayFull || resp.StatusCode != 503 || !strings.Contains(e.Message, "limit of 1 sessions") || !strings.Contains(e.Message, "gateway-a") {
			t.Errorf("raw over the limit: %s %v", resp.Status, e)
		}
		c.Close()
		a.Close()
		s.idle()
		s.session(mode) // the place is free again
	})
	t.Run("strangers", func(t *testing.T) {
		s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Config.MaxPending = 2 })
		var silent []net.Conn
		for i := range 3 {
			c, err := net.Dial("tcp", s.addr) // says nothing
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			silent = append(silent, c)
			eventually(t, "it is counted", func() bool { return s.relay.strangers.Len() == min(i+1, 2) })
		}
		gone(t, silent[0])
		if n := s.relay.strangers.Len(); n != 2 {
			t.Errorf("%d strangers are there", n)
		}
	})
	t.Run("a flood of strangers keeps no session from starting", func(t *testing.T) {
		s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Config.MaxPending = 4 })
		for range 40 {
			c, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		s.session(transportRaw)
		s.session(transportTSGU)
	})
	t.Run("silent strangers are sent away", func(t *testing.T) {
		s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Config.HandshakeTimeoutSeconds = 1 })
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a silent stranger may stay")
		}
		s.idle()
	})
}

// TestVanishedPeersAreFound: connections inherit what finds a peer that has vanished without a word.
func TestVanishedPeersAreFound(t *testing.T) {
	s := newStack(t, nil)
	s.session(transportRaw)
	for _, session := range s.relay.live() {
		for _, l := range []*leg{session.client.leg, session.host} {
			for _, o := range socketOptions {
				l.tcp.raw.Control(func(fd uintptr) {
					if v, err := unix.GetsockoptInt(int(fd), o.level, o.name); err != nil || v != o.value {
						t.Errorf("option %d of level %d is %d, %v; want %d", o.name, o.level, v, err, o.value)
					}
				})
			}
		}
	}
}

// TestTicketVouches: a raw client whose ticket is being looked at is no stranger, for that may take as long as its host
// does; one whose ticket was refused is, at once.
func TestTicketVouches(t *testing.T) {
	s := newStack(t, func(_ *Options, f *fakeAdmission) {
		f.connect = func(ctx context.Context, _ *admission.ConnectRequest) *admission.ConnectResponse {
			<-ctx.Done()
			return &admission.ConnectResponse{}
		}
	})
	ask := func(ticket string) net.Conn {
		t.Helper()
		c, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprint(c, strings.ReplaceAll("GET /rendezvous/v1/connect HTTP/1.1\n"+upgradeHeaders+"\nAuthorization: Bearer "+ticket+"\n\n", "\n", "\r\n"))
		return c
	}
	waiting := ask(testTicket)
	eventually(t, "it waits, vouched for", func() bool {
		s.relay.joins.mu.Lock()
		defer s.relay.joins.mu.Unlock()
		return len(s.relay.joins.waiting) == 1 && s.relay.strangers.Len() == 0
	})
	refused := ask("bad")
	expect(t, refused, "HTTP/1.1 401") // and the relay waits for it to go
	if n := s.relay.strangers.Len(); n != 1 {
		t.Errorf("%d strangers while a refused client lingers, want 1", n)
	}
	refused.Close()
	waiting.Close()
	s.idle()
}

// gone waits until the relay has closed c.
func gone(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the stranger may stay: %v", err)
	}
}

// Under the name that agents join by, there is nothing for clients: by another pod they would have that pod's address.
func TestAgentsNameIsForJoins(t *testing.T) {
	s := newStack(t, nil)
	for _, head := range []string{
		"GET /rendezvous/v1/connect HTTP/1.1\n" + upgradeHeaders + "\nAuthorization: Bearer " + testTicket,
		"RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\n" + upgradeHeaders,
		"RDG_IN_DATA /remoteDesktopGateway/ HTTP/1.1\nRDG-Connection-Id: " + testConnection + "\nContent-Length: 0",
		"POST /api/arm/v2/connections HTTP/1.1\nAuthorization: Bearer " + testTicket + "\nContent-Length: 0",
	} {
		c, err := s.dial(s.addr, testInstance+".join."+testHost)
		if err != nil {
			t.Fatal(err)
		}
		resp, body := s.request(c, bufio.NewReader(c), head)
		c.Close()
		if e := decodeRefusal(t, body); resp.StatusCode != 404 || !strings.Contains(e.Message, "agents join") {
			t.Errorf("%.30s: %s %v", head, resp.Status, e)
		}
	}
}

// TestAgentsAreSpared: clients that say nothing more push each other out, and not the agent that is about to join; agents
// that say nothing more push clients out, up to half of the places.
func TestAgentsAreSpared(t *testing.T) {
	s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Config.MaxPending = 4 })
	var clients, agents []net.Conn
	come := func(to *[]net.Conn, name string) {
		t.Helper()
		c, err := s.dial(s.addr, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		*to = append(*to, c)
	}
	agentName := testInstance + ".join." + testHost
	come(&agents, agentName)
	for range 5 {
		come(&clients, testHost)
	}
	gone(t, clients[0])
	gone(t, clients[1])
	for range 5 {
		come(&agents, agentName)
	}
	gone(t, agents[0])
	for _, c := range []net.Conn{agents[5], agents[4]} {
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\n\r\n", pathPing)
		expect(t, c, "HTTP/1.1 204")
	}
	s.session(transportTSGU)
}

func TestGatewayContainerAway(t *testing.T) {
	s := newStack(t, nil)
	c, a := s.session(transportRaw)
	s.stopAdmission()
	_, resp, e := s.dialRaw(testTicket, "")
	if e == nil || e.Code != refusal.AdmissionAway || resp.StatusCode != 503 || !strings.Contains(e.Message, "try again") {
		t.Errorf("%s %v", resp.Status, e)
	}
	c.Write([]byte("goes on"))
	expect(t, a, "goes on")
}

func TestIdleTimeout(t *testing.T) {
	each(t, func(o *Options, _ *fakeAdmission) { o.Config.IdleTimeoutSeconds = 1 }, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		c.Write([]byte("x"))
		expect(t, a, "x")
		io.ReadAll(c)
		if !c.closedWith("1001 idle-timeout") {
			t.Errorf("closed with %q", c.closed)
		}
		if c.tsgu && (c.status == nil || *c.status != tsgu.CloseSessionTimeout || len(c.notes) != 1 || !strings.Contains(c.notes[0], "idle for 1s") || !strings.Contains(c.notes[0], c.header.Get("Activity-Id"))) {
			t.Errorf("status %v, notes %q", c.status, c.notes)
		}
		eventually(t, "reported", func() bool { return s.endReason(c) == string(refusal.IdleTimeout) })
	})
}

func TestKeepAlive(t *testing.T) {
	for _, mode := range []string{transportTSGU, transportLegacy} {
		t.Run(mode, func(t *testing.T) {
			s := newStack(t, func(o *Options, _ *fakeAdmission) { o.KeepAlive = 20 * time.Millisecond })
			c, a := s.session(mode)
			for range 3 {
				c.want(tsgu.TypeKeepAlive)
				c.Conn.Write(c.message(tsgu.AppendKeepAlive(nil))) // as FreeRDP echoes it
			}
			a.Write([]byte("x"))
			expect(t, c, "x")
		})
	}
}

func TestAdministratorEndsSession(t *testing.T) {
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		var id string
		eventually(t, "started is reported", func() bool {
			for _, r := range s.adm.list() {
				if p := r.GetStarted(); p != nil {
					id = p.SessionId
					if p.User != "alice" || p.Host != "pool/host-1" || p.Transport != mode || p.Workspace != "demo" || p.Resource != "desk" {
						t.Errorf("reported %v", p)
					}
					return true
				}
			}
			return false
		})
		s.adm.commands <- &admission.RelayCommand{Command: &admission.RelayCommand_End{End: &admission.End{SessionId: id, Reason: "Maintenance until noon."}}}
		io.ReadAll(c)
		if !c.closedWith("1001 ended-by-administrator") {
			t.Errorf("closed with %q", c.closed)
		}
		if c.tsgu && (c.status == nil || *c.status != tsgu.CloseAborted || len(c.notes) != 1 || !strings.HasPrefix(c.notes[0], "Maintenance until noon.")) {
			t.Errorf("status %v, notes %q", c.status, c.notes)
		}
		if _, err := io.ReadAll(a); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the host's leg goes on")
		}
	})
}

func TestDrain(t *testing.T) {
	hold := make(chan struct{})
	s := newStack(t, nil)
	dial := s.adm.connect
	s.adm.connect = func(ctx context.Context, r *admission.ConnectRequest) *admission.ConnectResponse {
		select {
		case <-hold:
		case <-ctx.Done():
		}
		return dial(ctx, r)
	}
	waiting := make(chan *rdpClient, 1)
	go func() {
		c, _, e := s.dialRaw(testTicket, "")
		if e != nil {
			t.Error(e)
		}
		waiting <- c
	}()
	eventually(t, "one client waits", func() bool { s.relay.mu.Lock(); defer s.relay.mu.Unlock(); return s.relay.places.queue.Len() == 1 })
	if !s.relay.Ready() {
		t.Error("not ready before the drain")
	}
	s.stop()
	eventually(t, "draining", s.relay.draining.Load)
	if s.relay.Ready() {
		t.Error("ready while draining")
	}
	_, resp, e := s.dialRaw(testTicket, "")
	if e == nil || e.Code != refusal.GatewayDraining || resp.StatusCode != 503 || !strings.Contains(e.Message, "try again") {
		t.Errorf("a new client: %s %v", resp.Status, e)
	}
	close(hold) // the agent of the client that waited may still join
	c, a := <-waiting, s.agent()
	c.Write([]byte("x"))
	expect(t, a, "x")
	select {
	case err := <-s.ran:
		t.Fatalf("the relay stopped with a session (%v)", err)
	case <-time.After(50 * time.Millisecond):
	}
	c.Close()
	a.Close()
	select {
	case err := <-s.ran:
		if err != nil {
			t.Error(err)
		}
		s.ran <- nil
	case <-time.After(patience):
		t.Fatal("the last session ended, but the relay didn't")
	}
	for _, r := range s.adm.list() {
		if r.GetDraining() != nil {
			return
		}
	}
	t.Error("the drain was not reported")
}

func TestDrainDeadline(t *testing.T) {
	each(t, func(o *Options, _ *fakeAdmission) { o.Config.DrainDeadlineSeconds = 1 }, func(t *testing.T, s *stack, mode string) {
		c, _ := s.session(mode)
		s.stop()
		io.ReadAll(c)
		if !c.closedWith("1001 drain-deadline") {
			t.Errorf("closed with %q", c.closed)
		}
	})
}

// TestNothingIsLeft: no goroutine, no descriptor, no pooled state after sessions have come and gone in every way.
func TestNothingIsLeft(t *testing.T) {
	many := 200
	if n, err := strconv.Atoi(os.Getenv("RDV_TEST_SESSIONS")); err == nil { // 10000 takes a minute or two
		many = n
	}
	s := newStack(t, nil)
	descriptors := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip(err)
		}
		return len(all)
	}
	round := func(n int) {
		var all sync.WaitGroup
		for i := range n {
			c, a := s.session(modes[i%len(modes)])
			all.Go(func() {
				c.Write([]byte("hello"))
				expect(t, a, "hello")
				switch i % 4 {
				case 0:
					c.Close()
				case 1:
					a.Close()
				case 2:
					c.NetConn().Close()
				case 3:
					a.NetConn().Close()
				}
				io.ReadAll(a)
				io.ReadAll(c)
				c.Close()
				a.Close()
			})
		}
		all.Wait()
		s.idle()
	}
	round(8)
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for ; many > 0; many -= 200 {
		round(min(many, 200))
	}
	eventually(t, fmt.Sprintf("back to %d goroutines and %d descriptors", goroutines, files), func() bool {
		return runtime.NumGoroutine() <= goroutines+2 && descriptors() <= files+2
	})
}

// TestSlowReader: a client that doesn't read stops its host, and costs no queue meanwhile.
func TestSlowReader(t *testing.T) {
	const total = 64 << 20
	each(t, nil, func(t *testing.T, s *stack, mode string) {
		c, a := s.session(mode)
		go func() {
			chunk := make([]byte, 64<<10)
			for range total / len(chunk) {
				a.Write(chunk)
			}
		}()
		eventually(t, "the session runs", func() bool { return len(s.relay.live()) == 1 })
		session := s.relay.live()[0]
		last := uint64(0)
		eventually(t, "the host is stopped", func() bool {
			time.Sleep(100 * time.Millisecond)
			now := session.toClient.Load()
			stopped := now > 0 && now == last
			last = now
			return stopped
		})
		if last > total/2 {
			t.Errorf("%d of %d bytes were taken for a client that reads none", last, total)
		}
		if n, err := io.CopyN(io.Discard, c, total); err != nil {
			t.Errorf("only %d bytes came once the client read: %v", n, err)
		}
	})
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Metrics = NewMetrics(registry) })
	c, a := s.session(transportTSGU)
	c.Write([]byte("12345"))
	expect(t, a, "12345")
	a.Write([]byte("123"))
	expect(t, c, "123")
	s.dialRaw("bad", "")
	s.dialAgent([]byte("bad"), testInstance, s.addr)
	value := func(text string) string {
		t.Helper()
		srv := httptest.NewServer(promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
		defer srv.Close()
		req, _ := http.NewRequest(http.MethodGet, srv.URL, nil)
		req.Header.Set("Accept", "application/openmetrics-text")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		all, _ := io.ReadAll(resp.Body)
		for line := range strings.Lines(string(all)) {
			if strings.HasPrefix(line, "rendezvous_relay_"+text+" ") {
				return strings.TrimSpace(strings.TrimPrefix(line, "rendezvous_relay_"+text+" "))
			}
		}
		return ""
	}
	if got := value("sessions"); got != "1.0" {
		t.Errorf("sessions %q during one", got)
	}
	c.Close()
	io.ReadAll(a) // first the client's end, then the host's
	a.Close()
	s.idle()
	for text, want := range map[string]string{
		"sessions": "0.0", "pending": "0.0",
		`bytes_total{direction="to_host"}`:                                  "5.0",
		`bytes_total{direction="to_client"}`:                                "3.0",
		`admissions_total{code="ok",transport="tsgu-websocket"}`:            "1.0",
		`admissions_total{code="ticket-invalid",transport="raw-websocket"}`: "1.0",
		`joins_total{result="ok"}`:                                          "1.0",
		`joins_total{result="refused"}`:                                     "1.0",
		`sessions_ended_total{reason="client-closed"}`:                      "1.0",
	} {
		if got := value(text); got != want {
			t.Errorf("%s is %q, want %q", text, got, want)
		}
	}
	if got := allBuckets(value); !strings.Contains(got, `activity="`+c.header.Get("Activity-Id")+`"`) {
		t.Errorf("no exemplar with the activity id: %q", got)
	}
}

// allBuckets joins the connect histogram's lines.
func allBuckets(value func(string) string) string {
	var all string
	for _, le := range []string{"0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "+Inf"} {
		all += value(`connect_seconds_bucket{le="` + le + `"}`)
	}
	return all
}

func TestBoundsChangeWhileServing(t *testing.T) {
	s := newStack(t, nil)
	s.session(transportRaw)
	s.relay.SetConfig(config.Relay{Gateway: "gateway-a", Hostname: testHost, MaxSessions: 1})
	if _, _, e := s.dialRaw(testTicket, ""); e == nil || e.Code != refusal.GatewayFull {
		t.Errorf("over the new limit: %v", e)
	}
	s.relay.SetConfig(config.Relay{Gateway: "gateway-a", Hostname: testHost, MaxSessions: 2})
	s.session(transportRaw)
}
