package render

import (
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// The operator's own policy is a file, and leaves out what those that it makes do.
func TestOperatorsPolicy(t *testing.T) {
	text, err := os.ReadFile("../../config/manager/network_policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	policy := &networkingv1.NetworkPolicy{}
	if err := yaml.UnmarshalStrict(text, policy); err != nil {
		t.Fatal(err)
	}
	made := Options{}.BrokerNetworkPolicy(&rdv.Workspace{}, Surroundings{})
	last := func(p *networkingv1.NetworkPolicy) []networkingv1.NetworkPolicyPeer {
		return p.Spec.Egress[len(p.Spec.Egress)-1].To
	}
	if got, want := last(policy), last(made); !reflect.DeepEqual(got, want) {
		t.Errorf("the operator reaches %+v, want %+v", got, want)
	}
}

func TestMerged(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"", ""},
		{"10.244.1.0/24 10.244.0.0/24", "10.244.0.0/23"},
		{"10.244.1.0/24 10.244.2.0/24", "10.244.1.0/24 10.244.2.0/24"}, // neighbours, of no common range
		{"10.0.0.0/24 10.0.1.0/24 10.0.2.0/24 10.0.3.0/24", "10.0.0.0/22"},
		{"10.0.0.7/8 10.1.2.0/24 10.0.0.1/32", "10.0.0.0/8"},
		{"10.0.0.1/32 10.0.0.1/32", "10.0.0.1/32"},
		{"fd00::/64 10.0.0.0/24 fd00:0:0:1::/64", "10.0.0.0/24 fd00::/63"},
		{"0.0.0.0/1 128.0.0.0/1", "0.0.0.0/0"},
	} {
		var got []string
		for _, p := range Merged(prefixes(strings.Fields(tc.in)...)) {
			got = append(got, p.String())
		}
		if !slices.Equal(got, strings.Fields(tc.want)) {
			t.Errorf("%q: %v, want %s", tc.in, got, tc.want)
		}
	}
}

// Whatever is left out of a range must lie in it, or the API server refuses the policy.
func TestEgress(t *testing.T) {
	around := Surroundings{Cluster: prefixes("10.244.0.0/16", "fd00:244::/48"), Gateways: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:8443")}}
	blocks := func(p *networkingv1.NetworkPolicy) (cidrs, except []string) {
		for _, rule := range p.Spec.Egress {
			for _, to := range rule.To {
				if to.IPBlock != nil {
					cidrs = append(cidrs, to.IPBlock.CIDR)
					for _, e := range to.IPBlock.Except {
						if !netip.MustParsePrefix(to.IPBlock.CIDR).Overlaps(netip.MustParsePrefix(e)) {
							t.Errorf("%s is no part of %s", e, to.IPBlock.CIDR)
						}
					}
					except = append(except, to.IPBlock.Except...)
				}
			}
		}
		return cidrs, except
	}
	has := func(all []string, what string) bool { return slices.Contains(all, what) }

	pool := &rdv.HostPool{}
	cidrs, except := blocks(PoolNetworkPolicy(pool, around))
	if !has(cidrs, "0.0.0.0/0") || !has(cidrs, "::/0") || !has(cidrs, "192.0.2.7/32") {
		t.Errorf("a desktop reaches %v", cidrs)
	}
	for _, closed := range []string{"10.244.0.0/16", "fd00:244::/48", "169.254.0.0/16", "fd00:ec2::/32"} {
		if !has(except, closed) {
			t.Errorf("%s is open to a desktop, closed are %v", closed, except)
		}
	}
	pool.Spec.Network.Egress = &rdv.Egress{Deny: []rdv.Network{"10.0.0.0/8"}}
	if _, except = blocks(PoolNetworkPolicy(pool, around)); !has(except, "10.0.0.0/8") || has(except, "10.244.0.0/16") {
		t.Errorf("with 10.0.0.0/8 denied, closed are %v", except)
	}
	rule := networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "203.0.113.0/24"}}}}
	pool.Spec.Network.Egress = &rdv.Egress{Base: rdv.EgressNeeded, Allow: []networkingv1.NetworkPolicyEgressRule{rule}}
	if cidrs, _ = blocks(PoolNetworkPolicy(pool, around)); !slices.Equal(cidrs, []string{"192.0.2.7/32", "203.0.113.0/24"}) {
		t.Errorf("with what is needed and one range, a desktop reaches %v", cidrs)
	}
	pool.Spec.Network = rdv.NetworkAccess{Mode: rdv.NetworkUnmanaged}
	if PoolNetworkPolicy(pool, around) != nil {
		t.Error("an unmanaged pool has a policy")
	}

	if cidrs, _ = blocks(GatewayNetworkPolicy(&rdv.Gateway{}, around)); !slices.Equal(cidrs, []string{"192.0.2.7/32"}) {
		t.Errorf("a relay reaches %v", cidrs)
	}
	if _, except = blocks(Options{}.BrokerNetworkPolicy(&rdv.Workspace{}, around)); !has(except, "169.254.0.0/16") || has(except, "10.244.0.0/16") {
		t.Errorf("closed to brokers are %v", except)
	}
}
