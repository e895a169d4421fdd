package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// userTimeout is how long sent bytes may stay unacknowledged before the kernel gives the connection up.
const userTimeout = 60 * time.Second

// errAgain says that a read would have to wait. crypto/tls keeps a connection usable after a temporary error.
var errAgain net.Error = again{}

type again struct{}

func (again) Error() string   { return "relay: nothing to read yet" }
func (again) Timeout() bool   { return false }
func (again) Temporary() bool { return true }

// conn is the TCP connection under a TLS one. It adds what crypto/tls has no word for:
//   - the ClientHello is kept until its server name is known, so that the connection can be handed on untouched;
//   - during the handshake crypto/tls gets one record at a time, so that it holds nothing when leg.takeOver asks;
//   - reads that don't wait, and waiting without a buffer, so that an idle session holds none;
//   - whether the end of the stream was TCP's (a client that vanished) or TLS's (one that said good-bye).
type conn struct {
	*net.TCPConn
	raw syscall.RawConn

	// Until the TLS handshake has ended; owned by the accepting goroutine.
	secrets *handshakeSecrets // nil after
	peeking bool
	hello   []byte
	record  [recordHeader]byte // header of the record that crypto/tls reads
	have    int                // bytes of it
	left    int                // bytes of the record's body that crypto/tls has not got
	last    []byte             // the last record that crypto/tls wrote
	early   []byte             // read, not handed out; afterwards, what came behind the handshake
	onHello func(agent bool)   // called with the ClientHello: agent says that the server name is an instance's
	foreign string             // the instance that the server name asks for, where it isn't this one
	joining bool               // the server name is that of agents on their way to join
	peer    bool               // the server name is a hop's: once its handshake is over, another relay is at the other end
	mute    bool               // the handshake was given up: TLS must not send its alert
	// unbelieved says that there was a PROXY protocol header of somebody whose are not believed.
	unbelieved bool
	// client is the address in a header that was believed.
	client atomic.Pointer[net.TCPAddr]

	// Owned by whichever goroutine reads.
	polling bool // reads don't wait
	drained bool // the last read took all there was
	eof     bool // TCP has ended
	p       []byte
	n       int
	err     error
	asked   bool
	poll    [1]unix.PollFd
	tryFn   func(fd uintptr) bool // method values, made once: they would be allocated per read
	readyFn func(fd uintptr) bool
}

func newConn(tc *net.TCPConn) (*conn, error) {
	raw, err := tc.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &conn{TCPConn: tc, raw: raw, peeking: true, secrets: &handshakeSecrets{}}
	c.tryFn, c.readyFn = c.try, c.ready
	return c, nil
}

// socketOptions are those of every connection: it finds out within a minute that its other end has vanished. (Go sets
// TCP_NODELAY.)
var socketOptions = []struct{ level, name, value int }{
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 30},
	{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 10},
	{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
	{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout / time.Millisecond)},
}

// setOptions is what a net.ListenConfig or net.Dialer calls before it uses a socket.
func setOptions(_, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		for _, o := range socketOptions {
			failed = errors.Join(failed, unix.SetsockoptInt(int(fd), o.level, o.name, o.value))
		}
	})
	return errors.Join(err, failed)
}

// Listen opens a listener for Run. Its connections inherit socketOptions, which spares a session twenty system calls.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	lc := net.ListenConfig{Control: setOptions, KeepAlive: -1} // or Go would set its own on each connection
	return lc.Listen(ctx, "tcp", address)
}

// Read is for crypto/tls.
func (c *conn) Read(p []byte) (int, error) {
	if c.secrets != nil {
		return c.readInRecord(p)
	}
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	if c.polling {
		return c.readNow(p)
	}
	n, err := c.TCPConn.Read(p)
	c.eof = c.eof || err == io.EOF
	return n, err
}

// handshakeRead is what one read during the handshake may bring: more than a client's flight.
const handshakeRead = 2 << 10

// readInRecord never reads past a record's end.
func (c *conn) readInRecord(p []byte) (int, error) {
	if len(c.early) == 0 {
		if cap(c.early) < handshakeRead {
			c.early = make([]byte, handshakeRead)
		}
		buf := c.early[:cap(c.early)]
		n, err := c.TCPConn.Read(buf)
		if n == 0 {
			c.eof = c.eof || err == io.EOF
			return 0, err
		}
		c.early = buf[:n:n]
		if c.peeking {
			c.hello = append(c.hello, c.early...)
		}
	}
	var n int
	if c.left == 0 {
		n = copy(p, c.early[:min(len(c.early), recordHeader-c.have)])
		copy(c.record[c.have:], p[:n])
		if c.have += n; c.have == recordHeader {
			c.have, c.left = 0, int(binary.BigEndian.Uint16(c.record[3:]))
		}
	} else {
		n = copy(p, c.early[:min(len(c.early), c.left)])
		c.left -= n
	}
	c.early = c.early[n:]
	return n, nil
}

// handshakeOver returns the last record of the handshake. What crypto/tls reads from now on is no longer cut.
func (c *conn) handshakeOver() (last []byte) {
	last = c.last
	c.secrets, c.last, c.onHello = nil, nil, nil
	c.early = bytes.Clone(c.early) // its buffer was larger
	return last
}

// Write is for crypto/tls.
func (c *conn) Write(p []byte) (int, error) {
	if c.mute {
		return len(p), nil
	}
	if c.secrets != nil {
		c.last = bytes.Clone(lastRecord(p))
	}
	return c.TCPConn.Write(p)
}

// lastRecord is the last of the records in p, nil where p is not made of whole records.
func lastRecord(p []byte) (last []byte) {
	for len(p) > 0 {
		if len(p) < recordHeader {
			return nil
		}
		n := recordHeader + int(binary.BigEndian.Uint16(p[3:]))
		if n > len(p) {
			return nil
		}
		last, p = p[:n], p[n:]
	}
	return last
}

// readNow reads what is there, or fails with errAgain.
func (c *conn) readNow(p []byte) (int, error) {
	if c.drained {
		return 0, errAgain
	}
	c.p = p
	err := c.raw.Read(c.tryFn)
	c.p = nil
	switch {
	case err != nil:
		return 0, err
	case c.err == unix.EAGAIN:
		c.drained = true
		return 0, errAgain
	case c.err != nil:
		return 0, c.err
	case c.n == 0:
		c.eof = true
		return 0, io.EOF
	}
	c.drained = c.n < len(p)
	return c.n, nil
}

func (c *conn) try(fd uintptr) bool {
	for {
		c.n, c.err = unix.Read(int(fd), c.p)
		if c.err != unix.EINTR {
			return true
		}
	}
}

// wait returns once a read would not wait.
func (c *conn) wait() error {
	c.asked = false
	err := c.raw.Read(c.readyFn)
	c.drained = false
	return err
}

// ready is asked twice: before the goroutine is parked, when it must look for itself (the poller's news from before were
// forgotten when the read began), and when the poller woke it.
func (c *conn) ready(fd uintptr) bool {
	if c.asked {
		return true
	}
	c.asked = true
	c.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}
	n, err := unix.Poll(c.poll[:], 0)
	return n > 0 || err != nil && err != unix.EINTR
}
