package netlab

import (
	"io"
	"net"
	"testing"
	"time"
)

// Everything arrives, in order, no sooner than the line allows, and the end of one direction leaves the other open.
func TestSlowLine(t *testing.T) {
	far, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &SlowLine{listener: l, to: far.Addr().String(), conns: map[net.Conn]struct{}{}}
	go s.accept()
	defer s.Close()
	const trip = 40 * time.Millisecond
	s.SetRoundTrip(trip)

	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	began := time.Now()
	io.WriteString(near, "ab")
	c, err := far.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 2)
	if _, err := io.ReadFull(c, buf); err != nil {
		t.Fatal(err)
	}
	near.(*net.TCPConn).CloseWrite()
	if _, err := c.Read(buf); err != io.EOF {
		t.Errorf("the end did not pass: %v", err)
	}
	io.WriteString(c, "cd")
	if _, err := io.ReadFull(near, buf); err != nil || string(buf) != "cd" {
		t.Errorf("%q, %v", buf, err)
	}
	if took := time.Since(began); took < trip {
		t.Errorf("a round trip took %s, less than the line's %s", took, trip)
	}
	s.Close()
	if _, err := near.Read(buf); err == nil {
		t.Error("a closed line still carries")
	}
}
