package relay

import (
	"context"
	"io"
	"net"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/door"
)

// spliceTo hands a connection whose ClientHello names another pod of this gateway on to that pod, TLS untouched: the
// agent's TLS ends there. The bytes pass through the kernel's splice.
func (r *Relay) spliceTo(v *visitor, c *conn) {
	hello := c.hello
	c.hello = nil
	log := r.log.With("peer", c.RemoteAddr().String(), "instance", c.foreign)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	route, err := r.admission.Route(ctx, &admission.RouteRequest{Instance: c.foreign})
	if err != nil || route.Error != nil {
		r.metrics.handshakeFailed("route")
		log.Warn("no route to the instance", "error", err, "refusal", route.GetError().GetMessage())
		return
	}
	if !r.splice(+1) {
		r.metrics.handshakeFailed("limit")
		log.Warn("too many connections to other instances")
		return
	}
	defer r.splice(-1)
	v.vouch()
	nc, err := r.dial(ctx, "tcp", route.Address)
	if err != nil {
		r.metrics.handshakeFailed("route")
		log.Warn("the instance does not answer", "address", route.Address, "error", err)
		return
	}
	defer nc.Close()
	peer, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	if _, err := peer.Write(hello); err != nil {
		return
	}
	c.SetDeadline(time.Time{})
	r.adopt(peer)
	defer r.disown(peer)
	var both sync.WaitGroup
	both.Go(func() { door.PassOn(peer, c.TCPConn, r.closeGrace, splice) })
	door.PassOn(c.TCPConn, peer, r.closeGrace, splice)
	both.Wait()
}

// splice copies in the kernel.
func splice(to, from *net.TCPConn) error {
	_, err := io.Copy(to, from)
	return err
}
