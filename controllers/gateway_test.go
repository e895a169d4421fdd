package controllers

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/config"
)

// readyGateway makes a Workspace and a Gateway that serves it.
func readyGateway(t *testing.T, w *world, ns string) *rdv.Gateway {
	t.Helper()
	readyWorkspace(t, w, ns)
	w.issue(t, ns, "gw-tls")
	w.issue(t, ns, "gw.demo.identity")
	w.run(t, ns, "gw")
	gw := &rdv.Gateway{}
	w.is(t, gw, ns, "gw", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "gw.example.test")
	return gw
}

func TestGatewayFromNothingToReady(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	w.create(t, newGateway(ns, ns))
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonPending, "no Workspace in this namespace picks the gateway")
	w.create(t, newWorkspace(ns, ns))
	w.issue(t, ns, "gw-tls")
	w.issue(t, ns, "gw.demo.identity")
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionCertificatesReady, metav1.ConditionFalse, rdv.ReasonCertificatePend, `waits for the ticket signer of Workspace "demo"`)
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "gw"}, &appsv1.Deployment{}); !apierrors.IsNotFound(err) {
		t.Errorf("pods before there is a Workspace to serve: %v", err)
	}
	w.issueAll(t, ns, "demo")
	w.run(t, ns, "gw")
	gw := &rdv.Gateway{}
	w.is(t, gw, ns, "gw", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "gw.example.test")
	if gw.Status.CABundle != "CA of "+ns || gw.Status.Pods != "1/1" || gw.Status.Address == "" || gw.Status.CertificateExpires == nil || !slices.Equal(gw.Status.Workspaces, []string{"demo"}) {
		t.Errorf("status is %+v", gw.Status)
	}
	for name, child := range map[string]client.Object{
		"gw": &appsv1.Deployment{}, "gw-relays": &corev1.Service{}, "gw-relay": &corev1.ConfigMap{}, "gw-gateway": &corev1.ConfigMap{},
		"gw-tls": &certmanager.Certificate{}, "gw.demo.identity": &certmanager.Certificate{},
	} {
		controlled(t, w, ns, name, child, gw)
	}
}

// TestGatewayServesOneThoughAnotherFails shows that a Workspace whose certificates are not to be had holds up no other,
// and that a Workspace once served is not dropped for a Secret that is missing for a moment.
func TestGatewayServesOneThoughAnotherFails(t *testing.T) {
	w, ns := start(t)
	readyGateway(t, w, ns)
	broken := newWorkspace(ns, ns)
	broken.Name = "broken"
	w.create(t, broken)
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionCertificatesReady, metav1.ConditionFalse, rdv.ReasonCertificatePend, `"gw.broken.identity"`)
	served := func(want ...string) {
		t.Helper()
		eventually(t, func() error {
			var file config.Gateway
			if err := json.Unmarshal([]byte(read(t, w, ns, "gw-gateway", &corev1.ConfigMap{}).Data["config.json"]), &file); err != nil {
				return err
			}
			var got []string
			for _, ws := range file.Workspaces {
				got = append(got, ws.Name)
			}
			if !slices.Equal(got, want) {
				return fmt.Errorf("serves %v, want %v", got, want)
			}
			return nil
		})
	}
	served("demo")
	generation := read(t, w, ns, "gw", &appsv1.Deployment{}).Generation
	if err := w.Delete(t.Context(), read(t, w, ns, "gw.demo.identity", &corev1.Secret{})); err != nil {
		t.Fatal(err)
	}
	w.settled(t, ns)
	served("demo")
	if got := read(t, w, ns, "gw", &appsv1.Deployment{}).Generation; got != generation {
		t.Error("a Secret that is missing for a moment restarts the gateway")
	}
	w.issue(t, ns, "gw.demo.identity")
	w.issue(t, ns, "gw.broken.identity")
	w.issueAll(t, ns, "broken")
	served("broken", "demo")

	// Unpicked, its identity goes.
	w.patch(t, &rdv.Workspace{}, ns, "broken", `{"spec":{"gatewaySelector":{"matchLabels":{"for":"others"}}}}`)
	served("demo")
	w.vanishes(t, &certmanager.Certificate{}, ns, "gw.broken.identity")
	w.vanishes(t, &corev1.Secret{}, ns, "gw.broken.identity")
}

func TestGatewayEdits(t *testing.T) {
	w, ns := start(t)
	readyGateway(t, w, ns)
	before := w.settled(t, ns)
	for _, step := range []struct {
		name, patch string
		want        []string
	}{
		{"relay's limits", `{"spec":{"relay":{"limits":{"maxPending":7}}}}`, []string{"*v1.ConfigMap/gw-relay"}},
		{"relay's image", `{"spec":{"relay":{"image":"relay:other"}}}`, []string{"*v1.Deployment/gw"}},
		{"service", `{"spec":{"service":{"type":"NodePort"}}}`, []string{"*v1.Service/gw", "*v1.ConfigMap/gw-relay"}},
		{"region", `{"spec":{"region":"there"}}`, []string{"*v1.ConfigMap/gw-gateway"}},
	} {
		w.patch(t, &rdv.Gateway{}, ns, "gw", step.patch)
		before = w.onlyChanges(t, step.name, ns, before, "*v1alpha1.Gateway/gw", step.want...)
	}
}

func TestGatewayAutoscaling(t *testing.T) {
	w, ns := start(t)
	gw := readyGateway(t, w, ns)
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"replicas":3}}`)
	w.settled(t, ns)
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"replicas":null,"autoscaling":{"maxReplicas":4}}}`)
	controlled(t, w, ns, "gw", appears(t, w, ns, "gw", &autoscalingv2.HorizontalPodAutoscaler{}), gw)
	w.settled(t, ns)
	if n := *read(t, w, ns, "gw", &appsv1.Deployment{}).Spec.Replicas; n != 3 {
		t.Errorf("the autoscaler begins with %d pods, not with the 3 that there were", n)
	}
	// Now the autoscaler's number counts.
	w.patch(t, &appsv1.Deployment{}, ns, "gw", `{"spec":{"replicas":4}}`)
	w.poke(t, &rdv.Gateway{}, ns, "gw")
	w.settled(t, ns)
	if n := *read(t, w, ns, "gw", &appsv1.Deployment{}).Spec.Replicas; n != 4 {
		t.Errorf("the operator set the autoscaler's 4 replicas to %d", n)
	}
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"autoscaling":null,"replicas":2}}`)
	w.vanishes(t, &autoscalingv2.HorizontalPodAutoscaler{}, ns, "gw")
	eventually(t, func() error {
		if n := *read(t, w, ns, "gw", &appsv1.Deployment{}).Spec.Replicas; n != 2 {
			return fmt.Errorf("%d replicas", n)
		}
		return nil
	})
}

// TestGatewayLeavesSessionsToBrokers shows that the two writers of a Gateway's status don't undo each other.
func TestGatewayLeavesSessionsToBrokers(t *testing.T) {
	w, ns := start(t)
	readyGateway(t, w, ns)
	w.patchStatus(t, &rdv.Gateway{}, ns, "gw", `{"status":{"sessions":5}}`)
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"certificates":{"issuerRef":{"name":"missing"}}}}`)
	gw := &rdv.Gateway{}
	w.is(t, gw, ns, "gw", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonIssuerNotFound, `spec.certificates.issuerRef: ClusterIssuer "missing" not found`)
	if gw.Status.Sessions != 5 {
		t.Errorf("sessions became %d", gw.Status.Sessions)
	}
}

// TestGatewayService takes a real API server through what people write of a Service, and take back.
func TestGatewayService(t *testing.T) {
	w, ns := start(t)
	readyGateway(t, w, ns)
	becomes := func(step string, ok func(s corev1.ServiceSpec, relay config.Relay) bool) {
		t.Helper()
		eventually(t, func() error {
			s := read(t, w, ns, "gw", &corev1.Service{}).Spec
			var relay config.Relay
			if err := json.Unmarshal([]byte(read(t, w, ns, "gw-relay", &corev1.ConfigMap{}).Data["config.json"]), &relay); err != nil {
				return err
			}
			if !ok(s, relay) {
				return fmt.Errorf("%s: %+v, %+v", step, s, relay.Callers)
			}
			return nil
		})
	}
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"service":{"type":"LoadBalancer","externalTrafficPolicy":"Local","loadBalancerSourceRanges":["203.0.113.0/24"],
		"ipFamilyPolicy":"PreferDualStack","ipFamilies":["IPv4"],"proxyProtocol":{"networks":["10.0.0.0/8"]}}}}`)
	becomes("a load balancer", func(s corev1.ServiceSpec, relay config.Relay) bool {
		return s.Type == corev1.ServiceTypeLoadBalancer && s.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && slices.Equal(s.LoadBalancerSourceRanges, []string{"203.0.113.0/24"}) &&
			*s.IPFamilyPolicy == corev1.IPFamilyPolicyPreferDualStack && slices.Equal(relay.ProxyNetworks, []string{"10.0.0.0/8"}) && !relay.AddressesHidden
	})
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"service":{"externalTrafficPolicy":null,"loadBalancerSourceRanges":null,"proxyProtocol":null}}}`)
	becomes("taken back", func(s corev1.ServiceSpec, relay config.Relay) bool {
		return s.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyCluster && s.LoadBalancerSourceRanges == nil && relay.ProxyNetworks == nil && relay.AddressesHidden
	})
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"service":{"nodePorts":[{"name":"https","nodePort":443}]}}}`)
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonRejected, "The range of valid ports is 30000-32767")
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"service":{"nodePorts":[{"name":"https","nodePort":31443}],"allocateLoadBalancerNodePorts":false}}}`)
	becomes("a node port", func(s corev1.ServiceSpec, _ config.Relay) bool {
		return s.Ports[0].NodePort == 31443 && !*s.AllocateLoadBalancerNodePorts
	})
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"service":null}}`)
	becomes("inside the cluster again", func(s corev1.ServiceSpec, relay config.Relay) bool {
		return s.Type == corev1.ServiceTypeClusterIP && s.Ports[0].NodePort == 0 && s.AllocateLoadBalancerNodePorts == nil && !relay.AddressesHidden
	})
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
}
