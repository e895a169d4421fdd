package controllers

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

// +kubebuilder:rbac:groups="",resources=nodes,verbs=list
// +kubebuilder:rbac:groups=networking.k8s.io,resources=servicecidrs,verbs=list
// +kubebuilder:rbac:groups=discovery.k8s.io,resources=endpointslices,verbs=list
// +kubebuilder:rbac:groups=networking.k8s.io,resources=networkpolicies,verbs=delete

const (
	// networksEvery is how old the known addresses of the cluster may become.
	networksEvery = 2 * time.Minute
	// maxNetworks bounds the ranges in a policy: more of them are joined into wider ones.
	maxNetworks = 64
	// nodePage is how many nodes are read at one time.
	nodePage = 500
)

// networks knows the addresses of the cluster itself: NetworkPolicies keep desktops off them. It is safe for concurrent use.
type networks struct {
	live  client.Reader // past the cache: nobody else wants all nodes in memory
	given []netip.Prefix
	now   func() time.Time

	mu    sync.Mutex
	known []netip.Prefix
	read  time.Time
}

// get returns the addresses as they were at most networksEvery ago. What the operator may not read is left out.
func (n *networks) get(ctx context.Context) ([]netip.Prefix, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if now := n.now(); n.read.IsZero() || now.Sub(n.read) >= networksEvery {
		found, err := n.look(ctx)
		if err != nil {
			if n.read.IsZero() {
				return nil, err
			}
			return n.known, nil // better than none, and the next pass looks again
		}
		n.known, n.read = found, now
	}
	return n.known, nil
}

func (n *networks) look(ctx context.Context) ([]netip.Prefix, error) {
	found := slices.Clone(n.given)
	add := func(text string) {
		if p, err := netip.ParsePrefix(text); err == nil {
			found = append(found, p)
		} else if a, err := netip.ParseAddr(text); err == nil {
			found = append(found, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	more := ""
	for first := true; first || more != ""; first = false {
		nodes := &corev1.NodeList{}
		if err := n.list(ctx, "nodes", nodes, client.Limit(nodePage), client.Continue(more)); err != nil {
			return nil, err
		}
		for _, node := range nodes.Items {
			for _, cidr := range append(slices.Clone(node.Spec.PodCIDRs), node.Spec.PodCIDR) {
				add(cidr)
			}
			for _, a := range node.Status.Addresses {
				if a.Type == corev1.NodeInternalIP {
					add(a.Address)
				}
			}
		}
		more = nodes.Continue
	}
	services := &networkingv1.ServiceCIDRList{}
	if err := n.list(ctx, "service CIDRs", services); err != nil {
		return nil, err
	}
	for _, cidrs := range services.Items {
		for _, cidr := range cidrs.Spec.CIDRs {
			add(cidr)
		}
	}
	servers := &discoveryv1.EndpointSliceList{}
	if err := n.list(ctx, "the API server's addresses", servers, client.InNamespace(metav1.NamespaceDefault), client.MatchingLabels{discoveryv1.LabelServiceName: "kubernetes"}); err != nil {
		return nil, err
	}
	for _, slice := range servers.Items {
		for _, endpoint := range slice.Endpoints {
			for _, a := range endpoint.Addresses {
				add(a)
			}
		}
	}
	return atMost(render.Merged(found), maxNetworks), nil
}

// list leaves the list empty where the cluster has no such kind, or the operator, held to namespaces, may not read it.
func (n *networks) list(ctx context.Context, what string, into client.ObjectList, opts ...client.ListOption) error {
	err := n.live.List(ctx, into, opts...)
	if apierrors.IsForbidden(err) || meta.IsNoMatchError(err) || apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", what, err)
	}
	return nil
}

// atMost joins ranges into wider ones, the narrowest first, until there are no more than limit.
func atMost(ranges []netip.Prefix, limit int) []netip.Prefix {
	for len(ranges) > limit {
		narrowest := 0 // in host bits, so that both families count alike
		for i, p := range ranges {
			if p.Addr().BitLen()-p.Bits() < ranges[narrowest].Addr().BitLen()-ranges[narrowest].Bits() {
				narrowest = i
			}
		}
		host := ranges[narrowest].Addr().BitLen() - ranges[narrowest].Bits()
		wider := slices.Clone(ranges)
		for i, p := range wider {
			if p.Addr().BitLen()-p.Bits() == host {
				wider[i] = netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
			}
		}
		ranges = render.Merged(wider)
	}
	return ranges
}

// surroundings are what the policies in a namespace rest on.
func (b *base) surroundings(ctx context.Context, namespace string) (render.Surroundings, error) {
	var around render.Surroundings
	var err error
	if around.Cluster, err = b.networks.get(ctx); err != nil {
		return around, err
	}
	list := &rdv.GatewayList{}
	if err := b.Client.List(ctx, list, client.InNamespace(namespace)); err != nil {
		return around, fmt.Errorf("list Gateways: %w", err)
	}
	for i := range list.Items {
		if at, ok := reachedAt(&list.Items[i]); ok {
			around.Gateways = append(around.Gateways, at)
		}
	}
	slices.SortFunc(around.Gateways, netip.AddrPort.Compare)
	around.Gateways = slices.Compact(around.Gateways)
	return around, nil
}

// reachedAt is the address of a gateway's Service and its public port, if that is an address and no name.
func reachedAt(gw *rdv.Gateway) (netip.AddrPort, bool) {
	addr, err := netip.ParseAddr(gw.Status.Address)
	if err != nil {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr, uint16(render.GatewayPort(gw))), true
}

// reachedElsewhere passes a Gateway that came, went, or is reached at another address than before.
func reachedElsewhere() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		was, is := e.ObjectOld.(*rdv.Gateway), e.ObjectNew.(*rdv.Gateway)
		a, _ := reachedAt(was)
		b, _ := reachedAt(is)
		return a != b
	}}
}

// applyPolicy keeps an object's NetworkPolicy, or, where it wants none, deletes the one that it had.
func (b *base) applyPolicy(ctx context.Context, p *pass, owner client.Object, name string, want *networkingv1.NetworkPolicy) error {
	p.wakeAfter(networksRefresh)
	if want != nil {
		return b.applyAll(ctx, p, owner, want)
	}
	had := &metav1.PartialObjectMetadata{}
	had.SetGroupVersionKind(networkingv1.SchemeGroupVersion.WithKind("NetworkPolicy"))
	switch err := b.Client.Get(ctx, client.ObjectKey{Namespace: owner.GetNamespace(), Name: name}, had); {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("get NetworkPolicy %q: %w", name, err)
	case !metav1.IsControlledBy(had, owner):
		return nil // yours
	}
	return b.Delete(ctx, had)
}

// networksRefresh is how long a policy may stand on addresses of the cluster that have changed.
const networksRefresh = 10 * time.Minute
