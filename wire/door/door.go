// Package door stands before the listeners that strangers reach: it reads the PROXY protocol header that a load balancer may
// have put before a connection (wire/proxyproto), and bounds the connections that nobody has vouched for (wire/strangers).
// What has said nothing yet costs a goroutine and a small buffer; the server behind the door doesn't hear of it.
//
// The relay does the same on its own data path, of which this package has the accept loop, and what follows the copying.
package door

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/proxyproto"
	"rendezvous.dev/rendezvous/wire/strangers"
)

// Accept hands on connections until l closes. Failures (no descriptors left) back off from 5 ms to 1 s. Serve must not block.
func Accept(l net.Listener, log *slog.Logger, serve func(*net.TCPConn)) error {
	const first, last = 5 * time.Millisecond, time.Second
	delay := first
	for {
		nc, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			log.Warn("accept failed", "error", err, "again", delay.String())
			time.Sleep(delay)
			delay = min(2*delay, last)
			continue
		}
		delay = first
		tc, ok := nc.(*net.TCPConn)
		if !ok {
			nc.Close()
			return errors.New("door: the listener is not TCP")
		}
		serve(tc)
	}
}

// PassOn copies one way by pump, until from ends, and half-closes. The other way gets grace to end.
func PassOn(to, from *net.TCPConn, grace time.Duration, pump func(to, from *net.TCPConn) error) {
	err := pump(to, from)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		to.Close()
		from.Close()
		return
	}
	to.SetReadDeadline(time.Now().Add(grace))
}

// Why a connection ended before anybody had vouched for it, for Options.Ended.
const (
	EndedLimit  = "limit"  // another came, and there were too many
	EndedSilent = "silent" // it said nothing in time, or left
	EndedProxy  = "proxy"  // it began with a PROXY protocol header that can't be read, or isn't believed
)

// Options of a Door. Places and Patience are required.
type Options struct {
	// Places is how many strangers there may be. One source has a quarter of them.
	Places int
	// Patience is for how long one may say nothing.
	Patience time.Duration
	// Callers is what can be known of who calls; Field, where its networks are declared.
	Callers config.Callers
	Field   string
	Log     *slog.Logger
	// Ended is told why a connection ended before its server heard of it, or had to go later. It must not block.
	Ended func(why string)
}

// Door is one crowd of strangers, at one or several listeners. It is safe for concurrent use.
type Door struct {
	o        Options
	proxies  proxyproto.Networks
	warnings proxyproto.Warnings
	crowd    strangers.Crowd
}

// New makes a Door. The error is about Callers.
func New(o Options) (*Door, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Ended == nil {
		o.Ended = func(string) {}
	}
	proxies, err := proxyproto.ParseNetworks(o.Callers.ProxyNetworks)
	if err != nil {
		return nil, err
	}
	return &Door{o: o, proxies: proxies}, nil
}

// Strangers counts the connections that nobody has vouched for.
func (d *Door) Strangers() int { return d.crowd.Len() }

// Mute counts those of them that have said nothing.
func (d *Door) Mute() int { return d.crowd.Mute() }

// Conn is one connection. Its address is its client's, where a header that is believed tells it.
type Conn struct {
	net.Conn   // tcp, without the methods that would go past early
	tcp        *net.TCPConn
	door       *Door
	stranger   strangers.Stranger
	early      []byte // read, not handed out; owned by whoever reads
	client     atomic.Pointer[net.TCPAddr]
	unbelieved bool // set before anybody else has the Conn
}

// enter makes a stranger of a connection.
func (d *Door) enter(tc *net.TCPConn) *Conn {
	c := &Conn{Conn: tc, tcp: tc, door: d}
	c.stranger.Of = c
	d.sendAway(d.crowd.Enter(&c.stranger, d.source(tc), d.o.Places))
	return c
}

// source is where a connection comes from, not valid where that may be some node or load balancer.
func (d *Door) source(tc *net.TCPConn) netip.Addr {
	addr := proxyproto.Addr(tc.RemoteAddr())
	if d.o.Callers.AddressesHidden || d.proxies.Believe(addr) {
		return netip.Addr{}
	}
	return addr
}

func (d *Door) sendAway(evicted *strangers.Stranger) {
	if evicted == nil {
		return
	}
	old := evicted.Of.(*Conn)
	d.o.Ended(EndedLimit)
	d.o.Log.Debug("too many strangers: the oldest, or the oldest of this source, has to go", "remote", old.RemoteAddr().String())
	old.tcp.SetLinger(0)
	old.tcp.Close()
}

// firstRead is for what a stranger says first, in bytes.
const firstRead = 512

// listen waits until the stranger has said something, its header apart. The error says that it won't be served, and was
// counted.
func (c *Conn) listen() error {
	d := c.door
	c.SetReadDeadline(time.Now().Add(d.o.Patience))
	source, found, rest, err := proxyproto.Read(c.tcp, make([]byte, 0, firstRead))
	from := c.tcp.RemoteAddr()
	believed := d.proxies.Believe(proxyproto.Addr(from))
	bad := found && (err != nil || !believed)
	switch {
	case bad && !believed:
		d.o.Ended(EndedProxy)
		d.warnings.Refused(d.o.Log, d.o.Field, from)
		c.unbelieved = true
	case bad:
		d.o.Ended(EndedProxy)
		d.warnings.Unreadable(d.o.Log, from, err)
	case source.IsValid():
		c.client.Store(net.TCPAddrFromAddrPort(source))
		d.sendAway(d.crowd.Locate(&c.stranger, source.Addr(), d.o.Places))
	}
	if err == nil && len(rest) == 0 {
		rest = make([]byte, firstRead)
		var n int
		n, err = c.tcp.Read(rest)
		rest = rest[:n]
	}
	if len(rest) > 0 {
		c.early = rest
		d.crowd.Spoke(&c.stranger, false)
		return c.SetReadDeadline(time.Time{})
	}
	if !bad {
		d.o.Ended(EndedSilent)
	}
	return errors.Join(errors.New("door: the connection ended before it said anything"), err)
}

// Read gives what comes after the header.
func (c *Conn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		if c.early = c.early[n:]; len(c.early) == 0 {
			c.early = nil
		}
		return n, nil
	}
	return c.tcp.Read(p)
}

// Take gives up the connection for its TCP connection, and what was read of it and not handed out yet.
func (c *Conn) Take() (tc *net.TCPConn, early []byte) {
	early, c.early = c.early, nil
	return c.tcp, early
}

// RemoteAddr is the client's address, as far as it is known.
func (c *Conn) RemoteAddr() net.Addr {
	if client := c.client.Load(); client != nil {
		return client
	}
	return c.tcp.RemoteAddr()
}

// Unbelieved is the field that says whose PROXY protocol headers are believed, where the connection began with one of
// somebody else's: it is to be refused.
func (c *Conn) Unbelieved() string {
	if c == nil || !c.unbelieved {
		return ""
	}
	return c.door.o.Field
}

// Vouch takes the connection off the strangers: it is somebody's who is known.
func (c *Conn) Vouch() {
	if c != nil {
		c.door.crowd.Leave(&c.stranger)
	}
}

// Close ends the connection.
func (c *Conn) Close() error {
	c.Vouch()
	return c.tcp.Close()
}

// Of gives the Conn that a connection is, or that TLS runs on; nil where there is none.
func Of(nc net.Conn) *Conn {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	c, _ := nc.(*Conn)
	return c
}

// Serve takes connections until l closes, and then ends those that have said nothing. Greet, where it is set, is called
// before the stranger has said anything; an error ends the connection. Serve is then called with those who have, and owns
// them; it may block.
func (d *Door) Serve(l net.Listener, greet func(*Conn) error, serve func(*Conn)) error {
	w := waiting{conns: map[*Conn]struct{}{}}
	defer w.end()
	return Accept(l, d.o.Log, func(tc *net.TCPConn) {
		c := d.enter(tc)
		if !w.add(c) {
			c.Close()
			return
		}
		go func() {
			var err error
			if greet != nil {
				err = greet(c)
			}
			if err == nil {
				err = c.listen()
			}
			if w.remove(c); err != nil {
				c.Close()
				return
			}
			serve(c)
		}()
	})
}

// waiting is the connections of one listener that have said nothing.
type waiting struct {
	mu    sync.Mutex
	conns map[*Conn]struct{}
	over  bool
}

func (w *waiting) add(c *Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		w.conns[c] = struct{}{}
	}
	return !w.over
}

func (w *waiting) remove(c *Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, c)
}

func (w *waiting) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	for c := range w.conns {
		c.tcp.Close()
	}
}

// Listen puts the door before a listener: it gives the connections that have said something, each a *Conn.
func (d *Door) Listen(l net.Listener) net.Listener {
	b := &behind{Listener: l, spoken: make(chan *Conn), closed: make(chan struct{})}
	go func() {
		defer close(b.closed)
		b.err = d.Serve(l, nil, func(c *Conn) {
			select {
			case b.spoken <- c:
			case <-b.closed:
				c.Close()
			}
		})
	}()
	return b
}

type behind struct {
	net.Listener
	spoken chan *Conn
	closed chan struct{}
	err    error // set before closed is
}

// Accept gives the next connection that has said something.
func (b *behind) Accept() (net.Conn, error) {
	select {
	case c := <-b.spoken:
		return c, nil
	case <-b.closed:
		return nil, errors.Join(net.ErrClosed, b.err)
	}
}

// Listeners that only the cluster reaches (probes, Prometheus, API servers) have few connections.
const (
	insidePlaces   = 64
	insidePatience = 10 * time.Second
)

// Inside opens a listener that only the cluster is to reach: any pod may, so it is bounded as well. Ended may be nil.
func Inside(address string, log *slog.Logger, ended func(why string)) (net.Listener, error) {
	d, err := New(Options{Places: insidePlaces, Patience: insidePatience, Log: log, Ended: ended})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return d.Listen(l), nil
}

type contextKey struct{}

// ConnContext is an http.Server's: From finds the connection of a request then.
func ConnContext(ctx context.Context, nc net.Conn) context.Context {
	return context.WithValue(ctx, contextKey{}, Of(nc))
}

// From gives a request's connection; nil, with which nothing is wrong, where no door is before the server.
func From(ctx context.Context) *Conn {
	c, _ := ctx.Value(contextKey{}).(*Conn)
	return c
}
