package relay

import (
	"errors"
	"time"

	"rendezvous.dev/rendezvous/wire/refusal"
)

// serveRaw is RDP bytes in WebSocket frames, with the ticket as bearer token. The 101 is not sent before both legs are
// there, so that every refusal is an HTTP answer.
//
// FreeRDP (3.15 seen) does not notice in this mode that its session was closed, by close frame, TLS or TCP, before it
// next writes: the picture stands still until the user moves the mouse. In TSGU mode it does at once.
func (r *Relay) serveRaw(v *visitor, req *request, activity string) {
	ticket := bearer(req)
	a, ok := r.newWebSocket(v, req, transportRaw, activity)
	if a == nil {
		return
	}
	defer a.close()
	if e := a.trust(ticket); e != nil {
		v.sayNo(httpStatus(e.Code), e)
		return
	}
	if err := a.connect(""); err != nil {
		var e *refusal.Error
		if errors.As(err, &e) {
			v.sayNo(httpStatus(e.Code), e)
		}
		return
	}
	ok.activity = a.activity
	v.SetWriteDeadline(time.Now().Add(lingerTime))
	if ok.write(v) != nil {
		return
	}
	a.begin(newClient(v.leg, v.leg, framing{webSocket: true})).run()
}
