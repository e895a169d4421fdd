package agent

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/proxydial"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	joinPath     = "/rendezvous/v1/join"
	joinProtocol = "rendezvous-join/1"
	// joinMax bounds a join. The gateway's deadline is a time of day, and a machine's clock may be wrong: what is left
	// of it counts only between timing.joinMin and this.
	joinMax = 30 * time.Second
	// maxJoinHeader bounds the gateway's answer, in bytes.
	maxJoinHeader = 16 << 10
)

// checkRequest refuses what no broker of ours sends.
func checkRequest(req bus.HostConnect) *refusal.Error {
	bad := func(what string) *refusal.Error {
		return refusal.New(refusal.BadRequest, "The broker's connect request has no valid %s. Are broker and agent of matching versions?", what).With(req.ActivityID)
	}
	_, _, err := net.SplitHostPort(req.Address)
	switch {
	case req.SessionID == "":
		return bad("session id")
	case len(req.JoinSecret) != 32:
		return bad("join secret")
	case err != nil:
		return bad("gateway address")
	case req.ServerName == "" || !identity.IsLabel(req.Instance):
		return bad("gateway instance")
	}
	return nil
}

// traceAccept says how this host answered in step 9.
func (a *Agent) traceAccept(req bus.HostConnect, began time.Time, refused *refusal.Error) {
	e := trace.Event{ActivityID: req.ActivityID, Step: trace.StepOrchestrate, At: began, Duration: time.Since(began), Detail: "accepted", User: req.User}
	if refused != nil {
		e.Detail, e.Error = refused.Message, string(refused.Code)
	}
	a.trace(e)
}

// serveSession carries one accepted session from the dial to its end.
func (a *Agent) serveSession(req bus.HostConnect) {
	log := a.log.With("activity", req.ActivityID, "session", req.SessionID, "user", req.User)
	defer signal(a.changed)
	defer func() { a.ledger.release(req.SessionID, time.Now()) }()

	began := time.Now()
	gateway, host, release, err := a.openLegs(req)
	defer release()
	step := trace.Event{ActivityID: req.ActivityID, Step: trace.StepReverse, At: began, Duration: time.Since(began), User: req.User,
		Detail: fmt.Sprintf("%s, instance %s", req.Address, req.Instance)}
	if err != nil {
		refused := refusal.From(err)
		step.Detail, step.Error = refused.Message, string(refused.Code)
		a.trace(step)
		log.Error("session not joined", "gateway", req.Address, "instance", req.Instance, "error", err)
		return
	}
	defer gateway.Close()
	defer host.Close()
	a.trace(step)
	if !a.ledger.activate(req.SessionID, time.Now(), gateway, host) {
		return // the agent stops
	}
	signal(a.changed)
	log.Info("session joined", "gateway", req.Address, "instance", req.Instance, "took", step.Duration.String())

	toHost, toGateway, err := pump(gateway, host, a.opts.timing.closeGrace)
	if toGateway == 0 { // not a word of the RDP server
		signal(a.suspect)
	}
	log = log.With("bytesToHost", toHost, "bytesToGateway", toGateway, "took", time.Since(began).Round(time.Millisecond).String())
	if err != nil {
		log = log.With("error", err)
	}
	log.Info("session ended")
}

// openLegs joins the client at the gateway and connects to the RDP server, within the gateway's deadline. What may
// pass is tried again; a refusal is not. release is to be called when the session has ended.
func (a *Agent) openLegs(req bus.HostConnect) (gateway *joinedConn, host *net.TCPConn, release func(), err error) {
	release = func() {}
	ctx, cancel := context.WithTimeout(context.Background(), min(max(time.Until(req.Deadline), a.opts.timing.joinMin), joinMax))
	defer cancel()
	retry := backoff{min: 100 * time.Millisecond, max: time.Second}
	for {
		gateway, err = joinBy(ctx, a.dialer(), req, a.tlsSessions)
		var refused *refusal.Error
		if err == nil || errors.As(err, &refused) {
			break
		}
		if sleep(ctx, retry.delay()) != nil {
			break
		}
	}
	if err != nil {
		return nil, nil, release, err
	}
	if host, release, err = a.dialRDP(ctx, req); err != nil {
		gateway.Close()
		signal(a.suspect)
		return nil, nil, release, refusal.New(refusal.HostNotReady, "The RDP server at %s does not answer: %v.", a.opts.RDPAddr, err)
	}
	return gateway, host, release, nil
}

// joinedConn is the connection to the gateway after its 101: what came with the answer is read first.
type joinedConn struct {
	*tls.Conn
	rest *bufio.Reader
}

func (c *joinedConn) Read(p []byte) (int, error) {
	if c.rest.Buffered() > 0 {
		return c.rest.Read(p)
	}
	return c.Conn.Read(p)
}

// join dials the gateway instance that holds the client and presents the join secret. The TLS server name routes to
// the instance; the certificate must be the gateway's. A handshake with an instance that is known is resumed.
func join(ctx context.Context, req bus.HostConnect, known tls.ClientSessionCache) (*joinedConn, error) {
	return joinBy(ctx, proxydial.Dialer{}, req, known)
}

// joinBy is join through the proxy of a dialer, where the gateway's address goes by one.
func joinBy(ctx context.Context, d proxydial.Dialer, req bus.HostConnect, known tls.ClientSessionCache) (*joinedConn, error) {
	d.Net.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 4}
	raw, err := d.DialContext(ctx, "tcp", req.Address)
	if err != nil {
		return nil, fmt.Errorf("gateway %s can't be reached: %w", req.Address, err)
	}
	conf, err := gatewayTLS(req, known)
	if err != nil {
		raw.Close()
		return nil, err
	}
	conn := tls.Client(raw, conf)
	ok := false
	defer func() {
		if !ok {
			raw.Close()
		}
	}()
	// A deadline bounds writing and reading the request, and a cancelled ctx cuts them short.
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Now()) })
	defer stop()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("gateway %s: TLS: %w", req.Address, err)
	}
	r, err := http.NewRequest(http.MethodGet, "https://"+req.ServerName+joinPath, nil)
	if err != nil {
		return nil, err
	}
	r.Header = http.Header{
		"Connection":             {"Upgrade"},
		"Upgrade":                {joinProtocol},
		"Authorization":          {"Bearer " + base64.RawURLEncoding.EncodeToString(req.JoinSecret)},
		"Rendezvous-Instance":    {req.Instance},
		brokerapi.HeaderActivity: {req.ActivityID},
	}
	if err := r.Write(conn); err != nil {
		return nil, fmt.Errorf("gateway %s: %w", req.Address, err)
	}
	bound := &io.LimitedReader{R: conn, N: maxJoinHeader}
	rest := bufio.NewReaderSize(bound, 4<<10)
	res, err := http.ReadResponse(rest, r)
	if err != nil {
		return nil, fmt.Errorf("gateway %s: no answer to the join: %w", req.Address, err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		return nil, joinRefusal(req, res)
	}
	if !stop() {
		return nil, ctx.Err()
	}
	bound.N = math.MaxInt64
	ok = true
	return &joinedConn{Conn: conn, rest: rest}, nil
}

// joinRefusal reads why the gateway refused.
func joinRefusal(req bus.HostConnect, res *http.Response) error {
	var body brokerapi.ErrorBody
	if err := json.NewDecoder(io.LimitReader(res.Body, maxJoinHeader)).Decode(&body); err == nil && body.Error != nil {
		return refusal.Received(body.Error, refusal.Protocol).With(req.ActivityID)
	}
	if res.StatusCode >= 500 {
		return fmt.Errorf("gateway %s answered the join with %s", req.Address, res.Status)
	}
	return refusal.New(refusal.Protocol, "Gateway %s answered the join with %s: is that a Rendezvous gateway?", req.Address, res.Status).With(req.ActivityID)
}

// gatewayTLS names the instance in SNI and verifies the gateway's own name, which Go's default check would not. A resumed
// handshake shows no certificate: the one that the session began with is verified again, at the time of now and against
// the CA of this very request. A session is used once, so that one which no longer passes stands in nobody's way.
func gatewayTLS(req bus.HostConnect, known tls.ClientSessionCache) (*tls.Config, error) {
	var roots *x509.CertPool // nil: the machine's own
	if req.CABundle != "" {
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM([]byte(req.CABundle)) {
			return nil, refusal.New(refusal.BadRequest, "The CA bundle for gateway %s holds no certificate.", req.Address).With(req.ActivityID)
		}
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         req.Instance + ".join." + req.ServerName,
		ClientSessionCache: known, // by server name, which is an instance's
		InsecureSkipVerify: true,  // VerifyConnection does it
		VerifyConnection: func(cs tls.ConnectionState) error {
			opts := x509.VerifyOptions{Roots: roots, DNSName: req.ServerName, Intermediates: x509.NewCertPool()}
			for _, c := range cs.PeerCertificates[1:] {
				opts.Intermediates.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(opts)
			return err
		},
	}, nil
}

// buffers hold what is on its way. TLS records carry at most 16 KiB; a read from the RDP server fills two.
var buffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// pump copies both ways until both ends are done. When one direction ends, its receiver is told so and the other
// direction has grace to finish.
func pump(gateway *joinedConn, host *net.TCPConn, grace time.Duration) (toHost, toGateway int64, err error) {
	var wg sync.WaitGroup
	var errHost, errGateway error
	closing := func() {
		deadline := time.Now().Add(grace)
		gateway.SetDeadline(deadline)
		host.SetDeadline(deadline)
	}
	wg.Go(func() { toHost, errHost = copyToHost(host, gateway); closing() })
	wg.Go(func() { toGateway, errGateway = copyToGateway(gateway, host); closing() })
	wg.Wait()
	return toHost, toGateway, cmp.Or(errHost, errGateway)
}

// copyToHost moves what the client sends to the RDP server.
func copyToHost(host *net.TCPConn, gateway *joinedConn) (int64, error) {
	n, err := copyPooled(host, gateway)
	host.CloseWrite()
	return n, err
}

// copyToGateway moves what the RDP server sends to the client.
func copyToGateway(gateway *joinedConn, host *net.TCPConn) (int64, error) {
	n, err := copyPooled(gateway, host)
	gateway.CloseWrite()
	return n, err
}

// copyPooled is io.Copy with a pooled buffer. One end is TLS in this process, so the kernel can't splice, and the
// ReadFrom and WriteTo of a TCP connection would only allocate a buffer of their own: they are hidden.
func copyPooled(dst io.Writer, src io.Reader) (int64, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	n, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, *buf)
	if errors.Is(err, net.ErrClosed) {
		err = nil // the agent ended the session itself
	}
	return n, err
}
