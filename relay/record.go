package relay

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"math"
)

// This file is the record layer of TLS 1.3 (RFC 8446, section 5) for connections whose handshake crypto/tls has done. It
// is here because crypto/tls copies every byte twice, makes a system call per record, and keeps 17 KiB of buffer and the
// remains of the handshake with each connection that ever read: see docs/performance.md. Where it doesn't know the
// cipher suite or the version, crypto/tls goes on (leg.takeOver).
//
// A record on the wire, type and version always those of TLS 1.2's application data:
//
//	23 | 3 3 | u16 length | AEAD(content, u8 type, zeros...) with these 5 bytes as additional data
//
// Nonces: the 64-bit number of the record under its key, XORed into the key's IV (5.3). A direction has one owner at a
// time (the reading goroutine; for writing, the holder of leg.wmu), its number only grows, and a new key starts at 0.

const (
	recordHeader = 5
	recordTag    = 16
	// recordOverhead is what a record needs beside its content: header, type, tag.
	recordOverhead = recordHeader + 1 + recordTag
	// maxContent bounds a record's content (5.1), maxSealed its encrypted part (5.2).
	maxContent = 16 << 10
	maxSealed  = maxContent + 256
	// rekeyAfter is the records after which a key is replaced: AES-GCM is good for 2^24.5 full ones (5.5).
	rekeyAfter = 1 << 24
)

// Content types (5.1).
const (
	typeAlert     byte = 21
	typeHandshake byte = 22
	typeData      byte = 23
)

// keyUpdate is the only message of a client that may follow its handshake (4.6.3); its last byte asks for one in return or not.
const (
	keyUpdate          byte = 24
	updateNotRequested byte = 0
	updateRequested    byte = 1
)

// alert is a reason to end a TLS connection (6).
type alert byte

// Alert levels. TLS 1.3 goes by the alert alone (6), but says what they are to be.
const (
	alertLevelWarning = 1
	alertLevelFatal   = 2
)

const (
	alertCloseNotify       alert = 0
	alertUnexpectedMessage alert = 10
	alertBadRecordMAC      alert = 20
	alertRecordOverflow    alert = 22
	alertIllegalParameter  alert = 47
	alertDecodeError       alert = 50
	alertUserCanceled      alert = 90
)

func (a alert) Error() string {
	return fmt.Sprintf("relay: the TLS record breaks the rules (alert %d)", byte(a))
}

// suite is a cipher suite that this file knows.
type suite struct {
	hash func() hash.Hash
	key  int // bytes
}

// suiteOf is nil for suites that are left to crypto/tls.
func suiteOf(id uint16) *suite {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return &suite{sha256.New, 16}
	case tls.TLS_AES_256_GCM_SHA384:
		return &suite{sha512.New384, 32}
	}
	return nil
}

// expandLabel is HKDF-Expand-Label with an empty context (7.1).
func (s *suite) expandLabel(secret []byte, label string, n int) ([]byte, error) {
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len("tls13 ")+len(label)))
	info = append(append(info, "tls13 "...), label...)
	return hkdf.Expand(s.hash, secret, string(append(info, 0)), n)
}

// direction protects the records that go one way.
type direction struct {
	suite  *suite
	secret []byte // application_traffic_secret_N
	aead   cipher.AEAD
	iv     [12]byte
	nonce  [12]byte // scratch: a local one would be allocated per record
	seq    uint64   // of the next record
}

// newDirection starts with a traffic secret, of whose key n records were used already.
func newDirection(s *suite, secret []byte, n uint64) (direction, error) {
	d := direction{suite: s}
	err := d.install(secret)
	d.seq = n
	return d, err
}

// install derives key and IV of a secret (7.3).
func (d *direction) install(secret []byte) error {
	key, err := d.suite.expandLabel(secret, "key", d.suite.key)
	if err != nil {
		return err
	}
	iv, err := d.suite.expandLabel(secret, "iv", len(d.iv))
	if err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	clear(key)
	if err != nil {
		return err
	}
	if d.aead, err = cipher.NewGCM(block); err != nil {
		return err
	}
	d.secret, d.seq = secret, 0
	copy(d.iv[:], iv)
	return nil
}

// update goes on to the next key (7.2).
func (d *direction) update() error {
	next, err := d.suite.expandLabel(d.secret, "traffic upd", len(d.secret))
	if err != nil {
		return err
	}
	clear(d.secret)
	return d.install(next)
}

// count makes the nonce of the next record, which nothing else will get.
func (d *direction) count() error {
	if d.seq == math.MaxUint64 {
		return errors.New("relay: a TLS key is used up")
	}
	d.nonce = d.iv
	tail := d.nonce[4:]
	binary.BigEndian.PutUint64(tail, binary.BigEndian.Uint64(tail)^d.seq)
	d.seq++
	return nil
}

// seal makes a record in place: its content stands at rec[recordHeader:], and rec ends where the record will.
func (d *direction) seal(rec []byte, typ byte) error {
	end := len(rec) - recordTag
	if end-recordHeader-1 > maxContent {
		return alertRecordOverflow
	}
	if err := d.count(); err != nil {
		return err
	}
	rec[end-1] = typ
	rec[0], rec[1], rec[2] = typeData, 3, 3
	binary.BigEndian.PutUint16(rec[3:], uint16(len(rec)-recordHeader))
	d.aead.Seal(rec[recordHeader:recordHeader], d.nonce[:], rec[recordHeader:end], rec[:recordHeader])
	return nil
}

// recordLen is the length of the record that b begins with, 0 where b doesn't tell yet.
func recordLen(b []byte) (int, error) {
	if len(b) < recordHeader {
		return 0, nil
	}
	n := int(binary.BigEndian.Uint16(b[3:]))
	switch {
	case b[0] != typeData: // all others are of the handshake, which is over
		return 0, alertUnexpectedMessage
	case n > maxSealed:
		return 0, alertRecordOverflow
	case n < 1+recordTag:
		return 0, alertBadRecordMAC
	}
	return recordHeader + n, nil
}

// open reads a whole record in place.
func (d *direction) open(rec []byte) (typ byte, content []byte, err error) {
	if err := d.count(); err != nil {
		return 0, nil, err
	}
	inner, err := d.aead.Open(rec[recordHeader:recordHeader], d.nonce[:], rec[recordHeader:], rec[:recordHeader])
	if err != nil {
		return 0, nil, alertBadRecordMAC
	}
	if len(inner) > maxContent+1 { // padding counts (5.2)
		return 0, nil, alertRecordOverflow
	}
	end := len(inner) - 1
	for end >= 0 && inner[end] == 0 { // padding (5.4)
		end--
	}
	if end < 0 {
		return 0, nil, alertUnexpectedMessage
	}
	return inner[end], inner[:end], nil
}

// handshakeSecrets takes down, by way of tls.Config.KeyLogWriter and WrapSession, what a handshake leaves to whoever
// protects the records after it.
type handshakeSecrets struct {
	fromClient, fromServer []byte // application_traffic_secret_0; nil below TLS 1.3
	tickets                uint64 // NewSessionTickets sent, each a record under the server's new key
}

// Write reads one line of the key log: label, client random, secret.
func (s *handshakeSecrets) Write(line []byte) (int, error) {
	label, rest, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
	_, secret, _ := bytes.Cut(rest, []byte(" "))
	var to *[]byte
	switch string(label) {
	case "CLIENT_TRAFFIC_SECRET_0":
		to = &s.fromClient
	case "SERVER_TRAFFIC_SECRET_0":
		to = &s.fromServer
	default:
		return len(line), nil
	}
	*to = make([]byte, hex.DecodedLen(len(secret)))
	_, err := hex.Decode(*to, secret)
	return len(line), err
}

// capture makes the configuration of one connection that leaves its secrets in s. Tickets are still base's own.
func (s *handshakeSecrets) capture(base *tls.Config) *tls.Config {
	c := base.Clone()
	c.GetConfigForClient = nil
	c.KeyLogWriter = s
	c.WrapSession = func(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
		s.tickets++
		return base.EncryptTicket(cs, ss)
	}
	return c
}
