// Package wsframe is WebSocket framing (RFC 6455) for a path that only moves bytes.
//
//	 0               1               2               3
//	+-+-+-+-+-------+-+-------------+-------------------------------+
//	|F|R|R|R| opcode|M|   length    | extended length: 2 bytes when |
//	|I|S|S|S|  (4)  |A|    (7)      | length = 126, 8 when 127      |
//	|N|V|V|V|       |S|             +-------------------------------+
//	| |1|2|3|       |K|             | masking key: 4 bytes when M   |
//	+-+-+-+-+-------+-+-------------+-------------------------------+
//	| payload, XORed with the key when M                            |
//
// Flow: a client's frames are masked, a server's are not. Binary messages carry a byte stream: where frames and messages
// begin and end means nothing, so a Decoder hands out payload as it comes, in place, and never gathers a message. Control
// frames (at most 125 bytes) may stand between fragments; they are gathered, for they are answered whole.
//
// Rules that keep FreeRDP alive: never send a ping, never wait for the answer to a close, answer a ping with a pong of the
// same payload. Text frames are refused: nothing that we carry is text. Version 13 is the only version; no extension is negotiated.
package wsframe

import (
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// Opcode says what a frame is.
type Opcode byte

// The opcodes of RFC 6455. None stands in an Event that has nothing to tell.
const (
	None         Opcode = 0xff
	Continuation Opcode = 0x0
	Text         Opcode = 0x1
	Binary       Opcode = 0x2
	Close        Opcode = 0x8
	Ping         Opcode = 0x9
	Pong         Opcode = 0xa
)

// Status codes of close frames (RFC 6455, 7.4.1).
const (
	CloseNormal      = 1000
	CloseGoingAway   = 1001
	CloseProtocol    = 1002
	CloseUnsupported = 1003
	ClosePolicy      = 1008
	CloseInternal    = 1011
	CloseTryAgain    = 1013
)

const (
	// MaxControl bounds a control frame's payload, in bytes.
	MaxControl = 125
	// MaxHeaderLen is the longest header, in bytes: 2, extended length 8, key 4.
	MaxHeaderLen = 14
	// maxReason is what a close frame has room for after its code.
	maxReason = MaxControl - 2

	finBit  = 0x80
	maskBit = 0x80
)

// Error is a breach of the protocol by the other side.
type Error struct {
	// Code is what a close frame should say.
	Code   int
	Reason string
}

func (e *Error) Error() string { return "wsframe: " + e.Reason }

// CloseCode is the code that a close frame should carry for err.
func CloseCode(err error) int {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CloseInternal
}

func breach(format string, args ...any) error {
	return &Error{Code: CloseProtocol, Reason: fmt.Sprintf(format, args...)}
}

// Event is what one call of Decode found.
type Event struct {
	// Op is Binary for payload bytes, Ping, Pong or Close for a whole control frame, None when more input is needed.
	Op Opcode
	// Payload aliases the input for Binary (unmasked in place), the Decoder for control frames. It is good until the next call.
	Payload []byte
}

// Decoder takes a stream of frames apart, whatever way the stream was cut. The zero value reads a server's unmasked frames.
// It holds no buffer but the control frame under way, and never allocates.
type Decoder struct {
	// Masked demands masked frames: set it where the reader is the server.
	Masked bool

	// The header under way.
	header [MaxHeaderLen]byte
	have   int

	// The frame under way, once its header is whole.
	inFrame bool
	op      Opcode
	left    uint64
	key     uint32
	// inMessage is true between the fragments of a message.
	inMessage bool

	control    [MaxControl]byte
	controlLen int
}

// Decode takes bytes from the front of b, at least one where b is not empty, and says how many. It returns at the first event.
func (d *Decoder) Decode(b []byte) (n int, ev Event, err error) {
	for n < len(b) || d.frameDone() {
		if !d.inFrame {
			used, err := d.readHeader(b[n:])
			n += used
			if err != nil {
				return n, Event{Op: None}, err
			}
			continue
		}
		part := b[n:min(uint64(len(b)), uint64(n)+min(d.left, uint64(len(b))))]
		n += len(part)
		d.left -= uint64(len(part))
		if d.Masked {
			d.key = mask(d.key, part)
		}
		if d.op < Close {
			if d.left == 0 {
				d.endFrame()
			}
			if len(part) > 0 {
				return n, Event{Op: Binary, Payload: part}, nil
			}
			continue
		}
		d.controlLen += copy(d.control[d.controlLen:], part)
		if d.left == 0 {
			ev := Event{Op: d.op, Payload: d.control[:d.controlLen]}
			d.endFrame()
			return n, ev, nil
		}
	}
	return n, Event{Op: None}, nil
}

// frameDone says that a frame without payload waits to be told: it needs no further input.
func (d *Decoder) frameDone() bool { return d.inFrame && d.left == 0 }

func (d *Decoder) endFrame() { d.inFrame, d.have, d.controlLen = false, 0, 0 }

// readHeader gathers the header and, once whole, opens the frame.
func (d *Decoder) readHeader(b []byte) (n int, err error) {
	for {
		need := d.headerLen()
		if d.have == need {
			return n, d.openFrame()
		}
		used := copy(d.header[d.have:need], b[n:])
		n += used
		d.have += used
		if d.have < need {
			return n, nil
		}
	}
}

// headerLen is how long the header is, as far as its first bytes tell.
func (d *Decoder) headerLen() int {
	if d.have < 2 {
		return 2
	}
	n := 2
	switch d.header[1] &^ maskBit {
	case 126:
		n += 2
	case 127:
		n += 8
	}
	if d.header[1]&maskBit != 0 {
		n += 4
	}
	return n
}

func (d *Decoder) openFrame() error {
	h := d.header[:d.have]
	fin, op, masked := h[0]&finBit != 0, Opcode(h[0]&0x0f), h[1]&maskBit != 0
	length := uint64(h[1] &^ maskBit)
	short := true
	switch length {
	case 126:
		length = uint64(binary.BigEndian.Uint16(h[2:]))
		short = length >= 126
	case 127:
		length = binary.BigEndian.Uint64(h[2:])
		short = length > 0xffff
	}
	switch {
	case h[0]&0x70 != 0:
		return breach("reserved bits are set, but no extension was negotiated")
	case masked != d.Masked:
		return breach("the frame's mask bit is %t, but this side must see %t", masked, d.Masked)
	case !short:
		return breach("the length is not in its shortest form")
	case length>>63 != 0:
		return breach("the length has its top bit set")
	}
	switch op {
	case Continuation:
		if !d.inMessage {
			return breach("a continuation continues nothing")
		}
		d.inMessage = !fin
	case Binary:
		if d.inMessage {
			return breach("a new message begins inside another")
		}
		d.inMessage = !fin
	case Text:
		return &Error{Code: CloseUnsupported, Reason: "text frames are not taken; send binary ones"}
	case Close, Ping, Pong:
		if !fin || length > MaxControl {
			return breach("a control frame is fragmented or longer than %d bytes", MaxControl)
		}
	default:
		return breach("opcode %#x is unknown", byte(op))
	}
	d.inFrame, d.op, d.left, d.key = true, op, length, 0
	if masked {
		d.key = binary.LittleEndian.Uint32(h[len(h)-4:])
	}
	return nil
}

// mask XORs b with the key, 32 bytes a turn, and returns the key turned to where b ends.
func mask(key uint32, b []byte) uint32 {
	wide := uint64(key)<<32 | uint64(key)
	for len(b) >= 32 {
		w := b[:32:32]
		binary.LittleEndian.PutUint64(w, binary.LittleEndian.Uint64(w)^wide)
		binary.LittleEndian.PutUint64(w[8:], binary.LittleEndian.Uint64(w[8:])^wide)
		binary.LittleEndian.PutUint64(w[16:], binary.LittleEndian.Uint64(w[16:])^wide)
		binary.LittleEndian.PutUint64(w[24:], binary.LittleEndian.Uint64(w[24:])^wide)
		b = b[32:]
	}
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)^wide)
		b = b[8:]
	}
	for i := range b {
		b[i] ^= byte(key)
		key = bits.RotateLeft32(key, -8)
	}
	return key
}

// HeaderLen is how long the header of a server's frame with n payload bytes is.
func HeaderLen(n int) int {
	switch {
	case n < 126:
		return 2
	case n <= 0xffff:
		return 4
	}
	return 10
}

// PutHeader writes the header of a server's whole (unfragmented, unmasked) message of n payload bytes to the front of b,
// which has room for HeaderLen(n), and returns that length.
func PutHeader(b []byte, op Opcode, n int) int {
	b[0] = finBit | byte(op)
	switch {
	case n < 126:
		b[1] = byte(n)
		return 2
	case n <= 0xffff:
		b[1] = 126
		binary.BigEndian.PutUint16(b[2:], uint16(n))
		return 4
	}
	b[1] = 127
	binary.BigEndian.PutUint64(b[2:], uint64(n))
	return 10
}

// AppendFrame appends a server's whole message.
func AppendFrame(dst []byte, op Opcode, payload []byte) []byte {
	var h [MaxHeaderLen]byte
	dst = append(dst, h[:PutHeader(h[:], op, len(payload))]...)
	return append(dst, payload...)
}

// AppendMaskedFrame appends a client's whole message, masked with key.
func AppendMaskedFrame(dst []byte, op Opcode, payload []byte, key [4]byte) []byte {
	var h [MaxHeaderLen]byte
	n := PutHeader(h[:], op, len(payload))
	h[1] |= maskBit
	dst = append(append(dst, h[:n]...), key[:]...)
	dst = append(dst, payload...)
	mask(binary.LittleEndian.Uint32(key[:]), dst[len(dst)-len(payload):])
	return dst
}

// ClosePayload is a close frame's payload. A reason that is too long is cut between characters.
func ClosePayload(code int, reason string) []byte {
	for len(reason) > maxReason {
		cut := maxReason
		for cut > 0 && reason[cut]&0xc0 == 0x80 {
			cut--
		}
		reason = reason[:cut]
	}
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(reason)), uint16(code)), reason...)
}

// ParseClose reads a close frame's payload. Code 1005 stands for an empty one.
func ParseClose(payload []byte) (code int, reason string) {
	if len(payload) < 2 {
		return 1005, ""
	}
	return int(binary.BigEndian.Uint16(payload)), string(payload[2:])
}

// AcceptKey answers the client's Sec-WebSocket-Key, whatever it holds: RFC 6455 (4.2.2) asks no server to decode it, and
// FreeRDP 2 sends 15 characters that are not base64.
func AcceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}
