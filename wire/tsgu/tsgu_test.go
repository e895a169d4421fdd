package tsgu

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// appender is every packet.
type appender interface{ Append([]byte) []byte }

// parse reads one packet's body by its type; nil where there is nothing to parse.
func parse(ev Event) (appender, error) {
	switch ev.Type {
	case TypeHandshakeRequest:
		p, err := ParseHandshakeRequest(ev.Body)
		return &p, err
	case TypeHandshakeResponse:
		p, err := ParseHandshakeResponse(ev.Body)
		return &p, err
	case TypeTunnelCreate:
		p, err := ParseTunnelCreate(ev.Body)
		return &p, err
	case TypeTunnelResponse:
		p, err := ParseTunnelResponse(ev.Body)
		return &p, err
	case TypeTunnelAuth:
		p, err := ParseTunnelAuth(ev.Body)
		return &p, err
	case TypeTunnelAuthResponse:
		p, err := ParseTunnelAuthResponse(ev.Body)
		return &p, err
	case TypeChannelCreate:
		p, err := ParseChannelCreate(ev.Body)
		return &p, err
	case TypeChannelResponse:
		p, err := ParseChannelResponse(ev.Body)
		return &p, err
	case TypeCloseChannel, TypeCloseChannelResponse:
		p, err := ParseCloseChannel(ev.Body, ev.Type == TypeCloseChannelResponse)
		return &p, err
	}
	return nil, nil
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Map(func(r rune) rune {
		if r == ' ' || r == '\n' || r == '\t' {
			return -1
		}
		return r
	}, s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// samples are packets as they stand on the wire, and what they say.
var samples = []struct {
	name string
	hex  string
	want appender
}{
	{"handshake request with PAA", "0100 0000 0e000000 01 00 0000 0200", &HandshakeRequest{Major: 1, ExtAuth: ExtAuthPAA, Rest: []byte{}}},
	{"handshake response", "0200 0000 12000000 00000000 01 00 0000 0200", &HandshakeResponse{Major: 1, ExtAuth: ExtAuthPAA, Rest: []byte{}}},
	{"handshake refused", "0200 0000 12000000 f9590780 01 00 0000 0200", &HandshakeResponse{Error: ErrUnsupportedAuthentication, Major: 1, ExtAuth: ExtAuthPAA, Rest: []byte{}}},
	{"tunnel create with cookie", "0400 0000 18000000 0d000000 0100 0000 0600 4100 6200 0000", &TunnelCreate{Caps: 0xd, Fields: 1, Cookie: NewText("Ab"), Rest: []byte{}}},
	{"tunnel create with reauth and cookie", "0400 0000 1e000000 3f000000 0300 0000 0807060504030201 0400 4100 0000", &TunnelCreate{Caps: 0x3f, Fields: 3, ReauthContext: 0x0102030405060708, Cookie: NewText("A"), Rest: []byte{}}},
	{"tunnel create without cookie", "0400 0000 10000000 0d000000 0000 0000", &TunnelCreate{Caps: 0xd, Rest: []byte{}}},
	{"tunnel response", "0500 0000 1a000000 0000 00000000 0300 0000 0a000000 0a000000", &TunnelResponse{Fields: 3, TunnelID: 10, Caps: CapIdleTimeout | CapServiceMessage, Rest: []byte{}}},
	{"tunnel auth", "0600 0000 10000000 0000 0400 6300 0000", &TunnelAuth{ClientName: NewText("c"), Rest: []byte{}}},
	{"tunnel auth response", "0700 0000 18000000 00000000 0300 0000 00000080 0a000000", &TunnelAuthResponse{Fields: 3, Redirection: 0x80000000, IdleMinutes: 10, Rest: []byte{}}},
	{"channel create", "0800 0000 16000000 01 00 3d0d 0300 0600 6800 6900 0000", &ChannelCreate{Port: 3389, Protocol: 3, Names: []Text{NewText("hi")}, Rest: []byte{}}},
	{"channel create with alternate and more", "0800 0000 19000000 01 01 3d0d 0300 0400 6800 0000 0200 6100 ff", &ChannelCreate{Port: 3389, Protocol: 3, Names: []Text{NewText("h")}, Alternates: []Text{{'a', 0}}, Rest: []byte{0xff}}},
	{"channel response", "0900 0000 14000000 00000000 0100 0000 01000000", &ChannelResponse{Fields: 1, ChannelID: 1, Rest: []byte{}}},
	{"close channel", "1000 0000 0c000000 d4040000", &CloseChannel{Status: CloseAborted, Rest: []byte{}}},
	{"close channel response", "1100 0000 0c000000 00000000", &CloseChannel{Response: true, Rest: []byte{}}},
}

func TestPackets(t *testing.T) {
	for _, tt := range samples {
		t.Run(tt.name, func(t *testing.T) {
			wire := unhex(t, tt.hex)
			if got := tt.want.Append(nil); !bytes.Equal(got, wire) {
				t.Errorf("Append gave %x, want %x", got, wire)
			}
			var d Decoder
			n, ev, err := d.Decode(wire)
			if err != nil || n != len(wire) {
				t.Fatalf("Decode took %d of %d bytes: %v", n, len(wire), err)
			}
			got, err := parse(ev)
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("parsed %+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

// captured is what FreeRDP 3.15 of Debian 13 sent.
func captured(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "freerdp-3.15", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCaptures(t *testing.T) {
	for name, want := range map[string]appender{
		"handshake-request": &HandshakeRequest{Major: 1, ExtAuth: ExtAuthPAA, Rest: []byte{}},
		"tunnel-auth":       &TunnelAuth{ClientName: NewText("laptop"), Rest: []byte{}},
		"channel-create":    &ChannelCreate{Port: 3389, Protocol: 3, Names: []Text{NewText("linux.ns.rdv.internal")}, Rest: []byte{}},
	} {
		var d Decoder
		_, ev, err := d.Decode(captured(t, name))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parse(ev); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
		}
	}
}

func TestBrokenPackets(t *testing.T) {
	tests := []struct{ name, hex, err string }{
		{"length below the header", "0100 0000 07000000", "its length is 7"},
		{"length above the bound", "0400 0000 ffffffff", "4294967295"},
		{"data length disagrees", "0a00 0000 0f000000 0400", "tells of 4 bytes"},
		{"data without its length field", "0a00 0000 08000000 0000", "its length is 8"},
		{"cookie longer than packet", "0400 0000 14000000 0d000000 0100 0000 0600 4100", "ends before"},
		{"handshake too short", "0100 0000 0a000000 0100", "ends before"},
		{"no name", "0800 0000 0e000000 00 00 3d0d 0300", "0 names"},
		{"too many names", "0800 0000 0e000000 33 00 3d0d 0300", "51 names"},
		{"close without status", "1000 0000 08000000", "ends before"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var d Decoder
			_, ev, err := d.Decode(unhex(t, tt.hex))
			if err == nil {
				_, err = parse(ev)
			}
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
		})
	}
}

func TestText(t *testing.T) {
	for _, s := range []string{"", "desk", "grüße", "𝄞 clef"} {
		text := NewText(s)
		if text.String() != s || text[len(text)-1] != 0 || text[len(text)-2] != 0 {
			t.Errorf("%q became %x, and %q again", s, []byte(text), text.String())
		}
	}
	if got := (Text{'a', 0, 'b'}).String(); got != "a" {
		t.Errorf("odd length: %q", got)
	}
}

// story is what a stream tells, adjacent DATA joined.
func story(stream []byte, cut func(left int) int) (string, error) {
	var d Decoder
	var out strings.Builder
	var data []byte
	flush := func() {
		if len(data) > 0 {
			fmt.Fprintf(&out, "data %x\n", data)
			data = nil
		}
	}
	for len(stream) > 0 {
		piece := stream[:min(len(stream), max(1, cut(len(stream))))]
		stream = stream[len(piece):]
		for len(piece) > 0 {
			n, ev, err := d.Decode(piece)
			if err != nil {
				flush()
				return out.String(), err
			}
			if n == 0 {
				return "", fmt.Errorf("no progress")
			}
			piece = piece[n:]
			switch ev.Type {
			case None:
			case TypeData:
				data = append(data, ev.Body...)
			default:
				flush()
				fmt.Fprintf(&out, "%#x %x\n", uint16(ev.Type), ev.Body)
			}
		}
	}
	flush()
	return out.String(), nil
}

func TestDecodeStream(t *testing.T) {
	var stream []byte
	stream = AppendData(stream, []byte("ab"))
	stream = AppendKeepAlive(stream)
	stream = AppendData(stream, nil)
	stream = AppendData(stream, []byte("c"))
	stream = (&CloseChannel{Status: 5}).Append(stream)
	const want = "data 6162\n0xd \ndata 63\n0x10 05000000\n"
	for _, size := range []int{1, 2, 7, 1000} {
		if got, err := story(stream, func(int) int { return size }); err != nil || got != want {
			t.Errorf("pieces of %d: %q, %v; want %q", size, got, err, want)
		}
	}
}

func TestDecodeDataDoesNotAllocate(t *testing.T) {
	stream := AppendKeepAlive(AppendData(nil, make([]byte, 5000)))
	var d Decoder
	if n := testing.AllocsPerRun(100, func() {
		for b := stream; len(b) > 0; {
			n, _, err := d.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			b = b[n:]
		}
	}); n != 0 {
		t.Errorf("%v allocations per packet", n)
	}
}

// FuzzPackets: a packet that parses is written back byte for byte, but for the header's reserved field.
func FuzzPackets(f *testing.F) {
	for _, s := range samples {
		f.Add(unhex(f, s.hex))
	}
	for _, name := range []string{"handshake-request", "tunnel-auth", "channel-create"} {
		f.Add(captured(f, name))
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		var d Decoder
		n, ev, err := d.Decode(wire)
		if err != nil || ev.Type == None {
			return
		}
		p, err := parse(ev)
		if p == nil || err != nil {
			return
		}
		want := bytes.Clone(wire[:n])
		want[2], want[3] = 0, 0
		if got := p.Append(nil); !bytes.Equal(got, want) {
			t.Errorf("%x became %+v, then %x", want, p, got)
		}
	})
}

// FuzzStream: any stream, cut in any way, tells the same story as in one piece.
func FuzzStream(f *testing.F) {
	f.Add(AppendKeepAlive(AppendData(nil, []byte("hello"))), uint64(1))
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64) {
		whole, errWhole := story(stream, func(left int) int { return left })
		r := rand.New(rand.NewPCG(seed, 0))
		cut, errCut := story(stream, func(int) int { return r.IntN(20) })
		if whole != cut || fmt.Sprint(errWhole) != fmt.Sprint(errCut) {
			t.Errorf("in one piece %q (%v), cut %q (%v)", whole, errWhole, cut, errCut)
		}
	})
}
