package controllers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

func TestClusterNetworksAreRead(t *testing.T) {
	w, _ := start(t)
	for i := range 3 {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("networks-%d", i)}}
		node.Spec.PodCIDR = fmt.Sprintf("10.244.%d.0/24", i)
		node.Spec.PodCIDRs = []string{node.Spec.PodCIDR}
		w.create(t, node)
		t.Cleanup(func() { _ = w.Delete(context.Background(), node) })
		w.patchStatus(t, &corev1.Node{}, "", node.Name, fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.%d"},{"type":"Hostname","address":"n"}]}}`, i+1))
	}
	now := time.Now()
	n := &networks{live: w, given: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}, now: func() time.Time { return now }}
	got, err := n.get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"10.244.0.0/23", "10.244.2.0/24", "192.0.2.1/32", "192.0.2.2/31", "198.51.100.0/24", "10.0.0.0/24"} {
		if !slices.Contains(got, netip.MustParsePrefix(want)) { // the last: envtest's Services
			t.Errorf("%s is not among the cluster's networks %v", want, got)
		}
	}

	// A node that comes is seen, but the API server is not asked by every pass; nor does its silence open anything.
	late := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "networks-late"}, Spec: corev1.NodeSpec{PodCIDR: "10.250.0.0/24", PodCIDRs: []string{"10.250.0.0/24"}}}
	w.create(t, late)
	t.Cleanup(func() { _ = w.Delete(context.Background(), late) })
	sees := func(want bool) {
		t.Helper()
		got, err := n.get(t.Context())
		if has := slices.Contains(got, netip.MustParsePrefix("10.250.0.0/24")); err != nil || has != want {
			t.Errorf("the late node's addresses are known: %v (%v), want %v", has, err, want)
		}
	}
	sees(false)
	now = now.Add(networksEvery)
	sees(true)
	n.live, now = silent{}, now.Add(networksEvery)
	sees(true)
	fresh := &networks{live: silent{}, now: n.now}
	if got, err := fresh.get(t.Context()); err == nil {
		t.Errorf("nothing could be read, and %v is all the cluster's networks", got)
	}
}

// silent is an API server that doesn't answer.
type silent struct{ client.Reader }

func (silent) List(context.Context, client.ObjectList, ...client.ListOption) error {
	return errors.New("no answer")
}

func TestManyNetworksBecomeFewer(t *testing.T) {
	var many []netip.Prefix
	for i := range 900 { // one node in three is away
		many = append(many, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i / 100), byte(i % 100 * 2), 0}), 24))
	}
	few := atMost(render.Merged(many), maxNetworks)
	if len(few) > maxNetworks {
		t.Fatalf("%d ranges", len(few))
	}
	for _, p := range many {
		if !slices.ContainsFunc(few, func(q netip.Prefix) bool { return q.Overlaps(p) && q.Bits() <= p.Bits() }) {
			t.Errorf("%s is in none of %v", p, few)
		}
	}
	for _, q := range few { // and they say nothing of the rest of the world
		if q.Bits() < 16 {
			t.Errorf("%s is far wider than what was given", q)
		}
	}
}

func TestNetworkPolicies(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.create(t, newPool(ns))
	policy := func(name string) *networkingv1.NetworkPolicy {
		return appears(t, w, ns, name, &networkingv1.NetworkPolicy{})
	}
	hosts, brokers := render.PoolNetworkPolicyName("linux"), render.WorkspaceBroker("demo")
	w.issue(t, ns, "gw-tls")
	w.issue(t, ns, "gw.demo.identity")
	w.run(t, ns, "gw")
	eventually(t, func() error { // where the gateway is reached, be it a load balancer
		at := read(t, w, ns, "gw", &rdv.Gateway{}).Status.Address
		for _, rule := range policy(hosts).Spec.Egress {
			if len(rule.To) == 1 && rule.To[0].IPBlock != nil && at != "" && rule.To[0].IPBlock.CIDR == at+"/32" {
				return nil
			}
		}
		return fmt.Errorf("the gateway's address %q is in no rule", at)
	})
	rules := len(policy(hosts).Spec.Egress)
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"network":{"egress":{"base":"Needed","allow":[{"to":[{"ipBlock":{"cidr":"203.0.113.0/24"}}]}]}}}}`)
	eventually(t, func() error {
		p := policy(hosts)
		if last := p.Spec.Egress[len(p.Spec.Egress)-1]; len(p.Spec.Egress) != rules || last.To[0].IPBlock == nil || last.To[0].IPBlock.CIDR != "203.0.113.0/24" {
			return fmt.Errorf("a pool with base Needed and one rule: %+v", p.Spec.Egress)
		}
		return nil
	})
	w.patch(t, &rdv.Workspace{}, ns, "demo", `{"spec":{"broker":{"network":{"metricsFrom":[{"podSelector":{"matchLabels":{"app":"prometheus"}}}]}}}}`)
	eventually(t, func() error {
		for _, rule := range policy(brokers).Spec.Ingress {
			if len(rule.From) == 1 && rule.From[0].PodSelector != nil && rule.From[0].PodSelector.MatchLabels["app"] == "prometheus" {
				return nil
			}
		}
		return fmt.Errorf("metricsFrom of the Workspace doesn't show in its NetworkPolicy")
	})

	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"network":{"mode":"Unmanaged","egress":null}}}`)
	w.vanishes(t, &networkingv1.NetworkPolicy{}, ns, hosts)
	mine := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: hosts}}
	w.create(t, mine)
	w.poke(t, &rdv.HostPool{}, ns, "linux")
	w.settled(t, ns)
	read(t, w, ns, hosts, &networkingv1.NetworkPolicy{}) // a policy of one's own, even of that name, stays
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"network":null}}`)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonConflict, "NetworkPolicy \""+hosts+"\"")

	for patch, words := range map[string]string{ // what the API server refuses
		`{"spec":{"network":{"egress":{"deny":["10.0.0.1/8"]}}}}`:              "with no bit set beyond BITS",
		`{"spec":{"network":{"egress":{"deny":["office"]}}}}`:                  "write the network as ADDRESS/BITS",
		`{"spec":{"network":{"mode":"Unmanaged","egress":{"base":"Needed"}}}}`: "egress needs mode Managed",
	} {
		pool := &rdv.HostPool{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "linux"}}
		err := w.Patch(t.Context(), pool, client.RawPatch(types.MergePatchType, []byte(patch)))
		if err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", patch, err, words)
		}
	}
}
