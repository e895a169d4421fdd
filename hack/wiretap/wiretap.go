// Package wiretap reads what passed on a wire: TCP streams out of a capture, TLS 1.3 out of a stream with the keys that
// a client logged, and typed keys out of an RDP input stream. The end-to-end tests use it to show that the relay
// carries what it cannot read, and that the same reading succeeds with the client's keys.
package wiretap

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"sort"
	"strings"

	"golang.org/x/crypto/chacha20poly1305"
)

// Stream is one direction of one TCP connection.
type Stream struct {
	Src, Dst uint16 // ports
	Data     []byte
}

type flow struct {
	src, dst string
	sp, dp   uint16
}

type segment struct {
	seq  uint32
	data []byte
}

// Streams reads a capture (classic pcap, Ethernet or raw IP, IPv4) and returns every direction of every connection.
func Streams(pcap io.Reader) ([]Stream, error) {
	r := bufio.NewReader(pcap)
	var head [24]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("wiretap: pcap header: %w", err)
	}
	if magic := binary.LittleEndian.Uint32(head[:]); magic != 0xa1b2c3d4 && magic != 0xa1b23c4d {
		return nil, fmt.Errorf("wiretap: not a little-endian pcap file (magic %#x)", magic)
	}
	link := binary.LittleEndian.Uint32(head[20:])
	segments := map[flow][]segment{}
	for {
		var ph [16]byte
		if _, err := io.ReadFull(r, ph[:]); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		} else if err != nil {
			return nil, err
		}
		pkt := make([]byte, binary.LittleEndian.Uint32(ph[8:]))
		if _, err := io.ReadFull(r, pkt); err != nil {
			break // the capture was cut off in the middle of a packet
		}
		if f, s, ok := parse(link, pkt); ok {
			segments[f] = append(segments[f], s)
		}
	}
	var out []Stream
	for f, segs := range segments {
		out = append(out, Stream{Src: f.sp, Dst: f.dp, Data: reassemble(segs)})
	}
	sort.Slice(out, func(i, j int) bool { return len(out[i].Data) > len(out[j].Data) })
	return out, nil
}

func parse(link uint32, p []byte) (flow, segment, bool) {
	switch link {
	case 1: // Ethernet
		if len(p) < 14 || binary.BigEndian.Uint16(p[12:]) != 0x0800 {
			return flow{}, segment{}, false
		}
		p = p[14:]
	case 113: // Linux cooked
		if len(p) < 16 || binary.BigEndian.Uint16(p[14:]) != 0x0800 {
			return flow{}, segment{}, false
		}
		p = p[16:]
	}
	if len(p) < 20 || p[0]>>4 != 4 || p[9] != 6 {
		return flow{}, segment{}, false
	}
	ihl, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
	if total == 0 || total > len(p) { // offloaded segments carry no length
		total = len(p)
	}
	if total < ihl+20 {
		return flow{}, segment{}, false
	}
	t := p[ihl:total]
	off := int(t[12]>>4) * 4
	if off < 20 || off > len(t) || len(t) == off {
		return flow{}, segment{}, false
	}
	f := flow{string(p[12:16]), string(p[16:20]), binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])}
	return f, segment{binary.BigEndian.Uint32(t[4:]), bytes.Clone(t[off:])}, true
}

// reassemble puts the segments of one direction in order. Sequence numbers may wrap, so they count from the first.
func reassemble(segs []segment) []byte {
	first := segs[0].seq
	for _, s := range segs {
		if int32(s.seq-first) < 0 {
			first = s.seq
		}
	}
	sort.SliceStable(segs, func(i, j int) bool { return segs[i].seq-first < segs[j].seq-first })
	var out []byte
	for _, s := range segs {
		at := int(s.seq - first)
		switch {
		case at > len(out): // a hole: what follows can't be placed
			return out
		case at+len(s.data) > len(out):
			out = append(out[:at], s.data...)
		}
	}
	return out
}

// Keys is a key log (SSLKEYLOGFILE format): label and client random to secret.
type Keys map[string][]byte

// ParseKeys reads a key log.
func ParseKeys(log []byte) Keys {
	k := Keys{}
	for line := range strings.Lines(string(log)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		if secret, err := hex.DecodeString(f[2]); err == nil {
			k[f[0]+" "+strings.ToLower(f[1])] = secret
		}
	}
	return k
}

// TLS 1.3 record and handshake types (RFC 8446).
const (
	recordHandshake = 22
	recordData      = 23
	helloClient     = 1
	helloServer     = 2
)

// DecryptClient returns the application data that the client sent in a TLS 1.3 connection whose two directions are
// given from any point before the client's hello, and the name of the cipher suite.
func DecryptClient(fromClient, fromServer []byte, keys Keys) ([]byte, string, error) {
	ch := findHello(fromClient, helloClient)
	sh := findHello(fromServer, helloServer)
	if ch < 0 || sh < 0 {
		return nil, "", errors.New("wiretap: the streams hold no TLS handshake")
	}
	random := hex.EncodeToString(fromClient[ch+11 : ch+43])
	suiteAt := sh + 5 + 4 + 2 + 32
	suiteAt += 1 + int(fromServer[suiteAt])
	suite := binary.BigEndian.Uint16(fromServer[suiteAt:])
	hs, app := keys["CLIENT_HANDSHAKE_TRAFFIC_SECRET "+random], keys["CLIENT_TRAFFIC_SECRET_0 "+random]
	if hs == nil || app == nil {
		return nil, "", fmt.Errorf("wiretap: the key log has no TLS 1.3 secrets for client random %s", random)
	}
	handshake, name, err := newOpener(suite, hs)
	if err != nil {
		return nil, "", err
	}
	traffic, _, _ := newOpener(suite, app)
	var out []byte
	cur := handshake
	for rest := fromClient[ch:]; len(rest) >= 5; {
		n := int(binary.BigEndian.Uint16(rest[3:]))
		if len(rest) < 5+n {
			break
		}
		head, body := rest[:5], rest[5:5+n]
		rest = rest[5+n:]
		if head[0] != recordData {
			continue
		}
		plain, err := cur.open(head, body)
		if err != nil && cur == handshake {
			cur = traffic
			plain, err = cur.open(head, body)
		}
		if err != nil {
			return out, name, fmt.Errorf("wiretap: record %d does not decrypt", cur.seq)
		}
		plain = bytes.TrimRight(plain, "\x00") // padding; the content type follows the content
		if len(plain) > 0 && plain[len(plain)-1] == recordData {
			out = append(out, plain[:len(plain)-1]...)
		}
	}
	return out, name, nil
}

// findHello finds the record that starts a handshake with the message of the kind given.
func findHello(stream []byte, kind byte) int {
	for i := 0; i+43 < len(stream); i++ {
		if stream[i] == recordHandshake && stream[i+1] == 3 && stream[i+5] == kind && stream[i+6] == 0 && stream[i+9] == 3 && stream[i+10] == 3 {
			return i
		}
	}
	return -1
}

type opener struct {
	aead cipher.AEAD
	iv   []byte
	seq  uint64
}

func newOpener(suite uint16, secret []byte) (*opener, string, error) {
	var h func() hash.Hash
	var keyLen int
	var name string
	switch suite {
	case 0x1301:
		h, keyLen, name = sha256.New, 16, "TLS_AES_128_GCM_SHA256"
	case 0x1302:
		h, keyLen, name = sha512.New384, 32, "TLS_AES_256_GCM_SHA384"
	case 0x1303:
		h, keyLen, name = sha256.New, 32, "TLS_CHACHA20_POLY1305_SHA256"
	default:
		return nil, "", fmt.Errorf("wiretap: cipher suite %#04x is not TLS 1.3's", suite)
	}
	key, err := expandLabel(h, secret, "key", keyLen)
	if err != nil {
		return nil, "", err
	}
	iv, err := expandLabel(h, secret, "iv", 12)
	if err != nil {
		return nil, "", err
	}
	var aead cipher.AEAD
	if suite == 0x1303 {
		aead, err = chacha20poly1305.New(key)
	} else {
		block, berr := aes.NewCipher(key)
		if berr != nil {
			return nil, "", berr
		}
		aead, err = cipher.NewGCM(block)
	}
	return &opener{aead: aead, iv: iv}, name, err
}

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446 7.1).
func expandLabel(h func() hash.Hash, secret []byte, label string, n int) ([]byte, error) {
	info := append(binary.BigEndian.AppendUint16(nil, uint16(n)), byte(len("tls13 ")+len(label)))
	info = append(append(info, "tls13 "+label...), 0)
	return hkdf.Expand(h, secret, string(info), n)
}

func (o *opener) open(head, body []byte) ([]byte, error) {
	nonce := bytes.Clone(o.iv)
	for i := range 8 {
		nonce[4+i] ^= byte(o.seq >> (56 - 8*i))
	}
	plain, err := o.aead.Open(nil, nonce, body, head)
	if err == nil {
		o.seq++
	}
	return plain, err
}

// scancodes of a US keyboard, set 1 (MS-RDPBCGR 2.2.8.1.2.2.1 sends these).
var scancodes = map[rune]byte{
	'a': 0x1e, 'b': 0x30, 'c': 0x2e, 'd': 0x20, 'e': 0x12, 'f': 0x21, 'g': 0x22, 'h': 0x23, 'i': 0x17, 'j': 0x24, 'k': 0x25,
	'l': 0x26, 'm': 0x32, 'n': 0x31, 'o': 0x18, 'p': 0x19, 'q': 0x10, 'r': 0x13, 's': 0x1f, 't': 0x14, 'u': 0x16, 'v': 0x2f,
	'w': 0x11, 'x': 0x2d, 'y': 0x15, 'z': 0x2c,
}

// keyDowns are how a fast-path input PDU with one key-down event may begin (MS-RDPBCGR 2.2.8.1.2): one event, the PDU's
// length in one byte or in two, no flags; the scancode follows.
var keyDowns = [][]byte{{0x04, 0x04, 0x00}, {0x04, 0x80, 0x05, 0x00}}

// maxGap bounds the bytes between two keys of one word: key-up events, and some pointer or synchronise events.
const maxGap = 256

// Typed says whether the word (letters a to z) was typed in an RDP input stream, or stands in it as text.
func Typed(stream []byte, word string) bool {
	if bytes.Contains(stream, []byte(word)) || bytes.Contains(stream, utf16(word)) {
		return true
	}
	for {
		i := afterKey(stream, rune(word[0]))
		if i < 0 {
			return false
		}
		stream = stream[i:]
		if typedOn(stream, word[1:]) {
			return true
		}
	}
}

func typedOn(stream []byte, rest string) bool {
	for _, r := range rest {
		i := afterKey(stream[:min(len(stream), maxGap)], r)
		if i < 0 {
			return false
		}
		stream = stream[i:]
	}
	return true
}

// afterKey finds where the stream goes on behind the first time that the key goes down, -1 where it doesn't.
func afterKey(stream []byte, key rune) int {
	first := -1
	for _, down := range keyDowns {
		pattern := append(bytes.Clone(down), scancodes[key])
		if i := bytes.Index(stream, pattern); i >= 0 && (first < 0 || i+len(pattern) < first) {
			first = i + len(pattern)
		}
	}
	return first
}

func utf16(s string) []byte {
	var out []byte
	for _, r := range s {
		out = append(out, byte(r), 0)
	}
	return out
}
