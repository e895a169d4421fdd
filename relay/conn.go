package relay

import (
	"crypto/tls"
	"io"
	"net"
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
//   - reads that don't wait, and waiting without a buffer, so that an idle session holds none;
//   - whether the end of the stream was TCP's (a client that vanished) or TLS's (one that said good-bye).
type conn struct {
	*net.TCPConn
	raw syscall.RawConn

	// Until the TLS handshake has ended; owned by the accepting goroutine.
	peeking bool
	hello   []byte
	foreign string // the instance that the server name asks for, where it isn't this one
	mute    bool   // the handshake was given up: TLS must not send its alert

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
	c := &conn{TCPConn: tc, raw: raw, peeking: true}
	c.tryFn, c.readyFn = c.try, c.ready
	tc.SetNoDelay(true)
	tc.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3})
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
	})
	return c, nil
}

// Read is for crypto/tls.
func (c *conn) Read(p []byte) (int, error) {
	if c.polling {
		return c.readNow(p)
	}
	n, err := c.TCPConn.Read(p)
	if c.peeking {
		c.hello = append(c.hello, p[:n]...)
	}
	c.eof = c.eof || err == io.EOF
	return n, err
}

// Write is for crypto/tls.
func (c *conn) Write(p []byte) (int, error) {
	if c.mute {
		return len(p), nil
	}
	return c.TCPConn.Write(p)
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

// leg is one side of a session: a client's or an agent's TLS connection.
type leg struct {
	*tls.Conn
	tcp *conn
	// unread was read already, by whoever had the leg before.
	unread []byte
}

// Read gives what is unread first. A stream that ends without TLS's good-bye is io.ErrUnexpectedEOF.
func (l *leg) Read(p []byte) (int, error) {
	if len(l.unread) > 0 {
		n := copy(p, l.unread)
		l.unread = l.unread[n:]
		if len(l.unread) == 0 {
			l.unread = nil
		}
		return n, nil
	}
	n, err := l.Conn.Read(p)
	if err == io.EOF && l.tcp.eof {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// maxEarly bounds what a client may say while it waits for its host.
const maxEarly = 4 << 10

// watch reads the leg while nothing is expected from it, and calls gone when it ends. What it reads stays unread. The
// function that it returns ends the watch.
func (l *leg) watch(gone func()) (stop func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var early []byte
		defer func() { l.unread = append(l.unread, early...) }()
		buf := make([]byte, 512)
		for len(early) < maxEarly {
			n, err := l.Conn.Read(buf)
			early = append(early, buf[:n]...)
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				return
			}
			if err != nil {
				gone()
				return
			}
		}
	}()
	return func() {
		l.SetReadDeadline(time.Unix(1, 0))
		<-done
		l.SetReadDeadline(time.Time{})
	}
}
