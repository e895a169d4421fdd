package relay

import (
	"crypto/rand"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/tsgu"
)

// This file is the legacy form of MS-TSGU (3.3.5.1), for clients that have no WebSocket: two connections that show the
// same connection id, each good for one direction.
//
//	RDG_OUT_DATA, no body        200 without a length, 10 random bytes, then packets until the connection ends
//	RDG_IN_DATA, no body         200, once the OUT channel of that id is found: here, or on another pod (pair.go)
//	RDG_IN_DATA, a chunked body  on the same connection: the client's packets; never answered
//
// The OUT channel's goroutine runs tunnel and session. Whichever channel ends takes the other with it.

const (
	headerConnection = "RDG-Connection-Id"
	// seedLen is what MS-TSGU calls a seed of limited size; all clients known skip as much.
	seedLen = 10
)

// half is an OUT channel that waits for its IN channel, or has it.
type half struct {
	id   string
	addr netip.Addr // of its client
	out  *conn      // its own connection
	in   chan *leg  // of one; nil where the IN channel broke

	// Guarded by halves.mu.
	taken     *conn // the connection that claimed the half, the only one that ever may
	delivered bool
	over      bool
}

// halves is the OUT channels of this pod by their connection id, until their session ends: an id serves one client at a time.
type halves struct {
	mu   sync.Mutex
	open map[string]*half
}

// enter adds an OUT channel; nil where another client has the id. leave must follow. The same client's older one ends: a
// client whose network went away comes again with its id before anybody here has noticed. An addr that is not valid is
// not compared: 128 bits that the client drew tell enough then.
func (t *halves) enter(id string, addr netip.Addr, out *conn) (h *half, replaced bool) {
	h = &half{id: id, addr: addr, out: out, in: make(chan *leg, 1)}
	t.mu.Lock()
	old := t.open[id]
	if old != nil && old.addr != addr {
		t.mu.Unlock()
		return nil, false
	}
	if t.open == nil {
		t.open = map[string]*half{}
	}
	t.open[id] = h
	t.mu.Unlock()
	if old != nil {
		t.leave(old)
		old.out.Close()
	}
	return h, old != nil
}

// claim finds the half that c is the IN channel of, or leads to; nil where it isn't here. deliver or release must follow.
// An addr that is not valid is not compared.
func (t *halves) claim(id string, addr netip.Addr, c *conn) (*half, *refusal.Error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.open[id]
	switch {
	case h == nil:
		return nil, nil
	case addr.IsValid() && addr != h.addr:
		return nil, refusal.New(refusal.Protocol, "The IN channel comes from %s, but its OUT channel from another address: let both of a client's connections take the same way to the gateway, or use a client that speaks WebSocket.", addr)
	case h.taken != nil:
		return nil, refusal.New(refusal.Protocol, "The OUT channel of connection %s has its IN channel already: connect again.", id)
	}
	h.taken = c
	return h, nil
}

// deliver hands the IN channel over; false where the OUT channel has gone.
func (t *halves) deliver(h *half, in *leg) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h.over || h.delivered {
		return false
	}
	h.delivered = true
	h.in <- in
	return true
}

// release tells the OUT channel that a claim came to nothing. After deliver it does nothing.
func (t *halves) release(h *half) { t.deliver(h, nil) }

// leave ends a half, and the connection that claimed it.
func (t *halves) leave(h *half) {
	t.mu.Lock()
	h.over = true
	if t.open[h.id] == h {
		delete(t.open, h.id)
	}
	taken := h.taken
	t.mu.Unlock()
	if taken != nil {
		taken.Close()
	}
}

// await is the IN channel, once it is there; nil where it broke, did not come in time (late), or the OUT channel ended.
func (h *half) await(limit time.Duration, ended <-chan struct{}) (in *leg, late bool) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case in = <-h.in:
		return in, false
	case <-ended:
		return nil, false
	case <-timer.C:
		return nil, true
	}
}

// connectionID is what both channels of a client show.
func connectionID(req *request) string {
	if id := parseGUID(req.get(headerConnection)); id != "" {
		return id
	}
	return parseGUID(req.param("ConId"))
}

// serveOut is an OUT channel, until its session ends.
func (r *Relay) serveOut(v *visitor, req *request, activity string) {
	id := connectionID(req)
	if id == "" || req.body() {
		v.refuseClient(http.StatusBadRequest, refusal.New(refusal.Protocol, "RDG_OUT_DATA needs a header %s with a GUID, and no body: update the client.", headerConnection).With(activity))
		return
	}
	req.forget()
	a := r.newAttempt(v, transportLegacy, activity)
	if a == nil {
		return
	}
	defer a.close()
	h, replaced := r.halves.enter(id, v.comparable(), v.tcp)
	if h == nil {
		v.sayNo(http.StatusConflict, a.refused(refusal.New(refusal.Protocol, "Connection id %s is in use by a client at another address: connect again.", id)))
		return
	}
	if replaced {
		r.log.Info("the client came again with its connection id: the older connection ends", "activity", a.activity, "connection", id, "peer", v.tcp.RemoteAddr().String())
	}
	defer r.halves.leave(h)
	ok := &answer{status: http.StatusOK, activity: activity, stream: make([]byte, seedLen)}
	rand.Read(ok.stream)
	if ok.write(v) != nil {
		return
	}

	v.SetDeadline(time.Time{}) // the pairing timer stands for it
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		v.discard()
		r.halves.leave(h) // whoever reads the IN channel learns of it so
	}()
	defer func() {
		v.tcp.Close()
		<-ended
	}()
	in, late := h.await(r.pairTimeout, ended)
	if late {
		a.refused(refusal.New(refusal.Protocol, "No IN channel (RDG_IN_DATA) followed the OUT channel of connection %s within %s: let it through in proxies on the way.", id, r.pairTimeout))
		r.metrics.Pairs.WithLabelValues("late").Inc()
		v.SetWriteDeadline(time.Now().Add(lingerTime))
		v.Write((&tsgu.CloseChannel{Status: tsgu.CloseUnpaired}).Append(nil))
		v.farewell(ended)
		return
	}
	if in == nil {
		r.log.Info("the client left before its channels were a pair", "activity", activity, "connection", id)
		return
	}
	a.from = in
	a.serveTunnel(newClient(v.leg, in, framing{tsgu: true}))
	if a.session == nil {
		v.farewell(ended)
	}
}

// farewell ends an OUT channel such that what was written last arrives.
func (l *leg) farewell(ended <-chan struct{}) {
	l.SetWriteDeadline(time.Now().Add(lingerTime))
	l.CloseWrite()
	l.tcp.CloseWrite()
	timer := time.NewTimer(lingerTime)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
	}
}

// inbound is a claim that an IN channel's connection has: on a half of this pod, or on one of another pod, to which hop leads.
type inbound struct {
	r    *Relay
	id   string
	half *half
	hop  *leg
	gone chan struct{} // closed once hop has ended
}

// close gives up what came to nothing, and ends what was handed on.
func (in *inbound) close() {
	if in.half != nil {
		in.r.halves.release(in.half)
		return
	}
	in.hop.tcp.Close()
	<-in.gone
	in.r.splice(-1)
}

// serveIn takes one of an IN channel's requests; done says that the connection was used up.
func (r *Relay) serveIn(v *visitor, req *request, activity string) (done bool) {
	no := func(status int, e *refusal.Error) bool {
		v.refuseClient(status, e.With(activity))
		return true
	}
	id := connectionID(req)
	chunks := strings.EqualFold(req.get("Transfer-Encoding"), "chunked") && req.get("Content-Length") == ""
	switch {
	case id == "" || v.in != nil && v.in.id != id:
		return no(http.StatusBadRequest, refusal.New(refusal.Protocol, "RDG_IN_DATA needs a header %s with the GUID of its OUT channel: update the client.", headerConnection))
	case req.body() && !chunks:
		return no(http.StatusBadRequest, refusal.New(refusal.Protocol, "RDG_IN_DATA has either no body or a chunked one: let it through unchanged in proxies on the way."))
	case v.in == nil:
		in, e := r.claim(v, id, activity)
		if e != nil {
			r.metrics.Pairs.WithLabelValues("refused").Inc()
			status := httpStatus(e.Code)
			if e.Code == refusal.Protocol {
				status = http.StatusConflict
			}
			return no(status, e)
		}
		v.in = in
	}
	if !chunks {
		return (&answer{status: http.StatusOK, activity: activity}).write(v) != nil
	}
	v.SetDeadline(time.Time{})
	if v.in.half != nil {
		v.handed = r.halves.deliver(v.in.half, v.leg)
	} else {
		r.passToPeer(v, v.in)
	}
	return true
}

// claim finds the OUT channel that a client's IN channel belongs to.
func (r *Relay) claim(v *visitor, id, activity string) (*inbound, *refusal.Error) {
	addr := v.comparable()
	h, e := r.halves.claim(id, addr, v.tcp)
	if h != nil {
		r.metrics.Pairs.WithLabelValues("here").Inc()
		return &inbound{r: r, id: id, half: h}, nil
	}
	// One that is here and has its IN channel may be what is left of the client's connection before this one.
	in, elsewhere := r.claimElsewhere(v, id, addr, activity)
	if in == nil && e != nil {
		return nil, e
	}
	return in, elsewhere
}
