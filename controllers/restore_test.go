package controllers

import (
	"errors"
	"fmt"
	"testing"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

// children are all objects in a namespace that have the operator's label.
func (w *world) children(t *testing.T, ns string) (all []client.Object) {
	t.Helper()
	for _, list := range []client.ObjectList{
		&rdv.SessionHostList{}, &corev1.PodList{}, &appsv1.DeploymentList{}, &corev1.ServiceList{}, &corev1.ConfigMapList{}, &corev1.SecretList{},
		&corev1.ServiceAccountList{}, &rbacv1.RoleList{}, &rbacv1.RoleBindingList{}, &policyv1.PodDisruptionBudgetList{},
		&networkingv1.NetworkPolicyList{}, &certmanager.CertificateList{}, &certmanager.IssuerList{},
	} {
		if err := w.List(t.Context(), list, client.InNamespace(ns), client.MatchingLabels{rdv.LabelManagedBy: rdv.ManagedBy}); err != nil {
			t.Fatal(err)
		}
		if err := meta.EachListItem(list, func(o runtime.Object) error {
			all = append(all, o.(client.Object))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// A namespace is deleted and restored from a backup: the objects are new ones, without status. Garbage collection is not
// here, so the test has both worlds one after the other: children of the objects that had these names before, which are
// about to go, and children whose owner references a backup tool has taken off.
func TestRestoredNamespace(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.issue(t, ns, "gw-tls")
	w.issue(t, ns, "gw.demo.identity")
	w.run(t, ns, "gw")
	pool := newPool(ns)
	pool.Spec.Template = template("desktop:1")
	pool.Spec.Accounts = &rdv.Accounts{Policy: rdv.AccountsCreate}
	w.create(t, pool)
	appears(t, w, ns, "linux-0", &corev1.Pod{})
	accounts := appears(t, w, ns, rdv.AccountsConfigMap("linux"), &corev1.ConfigMap{})
	w.patch(t, accounts, ns, accounts.Name, `{"data":{"alice":"1"}}`)
	w.settled(t, ns)
	before := w.children(t, ns)

	renew := func(obj client.Object) client.Object {
		t.Helper()
		read(t, w, ns, obj.GetName(), obj)
		fresh := obj.DeepCopyObject().(client.Object)
		if err := w.Delete(t.Context(), obj); err != nil {
			t.Fatal(err)
		}
		w.vanishes(t, obj.DeepCopyObject().(client.Object), ns, obj.GetName())
		fresh.SetUID("")
		fresh.SetResourceVersion("")
		fresh.SetManagedFields(nil)
		w.create(t, fresh)
		return fresh
	}
	named := func(obj client.Object, name string) client.Object {
		obj.SetName(name)
		return obj
	}
	owners := []client.Object{
		renew(named(&rdv.Workspace{}, "demo")), renew(named(&rdv.Gateway{}, "gw")), renew(named(&rdv.HostPool{}, "linux")),
	}
	t.Run("children of earlier objects are waited for", func(t *testing.T) {
		for _, tc := range []struct {
			obj         client.Object
			name, words string
		}{
			{&rdv.Workspace{}, "demo", `to be deleted, to create them again: Issuer "demo-internal-selfsigned", Certificate "demo-internal-ca", Issuer "demo-internal", `},
			{&rdv.Gateway{}, "gw", `to be deleted, to create them again: Certificate "gw-tls", `},
			{&rdv.HostPool{}, "linux", `Secret "linux-registration", NetworkPolicy "linux-hosts", `},
		} {
			w.is(t, tc.obj, ns, tc.name, rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonPending, tc.words)
			w.is(t, tc.obj, ns, tc.name, rdv.ConditionStalled, metav1.ConditionFalse, rdv.ReasonPending, "")
		}
	})

	// The backup tool's doing: no owner references. The host is a new object, too. A pass that began on an earlier object may
	// still write that one's reference afterwards, which in a cluster garbage collection would follow up: so this is done until
	// all is well.
	owners = append(owners, renew(named(&rdv.SessionHost{}, "linux-0")))
	uids := map[types.UID]bool{}
	for _, owner := range owners {
		uids[owner.GetUID()] = true
	}
	for _, child := range w.children(t, ns) {
		w.patch(t, child, ns, child.GetName(), `{"metadata":{"ownerReferences":null}}`)
	}
	for _, owner := range owners {
		w.poke(t, owner.DeepCopyObject().(client.Object), ns, owner.GetName())
	}
	w.issue(t, ns, "gw.demo.identity") // which went with the Workspace
	earlier := map[types.UID]bool{}
	for _, child := range before {
		for _, ref := range child.GetOwnerReferences() {
			earlier[ref.UID] = true
		}
	}
	eventually(t, func() error {
		for _, child := range w.children(t, ns) {
			if ref := metav1.GetControllerOf(child); ref != nil && earlier[ref.UID] {
				w.patch(t, child, ns, child.GetName(), `{"metadata":{"ownerReferences":null}}`)
			}
		}
		return errors.Join(
			w.isNow(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, ""),
			w.isNow(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, ""),
			w.isNow(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, ""),
			w.isNow(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, ""),
		)
	})

	eventually(t, func() error {
		for _, child := range before {
			if err := w.Get(t.Context(), client.ObjectKeyFromObject(child), child); err != nil {
				return err
			}
			if refs := child.GetOwnerReferences(); len(refs) == 0 || !uids[refs[0].UID] {
				return fmt.Errorf("%T %s belongs to %+v", child, child.GetName(), refs)
			}
		}
		return nil
	})
	if got := read(t, w, ns, accounts.Name, &corev1.ConfigMap{}).Data["alice"]; got != "1" {
		t.Error("the pool's accounts are lost")
	}
	eventually(t, func() error { // and the pool, which may have made another meanwhile, comes back to the one
		hosts := &rdv.SessionHostList{}
		if err := w.List(t.Context(), hosts, client.InNamespace(ns)); err != nil || len(hosts.Items) != 1 || hosts.Items[0].Name != "linux-0" {
			return fmt.Errorf("%d hosts after the restore, %v", len(hosts.Items), err)
		}
		return nil
	})
}

func TestAdoptable(t *testing.T) {
	ws := &rdv.Workspace{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "desk"}}
	pool := &rdv.HostPool{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "linux"}}
	host := &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "linux"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}}
	service := func(change func(*corev1.Service)) client.Object {
		s := render.BrokerService(ws)
		change(s)
		return s
	}
	for name, tc := range map[string]struct {
		live, want client.Object
		yes        bool
	}{
		"as the operator made it":   {service(func(*corev1.Service) {}), render.BrokerService(ws), true},
		"with more labels":          {service(func(s *corev1.Service) { s.Labels["velero.io/restore-name"] = "x" }), render.BrokerService(ws), true},
		"without our label":         {service(func(s *corev1.Service) { delete(s.Labels, rdv.LabelManagedBy) }), render.BrokerService(ws), false},
		"of another workspace":      {service(func(s *corev1.Service) { s.Labels[rdv.LabelWorkspace] = "other" }), render.BrokerService(ws), false},
		"of another component":      {service(func(s *corev1.Service) { s.Labels[rdv.LabelComponent] = "gateway" }), render.BrokerService(ws), false},
		"owned by somebody":         {service(func(s *corev1.Service) { s.OwnerReferences = []metav1.OwnerReference{{Kind: "App", UID: "u"}} }), render.BrokerService(ws), false},
		"on its way out":            {service(func(s *corev1.Service) { s.DeletionTimestamp = new(metav1.Now()) }), render.BrokerService(ws), false},
		"a host's, for its pool":    {render.HostRegistrationSecret(host, render.Registration{}), render.PoolRegistrationSecret(pool, render.Registration{}), false},
		"a pool's, for its host":    {render.PoolRegistrationSecret(pool, render.Registration{}), render.HostRegistrationSecret(host, render.Registration{}), false},
		"a pool's, for it":          {render.PoolRegistrationSecret(pool, render.Registration{}), render.PoolRegistrationSecret(pool, render.Registration{}), true},
		"what is wanted has no one": {service(func(*corev1.Service) {}), &corev1.Service{}, false},
	} {
		if got := adoptable(tc.live, tc.want); got != tc.yes {
			t.Errorf("%s: %v", name, got)
		}
	}
}
