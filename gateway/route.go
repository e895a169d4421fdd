package gateway

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Peers is admission.AdmissionServer's: who the headless Service names, but this pod.
func (g *Gateway) Peers(ctx context.Context, _ *admission.PeersRequest) (*admission.PeersResponse, error) {
	addrs, e := g.relays(ctx, netip.Addr{})
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

// Strangers have relays looked up, with a server name that looks like a pod's or with a channel whose other half is nowhere.
// So a look-up goes for all who ask, and is kept: for relaysLife, where it has what is asked for; for relaysAnew, where a
// pod that has just come may be missing.
const (
	relaysLife    = 5 * time.Second
	relaysAnew    = 250 * time.Millisecond
	lookupTimeout = 3 * time.Second
)

// relayTable is the last look-up of this gateway's relays.
type relayTable struct {
	busy chan struct{} // of one: held while the name is looked up

	mu    sync.Mutex
	host  string
	addrs []netip.Addr
	err   error
	at    time.Time
}

// get gives what is known, if it is young enough for one who wants an address, or, where that is not valid, all of them.
func (t *relayTable) get(host string, want netip.Addr, now time.Time) (addrs []netip.Addr, err error, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	life := relaysAnew
	if t.err == nil && slices.Contains(t.addrs, want) {
		life = relaysLife
	}
	return t.addrs, t.err, t.host == host && now.Sub(t.at) < life
}

func (t *relayTable) put(host string, addrs []netip.Addr, err error, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.host, t.addrs, t.err, t.at = host, addrs, err, now
}

// relays is the addresses of this gateway's relays, for one who wants one of them, or all. The list is not the caller's to
// change.
func (g *Gateway) relays(ctx context.Context, want netip.Addr) ([]netip.Addr, *refusal.Error) {
	g.mu.Lock()
	host := g.config.PeersHost
	g.mu.Unlock()
	addrs, err, ok := g.table.get(host, want, time.Now())
	if !ok {
		select {
		case g.table.busy <- struct{}{}:
			if addrs, err, ok = g.table.get(host, want, time.Now()); !ok {
				addrs, err = g.lookUpRelays(ctx, host)
			}
			<-g.table.busy
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return nil, refusal.New(refusal.Internal, "The relays of this gateway can't be looked up under %s: is the headless Service there? (%v)", host, err)
	}
	return addrs, nil
}

// lookUpRelays asks the resolver. Others wait for the answer too, so it doesn't end with the request that happened to ask.
func (g *Gateway) lookUpRelays(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
	defer cancel()
	addrs, err := g.lookup(ctx, host)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	g.table.put(host, addrs, err, time.Now())
	return addrs, err
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
	peers, e := g.relays(ctx, addr)
	if e != nil {
		return no(e)
	}
	if !slices.Contains(peers, addr) {
		return no(refusal.New(refusal.UnknownInstance, "Instance %q is no relay of this gateway any more: the client it held has gone; connect again.", r.Instance))
	}
	g.metrics.Routes.WithLabelValues("ok").Inc()
	return &admission.RouteResponse{Address: netip.AddrPortFrom(addr, g.peerPort).String()}, nil
}
