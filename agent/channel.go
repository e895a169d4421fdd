package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/proxydial"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const (
	busDialTimeout = 5 * time.Second
	// busProxyTimeout is what a proxy gets to resolve the name and connect.
	busProxyTimeout = 15 * time.Second
	// busHandshakeTimeout is longer: where all agents come at once, as after the loss of every broker, a handshake waits
	// its turn, and one given up is made twice.
	busHandshakeTimeout = 20 * time.Second
	busPingInterval     = 10 * time.Second
	// busStable is how long a channel must have lasted for the next one to be tried without growing delays.
	busStable = 30 * time.Second
	// accountTimeout bounds the making of an account; the broker waits for the answer meanwhile.
	accountTimeout = 4 * time.Second
)

// keepChannel keeps one control channel to a broker until ctx ends. NATS's own reconnect is not used: it can't mix TLS
// and WebSocket addresses, nor change certificates.
func (a *Agent) keepChannel(ctx context.Context) {
	retry := backoff{min: a.opts.timing.retryMin, max: a.opts.timing.retryMax}
	var conn *nats.Conn // in service; may outlive several failed attempts to replace it after a renewal
	defer func() {
		if conn != nil {
			a.setConn(nil)
			conn.FlushTimeout(time.Second)
			conn.Close()
		}
	}()
	for ctx.Err() == nil {
		next, closed, err := a.dialBus(ctx)
		if err != nil {
			wait := retry.delay()
			a.trouble(err, false)
			a.log.Error("no control channel", "error", err, "retryIn", wait.Round(time.Millisecond).String())
			sleep(ctx, wait)
			continue
		}
		if conn != nil {
			// Make before break: both are subscribed for a moment, and a request that arrives twice is taken once.
			conn.Drain()
		}
		conn = next
		a.trouble(nil, false)
		a.setConn(conn)
		began := time.Now()
		a.log.Info("control channel", "url", conn.ConnectedUrl())
		signal(a.changed)
		if a.renewAgain {
			a.renewAgain = false
			signal(a.early)
		}
		select {
		case <-ctx.Done():
			return
		case <-a.redial:
			a.log.Info("changing the control channel")
		case <-closed:
			a.log.Warn("control channel lost", "error", conn.LastError())
			a.setConn(nil)
			conn = nil
			if time.Since(began) > busStable {
				retry.reset()
			}
			wait := retry.delay()
			select {
			case <-a.displaced: // two machines that come back at once would take turns by the second
				wait = a.opts.timing.displaced + rand.N(a.opts.timing.displaced)
			default:
			}
			sleep(ctx, wait)
		}
	}
}

func (a *Agent) setConn(c *nats.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conn = c
}

// dialBus connects with the membership in force and subscribes. closed is closed when the connection has ended.
func (a *Agent) dialBus(ctx context.Context) (conn *nats.Conn, closed chan struct{}, err error) {
	m := a.current()
	if time.Now().After(m.client.NotAfter) {
		// No broker would let us in, so there is no renewal; a token is the only way back.
		if m, err = a.membership(ctx, true); err != nil {
			return nil, nil, err
		}
		a.adopt(m)
	}
	if conn, closed, err = a.dialAs(ctx, m); err == nil {
		a.settled()
		return conn, closed, nil
	}
	if !errors.Is(err, nats.ErrAuthorization) {
		return nil, nil, err
	}
	// The brokers know this host by another key.
	next, otherwise := a.wayBack(ctx, m)
	if otherwise != nil {
		return nil, nil, fmt.Errorf("%w: the brokers don't take this machine's key: %w", err, otherwise)
	}
	a.adopt(next)
	return a.dialAs(ctx, next)
}

// dialAs connects with a membership.
func (a *Agent) dialAs(ctx context.Context, m *member) (conn *nats.Conn, closed chan struct{}, err error) {
	creds, err := mtls.NewReloader(m.dir, a.log)
	if err != nil {
		return nil, nil, err
	}
	var errs []error
	for _, raw := range busOrder(m.BusURLs) {
		conn, closed, err = a.dialBusURL(raw, m, creds)
		if err == nil {
			return conn, closed, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", raw, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, nil, errors.Join(errs...)
}

// busOrder puts plain TLS before WebSocket and keeps the brokers' order otherwise.
func busOrder(urls []string) []string {
	urls = slices.Clone(urls)
	slices.SortStableFunc(urls, func(x, y string) int {
		web := func(s string) int {
			if strings.HasPrefix(s, "wss:") {
				return 1
			}
			return 0
		}
		return web(x) - web(y)
	})
	return urls
}

// busDialer dials for NATS, which makes TLS and WebSocket of it, and keeps the last error, of which NATS keeps the text alone.
type busDialer struct {
	dialer proxydial.Dialer
	err    error
}

func (d *busDialer) Dial(network, address string) (net.Conn, error) {
	timeout := busDialTimeout
	if proxy, _ := d.dialer.For(address); proxy != nil {
		timeout = busProxyTimeout
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, err := d.dialer.DialContext(ctx, network, address)
	d.err = err
	return conn, err
}

func (a *Agent) dialBusURL(raw string, m *member, creds *mtls.Reloader) (*nats.Conn, chan struct{}, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" || (u.Scheme != "tls" && u.Scheme != "wss") {
		return nil, nil, errors.New("not a tls:// or wss:// URL: look at the Workspace's spec.broker")
	}
	closed := make(chan struct{})
	conf := creds.ClientConfig(u.Hostname(), mtls.AllowRole(m.Namespace, m.Workspace, identity.RoleBroker))
	dial := &busDialer{dialer: a.dialer()}
	lookUp := func(*nats.Options) error { return nil }
	if proxy, _ := dial.dialer.For(u.Host); proxy != nil {
		lookUp = nats.SkipHostLookup() // the proxy looks it up, and it goes by names too
	}
	conn, err := nats.Connect(raw,
		nats.Name("agent "+m.Pool+"/"+m.Host), nats.Secure(conf), nats.Timeout(busHandshakeTimeout), nats.NoReconnect(),
		nats.SetCustomDialer(dial), lookUp,
		nats.CustomInboxPrefix(bus.InboxPrefix(m.id())), nats.PingInterval(busPingInterval), nats.MaxPingsOutstanding(2),
		nats.DrainTimeout(busDialTimeout),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }),
		nats.LameDuckModeHandler(func(*nats.Conn) { signal(a.redial) }), // this broker stops soon
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { a.log.Error("control channel", "error", err) }),
	)
	if err != nil {
		return nil, nil, cmp.Or(dial.err, err)
	}
	_, err = conn.Subscribe(bus.HostConnectSubject(m.Pool, m.Host), a.onConnect)
	if err == nil {
		_, err = conn.Subscribe(bus.HostConfigSubject(m.Pool, m.Host), a.onConfig)
	}
	if err == nil {
		_, err = conn.Subscribe(bus.HostDisplacedSubject(m.Pool, m.Host), func(msg *nats.Msg) { a.onDisplaced(conn, msg) })
	}
	if err == nil {
		_, err = conn.Subscribe(bus.HostSessionSubject(m.Pool, m.Host), a.onSession)
	}
	if err == nil {
		err = conn.FlushTimeout(busDialTimeout) // the subscriptions stand before the first report says so
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, closed, nil
}

// onConfig takes the brokers' word on limit and drain.
func (a *Agent) onConfig(msg *nats.Msg) {
	var c bus.HostConfig
	if err := json.Unmarshal(msg.Data, &c); err != nil {
		a.log.Error("unreadable configuration from a broker", "error", err)
		return
	}
	if a.ledger.configure(c) {
		a.log.Info("configured", "generation", c.Generation, "maxSessions", c.MaxSessions, "draining", c.Draining)
		signal(a.changed)
		if a.otherRDPKey() {
			a.log.Info("the pool wants another kind of RDP key: renewing", "kind", c.RDPKey.String())
			signal(a.early)
		}
	}
}

// onConnect accepts or refuses one session and answers at once; the dialling goes on behind.
func (a *Agent) onConnect(msg *nats.Msg) {
	began := time.Now()
	var req bus.HostConnect
	if err := json.Unmarshal(msg.Data, &req); err != nil {
		a.reply(msg, refusal.New(refusal.BadRequest, "Session host %s can't read the broker's request: %v. Are broker and agent of matching versions?", a.opts.Host, err))
		return
	}
	if req.Account == nil || a.signIn == nil {
		a.accept(msg, req, began, checkRequest(req))
		return
	}
	go func() { // to make an account takes a moment, and others wait behind
		refused := checkRequest(req)
		if refused == nil {
			ctx, cancel := context.WithTimeout(context.Background(), accountTimeout)
			defer cancel()
			refused = a.signIn.prepare(ctx, a.current().Host, req)
		}
		a.accept(msg, req, began, refused)
	}()
}

// accept gives the session a place unless it is refused already, answers, and has it served.
func (a *Agent) accept(msg *nats.Msg, req bus.HostConnect, began time.Time, refused *refusal.Error) {
	fresh := false
	if refused == nil {
		fresh, refused = a.ledger.reserve(req, a.current().Host, began)
	}
	a.reply(msg, refused)
	a.traceAccept(req, began, refused)
	if refused != nil {
		a.log.Info("session refused", "activity", req.ActivityID, "session", req.SessionID, "user", req.User, "code", refused.Code, "why", refused.Message)
		return
	}
	if fresh {
		signal(a.changed)
		go a.serveSession(req)
	}
}

// reply answers. A report that is made from now on knows of what is answered.
func (a *Agent) reply(msg *nats.Msg, refused *refusal.Error) {
	a.mu.Lock()
	sequence := a.sequence
	a.mu.Unlock()
	data, err := json.Marshal(bus.HostReply{Err: refused, Sequence: sequence})
	if err == nil {
		err = msg.Respond(data)
	}
	if err != nil {
		a.log.Error("broker not answered", "error", err)
	}
}
