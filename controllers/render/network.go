package render

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/metadata"
)

// Surroundings are what NetworkPolicies need to know of a cluster.
type Surroundings struct {
	// Cluster are the addresses of its pods, Services, nodes and API server, as far as they are known.
	Cluster []netip.Prefix
	// Gateways are where the gateways of the object's namespace are reached, other than at their pods: a load balancer's
	// address and a port.
	Gateways []netip.AddrPort
}

// metadataServices are addresses that a pod has no business with.
var metadataServices = slices.Concat(metadata.LinkLocal, metadata.Services)

// BrokerNetworkPolicy opens the feed and the bus to all, the routes to other brokers of the same workspace, the sessions' API
// to the operator, and metrics to who may read them. It is nil where the Workspace wants none.
func (o Options) BrokerNetworkPolicy(ws *rdv.Workspace, around Surroundings) *networkingv1.NetworkPolicy {
	access := ws.Spec.Broker.Network
	sel := brokerSelector(ws.Name)
	return networkPolicy(ws.Namespace, WorkspaceBroker(ws.Name), workspaceLabels(ws, componentBroker), sel, access.Mode, []networkingv1.NetworkPolicyIngressRule{
		allow(nil, config.PortPublic, config.PortBus, config.PortBusWebSocket),
		allow(podsOf(sel), config.PortBusRoutes),
		allow(o.operator(), config.PortSessions),
		allow(readersOfMetrics(access), config.PortMetrics),
	}, egress(access.Egress, rdv.EgressAnywhere, around,
		dnsRule(),
		allowTo(podsOf(sel), config.PortBusRoutes),
	))
}

// GatewayNetworkPolicy lets anybody reach the listener, and the pod itself by default no more than DNS, the brokers' bus, the
// other relays, and other gateways, whose distance it measures: whoever broke into a relay could not go on from it. It is
// nil where the Gateway wants none.
func GatewayNetworkPolicy(gw *rdv.Gateway, around Surroundings) *networkingv1.NetworkPolicy {
	access := gw.Spec.Network
	rules := append([]networkingv1.NetworkPolicyEgressRule{
		dnsRule(),
		allowTo(podsOf(map[string]string{rdv.LabelComponent: componentBroker}), config.PortBus),
	}, toGateways(around)...)
	return networkPolicy(gw.Namespace, gw.Name, gatewayLabels(gw, componentGateway), gatewaySelector(gw.Name), access.Mode, []networkingv1.NetworkPolicyIngressRule{
		allow(nil, config.PortPublic),
		allow(readersOfMetrics(access), config.PortMetrics, config.PortGatewayMetrics),
	}, egress(access.Egress, rdv.EgressNeeded, around, rules...))
}

// PoolNetworkPolicy lets nothing reach the pool's pods: their desktops are reached through the agents, who dial out. By
// default they reach the world outside the cluster, and in it the brokers and the gateways. It is nil where the pool wants
// none.
func PoolNetworkPolicy(pool *rdv.HostPool, around Surroundings) *networkingv1.NetworkPolicy {
	access := pool.Spec.Network
	rules := append([]networkingv1.NetworkPolicyEgressRule{
		dnsRule(),
		allowTo(podsOf(brokerSelector(pool.Spec.WorkspaceRef.Name)), config.PortPublic, config.PortBus, config.PortBusWebSocket),
	}, toGateways(around)...)
	sel := selector(rdv.LabelHostPool, pool.Name, componentSessionHost)
	return networkPolicy(pool.Namespace, PoolNetworkPolicyName(pool.Name), labels(rdv.LabelHostPool, pool.Name, componentSessionHost), sel, access.Mode, nil,
		egress(access.Egress, rdv.EgressOutside, around, rules...))
}

// PoolNetworkPolicyName names a pool's NetworkPolicy.
func PoolNetworkPolicyName(pool string) string { return pool + "-hosts" }

func networkPolicy(
	namespace, name string, labels, selector map[string]string, mode rdv.NetworkMode,
	ingress []networkingv1.NetworkPolicyIngressRule, egress []networkingv1.NetworkPolicyEgressRule,
) *networkingv1.NetworkPolicy {
	if mode == rdv.NetworkUnmanaged {
		return nil
	}
	return &networkingv1.NetworkPolicy{
		TypeMeta:   typeMeta(networkingv1.SchemeGroupVersion.String(), "NetworkPolicy"),
		ObjectMeta: meta(namespace, name, labels),
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: selector},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
			Ingress:     ingress,
			Egress:      egress,
		},
	}
}

// egress is what pods need, the base, and what the spec allows besides.
func egress(spec *rdv.Egress, base rdv.EgressBase, around Surroundings, needed ...networkingv1.NetworkPolicyEgressRule) []networkingv1.NetworkPolicyEgressRule {
	if spec == nil {
		spec = &rdv.Egress{}
	}
	if spec.Base != "" {
		base = spec.Base
	}
	rules := needed
	if base != rdv.EgressNeeded {
		except := slices.Clone(metadataServices)
		if base == rdv.EgressOutside {
			except = append(except, around.Cluster...)
		}
		for _, text := range spec.Deny { // the API checks them
			if p, err := netip.ParsePrefix(string(text)); err == nil {
				except = append(except, p.Masked())
			}
		}
		rules = append(rules, networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{
			allBut("0.0.0.0/0", except), allBut("::/0", except),
		}})
	}
	return append(rules, spec.Allow...)
}

// allBut is the range all without those of except that are of its family.
func allBut(all string, except []netip.Prefix) networkingv1.NetworkPolicyPeer {
	block := &networkingv1.IPBlock{CIDR: all}
	is4 := netip.MustParsePrefix(all).Addr().Is4()
	for _, p := range Merged(except) {
		if p.Addr().Is4() == is4 && p.Bits() > 0 {
			block.Except = append(block.Except, p.String())
		}
	}
	return networkingv1.NetworkPolicyPeer{IPBlock: block}
}

// Merged are ranges in order, without those that lie in others, and neighbours joined.
func Merged(ranges []netip.Prefix) []netip.Prefix {
	sorted := slices.Clone(ranges)
	for i, p := range sorted {
		sorted[i] = p.Masked()
	}
	slices.SortFunc(sorted, netip.Prefix.Compare)
	var out []netip.Prefix
	for _, p := range sorted {
		if n := len(out); n > 0 && out[n-1].Overlaps(p) {
			if p.Bits() < out[n-1].Bits() {
				out[n-1] = p
			}
			continue
		}
		out = append(out, p)
		for n := len(out); n > 1; n = len(out) {
			a, b := out[n-2], out[n-1]
			joined := netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
			if a.Bits() != b.Bits() || a.Bits() == 0 || joined.Addr() != a.Addr() || !joined.Contains(b.Addr()) {
				break
			}
			out = append(out[:n-2], joined)
		}
	}
	return out
}

// GatewayPort is the port at which clients and session hosts dial a gateway.
func GatewayPort(gw *rdv.Gateway) int32 { return or(gw.Spec.Port, 443) }

func toGateways(around Surroundings) []networkingv1.NetworkPolicyEgressRule {
	rules := []networkingv1.NetworkPolicyEgressRule{allowTo(podsOf(map[string]string{rdv.LabelComponent: componentGateway}), config.PortPublic)}
	for _, at := range around.Gateways {
		block := &networkingv1.IPBlock{CIDR: netip.PrefixFrom(at.Addr(), at.Addr().BitLen()).String()}
		rules = append(rules, allowTo([]networkingv1.NetworkPolicyPeer{{IPBlock: block}}, int32(at.Port())))
	}
	return rules
}

// dnsRule opens DNS wherever it is: a node's cache has a link-local address. 5353 is where some distributions' pods listen.
func dnsRule() networkingv1.NetworkPolicyEgressRule {
	return networkingv1.NetworkPolicyEgressRule{
		Ports: append(policyPorts(corev1.ProtocolUDP, 53, 5353), policyPorts(corev1.ProtocolTCP, 53, 5353)...),
	}
}

// operator are the operator's pods; without its namespace, any pod: its certificate is looked at all the same.
func (o Options) operator() []networkingv1.NetworkPolicyPeer {
	if o.OperatorNamespace == "" {
		return []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{}}}
	}
	return []networkingv1.NetworkPolicyPeer{{
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: o.OperatorNamespace}},
		PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{labelAppName: appName, labelAppComponent: "manager"}},
	}}
}

// MetricsNamespaces is the label of namespaces whose pods read metrics, as kubebuilder's projects have it.
var MetricsNamespaces = map[string]string{"metrics": "enabled"}

func readersOfMetrics(access rdv.ServerNetworkAccess) []networkingv1.NetworkPolicyPeer {
	if len(access.MetricsFrom) > 0 {
		return access.MetricsFrom
	}
	return []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{MatchLabels: MetricsNamespaces}}}
}

// allow is an ingress rule for TCP ports from the given peers; none means from anywhere.
func allow(from []networkingv1.NetworkPolicyPeer, ports ...int32) networkingv1.NetworkPolicyIngressRule {
	return networkingv1.NetworkPolicyIngressRule{From: from, Ports: policyPorts(corev1.ProtocolTCP, ports...)}
}

// allowTo is an egress rule for TCP ports of the given peers.
func allowTo(to []networkingv1.NetworkPolicyPeer, ports ...int32) networkingv1.NetworkPolicyEgressRule {
	return networkingv1.NetworkPolicyEgressRule{To: to, Ports: policyPorts(corev1.ProtocolTCP, ports...)}
}

func policyPorts(protocol corev1.Protocol, ports ...int32) []networkingv1.NetworkPolicyPort {
	out := make([]networkingv1.NetworkPolicyPort, len(ports))
	for i, port := range ports {
		out[i] = networkingv1.NetworkPolicyPort{Protocol: new(protocol), Port: new(intstr.FromInt32(port))}
	}
	return out
}

// podsOf is the peer made of the pods with these labels in the same namespace.
func podsOf(selector map[string]string) []networkingv1.NetworkPolicyPeer {
	return []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: selector}}}
}
