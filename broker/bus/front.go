package bus

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"rendezvous.dev/rendezvous/wire/door"
)

// This file is what agents and gateways reach in the NATS server's place. The server's own listeners take any number of
// connections, and tell each at once which server of which cluster and version it is; they can't be replaced. So they are
// on loopback, and the public ones here pass on to them who has said something (wire/door).
//
// A NATS client waits for INFO before it speaks. It is given one that tells nothing; the server's own, which the server
// sends again inside TLS, is dropped.

const (
	// strangers are the connections that have not authenticated, at both listeners. One costs 2 KiB while it says nothing,
	// and 40 KiB in its handshake.
	strangers = 4096
	// calm is up to how many that say nothing a stranger is greeted at once. With more, only after greetAfter, which those
	// of a flood don't live to see.
	calm       = 64
	greetAfter = 250 * time.Millisecond
	// closeGrace is how long one direction may go on after the other has ended.
	closeGrace = 2 * time.Second
	// writeTimeout is how long a peer may take nothing of what is sent to it. The server gives slow ones up after 10 s.
	writeTimeout = 30 * time.Second
	// infoTimeout and maxInfo bound the server's INFO; it comes from this process.
	infoTimeout = 10 * time.Second
	maxInfo     = 16 << 10
)

// greeting is the INFO that strangers get.
var greeting = func() []byte {
	info, err := json.Marshal(map[string]any{"server_id": "rendezvous", "proto": 1, "headers": true, "auth_required": true,
		"tls_required": true, "tls_verify": true, "max_payload": maxPayload})
	if err != nil {
		panic(err)
	}
	return fmt.Appendf(nil, "INFO %s\r\n", info)
}()

// front is the public listeners.
type front struct {
	door *door.Door
	log  *slog.Logger
	over sync.WaitGroup

	mu        sync.Mutex
	listeners []net.Listener
	conns     map[netip.AddrPort]*door.Conn // by the address that the server sees
	closed    bool
}

func newFront(o door.Options) (*front, error) {
	o.Places, o.Patience = strangers, handshakeTimeout
	d, err := door.New(o)
	if err != nil {
		return nil, fmt.Errorf("bus: %w", err)
	}
	return &front{door: d, log: o.Log, conns: map[netip.AddrPort]*door.Conn{}}, nil
}

// listen opens a public listener; port -1 is a free one.
func (f *front) listen(host string, port int) (net.Listener, error) {
	lc := net.ListenConfig{KeepAlive: -1} // the server's pings find out who has vanished
	l, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(host, strconv.Itoa(max(port, 0))))
	if err != nil {
		return nil, fmt.Errorf("bus: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listeners = append(f.listeners, l)
	return l, nil
}

// serve passes a listener's connections on to the server's, at to. Greeted says that the server speaks first there.
func (f *front) serve(l net.Listener, to net.Addr, greeted bool) {
	var greet func(*door.Conn) error
	if greeted {
		greet = f.greet
	}
	f.over.Go(func() {
		if err := f.door.Serve(l, greet, func(c *door.Conn) { f.pass(c, to.String(), greeted) }); err != nil {
			f.log.Error("the bus takes no more connections", "listener", l.Addr().String(), "error", err)
		}
	})
}

func (f *front) greet(c *door.Conn) error {
	if f.door.Mute() > calm {
		time.Sleep(greetAfter)
	}
	c.SetWriteDeadline(time.Now().Add(closeGrace))
	_, err := c.Write(greeting)
	c.SetWriteDeadline(time.Time{})
	return err
}

// pass is a connection's goroutine, from its first word on.
func (f *front) pass(c *door.Conn, to string, greeted bool) {
	defer c.Close()
	if c.Unbelieved() != "" { // and was logged
		return
	}
	nc, err := (&net.Dialer{KeepAlive: -1}).Dial("tcp", to)
	if err != nil {
		f.log.Error("the bus's server takes no connection", "remote", c.RemoteAddr().String(), "error", err)
		return
	}
	defer nc.Close()
	server, client := nc.(*net.TCPConn), c
	if !f.enter(server, client) {
		return
	}
	defer f.leave(server)
	if greeted {
		if err := dropInfo(server); err != nil {
			f.log.Error("the bus's server does not answer", "remote", c.RemoteAddr().String(), "error", err)
			return
		}
	}
	tc, early := c.Take()
	if _, err := server.Write(early); err != nil {
		return
	}
	early = nil
	var both sync.WaitGroup
	both.Go(func() { door.PassOn(tc, server, closeGrace, pump) })
	door.PassOn(server, tc, closeGrace, pump)
	both.Wait()
}

func (f *front) enter(server *net.TCPConn, c *door.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	f.over.Add(1)
	f.conns[seenAs(server)] = c
	return true
}

func (f *front) leave(server *net.TCPConn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, seenAs(server))
	f.over.Done()
}

// seenAs is the address by which the server knows our end.
func seenAs(server *net.TCPConn) netip.AddrPort {
	return server.LocalAddr().(*net.TCPAddr).AddrPort()
}

// of finds the connection that the server knows by an address, nil where there is none.
func (f *front) of(addr net.Addr) *door.Conn {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.conns[tcp.AddrPort()]
}

// remote is the address of whom the server knows by addr.
func (f *front) remote(addr net.Addr) net.Addr {
	if c := f.of(addr); c != nil {
		return c.RemoteAddr()
	}
	return addr
}

// rename puts into a line of the server's log the addresses of those whom it knows by ours.
func (f *front) rename(line string) string {
	const loopback = "127.0.0.1:"
	var b strings.Builder
	for {
		before, after, found := strings.Cut(line, loopback)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		digits := len(after) - len(strings.TrimLeft(after, "0123456789"))
		addr, line2 := loopback+after[:digits], after[digits:]
		if ap, err := netip.ParseAddrPort(addr); err == nil {
			addr = f.remote(net.TCPAddrFromAddrPort(ap)).String()
		}
		b.WriteString(addr)
		line = line2
	}
}

// stopAccepting closes the public listeners; who is there stays.
func (f *front) stopAccepting() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.listeners {
		l.Close()
	}
}

// close ends it all, and waits.
func (f *front) close() {
	f.stopAccepting()
	f.mu.Lock()
	f.closed = true
	for _, c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.over.Wait()
}

// dropInfo reads the server's INFO, behind which nothing comes until the client has spoken.
func dropInfo(server *net.TCPConn) error {
	server.SetReadDeadline(time.Now().Add(infoTimeout))
	r := bufio.NewReaderSize(server, maxInfo)
	if _, err := r.ReadSlice('\n'); err != nil {
		return err
	}
	if r.Buffered() > 0 {
		return errors.New("bus: the server says more than INFO")
	}
	return server.SetReadDeadline(time.Time{})
}

// buffers are for bytes on their way: a connection that says nothing holds none.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// pump copies until from ends. (io.Copy would hold a pipe for splice while it waits, and buffers elsewhere; agents are many,
// and say something every few seconds.)
func pump(to, from *net.TCPConn) error {
	raw, err := from.SyscallConn()
	if err != nil {
		return err
	}
	var buf *[32 << 10]byte
	var n int
	var failed error
	read := func(fd uintptr) bool {
		buf = buffers.Get().(*[32 << 10]byte)
		for {
			if n, failed = unix.Read(int(fd), buf[:]); failed != unix.EINTR {
				break
			}
		}
		if failed != nil || n <= 0 {
			buffers.Put(buf)
			buf = nil
		}
		return failed != unix.EAGAIN
	}
	for {
		switch err := raw.Read(read); {
		case err != nil:
			return err
		case failed != nil:
			return os.NewSyscallError("read", failed)
		case n == 0:
			return nil
		}
		to.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err := to.Write(buf[:n])
		buffers.Put(buf)
		if err != nil {
			return err
		}
	}
}
