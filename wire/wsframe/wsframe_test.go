package wsframe

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var testKey = [4]byte{0x37, 0xfa, 0x21, 0x3d}

// decodeAll feeds stream in pieces that cut chooses and writes what came out as text, one event a line, adjacent
// payload joined.
func decodeAll(masked bool, stream []byte, cut func(left int) int) (string, error) {
	d := Decoder{Masked: masked}
	var out strings.Builder
	var data []byte
	flush := func() {
		if len(data) > 0 {
			fmt.Fprintf(&out, "data %x\n", data)
			data = nil
		}
	}
	stream = bytes.Clone(stream) // unmasking is in place
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
				return out.String(), fmt.Errorf("no progress on %d bytes", len(piece))
			}
			piece = piece[n:]
			switch ev.Op {
			case None:
			case Binary:
				data = append(data, ev.Payload...)
			default:
				flush()
				fmt.Fprintf(&out, "op %#x %x\n", byte(ev.Op), ev.Payload)
			}
		}
	}
	flush()
	return out.String(), nil
}

func TestDecode(t *testing.T) {
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	long := bytes.Repeat([]byte("abc"), 100)
	huge := bytes.Repeat([]byte{7}, 70000)
	tests := []struct {
		name   string
		masked bool
		in     []byte
		want   string
		err    string
	}{
		{name: "RFC 6455 5.7 unmasked", in: []byte{0x82, 5, 'H', 'e', 'l', 'l', 'o'}, want: "data 48656c6c6f\n"},
		{name: "RFC 6455 5.7 masked", masked: true, in: []byte{0x82, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58}, want: "data 48656c6c6f\n"},
		{name: "16-bit length", masked: true, in: AppendMaskedFrame(nil, Binary, long, testKey), want: fmt.Sprintf("data %x\n", long)},
		{name: "64-bit length", masked: true, in: AppendMaskedFrame(nil, Binary, huge, testKey), want: fmt.Sprintf("data %x\n", huge)},
		{name: "ping between fragments", in: join([]byte{0x02, 1, 'a'}, []byte{0x89, 2, 'p', 'q'}, []byte{0x80, 1, 'b'}), want: "data 61\nop 0x9 7071\ndata 62\n"},
		{name: "empty frames", masked: true, in: join(AppendMaskedFrame(nil, Binary, nil, testKey), AppendMaskedFrame(nil, Ping, nil, testKey), AppendMaskedFrame(nil, Binary, []byte("x"), testKey)), want: "op 0x9 \ndata 78\n"},
		{name: "close", masked: true, in: AppendMaskedFrame(nil, Close, ClosePayload(1000, "bye"), testKey), want: "op 0x8 03e8627965\n"},
		{name: "client without mask", masked: true, in: []byte{0x82, 1, 'a'}, err: "mask bit is false"},
		{name: "server with mask", in: AppendMaskedFrame(nil, Binary, []byte("a"), testKey), err: "mask bit is true"},
		{name: "text", in: []byte{0x81, 1, 'a'}, err: "text frames"},
		{name: "reserved bit", in: []byte{0xc2, 1, 'a'}, err: "reserved bits"},
		{name: "unknown opcode", in: []byte{0x83, 1, 'a'}, err: "opcode 0x3"},
		{name: "stray continuation", in: []byte{0x80, 1, 'a'}, err: "continues nothing"},
		{name: "message in message", in: []byte{0x02, 1, 'a', 0x82, 1, 'b'}, want: "data 61\n", err: "inside another"},
		{name: "long ping", in: append([]byte{0x89, 126, 0, 126}, make([]byte, 126)...), err: "longer than 125"},
		{name: "fragmented ping", in: []byte{0x09, 0}, err: "fragmented"},
		{name: "padded length", in: []byte{0x82, 126, 0, 1, 'a'}, err: "shortest"},
		{name: "top bit", in: []byte{0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0}, err: "top bit"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, size := range []int{1 << 20, 1, 3} {
				got, err := decodeAll(tt.masked, tt.in, func(int) int { return size })
				if got != tt.want {
					t.Errorf("pieces of %d: got %.200q, want %.200q", size, got, tt.want)
				}
				if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
					t.Errorf("pieces of %d: error %v, want %q", size, err, tt.err)
				}
			}
		})
	}
}

func TestMaskAgreesWithTheSlowWay(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		b := make([]byte, r.IntN(100))
		want := make([]byte, len(b))
		for i := range b {
			b[i] = byte(r.Uint32())
			want[i] = b[i] ^ testKey[i%4]
		}
		key := uint32(testKey[0]) | uint32(testKey[1])<<8 | uint32(testKey[2])<<16 | uint32(testKey[3])<<24
		cut := r.IntN(len(b) + 1)
		mask(mask(key, b[:cut]), b[cut:])
		if !bytes.Equal(b, want) {
			t.Fatalf("length %d cut at %d: got %x, want %x", len(b), cut, b, want)
		}
	}
}

func TestHeaderLenIsWhatPutHeaderWrites(t *testing.T) {
	for _, n := range []int{0, 1, 125, 126, 127, 65535, 65536, 1 << 30} {
		var h [MaxHeaderLen]byte
		if got := PutHeader(h[:], Binary, n); got != HeaderLen(n) {
			t.Errorf("payload %d: PutHeader wrote %d bytes, HeaderLen says %d", n, got, HeaderLen(n))
		}
	}
}

func TestClosePayloadIsCutBetweenCharacters(t *testing.T) {
	p := ClosePayload(ClosePolicy, strings.Repeat("ä", 100))
	code, reason := ParseClose(p)
	if len(p) > MaxControl || code != ClosePolicy || reason != strings.Repeat("ä", 61) {
		t.Errorf("got %d bytes, code %d, %q", len(p), code, reason)
	}
	if code, _ := ParseClose(nil); code != 1005 {
		t.Errorf("empty close: code %d, want 1005", code)
	}
}

func TestAcceptKey(t *testing.T) {
	if got := AcceptKey("dGhlIHNhbXBsZSBub25jZQ=="); got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		t.Errorf("got %q, want RFC 6455's example", got)
	}
	// Of FreeRDP 2.11.7, which checks no answer's value.
	if got := AcceptKey("VGBR@VFTW^RDEPL"); got == "" {
		t.Error("no answer")
	}
}

func TestDecodeDoesNotAllocate(t *testing.T) {
	stream := AppendMaskedFrame(nil, Binary, make([]byte, 4000), testKey)
	stream = AppendMaskedFrame(stream, Ping, []byte("p"), testKey)
	d := Decoder{Masked: true}
	if n := testing.AllocsPerRun(100, func() {
		for b := stream; len(b) > 0; {
			n, _, err := d.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			b = b[n:]
		}
	}); n != 0 {
		t.Errorf("%v allocations per stream", n)
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

func TestCapture(t *testing.T) {
	got, err := decodeAll(true, captured(t, "handshake-request"), func(left int) int { return left })
	if want := "data 010000000e000000010000000200\n"; err != nil || got != want {
		t.Errorf("%q, %v", got, err)
	}
}

// FuzzDecode: any stream, cut in any way, tells the same story as in one piece.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{0x82, 5, 'H', 'e', 'l', 'l', 'o'}, uint64(1), false)
	f.Add(AppendMaskedFrame(AppendMaskedFrame(nil, Ping, []byte("p"), testKey), Binary, []byte("hello"), testKey), uint64(2), true)
	f.Add([]byte{0x02, 1, 'a', 0x89, 0, 0x80, 1, 'b', 0x88, 0}, uint64(3), false)
	f.Add(captured(f, "handshake-request"), uint64(4), true)
	f.Add(captured(f, "channel-create"), uint64(5), true)
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64, masked bool) {
		whole, errWhole := decodeAll(masked, stream, func(left int) int { return left })
		r := rand.New(rand.NewPCG(seed, 0))
		cut, errCut := decodeAll(masked, stream, func(int) int { return r.IntN(20) })
		if whole != cut || fmt.Sprint(errWhole) != fmt.Sprint(errCut) {
			t.Errorf("in one piece %q (%v), cut %q (%v)", whole, errWhole, cut, errCut)
		}
	})
}

// FuzzRoundTrip: what AppendMaskedFrame writes, Decode reads.
func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("hello"), uint32(7))
	f.Fuzz(func(t *testing.T, payload []byte, key uint32) {
		k := [4]byte{byte(key), byte(key >> 8), byte(key >> 16), byte(key >> 24)}
		got, err := decodeAll(true, AppendMaskedFrame(nil, Binary, payload, k), func(left int) int { return left })
		want := ""
		if len(payload) > 0 {
			want = fmt.Sprintf("data %x\n", payload)
		}
		if err != nil || got != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	})
}

func BenchmarkUnmask(b *testing.B) {
	buf := make([]byte, 16<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		mask(0x12345678, buf)
	}
}
