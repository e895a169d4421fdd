package netlab

import (
	"context"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// SlowLine is a TCP proxy at a host's address that keeps back what passes it: whoever is reached through it seems to be
// far away. A kernel without netem needs one.
type SlowLine struct {
	listener net.Listener
	to       string
	oneWay   atomic.Int64 // nanoseconds

	mu    sync.Mutex
	conns map[net.Conn]struct{} // nil once closed
}

// SlowLine listens on a port of the host and passes connections on to an address as this machine sees it.
func (h *Host) SlowLine(port int, to string) (*SlowLine, error) {
	s := &SlowLine{to: to, conns: map[net.Conn]struct{}{}}
	err := h.Do(func() (err error) {
		s.listener, err = net.Listen("tcp", net.JoinHostPort(h.Addr, strconv.Itoa(port)))
		return err
	})
	if err != nil {
		return nil, err
	}
	go s.accept()
	return s, nil
}

// SetRoundTrip is how much longer a round trip takes through the line, half of it each way, from now on.
func (s *SlowLine) SetRoundTrip(d time.Duration) { s.oneWay.Store(int64(d / 2)) }

// Close ends the line and all that passes it.
func (s *SlowLine) Close() {
	s.listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

func (s *SlowLine) accept() {
	for {
		in, err := s.listener.Accept()
		if err != nil {
			return
		}
		go s.serve(in)
	}
}

func (s *SlowLine) serve(in net.Conn) {
	defer in.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	out, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.to)
	cancel()
	if err != nil {
		return
	}
	defer out.Close()
	s.mu.Lock()
	open := s.conns != nil
	if open {
		s.conns[in], s.conns[out] = struct{}{}, struct{}{}
	}
	s.mu.Unlock()
	if !open {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { s.carry(out, in) })
	both.Go(func() { s.carry(in, out) })
	both.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, in)
	delete(s.conns, out)
}

// carry passes one direction on, each piece when its time has come, and then its end.
func (s *SlowLine) carry(to, from net.Conn) {
	type piece struct {
		data []byte
		due  time.Time
	}
	pieces := make(chan piece, 256)
	go func() {
		defer close(pieces)
		for {
			buf := make([]byte, 32<<10)
			n, err := from.Read(buf)
			if n > 0 {
				pieces <- piece{buf[:n], time.Now().Add(time.Duration(s.oneWay.Load()))}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			from.Close()
			break
		}
	}
	for range pieces { // the reader must not be left waiting
	}
	to.(interface{ CloseWrite() error }).CloseWrite()
}
