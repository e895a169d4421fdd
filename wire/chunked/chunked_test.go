package chunked

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// decodeAll feeds stream in pieces that cut chooses, and returns the payload, joined. Its error is nil where the stream
// ends within the body.
func decodeAll(stream []byte, cut func(left int) int) (payload []byte, err error) {
	var d Decoder
	for len(stream) > 0 {
		piece := stream[:min(len(stream), max(1, cut(len(stream))))]
		stream = stream[len(piece):]
		for len(piece) > 0 {
			n, part, err := d.Decode(piece)
			if n == 0 {
				return payload, errors.New("no progress")
			}
			if payload = append(payload, part...); err != nil {
				if err == io.EOF && n < len(piece) {
					_, _, err = d.Decode(piece[n:]) // what comes after the end
				}
				return payload, err
			}
			piece = piece[n:]
		}
	}
	return payload, nil
}

func whole(left int) int { return left }

func TestDecode(t *testing.T) {
	long := strings.Repeat("x", 70000)
	for _, tt := range []struct{ name, in, want, err string }{
		{"one chunk", "5\r\nhello\r\n", "hello", ""},
		{"two and the end", "3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n", "abcd", "EOF"},
		{"sizes in either case", "a\r\n0123456789\r\nB\r\n0123456789a\r\n", "01234567890123456789a", ""},
		{"leading zeros", "00000001\r\nx\r\n", "x", ""},
		{"long", fmt.Sprintf("%x\r\n%s\r\n", len(long), long), long, ""},
		{"more promised than comes", "ffffffff\r\nabc", "abc", ""},
		{"the end in zeros", "00\r\n\r\n", "", "EOF"},
		{"no size", "\r\n", "", "0x0d stands in a chunk's size"},
		{"nine digits", "000000001\r\nx", "", "more than 8 digits"},
		{"sign", "-1\r\n", "", "0x2d stands in a chunk's size"},
		{"prefix", "0x1\r\nx", "", "0x78 stands in a chunk's size"},
		{"white space", "5 \r\nhello\r\n", "", "0x20 stands in a chunk's size"},
		{"extension", "5;a=b\r\nhello\r\n", "", "0x3b stands in a chunk's size"},
		{"bare line feed", "5\nhello\n", "", "0x0a stands in a chunk's size"},
		{"no line feed", "5\rhello", "", "after a chunk's size"},
		{"longer than its size", "3\r\nabcd\r\n", "abc", "after a chunk"},
		{"bare line feed after a chunk", "3\r\nabc\n", "abc", "after a chunk"},
		{"carriage return alone after a chunk", "3\r\nabc\r5", "abc", "after a chunk"},
		{"trailer", "0\r\nA: b\r\n\r\n", "", "after the last chunk"},
		{"half an end", "0\r\n\rx", "", "after the last chunk"},
		{"after the end", "0\r\n\r\nGET", "", "bytes come after the last chunk"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, size := range []int{1 << 20, 1, 3} {
				if size < 1<<20 && tt.name == "after the end" {
					continue // the end is told before what follows has come
				}
				got, err := decodeAll([]byte(tt.in), func(int) int { return size })
				if string(got) != tt.want {
					t.Errorf("pieces of %d: %.100q, want %.100q", size, got, tt.want)
				}
				if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
					t.Errorf("pieces of %d: error %v, want %q", size, err, tt.err)
				}
			}
		})
	}
}

// TestRandomSplits: whatever the chunks and however the stream is cut, what was put in comes out.
func TestRandomSplits(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 0))
		want := make([]byte, r.IntN(20000))
		for i := range want {
			want[i] = byte(r.Uint32())
		}
		var stream []byte
		for rest := want; len(rest) > 0; {
			n := 1 + r.IntN(min(len(rest), 1+r.IntN(5000)))
			stream = fmt.Appendf(stream, []string{"%x\r\n", "%X\r\n", "%06x\r\n"}[r.IntN(3)], n)
			stream = append(append(stream, rest[:n]...), "\r\n"...)
			rest = rest[n:]
		}
		stream = append(stream, "0\r\n\r\n"...)
		got, err := decodeAll(stream, func(int) int { return r.IntN(300) })
		if err != io.EOF || !bytes.Equal(got, want) {
			t.Fatalf("seed %d: %d of %d bytes, or others; %v", seed, len(got), len(want), err)
		}
	}
}

func TestDecodeDoesNotAllocate(t *testing.T) {
	var stream []byte
	for range 5 {
		stream = append(append(stream, "2bc\r\n"...), make([]byte, 702)...)
		copy(stream[len(stream)-2:], "\r\n")
	}
	var d Decoder
	if n := testing.AllocsPerRun(200, func() {
		got := 0
		for b := stream; len(b) > 0; {
			n, part, err := d.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			got += len(part)
			b = b[n:]
		}
		if got != 5*700 {
			t.Fatal(got)
		}
	}); n != 0 {
		t.Errorf("%v allocations per stream", n)
	}
}

// captured is what FreeRDP sent on its IN channel after the second request's head.
func captured(t testing.TB) []byte {
	b, err := os.ReadFile(filepath.Join("testdata", "freerdp-3.15", "in.chunked"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// FuzzDecode: however a stream is cut it tells the same, and what this strict reader takes the standard library's reads alike.
func FuzzDecode(f *testing.F) {
	f.Add(captured(f), uint64(1))
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\n"), uint64(2))
	f.Add([]byte("0\r\nA: b\r\n\r\n"), uint64(3))
	f.Add([]byte("FFFFFFFF\r\nx"), uint64(4))
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64) {
		want, wantErr := decodeAll(stream, whole)
		r := rand.New(rand.NewPCG(seed, 0))
		got, err := decodeAll(stream, func(int) int { return r.IntN(20) })
		var e *Error
		late := wantErr != nil && wantErr.Error() == (&Error{"bytes come after the last chunk"}).Error() // a cut may hide it
		if !bytes.Equal(got, want) || !late && fmt.Sprint(err) != fmt.Sprint(wantErr) {
			t.Errorf("in one piece %q (%v), cut %q (%v)", want, wantErr, got, err)
		}
		if errors.As(wantErr, &e) {
			return
		}
		std, stdErr := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(stream)))
		if stdErr != nil && strings.Contains(stdErr.Error(), "too much non-data") {
			return // a bound against small chunks that we don't have: a frame costs us as little as a byte does
		}
		if !bytes.Equal(std, want) || wantErr == io.EOF && stdErr != nil {
			t.Errorf("taken as %q (%v), by net/http as %q (%v)", want, wantErr, std, stdErr)
		}
	})
}
