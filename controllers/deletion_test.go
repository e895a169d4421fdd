package controllers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// report takes the broker's part: what a host's agent says, as of now, of a drain of this very object.
func (w *world) report(t *testing.T, ns, host string, connected bool, sessions int, drains bool) {
	t.Helper()
	generation := read(t, w, ns, host, &rdv.SessionHost{}).Generation
	w.patchStatus(t, &rdv.SessionHost{}, ns, host, fmt.Sprintf(
		`{"status":{"agent":{"connected":%t,"rdpReady":%t,"sessions":%d,"drainAcknowledged":%t,"acknowledgedGeneration":%d,"lastHeartbeat":%q}}}`,
		connected, connected, sessions, drains, generation, w.clock.now().UTC().Format(time.RFC3339)))
}

// deletes asks for an object's deletion.
func (w *world) deletes(t *testing.T, obj client.Object, ns, name string) {
	t.Helper()
	if err := w.Delete(t.Context(), read(t, w, ns, name, obj)); err != nil {
		t.Fatal(err)
	}
}

// stays is an error where an object is gone.
func (w *world) stays(t *testing.T, obj client.Object, ns, name string) {
	t.Helper()
	w.settled(t, ns)
	read(t, w, ns, name, obj)
}

func machineIn(ns, name string) *rdv.SessionHost {
	return &rdv.SessionHost{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name},
		Spec:       rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}},
	}
}

func TestDeletedHostDrains(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pod := poolWithPod(t, w, ns)
	host := read(t, w, ns, "linux-0", &rdv.SessionHost{})
	if !slices.Contains(host.Finalizers, rdv.Finalizer) {
		t.Fatal("a pod is there before the finalizer")
	}
	if !slices.ContainsFunc(pod.OwnerReferences, func(r metav1.OwnerReference) bool { return r.Kind == "Namespace" }) {
		t.Error("a deletion in the foreground would take the pod from under its sessions")
	}
	w.report(t, ns, "linux-0", true, 2, false)
	w.deletes(t, &rdv.SessionHost{}, ns, "linux-0")
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "waits for 2 sessions to end, until ")
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonTerminating, "not to wait: kubectl annotate sessionhost linux-0 rendezvous.dev/skip-drain=true")
	w.event(t, ns, "linux-0", eventDraining, "2 sessions")
	w.stays(t, &rdv.SessionHost{}, ns, "linux-0")
	if !read(t, w, ns, "linux-0", &corev1.Pod{}).DeletionTimestamp.IsZero() {
		t.Fatal("the pod was removed from under its sessions")
	}
	appears(t, w, ns, "linux-1", &rdv.SessionHost{}) // the pool has its number meanwhile
	w.report(t, ns, "linux-0", true, 0, true)
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-0")
	w.vanishes(t, &corev1.Pod{}, ns, "linux-0") // at once, for no node has it
}

func TestDeletedHostDoesNotWaitForEver(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.DrainDeadlineSeconds = new(int32(3600))
	w.create(t, pool)
	for _, tc := range []struct {
		name string
		then func(t *testing.T, host string)
	}{
		{"it is told not to", func(t *testing.T, host string) {
			w.patch(t, &rdv.SessionHost{}, ns, host, `{"metadata":{"annotations":{"rendezvous.dev/skip-drain":"true"}}}`)
			w.event(t, ns, host, eventDrainSkipped, "deleted with 1 session")
		}},
		{"no broker says any more that somebody is there", func(*testing.T, string) {
			w.clock.advance(heartbeatLost + time.Minute)
		}},
		{"the deadline passes", func(t *testing.T, host string) {
			w.clock.advance(61 * time.Minute)
			w.report(t, ns, host, true, 1, true)
			w.event(t, ns, host, eventDrainDeadline, "deadline of 1h0m0s has passed")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			host := "pc-" + strings.ReplaceAll(tc.name[:4], " ", "")
			w.create(t, machineIn(ns, host))
			w.is(t, &rdv.SessionHost{}, ns, host, rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
			w.report(t, ns, host, true, 1, false)
			w.deletes(t, &rdv.SessionHost{}, ns, host)
			w.is(t, &rdv.SessionHost{}, ns, host, rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 session")
			w.stays(t, &rdv.SessionHost{}, ns, host)
			tc.then(t, host)
			w.vanishes(t, &rdv.SessionHost{}, ns, host)
		})
	}
}

func TestDeletedPoolDrains(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Template, pool.Spec.Replicas = template("desktop:1"), new(int32(2))
	w.create(t, pool, machineIn(ns, "pc"))
	for _, host := range []string{"linux-0", "linux-1", "pc"} {
		w.is(t, &rdv.SessionHost{}, ns, host, rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
	}
	w.report(t, ns, "linux-1", true, 1, false)
	w.report(t, ns, "pc", true, 2, false)
	w.deletes(t, &rdv.HostPool{}, ns, "linux")
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "waits for 3 sessions on linux-1, pc to end, until ")
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-0")
	w.is(t, &rdv.SessionHost{}, ns, "linux-1", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 session")
	w.stays(t, &rdv.HostPool{}, ns, "linux")
	if !read(t, w, ns, "pc", &rdv.SessionHost{}).DeletionTimestamp.IsZero() {
		t.Error("a machine that somebody declared was deleted with its pool")
	}
	w.report(t, ns, "linux-1", true, 0, true)
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-1")
	w.stays(t, &rdv.HostPool{}, ns, "linux")
	w.report(t, ns, "pc", true, 0, true)
	w.vanishes(t, &rdv.HostPool{}, ns, "linux")
}

// Whichever is deleted first: the workspace stays for its people, and nothing is left in the end.
func TestDeletedInAnyOrder(t *testing.T) {
	kinds := map[string]func() client.Object{
		"ws":   func() client.Object { return &rdv.Workspace{ObjectMeta: metav1.ObjectMeta{Name: "demo"}} },
		"pool": func() client.Object { return &rdv.HostPool{ObjectMeta: metav1.ObjectMeta{Name: "linux"}} },
		"host": func() client.Object { return &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Name: "linux-0"}} },
		"gw":   func() client.Object { return &rdv.Gateway{ObjectMeta: metav1.ObjectMeta{Name: "gw"}} },
	}
	for _, order := range [][]string{
		{"ws", "pool", "host", "gw"}, {"gw", "host", "pool", "ws"}, {"host", "ws", "gw", "pool"}, {"pool", "gw", "ws", "host"},
	} {
		t.Run(strings.Join(order, ","), func(t *testing.T) {
			w, ns := start(t)
			readyWorkspace(t, w, ns)
			w.issue(t, ns, "gw-tls")
			w.issue(t, ns, "gw.demo.identity")
			poolWithPod(t, w, ns)
			d := appears(t, w, ns, "gw", &appsv1.Deployment{})
			gatewayPod := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "gw-1", Labels: d.Spec.Template.Labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "gateway", Image: "x"}}},
			}
			w.create(t, gatewayPod)
			w.report(t, ns, "linux-0", true, 1, false)
			for _, kind := range order {
				obj := kinds[kind]()
				w.deletes(t, obj, ns, obj.GetName())
			}
			w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 session on linux-0")
			w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 session on linux-0")
			w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 session")
			w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 pod with 0 sessions")
			w.vanishes(t, &appsv1.Deployment{}, ns, "gw")
			appears(t, w, ns, "demo-broker", &appsv1.Deployment{})
			if !read(t, w, ns, "linux-0", &corev1.Pod{}).DeletionTimestamp.IsZero() {
				t.Fatal("the pod was removed from under its session")
			}
			// The relay has drained, and the person has gone.
			if err := w.Delete(t.Context(), gatewayPod, client.GracePeriodSeconds(0)); err != nil {
				t.Fatal(err)
			}
			w.report(t, ns, "linux-0", true, 0, true)
			for _, kind := range order {
				obj := kinds[kind]()
				w.vanishes(t, obj, ns, obj.GetName())
			}
		})
	}
}

// A deletion that orphans takes nothing from anybody: what was made stays, and an object of the same name takes it up.
func TestOrphaningDeletionWaitsForNobody(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.issue(t, ns, "gw-tls")
	w.issue(t, ns, "gw.demo.identity")
	pod := poolWithPod(t, w, ns)
	d := appears(t, w, ns, "gw", &appsv1.Deployment{})
	w.create(t, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "gw-1", Labels: d.Spec.Template.Labels},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "gateway", Image: "x"}}},
	})
	w.report(t, ns, "linux-0", true, 1, false)
	for name, obj := range map[string]client.Object{"demo": &rdv.Workspace{}, "gw": &rdv.Gateway{}, "linux": &rdv.HostPool{}} {
		if err := w.Delete(t.Context(), read(t, w, ns, name, obj), client.PropagationPolicy(metav1.DeletePropagationOrphan)); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error { // the garbage collector's finalizer alone is left
			if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, obj); err != nil || !slices.Equal(obj.GetFinalizers(), []string{metav1.FinalizerOrphanDependents}) {
				return fmt.Errorf("%s has finalizers %q, %v", name, obj.GetFinalizers(), err)
			}
			return nil
		})
		w.patch(t, obj, ns, name, `{"metadata":{"finalizers":null}}`)
	}
	w.settled(t, ns)
	if now := read(t, w, ns, "linux-0", &corev1.Pod{}); now.UID != pod.UID || now.DeletionTimestamp != nil {
		t.Error("the host's pod is gone")
	}
	if now := read(t, w, ns, "gw", &appsv1.Deployment{}); now.UID != d.UID || now.DeletionTimestamp != nil {
		t.Error("the gateway's Deployment is gone")
	}
	if now := read(t, w, ns, "linux-0", &rdv.SessionHost{}); now.DeletionTimestamp != nil {
		t.Error("the pool's host is deleted")
	}
}

func TestDeletedNamespaceDoesNotHang(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	poolWithPod(t, w, ns)
	w.report(t, ns, "linux-0", true, 3, false)
	w.create(t, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "gw-1", Labels: map[string]string{
			rdv.LabelGateway: "gw", rdv.LabelComponent: "gateway", rdv.LabelManagedBy: rdv.ManagedBy,
		}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "gateway", Image: "x"}}, TerminationGracePeriodSeconds: new(int64(28800)), NodeName: "n"},
	})
	if err := w.Delete(t.Context(), read(t, w, "", ns, &corev1.Namespace{})); err != nil {
		t.Fatal(err)
	}
	for _, list := range []client.Object{&corev1.Pod{}, &rdv.Workspace{}, &rdv.HostPool{}, &rdv.SessionHost{}, &rdv.Gateway{}} {
		if err := w.DeleteAllOf(t.Context(), list, client.InNamespace(ns)); err != nil { // the namespace controller's part
			t.Fatal(err)
		}
	}
	w.vanishes(t, &rdv.Workspace{}, ns, "demo")
	w.vanishes(t, &rdv.HostPool{}, ns, "linux")
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-0")
	w.vanishes(t, &rdv.Gateway{}, ns, "gw")
	if grace := read(t, w, ns, "gw-1", &corev1.Pod{}).DeletionGracePeriodSeconds; grace == nil || *grace > 60 {
		t.Errorf("the gateway's pod holds the namespace for %v seconds", grace)
	}
}

func TestPoolsAnnotationSkipsItsHosts(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	poolWithPod(t, w, ns)
	w.report(t, ns, "linux-0", true, 1, false)
	w.deletes(t, &rdv.HostPool{}, ns, "linux")
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonTerminating, "1 session")
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"metadata":{"annotations":{"rendezvous.dev/skip-drain":"true"}}}`)
	w.vanishes(t, &rdv.HostPool{}, ns, "linux")
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-0")
}

// A machine in Git that a GitOps tool prunes and makes again, or that somebody replaces, stays its user's.
func TestMachineStaysItsUsers(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Type = rdv.Personal
	w.create(t, pool, machineIn(ns, "pc"))
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.patch(t, &rdv.SessionHost{}, ns, "pc", `{"spec":{"assignedUser":"alice@example.test"}}`)

	replacement := machineIn(ns, "pc")
	eventually(t, func() error { // the operator writes, too
		replacement.ResourceVersion = read(t, w, ns, "pc", &rdv.SessionHost{}).ResourceVersion
		if err := w.Update(t.Context(), replacement); err == nil || !strings.Contains(err.Error(), "assignedUser can't be left out once it is set") {
			return fmt.Errorf("a replacement without the user: %v", err)
		}
		return nil
	})

	user := func() (user string) {
		t.Helper()
		eventually(t, func() error {
			host := read(t, w, ns, "pc", &rdv.SessionHost{})
			if !slices.Contains(host.Finalizers, rdv.Finalizer) {
				return errors.New("the operator has not seen it yet")
			}
			user = host.Spec.AssignedUser
			return nil
		})
		return user
	}
	again := func(change func(*rdv.SessionHost)) {
		t.Helper()
		w.deletes(t, &rdv.SessionHost{}, ns, "pc")
		w.vanishes(t, &rdv.SessionHost{}, ns, "pc")
		host := machineIn(ns, "pc")
		change(host)
		w.create(t, host)
	}
	asDeclared := func(*rdv.SessionHost) {}
	again(asDeclared)
	if got := user(); got != "alice@example.test" {
		t.Errorf("alice's machine is now %q's", got)
	}
	w.event(t, ns, "pc", eventAssignmentRestored, "assigned to alice@example.test again")
	again(func(h *rdv.SessionHost) { h.Spec.AssignedUser = "bob@example.test" })
	if got := user(); got != "bob@example.test" {
		t.Errorf("an administrator gave it to bob; it is %q's", got)
	}
	w.patch(t, &rdv.SessionHost{}, ns, "pc", `{"spec":{"assignedUser":""}}`)
	again(asDeclared)
	if got := user(); got != "" {
		t.Errorf("a machine that was freed is %q's", got)
	}
	// And with its pool: the record outlives that.
	w.patch(t, &rdv.SessionHost{}, ns, "pc", `{"spec":{"assignedUser":"carol@example.test"}}`)
	w.deletes(t, &rdv.SessionHost{}, ns, "pc")
	w.deletes(t, &rdv.HostPool{}, ns, "linux")
	w.vanishes(t, &rdv.SessionHost{}, ns, "pc")
	w.vanishes(t, &rdv.HostPool{}, ns, "linux")
	pool = newPool(ns)
	pool.Spec.Type = rdv.Personal
	w.create(t, machineIn(ns, "pc"), pool)
	if got := user(); got != "carol@example.test" {
		t.Errorf("carol's machine is now %q's", got)
	}
	// Whoever has the pool's token may take a name that is free, but not the person.
	again(func(h *rdv.SessionHost) { h.Labels = map[string]string{rdv.LabelMadeByToken: "x"} })
	if got := user(); got != "" {
		t.Errorf("a host that a token made is %q's", got)
	}
}

// A pod of a predecessor that was removed by force makes room.
func TestPodOfPredecessorGoes(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Type, pool.Spec.Template = rdv.Personal, template("desktop:1") // names are kept
	w.create(t, pool)
	pod := appears(t, w, ns, "linux-0", &corev1.Pod{})
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: ns}}
	w.create(t, node)
	t.Cleanup(func() { _ = w.Delete(context.Background(), node) })
	binding := &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "linux-0"}, Target: corev1.ObjectReference{Kind: "Node", Name: node.Name}}
	if err := w.SubResource("binding").Create(t.Context(), pod, binding); err != nil { // so that it takes its time to end
		t.Fatal(err)
	}
	w.patch(t, &rdv.SessionHost{}, ns, "linux-0", `{"metadata":{"finalizers":null}}`)
	w.patch(t, pod, ns, "linux-0", fmt.Sprintf(`{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Namespace","name":%q,"uid":%q}]}}`,
		ns, read(t, w, "", ns, &corev1.Namespace{}).UID))
	w.deletes(t, &rdv.SessionHost{}, ns, "linux-0")
	eventually(t, func() error {
		now := &corev1.Pod{}
		err := w.Get(t.Context(), client.ObjectKeyFromObject(pod), now)
		switch {
		case apierrors.IsNotFound(err):
			return nil
		case err != nil:
			return err
		case now.UID != pod.UID:
			return nil
		case now.DeletionTimestamp.IsZero():
			return errors.New("it is still there")
		}
		return nil
	})
	// While it ends, the new host waits for it; then it has a pod of its own.
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonPending, `Pod "linux-0"`)
	w.collect(t, ns, "linux-0")
	eventually(t, func() error {
		now := &corev1.Pod{}
		err := w.Get(t.Context(), client.ObjectKeyFromObject(pod), now)
		if err == nil && now.UID == pod.UID {
			err = errors.New("it is the old one")
		}
		return err
	})
}
