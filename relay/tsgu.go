package relay

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

const (
	tunnelID  = 1
	channelID = 1
	// rdpProtocol is the only value of CHANNEL_CREATE's protocol.
	rdpProtocol = 3
)

// packet is anything that can be sent.
type packet interface{ Append([]byte) []byte }

// tunnel is a TSGU client on its way to its channel: each method takes one request and answers it.
type tunnel struct {
	*client
	a    *attempt
	name string // the client machine's, for logs
}

// serveTSGU is MS-TSGU over WebSocket. Its steps refuse in their response packet, with the status that the client shows;
// code, message and activity id follow in the close frame, for clients that can show them, and in the log.
func (r *Relay) serveTSGU(v *visitor, req *request, activity string) {
	a, ok := r.newWebSocket(v, req, transportTSGU, activity)
	if a == nil {
		return
	}
	defer a.close()
	if ok.write(v) != nil {
		return
	}
	a.serveTunnel(newClient(v.leg, v.leg, framing{webSocket: true, tsgu: true}))
}

// serveTunnel is MS-TSGU in either form, from the first packet to the session's end.
func (a *attempt) serveTunnel(c *client) {
	t := &tunnel{client: c, a: a}
	for _, step := range []func() error{t.handshake, t.create, t.authorise, t.channel} {
		if err := step(); err != nil {
			t.fail(err)
			return
		}
	}
	a.begin(c).run()
}

// fail ends a tunnel that a step gave up. Refusals were answered by the step where the protocol has a packet for it.
func (t *tunnel) fail(err error) {
	var e *refusal.Error
	if !errors.As(err, &e) {
		t.a.r.metrics.handshakeFailed("tsgu")
		t.a.r.log.Info("the client ended its tunnel", "activity", t.a.activity, "error", err)
		return
	}
	if !t.webSocket {
		return // serveOut says good-bye
	}
	code := wsframe.ClosePolicy
	if e.Code == refusal.Protocol {
		code = wsframe.CloseProtocol
	}
	if t.control(wsframe.Close, wsframe.ClosePayload(code, fmt.Sprintf("%s; activity %s", e.Code, e.ActivityID))) == nil {
		t.linger()
	}
}

// want reads up to the next packet of one type. Only a KEEPALIVE may come before it.
func (t *tunnel) want(typ tsgu.Type) ([]byte, error) {
	timeout := time.Duration(t.a.r.config.Load().HandshakeTimeoutSeconds) * time.Second
	t.SetDeadline(time.Now().Add(timeout))
	for {
		ev, err := t.next()
		switch {
		case brokeProtocol(err):
			return nil, t.breach("The client broke the protocol (%v): update it, or report it with the activity id.", err)
		case err != nil:
			return nil, err
		case ev.Type == typ:
			return ev.Body, nil
		case ev.Type == tsgu.TypeKeepAlive:
		case ev.Type == tsgu.TypeCloseChannel:
			return nil, errClientGone
		default:
			return nil, t.breach("The client sent packet type %#x where %#x was due: update it, or report it with the activity id.", uint16(ev.Type), uint16(typ))
		}
	}
}

func (t *tunnel) breach(format string, args ...any) error {
	return t.a.refused(refusal.New(refusal.Protocol, format, args...))
}

// handshake takes HANDSHAKE_REQUEST: version 1, and the ticket as PAA cookie as the one way to authenticate.
func (t *tunnel) handshake() error {
	body, err := t.want(tsgu.TypeHandshakeRequest)
	if err != nil {
		return err
	}
	req, err := tsgu.ParseHandshakeRequest(body)
	if err != nil {
		return t.breach("%v: update the client.", err)
	}
	resp := tsgu.HandshakeResponse{Major: 1, ExtAuth: tsgu.ExtAuthPAA}
	var e *refusal.Error
	switch {
	case req.Major != 1:
		resp.Error = tsgu.ErrNotSupported
		e = refusal.New(refusal.Protocol, "The client speaks MS-TSGU version %d.%d, this gateway 1.0: use another client version.", req.Major, req.Minor)
	case req.ExtAuth&tsgu.ExtAuthPAA == 0:
		resp.Error = tsgu.ErrUnsupportedAuthentication
		e = refusal.New(refusal.TicketMissing, "The client offers no ticket (authentication %#x): use a connection file from the workspace's feed, or `rdv connect` (FreeRDP: access-token).", req.ExtAuth)
	}
	if e != nil {
		e = t.a.refused(e)
	}
	return t.answer(&resp, e)
}

// create takes TUNNEL_CREATE with the ticket.
func (t *tunnel) create() error {
	body, err := t.want(tsgu.TypeTunnelCreate)
	if err != nil {
		return err
	}
	req, err := tsgu.ParseTunnelCreate(body)
	if err != nil {
		return t.breach("%v: update the client.", err)
	}
	t.idleTimeouts = req.Caps&tsgu.CapIdleTimeout != 0
	t.serviceMessages = req.Caps&tsgu.CapServiceMessage != 0
	resp := tsgu.TunnelResponse{Fields: 3, TunnelID: tunnelID, Caps: tsgu.CapIdleTimeout | tsgu.CapServiceMessage}
	e := t.a.authenticate(req.Cookie.String()) // no cookie is an empty ticket
	clear(req.Cookie)
	if e != nil {
		resp.Status, resp.Fields = statusOf(e.Code), 0
	}
	return t.answer(&resp, e)
}

// authorise takes TUNNEL_AUTH, which only names the client's machine: what the user may do is the broker's to say.
func (t *tunnel) authorise() error {
	body, err := t.want(tsgu.TypeTunnelAuth)
	if err != nil {
		return err
	}
	req, err := tsgu.ParseTunnelAuth(body)
	if err != nil {
		return t.breach("%v: update the client.", err)
	}
	t.name = req.ClientName.String()
	return t.answer(&tsgu.TunnelAuthResponse{Fields: 3, Redirection: t.redirection(), IdleMinutes: t.idleMinutes()}, nil)
}

// redirection is what the ticket says about redirected devices; all enabled leaves it to the signed file.
func (t *tunnel) redirection() uint32 {
	const enableAll = 0x80000000
	if t.a.redirectFlags == 0 {
		return enableAll
	}
	return t.a.redirectFlags
}

// idleMinutes is the idle timeout for clients that hold to it themselves; 0 is none.
func (t *tunnel) idleMinutes() uint32 {
	return uint32(t.a.r.config.Load().IdleTimeoutSeconds+59) / 60
}

// channel takes CHANNEL_CREATE, has the host dial, and opens the channel.
func (t *tunnel) channel() error {
	body, err := t.want(tsgu.TypeChannelCreate)
	if err != nil {
		return err
	}
	req, err := tsgu.ParseChannelCreate(body)
	if err != nil {
		return t.breach("%v: update the client.", err)
	}
	if req.Protocol != rdpProtocol {
		return t.breach("The client asks for protocol %d in its channel, not RDP (%d): use an RDP client.", req.Protocol, rdpProtocol)
	}
	if len(t.payload) > 0 {
		return t.breach("The client sent data before its channel was open: update it, or report it with the activity id.")
	}
	t.from.unread = append(t.in, t.from.unread...)
	t.in, t.buf = nil, nil
	target := t.target(req)
	t.ts.Release()
	t.a.r.log.Debug("channel asked for", "activity", t.a.activity, "client", t.name, "target", target)

	resp := tsgu.ChannelResponse{Fields: 1, ChannelID: channelID}
	var e *refusal.Error
	if err := t.a.connect(target); err != nil && !errors.As(err, &e) {
		return err
	}
	if e != nil {
		resp.Error, resp.Fields = statusOf(e.Code), 0
	}
	return t.answer(&resp, e)
}

// target is the name that the client asks for: of several, the ticket's, where it is among them. The gateway container compares.
func (t *tunnel) target(req tsgu.ChannelCreate) string {
	for _, name := range append(req.Names, req.Alternates...) {
		if s := name.String(); strings.EqualFold(s, t.a.target) {
			return s
		}
	}
	return req.Names[0].String()
}

// answer sends a response; a refusal that it carries ends the tunnel.
func (t *tunnel) answer(p packet, e *refusal.Error) error {
	t.SetWriteDeadline(time.Now().Add(lingerTime))
	if err := t.send(p); err != nil {
		return err
	}
	if e != nil {
		return e
	}
	return nil
}

// statusOf is the HRESULT that a client shows for a refusal.
func statusOf(code refusal.Code) uint32 {
	switch code {
	case refusal.TicketMissing:
		return tsgu.ErrCookieBadPacket
	case refusal.TicketInvalid, refusal.TicketExpired:
		return tsgu.ErrCookieDenied
	case refusal.NotGranted, refusal.Revoked, refusal.UnknownResource, refusal.WrongTarget:
		return tsgu.ErrResourceAccessDenied
	case refusal.NoHost, refusal.HostTimeout, refusal.HostRefused, refusal.HostNotReady:
		return tsgu.ErrConnectFailed
	case refusal.HostFull, refusal.HostDraining, refusal.GatewayFull, refusal.GatewayDraining:
		return tsgu.ErrMaxConnections
	}
	return tsgu.ErrInternal
}
