package gateway

import (
	"context"
	"net/netip"
	"slices"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Peers is admission.AdmissionServer's: who the headless Service names, but this pod.
func (g *Gateway) Peers(ctx context.Context, _ *admission.PeersRequest) (*admission.PeersResponse, error) {
	addrs, e := g.relays(ctx)
	if e != nil {
		return &admission.PeersResponse{Error: protoError(e)}, nil
	}
	resp := &admission.PeersResponse{}
	for _, addr := range addrs {
		if name := admission.InstanceName(addr); name != g.instance {
			resp.Peers = append(resp.Peers, &admission.Peer{Instance: name, Address: netip.AddrPortFrom(addr, g.peerPort).String()})
		}
	}
	return resp, nil
}

// relays is the addresses of this gateway's relays.
func (g *Gateway) relays(ctx context.Context) ([]netip.Addr, *refusal.Error) {
	g.mu.Lock()
	host := g.config.PeersHost
	g.mu.Unlock()
	addrs, err := g.lookup(ctx, host)
	if err != nil {
		return nil, refusal.New(refusal.Internal, "The relays of this gateway can't be looked up under %s: is the headless Service there? (%v)", host, err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, nil
}

// Route is admission.AdmissionServer's. An instance's name is its address, and the headless Service says which addresses
// are this gateway's: so no directory is kept, and an agent can't have a relay dial anything else. The Service publishes
// pods that are not ready too, for a draining relay still takes joins.
func (g *Gateway) Route(ctx context.Context, r *admission.RouteRequest) (*admission.RouteResponse, error) {
	no := func(e *refusal.Error) (*admission.RouteResponse, error) {
		g.metrics.Routes.WithLabelValues(string(e.Code)).Inc()
		return &admission.RouteResponse{Error: protoError(e)}, nil
	}
	addr, err := admission.InstanceAddr(r.Instance)
	if err != nil || r.Instance == g.instance {
		return no(refusal.New(refusal.UnknownInstance, "%q is no other instance of this gateway: the client it held has gone; connect again.", r.Instance))
	}
	peers, e := g.relays(ctx)
	if e != nil {
		return no(e)
	}
	if !slices.Contains(peers, addr) {
		return no(refusal.New(refusal.UnknownInstance, "Instance %q is no relay of this gateway any more: the client it held has gone; connect again.", r.Instance))
	}
	g.metrics.Routes.WithLabelValues("ok").Inc()
	return &admission.RouteResponse{Address: netip.AddrPortFrom(addr, g.peerPort).String()}, nil
}
