// Package chunked takes an HTTP body apart that comes in chunks (RFC 9112, 7.1), for a path that only moves bytes.
//
//	chunk  hex size (1 to 8 digits) CRLF, that many bytes, CRLF
//	end    "0" CRLF CRLF
//
// Flow: MS-TSGU's legacy form streams its packets in the body of one request that lasts as long as the session. Where
// chunks begin and end means nothing, so a Decoder hands out payload as it comes, in place, and never gathers a chunk: a
// size that lies costs nothing.
//
// The grammar is taken strictly, for what two readers could read in two ways is how requests are smuggled: no chunk
// extensions, no trailers, no white space, no bare line feed. No client of ours sends any of these.
package chunked

import (
	"fmt"
	"io"
)

// maxDigits bounds the digits of a size: what they can tell fits 32 bits.
const maxDigits = 8

// Error is a breach of the grammar by the other side.
type Error struct{ Reason string }

func (e *Error) Error() string { return "chunked: " + e.Reason }

// What a Decoder expects next.
type state byte

const (
	size state = iota
	sizeLF
	data
	dataCR
	dataLF
	endCR
	endLF
	over
)

// Decoder takes a byte stream of chunks apart, whatever way it was cut. The zero value is ready.
type Decoder struct {
	next   state
	digits int
	left   uint32 // of the chunk; while its size is read, the size so far
}

// Decode takes bytes from the front of b, at least one where b is not empty, and says how many. Payload aliases b; there
// is none yet where it is empty. The last chunk is io.EOF, after which nothing may come.
func (d *Decoder) Decode(b []byte) (n int, payload []byte, err error) {
	for n < len(b) {
		if d.next == data {
			payload = b[n:min(uint64(len(b)), uint64(n)+uint64(d.left))]
			if d.left -= uint32(len(payload)); d.left == 0 {
				d.next = dataCR
			}
			return n + len(payload), payload, nil
		}
		c := b[n]
		n++
		if err := d.step(c); err != nil {
			return n, nil, err
		}
	}
	return n, nil, nil
}

// step takes one byte of what stands around payload.
func (d *Decoder) step(c byte) error {
	switch d.next {
	case size:
		return d.sizeByte(c)
	case sizeLF:
		d.next = data
		if d.left == 0 {
			d.next = endCR
		}
		return want(c, '\n', "a chunk's size")
	case dataCR:
		d.next = dataLF
		return want(c, '\r', "a chunk")
	case dataLF:
		d.next, d.digits = size, 0
		return want(c, '\n', "a chunk")
	case endCR:
		d.next = endLF
		return want(c, '\r', "the last chunk")
	case endLF:
		d.next = over
		if err := want(c, '\n', "the last chunk"); err != nil {
			return err
		}
		return io.EOF
	}
	return &Error{"bytes come after the last chunk"}
}

func (d *Decoder) sizeByte(c byte) error {
	var v byte
	switch {
	case '0' <= c && c <= '9':
		v = c - '0'
	case 'a' <= c && c <= 'f':
		v = c - 'a' + 10
	case 'A' <= c && c <= 'F':
		v = c - 'A' + 10
	case c == '\r' && d.digits > 0:
		d.next = sizeLF
		return nil
	default:
		return &Error{fmt.Sprintf("byte %#02x stands in a chunk's size", c)}
	}
	if d.digits++; d.digits > maxDigits {
		return &Error{fmt.Sprintf("a chunk's size has more than %d digits", maxDigits)}
	}
	d.left = d.left<<4 | uint32(v)
	return nil
}

func want(c, wanted byte, after string) error {
	if c != wanted {
		return &Error{fmt.Sprintf("byte %#02x stands after %s, where %#02x is due", c, after, wanted)}
	}
	return nil
}
