package gateway

import (
	"context"
	"net/netip"
	"slices"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Route is admission.AdmissionServer's. An instance's name is its address, and the headless Service says which addresses
// are this gateway's: so no directory is kept, and an agent can't have a relay dial anything else. The Service publishes
// pods that are not ready too, for a draining relay still takes joins.
func (g *Gateway) Route(ctx context.Context, r *admission.RouteRequest) (*admission.RouteResponse, error) {
	g.mu.Lock()
	host := g.config.PeersHost
	g.mu.Unlock()
	no := func(code refusal.Code, format string, args ...any) (*admission.RouteResponse, error) {
		g.metrics.Routes.WithLabelValues(string(code)).Inc()
		return &admission.RouteResponse{Error: protoError(refusal.New(code, format, args...))}, nil
	}
	addr, err := admission.InstanceAddr(r.Instance)
	if err != nil || r.Instance == g.instance {
		return no(refusal.UnknownInstance, "%q is no other instance of this gateway: the client it held has gone; connect again.", r.Instance)
	}
	peers, err := g.lookup(ctx, host)
	if err != nil {
		return no(refusal.Internal, "The relays of this gateway can't be looked up under %s: is the headless Service there? (%v)", host, err)
	}
	if !slices.ContainsFunc(peers, func(p netip.Addr) bool { return p.Unmap() == addr }) {
		return no(refusal.UnknownInstance, "Instance %q is no relay of this gateway any more: the client it held has gone; connect again.", r.Instance)
	}
	g.metrics.Routes.WithLabelValues("ok").Inc()
	return &admission.RouteResponse{Address: netip.AddrPortFrom(addr, g.peerPort).String()}, nil
}
