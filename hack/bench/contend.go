package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// patience bounds every step of opening a session.
const patience = 20 * time.Second

// Names in the certificates.
const (
	gatewayName = "gateway.bench.test"
	hostName    = "host.bench.test"
)

// stack is what runs for one or several contenders.
type stack interface {
	// start starts fresh processes and returns once they serve.
	start(ctx context.Context) error
	stop()
	processes() []*process
}

// contender is one way through a stack.
type contender struct {
	name  string
	stack stack
	// dial gets a client's stream whose other end reaches a host. With resume, TLS sessions are resumed on both legs.
	dial func(resume bool) (stream, error)
	// most is how many sessions at once are asked of it; 0 is any number.
	most int
}

// stream carries the bytes of a session, without what frames them.
type stream interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
}

// session is both ends of one session.
type session struct{ client, host stream }

func (s *session) close() {
	s.client.Close()
	s.host.SetDeadline(time.Now().Add(patience))
	io.Copy(io.Discard, s.host) // the contender has passed the end on
	s.host.Close()
}

// meet brings a client and its host together: a client's first eight bytes say who it is, the host answers with one.
type meet struct {
	last    atomic.Uint64
	mu      sync.Mutex
	waiting map[uint64]chan stream
}

const greeting = 8

// open opens a session and says how long it took from dialling until the host's first byte came.
func (m *meet) open(c *contender, resume bool) (*session, time.Duration, error) {
	id, ch := m.last.Add(1), make(chan stream, 1)
	m.mu.Lock()
	if m.waiting == nil {
		m.waiting = map[uint64]chan stream{}
	}
	m.waiting[id] = ch
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.waiting, id)
		m.mu.Unlock()
	}()
	began := time.Now()
	client, err := c.dial(resume)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", c.name, err)
	}
	client.SetDeadline(time.Now().Add(patience))
	b := binary.BigEndian.AppendUint64(nil, id)
	if _, err = client.Write(b); err == nil {
		_, err = io.ReadFull(client, b[:1])
	}
	took := time.Since(began)
	if err != nil {
		client.Close()
		return nil, 0, fmt.Errorf("%s: no host answers: %w", c.name, err)
	}
	client.SetDeadline(time.Time{})
	return &session{client, <-ch}, took, nil
}

// host is called with each connection that reached a host. It owns it.
func (m *meet) host(s stream) {
	s.SetDeadline(time.Now().Add(patience))
	var b [greeting]byte
	if _, err := io.ReadFull(s, b[:]); err != nil {
		s.Close()
		return
	}
	s.SetDeadline(time.Time{})
	m.mu.Lock()
	ch := m.waiting[binary.BigEndian.Uint64(b[:])]
	m.mu.Unlock()
	if ch == nil {
		s.Close()
		return
	}
	ch <- s // before the answer: open takes it once that has come
	if _, err := s.Write(b[:1]); err != nil {
		s.Close()
	}
}

// clientTLS is what clients and agents speak: TLS 1.3, P-256 for the exchange of keys. The certificate isn't verified
// against the CA, to keep the load generator light; no contender can tell.
func clientTLS(name string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256}, ServerName: name,
		InsecureSkipVerify: true, DynamicRecordSizingDisabled: true}
}

// tlsDialer dials TLS, with a session cache or without.
type tlsDialer struct{ full, resumed *tls.Config }

func newTLSDialer(name string) *tlsDialer {
	d := &tlsDialer{full: clientTLS(name), resumed: clientTLS(name)}
	d.resumed.ClientSessionCache = tls.NewLRUClientSessionCache(16)
	return d
}

// handshakes counts those of the load generator, by leg, so that a run can prove what it measured.
type handshakes struct{ full, resumed atomic.Int64 }

func (h *handshakes) count(cs tls.ConnectionState) {
	if cs.DidResume {
		h.resumed.Add(1)
	} else {
		h.full.Add(1)
	}
}

var clientLegs, hostLegs handshakes

// dial connects and checks that what was agreed on is what the report says.
func (d *tlsDialer) dial(address string, resume bool, legs *handshakes) (*tls.Conn, error) {
	conf := d.full
	if resume {
		conf = d.resumed
	}
	tcp, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return nil, err
	}
	c := tls.Client(tcp, conf)
	c.SetDeadline(time.Now().Add(patience))
	if err := c.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	cs := c.ConnectionState()
	legs.count(cs)
	return c, agreed(cs)
}

// agreed checks version, cipher and curve.
func agreed(cs tls.ConnectionState) error {
	if cs.Version != tls.VersionTLS13 || cs.CipherSuite != tls.TLS_AES_128_GCM_SHA256 || cs.CurveID != tls.CurveP256 {
		return fmt.Errorf("the TLS handshake agreed on %s, %s, %s", tls.VersionName(cs.Version), tls.CipherSuiteName(cs.CipherSuite), cs.CurveID)
	}
	return nil
}

// backend is the host that peers open TLS to.
type backend struct {
	l    net.Listener
	port int
	bad  atomic.Pointer[error] // the last handshake that did not agree
}

func newBackend(dir string, m *meet) (*backend, error) {
	cert, err := tls.LoadX509KeyPair(dir+"/tls.crt", dir+"/tls.key")
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	b := &backend{l: l, port: l.Addr().(*net.TCPAddr).Port}
	conf := &tls.Config{MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256}, Certificates: []tls.Certificate{cert},
		DynamicRecordSizingDisabled: true}
	go func() {
		for {
			tcp, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			go func() {
				c := tls.Server(tcp, conf)
				c.SetDeadline(time.Now().Add(patience))
				if c.Handshake() != nil { // somebody who looked whether we listen
					c.Close()
					return
				}
				cs := c.ConnectionState()
				hostLegs.count(cs)
				if err := agreed(cs); err != nil {
					b.bad.Store(&err)
					c.Close()
					return
				}
				m.host(c)
			}()
		}
	}()
	return b, nil
}
