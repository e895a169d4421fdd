package relay

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// fillSpans puts content into b as records would have brought it.
func fillSpans(b *batch, content []byte, records ...int) {
	b.start, b.end, b.spans, b.content = room, room, 0, 0
	at := room + recordHeader
	for _, n := range records {
		copy(b.mem[at:], content[:n])
		content = content[n:]
		b.add(at, n)
		at += n + recordOverhead
	}
}

// TestFrame: whatever records came, the headers stand before their content, nothing is lost, no record is too long, and
// there is room around each.
func TestFrame(t *testing.T) {
	for _, f := range framings {
		for _, records := range [][]int{{1}, {64}, {115}, {116}, {125}, {126}, {maxContent - 15}, {maxContent - 14}, {maxContent - 13}, {maxContent - 4}, {maxContent - 3}, {maxContent},
			{1, 1, 1}, {100, maxContent}, {maxContent, 100}, {maxContent, maxContent, maxContent}, {maxContent / 2, maxContent / 2, 1}, {9000, 9000, 9000, 9000, 9000, 9000, 9000}} {
			t.Run(fmt.Sprintf("%+v %v", f, records), func(t *testing.T) {
				total := 0
				for _, n := range records {
					total += n
				}
				want := make([]byte, total)
				for i := range want {
					want[i] = byte(i * 7)
				}
				b := new(batch)
				fillSpans(b, want, records...)
				b.frame(f)
				var out, got []byte
				free := 0
				for _, s := range b.filled() {
					if s.n > maxContent || s.at-recordHeader < free {
						t.Fatalf("spans %v", b.filled())
					}
					free = s.end() + recordOverhead - recordHeader
					out = append(out, b.mem[s.at:s.end()]...)
				}
				var ws wsframe.Decoder
				var ts tsgu.Decoder
				if got = out; f.webSocket {
					n, ev, err := ws.Decode(out)
					if err != nil || n != len(out) || ev.Op != wsframe.Binary {
						t.Fatalf("no whole frame: %d of %d bytes, op %#x, %v", n, len(out), ev.Op, err)
					}
					got = ev.Payload
				}
				if f.tsgu {
					n, pkt, err := ts.Decode(got)
					if err != nil || n != len(got) || pkt.Type != tsgu.TypeData {
						t.Fatalf("a message is not one DATA packet: %d of %d bytes, type %#x, %v", n, len(got), pkt.Type, err)
					}
					got = pkt.Body
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%d bytes came out of %d, or others", len(got), len(want))
				}
			})
		}
	}
}

var framings = []framing{{webSocket: true}, {webSocket: true, tsgu: true}, {tsgu: true}}

func TestFramingDoesNotAllocate(t *testing.T) {
	for _, f := range framings {
		rdp := &rdpClient{tsgu: f.tsgu}
		if !f.webSocket {
			rdp.out = new(tls.Conn)
		}
		var in []byte
		for range 5 {
			in = append(in, rdp.frame(make([]byte, 700))...)
		}
		c := newClient(nil, nil, f)
		b := new(batch)
		if n := testing.AllocsPerRun(200, func() {
			fillSpans(b, in, len(in)-1000, 1000)
			if err := c.unwrapAll(b); err != nil || b.content != 3500 {
				t.Fatal(b.content, err)
			}
			b.frame(f)
		}); n != 0 {
			t.Errorf("%+v: %v allocations per message", f, n)
		}
	}
}

// TestSteadyPathAllocations counts what the whole process allocates for a round trip, TLS and both test ends included.
func TestSteadyPathAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("counted without the race detector")
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			s := newStack(t, nil)
			c, a := s.session(mode)
			up, down := c.frame(make([]byte, 64)), make([]byte, 64)
			buf := make([]byte, 1<<10)
			framed := map[string]int{transportRaw: 66, transportTSGU: 66 + tsgu.DataHeaderLen, transportLegacy: 64 + tsgu.DataHeaderLen}[mode]
			if n := testing.AllocsPerRun(500, func() {
				c.Conn.Write(up)
				if _, err := io.ReadFull(a, buf[:64]); err != nil {
					t.Fatal(err)
				}
				a.Write(down)
				if _, err := io.ReadFull(c.r, buf[:framed]); err != nil {
					t.Fatal(err)
				}
			}); n > 6 { // all of them readers that crypto/tls makes, one or two per record; one of ours more per message is seen
				t.Errorf("%v allocations per round trip", n)
			}
		})
	}
}

func BenchmarkRelay(b *testing.B) {
	for _, mode := range modes {
		b.Run("down/"+mode, func(b *testing.B) {
			s := newStack(b, nil)
			c, a := s.session(mode)
			chunk := make([]byte, 64<<10)
			b.SetBytes(int64(len(chunk)))
			go func() {
				for range b.N {
					a.Write(chunk)
				}
			}()
			buf := make([]byte, 64<<10)
			b.ResetTimer()
			for left := b.N * len(chunk); left > 0; {
				n, err := c.r.Read(buf)
				if err != nil {
					b.Fatal(err)
				}
				left -= n // headers count too: they are under a thousandth
			}
		})
	}
}

func TestHeadIsBoundedAndStrict(t *testing.T) {
	const ok = "GET /x?a=b HTTP/1.1\r\nHost: h\r\nX-A:  v \r\n"
	for name, head := range map[string]string{
		"no target":       "GET HTTP/1.1\r\n",
		"absolute target": "GET http://x/ HTTP/1.1\r\n",
		"folded header":   "GET / HTTP/1.1\r\nA: b\r\n c\r\n",
		"no colon":        "GET / HTTP/1.1\r\nabc\r\n",
		"space in name":   "GET / HTTP/1.1\r\nA : b\r\n",
		"bare LF":         "GET / HTTP/1.1\r\nA: b\nC: d\r\n",
		"NUL":             "GET / HTTP/1.1\r\nA: \x00\r\n",
		"many":            "GET / HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", maxHeaders+1),
	} {
		if r, err := parseHead(head); err == nil {
			t.Errorf("%s: taken as %+v", name, r)
		}
	}
	r, err := parseHead(ok)
	if err != nil || r.method != "GET" || r.path != "/x" || r.param("a") != "b" || r.get("x-a") != "v" || r.close {
		t.Errorf("%+v, %v", r, err)
	}
}

// capturedHead is a request head that FreeRDP 3.15 of Debian 13 sent, but for its ticket.
func capturedHead(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "freerdp-3.15", name+".head"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCapturedHeads(t *testing.T) {
	for name, want := range map[string]struct{ method, path, activity, ticket string }{
		"tsgu": {"RDG_OUT_DATA", "/remoteDesktopGateway/", "ebfaa1a0-d760-43e4-7c29-824d485fdb8a", ""},
		"raw":  {"GET", "/rendezvous/v1/connect", "", "TICKET"},
	} {
		r, err := parseHead(string(capturedHead(t, name)))
		if err != nil {
			t.Fatal(err)
		}
		if r.method != want.method || r.path != want.path || bearer(r) != want.ticket || r.body() {
			t.Errorf("%s: %+v", name, r)
		}
		if id := activityOf(r); want.activity != "" && id != want.activity {
			t.Errorf("%s: activity %s", name, id)
		}
		if _, e := upgradeWebSocket(r, "a"); e != nil {
			t.Errorf("%s: %v", name, e)
		}
	}
}

// FuzzHead: no head makes the parser fail in a bad way, and what it takes has a method, a path and clean headers.
func FuzzHead(f *testing.F) {
	f.Add("GET /rendezvous/v1/ping HTTP/1.1\r\nHost: h\r\n")
	for _, name := range []string{"tsgu", "raw", "legacy", "arm-entry", "arm-affinity", "arm-upgrade"} {
		f.Add(string(capturedHead(f, name)))
	}
	f.Fuzz(func(t *testing.T, head string) {
		r, err := parseHead(head)
		if err != nil {
			return
		}
		if !isToken(r.method) || !strings.HasPrefix(r.path, "/") || len(r.header) > maxHeaders {
			t.Errorf("%q was taken as %+v", head, r)
		}
		for _, h := range r.header {
			if !isToken(h.name) || strings.ContainsAny(h.value, "\r\n\x00") {
				t.Errorf("header %q: %q", h.name, h.value)
			}
		}
		r.param("access_token")
		activityOf(r)
		bearer(r)
		armTicket(r)
	})
}
