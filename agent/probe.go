package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// Security protocols of RDP's negotiation (MS-RDPBCGR 2.2.1.1.1).
const (
	protocolTLS    = 1
	protocolHybrid = 2
)

// negotiationRequest is an X.224 connection request that asks for TLS or NLA:
// TPKT (version 3, length 19), X.224 CR (length 14), RDP_NEG_REQ (type 1, length 8, protocols).
var negotiationRequest = []byte{3, 0, 0, 19, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, protocolTLS | protocolHybrid, 0, 0, 0}

// negotiationFailures are the codes of RDP_NEG_FAILURE.
var negotiationFailures = map[uint32]string{
	1: "it wants TLS", 2: "it does not allow TLS: set security_layer=tls or negotiate",
	3: "it has no certificate: give it the one that the agent installs", 4: "inconsistent flags",
	5: "it wants NLA", 6: "it wants TLS with a client certificate",
}

// probeResult is what one probe found.
type probeResult struct {
	ready  bool
	why    string            // not ready
	served *x509.Certificate // what the RDP server shows
}

// probeRDP connects as a client would, up to and with TLS, within a time.
func probeRDP(ctx context.Context, addr string, within time.Duration) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("nothing answers at %s: %w", addr, err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if _, err := conn.Write(negotiationRequest); err != nil {
		return nil, err
	}
	if err := readConfirm(conn); err != nil {
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	// Any certificate will do for looking at it; the names are checked by the caller, the chain by real clients.
	secure := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12})
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("%s: TLS: %w", addr, err)
	}
	return secure.ConnectionState().PeerCertificates[0], nil
}

// readConfirm reads the X.224 connection confirm; nil means that TLS comes next.
func readConfirm(r io.Reader) error {
	var b [19]byte
	if _, err := io.ReadFull(r, b[:11]); err != nil {
		return fmt.Errorf("it closed the connection in the RDP negotiation: %w", err)
	}
	switch {
	case b[0] != 3 || b[5] != 0xd0:
		return errors.New("what listens there is no RDP server")
	case binary.BigEndian.Uint16(b[2:]) == 11:
		return errors.New("it offers old RDP security only: set security_layer=tls")
	case binary.BigEndian.Uint16(b[2:]) != 19:
		return errors.New("what listens there is no RDP server")
	}
	if _, err := io.ReadFull(r, b[11:]); err != nil {
		return fmt.Errorf("it closed the connection in the RDP negotiation: %w", err)
	}
	value := binary.LittleEndian.Uint32(b[15:])
	switch {
	case b[11] == 3 && negotiationFailures[value] != "":
		return fmt.Errorf("it refused the RDP negotiation: %s (code %d)", negotiationFailures[value], value)
	case b[11] == 3:
		return fmt.Errorf("it refused the RDP negotiation with code %d", value)
	case b[11] != 2:
		return errors.New("what listens there is no RDP server")
	case value == 0:
		return errors.New("it chose old RDP security, which the gateway could read: set security_layer=tls")
	}
	return nil
}

// servesOurs says why clients would not trust the served certificate, where the pool's issuer gives this host one.
func servesOurs(m *member, served *x509.Certificate, now time.Time) error {
	if m == nil || m.rdp == nil {
		return nil
	}
	name := brokerapi.PoolName(m.Namespace, m.Pool)
	switch {
	case !slices.Contains(served.DNSNames, name):
		return fmt.Errorf("it shows a certificate without the name %s: let the RDP server read the one that the agent installs", name)
	case now.After(served.NotAfter):
		return fmt.Errorf("its certificate expired at %s: let the RDP server read the one that the agent installs", served.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// safeLogins says why nobody may be brought to this machine's RDP server: it lets in others than the agent says.
func (a *Agent) safeLogins() error {
	if err := a.opts.guarded(); err != nil {
		return fmt.Errorf("login by connection is not set up, or not safe: %w; run `agent login install` there", err)
	}
	return nil
}

// watch decides when the RDP server is asked. A server logs every connection, for ever, so that it is asked when there is a
// reason to: it has just been started, connections to it wait, one of ours went wrong, it was not well the last time; and rarely
// without a reason. Between, the kernel says whether it listens. It is owned by keepProbing.
type watch struct {
	addr   string
	timing timing
	look   func() (login.Listening, error)

	last    login.Listening // by the last look
	waiting int             // looks in a row that saw connections wait
	probed  time.Time
	served  *x509.Certificate // by the last probe
	err     error             // of the last probe
	retry   backoff           // of one that fails
	next    time.Duration     // until the next probe of one that fails
}

// settled says that nothing is to be expected of the server's certificate: it is valid, and the very one that the agent has
// installed. A server takes that up when it pleases.
func (w *watch) settled(m *member, now time.Time) bool {
	return w.served == nil || servesOurs(m, w.served, now) == nil && (m == nil || m.rdp == nil || w.served.Equal(m.rdp))
}

// due says whether the server is to be asked now; else gone says that there is none to ask. wrong says that its certificate
// was not the right one, which a server may change between two connections.
func (w *watch) due(now time.Time, suspect, wrong bool) (due bool, gone error) {
	since := now.Sub(w.probed)
	l, err := w.look()
	if err != nil { // not to be had here
		if w.err != nil {
			return since >= w.next, nil
		}
		return since >= w.timing.probeReady, nil
	}
	changed := !slices.Equal(l.Sockets, w.last.Sockets)
	w.last = l
	if l.Waiting > 0 {
		w.waiting++
	} else {
		w.waiting = 0
	}
	switch {
	case len(l.Sockets) == 0:
		return false, fmt.Errorf("nothing listens at %s", w.addr)
	case changed || suspect:
		return true, nil
	case w.err != nil:
		return since >= w.next, nil
	case wrong || w.waiting > 1: // a busy server accepts within a look or two
		return since >= w.timing.probeReady, nil
	}
	return since >= w.timing.probeAgain, nil
}

// ask asks the server.
func (w *watch) ask(ctx context.Context) {
	w.served, w.err = probeRDP(ctx, w.addr, w.timing.probe)
	w.probed, w.next = time.Now(), 0
	if w.err == nil {
		w.retry.reset()
		return
	}
	w.next = w.retry.delay()
}

// keepProbing has the RDP server watched, and with it what else must be well for this host to take sessions. One failure alone
// does not take a ready host away.
func (a *Agent) keepProbing(ctx context.Context) {
	t := a.opts.timing
	w := &watch{addr: a.opts.RDPAddr, timing: t, look: a.opts.listeners, retry: backoff{min: t.probeUnready, max: t.probeReady}}
	failures := 0
	var unsafe error
	var asked time.Time // for unsafe
	for {
		suspect := false
		select {
		case <-a.suspect:
			suspect = true
		default:
		}
		now := time.Now()
		due, err := w.due(now, suspect, !w.settled(a.current(), now))
		if due {
			w.ask(ctx)
		}
		if err == nil {
			err = w.err
		}
		served := w.served
		if err == nil {
			err = servesOurs(a.current(), served, now)
		}
		if err == nil {
			if unsafe != nil || now.Sub(asked) >= t.probeReady {
				unsafe, asked = a.safeLogins(), now
			}
			err = unsafe
		}
		if ctx.Err() != nil {
			return
		}
		a.mu.Lock()
		was := a.probed
		a.mu.Unlock()
		next := probeResult{ready: err == nil, served: served}
		if err != nil {
			failures++
			next.why = err.Error()
		} else {
			failures = 0
		}
		if was.ready && !next.ready && failures < 2 {
			next = was
			w.next = 0 // ask again at once
		}
		if next.served == nil {
			next.served = was.served
		}
		a.mu.Lock()
		a.probed = next
		a.mu.Unlock()
		a.ledger.setReady(next.ready, next.why)
		if next.ready != was.ready || next.why != was.why || !sameCertificate(next.served, was.served) {
			a.log.Info("RDP server", "ready", next.ready, "address", a.opts.RDPAddr, "why", next.why)
			signal(a.changed)
		}
		if sleep(ctx, t.probeUnready) != nil {
			return
		}
	}
}

func sameCertificate(a, b *x509.Certificate) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Equal(b)
}
