package proxydial

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"
)

// Whatever a proxy answers, what follows a good answer comes through as it was sent, and a bad one is told in one short line.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 Connection established\r\n\r\n"), []byte("INFO {}\r\n"))
	f.Add([]byte("HTTP/1.1 407 \x1b[2J\r\nProxy-Authenticate: Basic\r\nContent-Length: 5\r\n\r\nhello"), []byte{})
	f.Add([]byte("HTTP/1.0 200\r\nTransfer-Encoding: chunked\r\n\r\n"), []byte("0\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nX: "+strings.Repeat("y", maxAnswer)+"\r\n\r\n"), []byte("x"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nX "+strings.Repeat("y", 8000)+"\r\n\r\n"), []byte{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	proxy := &url.URL{Scheme: "http", Host: l.Addr().String(), User: url.UserPassword("user", "s3cret")}
	f.Fuzz(func(t *testing.T, head, rest []byte) {
		if len(head)+len(rest) > 64<<10 {
			return
		}
		served := make(chan error, 1)
		go func() {
			conn, err := l.Accept()
			if err == nil {
				defer conn.Close()
				asked := make([]byte, 4096) // the request is one write
				if _, err = conn.Read(asked); err == nil {
					_, err = conn.Write(append(bytes.Clone(head), rest...))
					conn.(*net.TCPConn).CloseWrite()
					io.Copy(io.Discard, conn)
				}
			}
			served <- err
		}()
		conn, err := Dialer{Proxy: proxy}.connect(context.Background(), "tcp", proxy, "broker.example.test:443")
		if err != nil {
			if text := err.Error(); len(text) > 8*maxReason+200 || strings.ContainsAny(text, "\x1b\n\x00") || !utf8.ValidString(text) || strings.Contains(text, "s3cret") {
				t.Errorf("error %q", text)
			}
			<-served
			return
		}
		got, err := io.ReadAll(conn)
		conn.Close()
		<-served
		sent := append(bytes.Clone(head), rest...)
		if err == nil && !bytes.HasSuffix(sent, got) {
			t.Errorf("%q came through of %q", got, sent)
		}
		if err == nil && bytes.HasSuffix(head, []byte("\r\n\r\n")) && bytes.Count(head, []byte("\r\n\r\n")) == 1 && !bytes.Contains(head, []byte("\n\n")) && !bytes.Contains(head, []byte("\n\r\n\r")) && !bytes.Equal(got, rest) {
			t.Errorf("%q came through, want %q", got, rest)
		}
	})
}
