package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/stage"
)

// opNamespace is where the operator is put to the test, away from the desktops.
const opNamespace = "rendezvous-e2e"

// says waits until the condition of obj has the status and its message names each of words.
func says(t *testing.T, obj client.Object, condition string, status metav1.ConditionStatus, words ...string) {
	t.Helper()
	err := eventually(t.Context(), 90*time.Second, func() error {
		if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(obj), obj); err != nil {
			return err
		}
		c := apimeta.FindStatusCondition(conditions(obj), condition)
		if c == nil || c.Status != status || c.ObservedGeneration != obj.GetGeneration() {
			return fmt.Errorf("%T %s: %s is %+v, want %s", obj, obj.GetName(), condition, c, status)
		}
		for _, word := range words {
			if !strings.Contains(c.Message, word) {
				return fmt.Errorf("%T %s: %s says %q, which does not name %q", obj, obj.GetName(), condition, c.Message, word)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func conditions(obj client.Object) []metav1.Condition {
	switch o := obj.(type) {
	case *rdv.Workspace:
		return o.Status.Conditions
	case *rdv.HostPool:
		return o.Status.Conditions
	case *rdv.SessionHost:
		return o.Status.Conditions
	case *rdv.Gateway:
		return o.Status.Conditions
	}
	return nil
}

// edit changes an object, trying again where somebody else was faster.
func edit[T client.Object](t *testing.T, obj T, change func(T)) {
	t.Helper()
	if err := eventually(t.Context(), 10*time.Second, func() error {
		if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(obj), obj); err != nil {
			return err
		}
		change(obj)
		return w.Client.Update(t.Context(), obj)
	}); err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, obj client.Object) {
	t.Helper()
	if err := w.Client.Create(t.Context(), obj); err != nil {
		t.Fatal(err)
	}
}

// The life of a Workspace, a HostPool and a Gateway whose author gets everything wrong first.
func TestOperator(t *testing.T) {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: opNamespace}}
	if err := w.Client.Delete(t.Context(), ns); client.IgnoreNotFound(err) != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), time.Minute, func() error {
		return w.Client.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: opNamespace}})
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Client.Delete(context.WithoutCancel(t.Context()), ns) })
	named := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: opNamespace, Name: name} }
	issuer := rdv.IssuerReference{Name: "rdv-demo-ca", Kind: "ClusterIssuer"}
	one := int32(1)

	// A HostPool before its Workspace.
	pool := &rdv.HostPool{ObjectMeta: named("hp"), Spec: rdv.HostPoolSpec{WorkspaceRef: rdv.LocalReference{Name: "ws"}, Type: rdv.Pooled}}
	create(t, pool)
	says(t, pool, rdv.ConditionReady, metav1.ConditionFalse, "spec.workspaceRef", "ws")

	// A Workspace with an issuer that is not there, a provider that does not answer, and a resource without a pool.
	ws := &rdv.Workspace{ObjectMeta: named("ws"), Spec: rdv.WorkspaceSpec{
		Hostname:     "ws.rdv.test",
		Identity:     rdv.Identity{OIDC: rdv.OIDC{IssuerURL: "https://nobody.rdv.test", ClientID: "rdv"}},
		Signing:      rdv.Signing{IssuerRef: rdv.IssuerReference{Name: "nowhere", Kind: "ClusterIssuer"}},
		Certificates: rdv.WorkspaceCertificates{IssuerRef: issuer},
		Resources:    []rdv.Resource{{Name: "desk", Type: rdv.ResourceDesktop, HostPoolRef: rdv.LocalReference{Name: "wrong"}}},
		Broker:       rdv.Broker{Replicas: &one},
	}}
	create(t, ws)
	says(t, ws, rdv.ConditionReady, metav1.ConditionFalse)
	says(t, ws, rdv.ConditionIdentityReady, metav1.ConditionFalse, "spec.identity.oidc.issuerURL", "nobody.rdv.test")
	says(t, ws, rdv.ConditionReferencesResolved, metav1.ConditionFalse, "wrong")
	edit(t, ws, func(ws *rdv.Workspace) { ws.Spec.Resources[0].HostPoolRef.Name = "hp" })
	says(t, ws, rdv.ConditionReferencesResolved, metav1.ConditionFalse, "spec.signing.issuerRef", "nowhere")
	edit(t, ws, func(ws *rdv.Workspace) {
		ws.Spec.Signing.IssuerRef = issuer
		ws.Spec.Identity.OIDC.IssuerURL = stage.Issuer
		ws.Spec.Identity.OIDC.CABundle = string(w.CompanyCA)
	})
	says(t, ws, rdv.ConditionCertificatesReady, metav1.ConditionTrue)
	says(t, ws, rdv.ConditionReady, metav1.ConditionFalse, "spec.gatewaySelector")
	says(t, pool, rdv.ConditionReferencesResolved, metav1.ConditionTrue)

	// A Gateway whose Service's name somebody else holds.
	squatter := &corev1.Service{ObjectMeta: named("gw"), Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
	create(t, squatter)
	gw := &rdv.Gateway{ObjectMeta: named("gw"), Spec: rdv.GatewaySpec{Hostname: "gw.rdv.test", Certificates: rdv.GatewayCertificates{IssuerRef: issuer}}}
	create(t, gw)
	says(t, gw, rdv.ConditionReady, metav1.ConditionFalse, "Service", "gw")
	if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(squatter), squatter); err != nil || squatter.Spec.Ports[0].Port != 80 {
		t.Errorf("the operator touched a Service that is not its own: %v %+v", err, squatter.Spec.Ports)
	}
	if err := w.Client.Delete(t.Context(), squatter); err != nil {
		t.Fatal(err)
	}
	says(t, gw, rdv.ConditionReady, metav1.ConditionTrue)
	says(t, ws, rdv.ConditionReady, metav1.ConditionTrue)

	t.Run("an edit changes what depends on it", func(t *testing.T) {
		before := generations(t)
		edit(t, gw, func(gw *rdv.Gateway) { idle := int32(3600); gw.Spec.Relay.IdleTimeoutSeconds = &idle })
		says(t, gw, rdv.ConditionReady, metav1.ConditionTrue)
		time.Sleep(2 * time.Second)
		for name, g := range generations(t) {
			if before[name] != g {
				t.Errorf("an idle timeout rolled the pods of Deployment %s", name)
			}
		}
		if err := eventually(t.Context(), 20*time.Second, func() error {
			out, err := w.Kubectl(t.Context(), "", "-n", opNamespace, "get", "configmaps", "-o", "yaml")
			if err != nil || !strings.Contains(out, `"idleTimeoutSeconds": 3600`) {
				return fmt.Errorf("no ConfigMap has the new idle timeout: %v", err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})

	t.Run("damage is repaired", func(t *testing.T) {
		if err := w.Client.Delete(t.Context(), &corev1.Service{ObjectMeta: named("gw")}); err != nil {
			t.Fatal(err)
		}
		var d appsv1.Deployment
		key := client.ObjectKey{Namespace: opNamespace, Name: "ws-broker"}
		if err := w.Client.Get(t.Context(), key, &d); err != nil {
			t.Fatal(err)
		}
		three := int32(3)
		d.Spec.Replicas = &three
		if err := w.Client.Update(t.Context(), &d); err != nil {
			t.Fatal(err)
		}
		if err := eventually(t.Context(), 30*time.Second, func() error {
			if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: opNamespace, Name: "gw"}, &corev1.Service{}); err != nil {
				return err
			}
			if err := w.Client.Get(t.Context(), key, &d); err != nil || *d.Spec.Replicas != 1 {
				return fmt.Errorf("Deployment ws-broker has %d replicas: %v", *d.Spec.Replicas, err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})

	t.Run("nothing is written when nothing changes", func(t *testing.T) {
		says(t, ws, rdv.ConditionReady, metav1.ConditionTrue)
		says(t, gw, rdv.ConditionReady, metav1.ConditionTrue)
		time.Sleep(5 * time.Second)
		before := versions(t)
		time.Sleep(15 * time.Second)
		for name, v := range versions(t) {
			if before[name] != "" && before[name] != v {
				t.Errorf("%s was written though nothing changed", name)
			}
		}
	})

	t.Run("deletion leaves nothing", func(t *testing.T) {
		for _, obj := range []client.Object{gw, pool, ws} {
			if err := w.Client.Delete(t.Context(), obj); err != nil {
				t.Fatal(err)
			}
		}
		if err := eventually(t.Context(), 2*time.Minute, func() error {
			out, err := w.Kubectl(t.Context(), "", "-n", opNamespace, "get",
				"deployments,services,configmaps,serviceaccounts,roles,rolebindings,poddisruptionbudgets,networkpolicies,certificates,issuers,secrets,pods,sessionhosts", "-o", "name")
			if err != nil {
				return err
			}
			for name := range strings.Lines(out) {
				switch name = strings.TrimSpace(name); name {
				case "configmap/kube-root-ca.crt", "serviceaccount/default":
				default:
					return fmt.Errorf("%s is still there", name)
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(ws), ws); !apierrors.IsNotFound(err) {
			t.Errorf("the Workspace: %v", err)
		}
	})
}

// generations are those of the namespace's Deployments.
func generations(t *testing.T) map[string]int64 {
	t.Helper()
	var list appsv1.DeploymentList
	if err := w.Client.List(t.Context(), &list, client.InNamespace(opNamespace)); err != nil {
		t.Fatal(err)
	}
	out := map[string]int64{}
	for _, d := range list.Items {
		out[d.Name] = d.Generation
	}
	return out
}

// versions are the resource versions of what the operator makes and keeps.
func versions(t *testing.T) map[string]string {
	t.Helper()
	out, err := w.Kubectl(t.Context(), "", "-n", opNamespace, "get", "rdv,services,configmaps,roles,certificates,networkpolicies,poddisruptionbudgets", "-o",
		`jsonpath={range .items[*]}{.kind}/{.metadata.name}={.metadata.resourceVersion}{"\n"}{end}`)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for line := range strings.Lines(out) {
		name, version, _ := strings.Cut(strings.TrimSpace(line), "=")
		all[name] = version
	}
	return all
}
