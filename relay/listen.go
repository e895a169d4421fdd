package relay

import (
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/door"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/strangers"
)

// Paths of the public listener, lower-case: clients vary the case of the first.
const (
	pathTSGU    = "/remotedesktopgateway"
	pathConnect = "/rendezvous/v1/connect"
	pathPing    = "/rendezvous/v1/ping"
	pathHealth  = "/healthz" // for load balancers that take a 200 alone
	pathJoin    = "/rendezvous/v1/join"
	pathRPC     = "/rpc/"
)

const (
	// maxRequests bounds the pings on one connection.
	maxRequests = 64
	// joinProtocol is what an agent upgrades to.
	joinProtocol   = "rendezvous-join/1"
	headerInstance = "Rendezvous-Instance"
)

// errForeign ends a TLS handshake that belongs to another pod.
var errForeign = errors.New("relay: the connection is for another instance")

// visitor is one accepted connection until it is a session, an agent's leg or gone.
type visitor struct {
	*leg
	r        *Relay
	accepted time.Time
	handed   bool     // somebody else closes it
	in       *inbound // the claim of an IN channel

	stranger strangers.Stranger
}

// vouch takes the visitor off the strangers: a good ticket or join secret stands for it now.
func (v *visitor) vouch() { v.r.strangers.Leave(&v.stranger) }

// doubt puts the visitor among the strangers, where it may cost the oldest its place.
func (v *visitor) doubt() {
	v.r.sendAway(v.r.strangers.Enter(&v.stranger, v.comparable(), int(v.r.config.Load().MaxPending)))
}

// sendAway ends the connection of a stranger who has lost its place, if there is one.
func (r *Relay) sendAway(evicted *strangers.Stranger) {
	if evicted == nil {
		return
	}
	old := evicted.Of.(*visitor)
	r.metrics.handshakeFailed("limit")
	r.log.Debug("too many strangers: the oldest, or the oldest of this source, has to go", "peer", old.tcp.RemoteAddr().String())
	old.tcp.SetLinger(0)
	old.tcp.Close()
}

// accept takes connections until l closes.
func (r *Relay) accept(l net.Listener) error {
	return door.Accept(l, r.log, func(tc *net.TCPConn) {
		v := &visitor{r: r, accepted: time.Now()}
		v.stranger.Of = v
		var err error
		if v.leg, err = newLeg(tc, r.tls); err != nil {
			tc.Close()
			return
		}
		v.tcp.onHello = func(agent bool) { r.strangers.Spoke(&v.stranger, agent) }
		v.doubt()
		r.legs.Go(func() { r.serve(v) })
	})
}

// heads lends what request heads are read into.
var heads = sync.Pool{New: func() any { return new([maxHead]byte) }}

// growStack has the runtime grow the stack once, while it is empty. TLS's handshake needs 16 KiB or so; on the way there the
// runtime would copy the stack four times, each time a deeper one.
//
//go:noinline
func growStack() (b byte) {
	var room [12 << 10]byte
	for i := 0; i < len(room); i += len(room) / 2 { // so that the compiler can't do without
		b ^= room[i]
	}
	return b
}

// serve is one connection's goroutine.
func (r *Relay) serve(v *visitor) {
	growStack()
	defer v.vouch()
	c := v.tcp
	r.adopt(c)
	defer r.disown(c)
	defer func() {
		if v.in != nil {
			v.in.close()
		}
		if !v.handed {
			c.Close()
		}
	}()

	timeout := time.Duration(r.config.Load().HandshakeTimeoutSeconds) * time.Second
	c.SetDeadline(time.Now().Add(timeout))
	if !v.readProxyHeader() {
		return
	}
	secrets := c.secrets
	if err := v.tls.Handshake(); err != nil {
		if c.foreign != "" {
			r.spliceTo(v, c)
			return
		}
		r.metrics.handshakeFailed("tls")
		r.log.Debug("TLS handshake failed", "peer", c.RemoteAddr().String(), "error", err)
		v.explainTLS(err)
		return
	}
	if err := v.takeOver(secrets); err != nil {
		r.metrics.handshakeFailed("tls")
		r.log.Error("TLS records can't be taken over", "peer", c.RemoteAddr().String(), "error", err)
		return
	}

	if c.peer {
		v.vouch()
	}
	for range maxRequests {
		c.SetDeadline(time.Now().Add(timeout))
		buf := heads.Get().(*[maxHead]byte)
		req, err := readHead(v.leg, buf[:])
		clear(buf[:]) // a ticket may have been in it
		heads.Put(buf)
		if err != nil {
			var bad *badHead
			if errors.As(err, &bad) {
				r.metrics.handshakeFailed("head")
				v.refuse(bad.status, refusal.New(refusal.BadRequest, "%s Use an RDP client or rdv against this address.", bad.reason).With(newGUID()))
			}
			return
		}
		if done := r.route(v, req); done || req.close || req.body() {
			return
		}
	}
}

// explainTLS answers who speaks HTTP without TLS, as a health check that was set up so does.
func (v *visitor) explainTLS(err error) {
	var not tls.RecordHeaderError
	if !errors.As(err, &not) || not.Conn == nil {
		return
	}
	switch string(not.RecordHeader[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "RDG_O", "RDG_I":
	default:
		return
	}
	v.tcp.SetWriteDeadline(time.Now().Add(lingerTime))
	no := &answer{status: http.StatusBadRequest, reason: "Speak TLS here: use https, for health checks too", close: true}
	if no.write(v.tcp.TCPConn) == nil {
		v.linger()
	}
}

// onHello is called by TLS once the client has said which name it wants.
func (r *Relay) onHello(h *tls.ClientHelloInfo) (*tls.Config, error) {
	c := h.Conn.(*conn)
	c.peeking = false
	name, host := strings.ToLower(h.ServerName), strings.ToLower(r.config.Load().Hostname)
	if hop, ok := strings.CutSuffix(name, ".pair."+host); ok && host != "" && !c.unbelieved {
		c.hello = nil
		c.onHello(true)
		return r.onPair(c, hop)
	}
	instance, ok := strings.CutSuffix(name, ".join."+host)
	c.joining = ok
	c.onHello(ok)
	if ok && host != "" && instance != r.instance && !c.unbelieved {
		c.foreign, c.mute = instance, true
		return nil, errForeign
	}
	c.hello = nil
	return c.secrets.capture(r.tls), nil
}

// route answers one request; done says that the connection was used up.
func (r *Relay) route(v *visitor, req *request) (done bool) {
	path := strings.ToLower(strings.TrimSuffix(req.path, "/"))
	activity := activityOf(req)
	no := func(status int, code refusal.Code, format string, args ...any) bool {
		v.refuseClient(status, refusal.New(code, format, args...).With(activity))
		return true
	}
	switch {
	case v.tcp.unbelieved && path == pathArmEntry:
		v.refuseArm(r.unbelieved().With(activity), false)
		return true
	case v.tcp.unbelieved:
		e := r.unbelieved()
		return no(httpStatus(e.Code), e.Code, "%s", e.Message)
	case v.tcp.peer && path == pathPair && req.method == http.MethodGet:
		r.servePair(v, req, activity)
		return true
	case v.tcp.peer:
		return no(http.StatusNotFound, refusal.BadRequest, "A hop between relays serves %s alone.", pathPair)
	case v.tcp.joining && path != pathJoin && path != pathPing:
		// Through another pod its address would be that pod's, in logs, traces and wherever clients' addresses are compared.
		return no(http.StatusNotFound, refusal.BadRequest, "Under the name INSTANCE.join.%s agents join sessions, and nothing else is served: use the gateway's own name.", r.config.Load().Hostname)
	case path == pathTSGU && req.method == "RDG_OUT_DATA" && req.has("Upgrade", "websocket"):
		r.serveTSGU(v, req, activity)
		return true
	case path == pathTSGU && req.method == "RDG_OUT_DATA":
		r.serveOut(v, req, activity)
		return true
	case path == pathTSGU && req.method == "RDG_IN_DATA":
		return r.serveIn(v, req, activity)
	case path == pathTSGU:
		return no(http.StatusMethodNotAllowed, refusal.Protocol, "Method %.16s is not of MS-TSGU: point an RDP client at this gateway.", req.method)
	case path == pathConnect && req.method == http.MethodGet:
		r.serveRaw(v, req, activity)
		return true
	case path == pathArmEntry && req.method == http.MethodPost:
		r.serveArmEntry(v, req, activity)
		return true
	case path == pathArm && req.method == http.MethodGet:
		return r.serveArm(v, req, activity)
	case path == pathJoin && req.method == http.MethodGet:
		r.serveJoin(v, req, activity)
		return true
	case path == pathPing && (req.method == http.MethodGet || req.method == http.MethodHead):
		return (&answer{status: http.StatusNoContent, activity: activity, close: req.close}).write(v) != nil
	case path == pathHealth && (req.method == http.MethodGet || req.method == http.MethodHead):
		ok := &answer{status: http.StatusOK, activity: activity, close: req.close}
		if !r.Ready() {
			ok.status = http.StatusServiceUnavailable
		}
		return ok.write(v) != nil
	case strings.HasPrefix(path+"/", pathRPC):
		return no(http.StatusNotFound, refusal.Protocol, "RPC over HTTP is not spoken here: use MS-TSGU over HTTP (gateway transport `http` in FreeRDP).")
	}
	return no(http.StatusNotFound, refusal.BadRequest, "There is nothing at this path: a gateway serves RDP clients at /remoteDesktopGateway/ and rdv at %s.", pathConnect)
}

// activityOf is the activity id of a request: the client's own where it gives one, else a new one.
func activityOf(req *request) string {
	for _, given := range []string{req.get("Activity-Id"), req.get("RDG-Correlation-Id"), req.param("CorId")} {
		if id := parseGUID(given); id != "" {
			return id
		}
	}
	return newGUID()
}

// bearer is the request's bearer token, from its header or, for clients that can't set one, from its query.
func bearer(req *request) string {
	if scheme, token, ok := strings.Cut(req.get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	return req.param("access_token")
}

// refuse logs a refusal and answers with it.
func (v *visitor) refuse(status int, e *refusal.Error) {
	v.r.log.Info("request refused", "activity", e.ActivityID, "peer", v.tcp.RemoteAddr().String(), "status", status, "code", e.Code, "error", e.Message)
	v.sayNo(status, e)
}

// refuseClient is refuse for a client that nobody knows yet, and reports it.
func (v *visitor) refuseClient(status int, e *refusal.Error) {
	v.r.reportStranger(v, e.ActivityID, e)
	v.refuse(status, e)
}

// sayNo answers with a refusal that is logged already, and closes without losing the answer.
func (v *visitor) sayNo(status int, e *refusal.Error) {
	v.SetWriteDeadline(time.Now().Add(lingerTime))
	if refuse(v.leg, status, e) == nil {
		v.linger()
	}
}

// lingerTime bounds how long a last word may take to reach the other side.
const lingerTime = 2 * time.Second

// linger ends a connection such that what was written last arrives: closing with unread input would have the kernel
// reset the connection, and the other side lose it.
func (l *leg) linger() {
	l.SetDeadline(time.Now().Add(lingerTime))
	l.CloseWrite()
	l.tcp.CloseWrite()
	l.tcp.polling = false
	io.Copy(io.Discard, io.LimitReader(l.tcp.TCPConn, 1<<20))
	l.tcp.Close()
}

// serveJoin takes an agent's leg: one secret, one use, one host leg.
func (r *Relay) serveJoin(v *visitor, req *request, activity string) {
	arrived := time.Now()
	if !req.has("Upgrade", joinProtocol) {
		v.refuse(http.StatusBadRequest, refusal.New(refusal.Protocol, "A join request upgrades to %s: update the agent.", joinProtocol).With(activity))
		return
	}
	if i := req.get(headerInstance); i != r.instance {
		v.refuse(http.StatusMisdirectedRequest, refusal.New(refusal.UnknownInstance,
			"The join request for gateway instance %q reached %q: the agent's TLS server name must be INSTANCE.join.%s.", i, r.instance, r.config.Load().Hostname).With(activity))
		return
	}
	secret, err := base64.RawURLEncoding.DecodeString(bearer(req))
	req.forget()
	var w *joinWait
	if err == nil {
		w = r.joins.claim(secret)
	}
	clear(secret)
	if w == nil {
		r.metrics.Joins.WithLabelValues("refused").Inc()
		v.refuse(httpStatus(refusal.JoinUnknown), refusal.New(refusal.JoinUnknown,
			"The join secret is not known here: it was used before, its client has left, or its time has passed. The user connects again to get a new one.").With(activity))
		return
	}
	v.vouch()
	ok := &answer{status: http.StatusSwitchingProtocols, activity: w.activity,
		header: []headerField{{"Upgrade", joinProtocol}, {"Connection", "Upgrade"}}}
	if err := ok.write(v); err != nil {
		r.log.Info("the agent's leg broke as it joined", "activity", w.activity, "error", err)
		w.deliver(nil)
		return
	}
	r.metrics.Joins.WithLabelValues("ok").Inc()
	v.SetDeadline(time.Time{})
	v.handed = true
	w.deliver(&arrival{leg: v.leg, accepted: v.accepted, arrived: arrived})
}
