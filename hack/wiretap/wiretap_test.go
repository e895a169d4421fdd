package wiretap

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"
)

// tee keeps what is written to a connection.
type tee struct {
	net.Conn
	mu   sync.Mutex
	sent bytes.Buffer
}

func (c *tee) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.sent.Write(p)
	c.mu.Unlock()
	return c.Conn.Write(p)
}

func TestDecryptClient(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	client, server := &tee{Conn: a}, &tee{Conn: b}
	var log bytes.Buffer
	typed := []byte{0x04, 0x04, 0x00, 0x1e, 0x04, 0x04, 0x01, 0x1e, 0x04, 0x04, 0x00, 0x30}

	done := make(chan error, 1)
	go func() {
		s := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
		_, err := io.ReadFull(s, make([]byte, len(typed)))
		done <- err
	}()
	c := tls.Client(client, &tls.Config{InsecureSkipVerify: true, KeyLogWriter: &log})
	if _, err := c.Write(typed); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	// What comes before the hello, such as X.224's negotiation, is passed over.
	fromClient := append([]byte("cookie\r\n"), client.sent.Bytes()...)
	got, suite, err := DecryptClient(fromClient, server.sent.Bytes(), ParseKeys(log.Bytes()))
	if err != nil || !bytes.Equal(got, typed) || suite == "" {
		t.Errorf("DecryptClient = %x, %q, %v; want %x", got, suite, err, typed)
	}
	if !Typed(got, "ab") {
		t.Error("the typed word is not found in the clear text")
	}
	if Typed(fromClient, "ab") {
		t.Error("the typed word is found in the cipher text")
	}
	if _, _, err := DecryptClient(fromClient, server.sent.Bytes(), Keys{}); err == nil {
		t.Error("decrypted without keys")
	}
}

func TestTyped(t *testing.T) {
	stream := []byte{0x04, 0x04, 0x00, 0x1e, 1, 2, 3, 0x04, 0x80, 0x05, 0x00, 0x1e, 0x04, 0x04, 0x01, 0x1e, 0x04, 0x04, 0x00, 0x30}
	for word, want := range map[string]bool{"ab": true, "aab": true, "ba": false, "abc": false} {
		if got := Typed(stream, word); got != want {
			t.Errorf("Typed(%q) = %v, want %v", word, got, want)
		}
	}
	if !Typed([]byte("..c\x00a\x00n\x00.."), "can") || !Typed([]byte("a can"), "can") {
		t.Error("the word as text is not found")
	}
}
