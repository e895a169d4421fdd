package relay

import (
	"fmt"
	"net"
	"net/netip"

	"rendezvous.dev/rendezvous/wire/proxyproto"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// This file is about load balancers that begin a connection with a PROXY protocol header. From the networks that are
// configured a header is believed: the client's address stands for the connection's own from then on. From elsewhere it is
// read, so that the client can be told, and the connection is refused. A connection without a header is served wherever it
// comes from: another pod's splices have none, nor has whoever reaches the pod from inside the cluster.

// readProxyHeader reads the header that the visitor's connection may begin with; false ends the connection.
func (v *visitor) readProxyHeader() bool {
	r, c := v.r, v.tcp
	peer := c.TCPConn.RemoteAddr()
	source, found, err := c.readProxyHeader()
	switch {
	case found && !r.proxies.Load().Believe(proxyproto.Addr(peer)):
		r.metrics.handshakeFailed("proxy")
		r.warnings.Refused(r.log, r.proxyField(), peer)
		c.unbelieved = true // and told so, if the header can be read
	case found && err != nil:
		r.metrics.handshakeFailed("proxy")
		r.warnings.Unreadable(r.log, peer, err)
	case err != nil:
		r.metrics.handshakeFailed("tls")
		r.log.Debug("the connection ended before a ClientHello", "peer", peer.String(), "error", err)
	case source.IsValid():
		c.client.Store(net.TCPAddrFromAddrPort(source))
		r.sendAway(r.strangers.Locate(&v.stranger, source.Addr(), int(r.config.Load().MaxPending)))
	}
	return err == nil
}

// proxyField is where whose headers are believed is set.
func (r *Relay) proxyField() string {
	return fmt.Sprintf("spec.service.proxyProtocol.networks of Gateway %s", r.config.Load().Gateway)
}

// unbelieved is what clients behind such a load balancer are told.
func (r *Relay) unbelieved() *refusal.Error {
	return refusal.New(refusal.ProxyHeader, "The load balancer before gateway %s sends PROXY protocol headers, which the gateway does not take: ask your administrator to set %s, or to switch them off.",
		r.config.Load().Gateway, r.proxyField())
}

// comparable is the visitor's address where it tells clients apart; not valid where it is some node's or load balancer's.
func (v *visitor) comparable() netip.Addr {
	addr := proxyproto.Addr(v.tcp.RemoteAddr())
	if v.tcp.client.Load() == nil && (v.r.config.Load().AddressesHidden || v.r.proxies.Load().Believe(addr)) {
		return netip.Addr{}
	}
	return addr
}

// RemoteAddr is the client's address: what a believed header says, else the connection's own.
func (c *conn) RemoteAddr() net.Addr {
	if client := c.client.Load(); client != nil {
		return client
	}
	return c.TCPConn.RemoteAddr()
}

// readProxyHeader reads the header that the stream may begin with, and leaves what comes after it to be read.
func (c *conn) readProxyHeader() (source netip.AddrPort, found bool, err error) {
	source, found, c.early, err = proxyproto.Read(c.TCPConn, make([]byte, 0, handshakeRead))
	c.hello = append(c.hello, c.early...)
	return source, found, err
}
