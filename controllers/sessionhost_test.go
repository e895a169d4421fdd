package controllers

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
)

// hostToken waits until the host's Secret and status tell of the same token, another than differs, and gives it.
func (w *world) hostToken(t *testing.T, ns, host, differs string) string {
	t.Helper()
	var text string
	eventually(t, func() error {
		secret, sh := &corev1.Secret{}, &rdv.SessionHost{}
		if err := errors.Join(w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: host + "-registration"}, secret),
			w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: host}, sh)); err != nil {
			return err
		}
		text = string(secret.Data[render.KeyToken])
		if text == differs || sh.Status.Registration.TokenHash != plan.HashToken(text) {
			return fmt.Errorf("token is %q, and the status tells of %q", text, sh.Status.Registration.TokenHash)
		}
		return nil
	})
	return text
}

// enrol takes the broker's part: the host enrolled with this token.
func (w *world) enrol(t *testing.T, ns, host, token string) {
	t.Helper()
	w.patchStatus(t, &rdv.SessionHost{}, ns, host, fmt.Sprintf(`{"status":{"enrolment":{"time":"2026-01-01T00:00:00Z","tokenHash":%q}}}`, plan.HashToken(token)))
}

// deletePod takes the kubelet's part too, which would confirm the end.
func (w *world) deletePod(t *testing.T, ns, name string) {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	if err := w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)); client.IgnoreNotFound(err) != nil {
		t.Fatal(err)
	}
}

func poolWithPod(t *testing.T, w *world, ns string) *corev1.Pod {
	t.Helper()
	pool := newPool(ns)
	pool.Spec.Template = template("desktop:1")
	w.create(t, pool)
	return appears(t, w, ns, "linux-0", &corev1.Pod{})
}

func TestSessionHostPodWaitsForTheFeedsCertificate(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	pool := newPool(ns)
	pool.Spec.Template = template("desktop:1")
	w.create(t, newWorkspace(ns, ns), pool)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionEnrolled, metav1.ConditionFalse, rdv.ReasonPending, `(Secret "demo-tls")`)
	w.issue(t, ns, "demo-tls")
	appears(t, w, ns, "linux-0", &corev1.Pod{})
	if ca := string(read(t, w, ns, "linux-0-registration", &corev1.Secret{}).Data["ca.crt"]); ca != "CA of "+ns {
		t.Errorf("the agent is given %q to check the broker with", ca)
	}
}

func TestSessionHostPodLife(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pod := poolWithPod(t, w, ns)
	controlled(t, w, ns, "linux-0", pod, read(t, w, ns, "linux-0", &rdv.SessionHost{}))
	first := w.hostToken(t, ns, "linux-0", "")
	w.enrol(t, ns, "linux-0", first)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionEnrolled, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.settled(t, ns)
	if now := w.hostToken(t, ns, "linux-0", ""); now != first {
		t.Error("a spent token that a running pod mounts was replaced")
	}

	// A pod that is gone comes back, with a token that is not spent.
	w.deletePod(t, ns, "linux-0")
	eventually(t, func() error {
		again := &corev1.Pod{}
		if err := w.Get(t.Context(), client.ObjectKeyFromObject(pod), again); err != nil {
			return err
		}
		if again.UID == pod.UID {
			return errors.New("the pod is the old one")
		}
		return nil
	})
	w.enrol(t, ns, "linux-0", w.hostToken(t, ns, "linux-0", first))

	// Another template waits for the sessions to end.
	w.patchStatus(t, &rdv.SessionHost{}, ns, "linux-0", `{"status":{"agent":{"connected":true,"rdpReady":true,"sessions":1}}}`)
	w.patchStatus(t, &corev1.Pod{}, ns, "linux-0", `{"status":{"phase":"Running"}}`)
	pod = read(t, w, ns, "linux-0", &corev1.Pod{})
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"template":{"spec":{"containers":[{"name":"desktop","image":"desktop:2"}]}}}}`)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReconciling, metav1.ConditionTrue, rdv.ReasonProgressing, "the pod is replaced once no session is on it")
	if now := read(t, w, ns, "linux-0", &corev1.Pod{}); now.UID != pod.UID || !now.DeletionTimestamp.IsZero() {
		t.Fatal("a pod with a session was removed")
	}
	w.patchStatus(t, &rdv.SessionHost{}, ns, "linux-0", `{"status":{"agent":{"sessions":0}}}`)
	eventually(t, func() error {
		now := &corev1.Pod{}
		if err := w.Get(t.Context(), client.ObjectKeyFromObject(pod), now); err != nil {
			return err
		}
		if !now.DeletionTimestamp.IsZero() { // no kubelet is here to confirm
			w.deletePod(t, ns, "linux-0")
		}
		if now.Spec.Containers[0].Image != "desktop:2" {
			return errors.New("the pod still has image " + now.Spec.Containers[0].Image)
		}
		return nil
	})

	// An evicted pod is replaced, but not at once.
	pod = read(t, w, ns, "linux-0", &corev1.Pod{})
	w.patchStatus(t, &corev1.Pod{}, ns, "linux-0", `{"status":{"phase":"Failed","reason":"Evicted"}}`)
	w.clock.advance(time.Minute)
	w.poke(t, &rdv.SessionHost{}, ns, "linux-0")
	eventually(t, func() error {
		now := &corev1.Pod{}
		err := w.Get(context.Background(), client.ObjectKeyFromObject(pod), now)
		if err == nil && now.UID == pod.UID {
			if !now.DeletionTimestamp.IsZero() {
				w.deletePod(t, ns, "linux-0")
			}
			return errors.New("the evicted pod is still there")
		}
		return err
	})
}

// TestTemplateIsRolledOutInTurn shows that a pool's idle hosts are not all replaced at once.
func TestTemplateIsRolledOutInTurn(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Template, pool.Spec.Replicas = template("desktop:1"), new(int32(3))
	w.create(t, pool)
	hosts := []string{"linux-0", "linux-1", "linux-2"}
	report := func(host, agent string) {
		t.Helper()
		w.patchStatus(t, &rdv.SessionHost{}, ns, host, `{"status":{"agent":`+agent+`}}`)
	}
	for _, host := range hosts {
		w.enrol(t, ns, host, w.hostToken(t, ns, host, ""))
		report(host, `{"connected":true,"rdpReady":true}`)
		w.is(t, &rdv.SessionHost{}, ns, host, rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	}
	// outdated are the pods of the old template; those on their way out are helped to go.
	outdated := func() (names []string) {
		t.Helper()
		for _, host := range hosts {
			pod := &corev1.Pod{}
			if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: host}, pod); client.IgnoreNotFound(err) != nil {
				t.Fatal(err)
			} else if err != nil {
				continue
			}
			if !pod.DeletionTimestamp.IsZero() {
				w.deletePod(t, ns, host)
			} else if pod.Spec.Containers[0].Image == "desktop:1" {
				names = append(names, host)
			}
		}
		return names
	}
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"template":{"spec":{"containers":[{"name":"desktop","image":"desktop:2"}]}}}}`)
	for left := 2; left >= 0; left-- {
		eventually(t, func() error {
			if now := outdated(); len(now) != left {
				return fmt.Errorf("outdated are %v, want %d of them", now, left)
			}
			return nil
		})
		for _, host := range hosts {
			w.poke(t, &rdv.SessionHost{}, ns, host)
		}
		w.settled(t, ns)
		if now := outdated(); len(now) != left {
			t.Fatalf("outdated are %v, though one is still away", now)
		}
		// The one that went comes back. A status holds whole seconds, so the clock must show a later one.
		w.clock.advance(rolloutPatience + time.Second)
		for _, host := range hosts {
			w.poke(t, &rdv.SessionHost{}, ns, host)
		}
	}
}

func TestSessionHostForeignPod(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	foreign := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "linux-0"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "x"}}},
	}
	w.create(t, foreign)
	pool := newPool(ns)
	pool.Spec.Template = template("desktop:1")
	w.create(t, pool)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonConflict, `Pod "linux-0" exists and is not managed by this operator`)
	if now := read(t, w, ns, "linux-0", &corev1.Pod{}); now.ResourceVersion != foreign.ResourceVersion {
		t.Error("the foreign pod was touched")
	}
}

func TestMachinesToken(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	machine := &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "pc"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}}
	w.create(t, machine)
	w.is(t, machine, ns, "pc", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonReferenceNotFound, `spec.hostPoolRef: HostPool "linux" not found`)
	w.create(t, newPool(ns))
	token := w.hostToken(t, ns, "pc", "")
	w.is(t, machine, ns, "pc", rdv.ConditionEnrolled, metav1.ConditionFalse, rdv.ReasonNotEnrolled, `the token in Secret "pc-registration"`)
	if broker := string(read(t, w, ns, "pc-registration", &corev1.Secret{}).Data["broker"]); broker != "https://desk.example.test" {
		t.Errorf("a machine outside is sent to %q", broker)
	}
	w.enrol(t, ns, "pc", token)
	w.vanishes(t, &corev1.Secret{}, ns, "pc-registration")
	w.settled(t, ns)
	if hash := read(t, w, ns, "pc", machine).Status.Registration.TokenHash; hash != plan.HashToken(token) {
		t.Errorf("a spent token's hash must stay, so that it is known as spent; it is %q", hash)
	}

	// Asked for anew, the machine can enrol again, once.
	w.patch(t, &rdv.SessionHost{}, ns, "pc", `{"metadata":{"annotations":{"rendezvous.dev/rotate-registration":"reinstalled"}}}`)
	again := w.hostToken(t, ns, "pc", token)
	w.enrol(t, ns, "pc", again)
	w.vanishes(t, &corev1.Secret{}, ns, "pc-registration")
}

// TestMachineEnrolledWithPoolToken shows that a host that a broker made keeps no token that could be used besides.
func TestMachineEnrolledWithPoolToken(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.create(t, newPool(ns), &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "pc"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}})
	w.hostToken(t, ns, "pc", "")
	w.enrol(t, ns, "pc", w.token(t, ns, "linux", ""))
	w.vanishes(t, &corev1.Secret{}, ns, "pc-registration")
	eventually(t, func() error {
		if hash := read(t, w, ns, "pc", &rdv.SessionHost{}).Status.Registration.TokenHash; hash != "" {
			return fmt.Errorf("a token with hash %q would still enrol", hash)
		}
		return nil
	})
}

func TestSessionHostReportsBecomeConditions(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.create(t, newPool(ns), &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "pc"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}})
	is := func(condition string, status metav1.ConditionStatus, reason, words string) {
		t.Helper()
		w.is(t, &rdv.SessionHost{}, ns, "pc", condition, status, reason, words)
	}
	report := func(format string, args ...any) {
		t.Helper()
		w.patchStatus(t, &rdv.SessionHost{}, ns, "pc", `{"status":{"agent":`+fmt.Sprintf(format, args...)+`}}`)
	}
	is(rdv.ConditionConnected, metav1.ConditionUnknown, rdv.ReasonNotConnected, "")
	is(rdv.ConditionHealthy, metav1.ConditionUnknown, rdv.ReasonNotConnected, "")
	w.enrol(t, ns, "pc", w.hostToken(t, ns, "pc", ""))
	report(`{"connected":true,"lastHeartbeat":%q,"message":"port 3389 is closed"}`, w.clock.now().UTC().Format(time.RFC3339))
	is(rdv.ConditionHealthy, metav1.ConditionFalse, rdv.ReasonRDPNotReady, "the RDP server does not answer the agent: port 3389 is closed")
	is(rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonRDPNotReady, "")
	report(`{"rdpReady":true,"message":""}`)
	is(rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "1 of 1 hosts take sessions")

	w.patch(t, &rdv.SessionHost{}, ns, "pc", fmt.Sprintf(`{"spec":{"drain":{"mode":"NoNewSessions","until":%q}}}`, w.clock.now().Add(time.Hour).UTC().Format(time.RFC3339)))
	is(rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonDrainRequested, "not acknowledged")
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonNoHosts, "0 of 1")
	report(`{"drainAcknowledged":true,"sessions":1}`)
	is(rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonDrainRequested, "running ones go on")
	report(`{"sessions":0}`)
	is(rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonDrained, "")
	w.clock.advance(61 * time.Minute)
	w.poke(t, &rdv.SessionHost{}, ns, "pc")
	is(rdv.ConditionDraining, metav1.ConditionFalse, rdv.ReasonNotDraining, "spec.drain.until has passed")

	is(rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonHeartbeatLost, "no broker has noted a heartbeat for 15 minutes")
	report(`{"lastHeartbeat":%q}`, w.clock.now().UTC().Format(time.RFC3339))
	is(rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	report(`{"connected":false}`)
	is(rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonNotConnected, "not on the control channel")

	// What the brokers wrote is still theirs.
	host := read(t, w, ns, "pc", &rdv.SessionHost{})
	if host.Status.Enrolment == nil || host.Status.Agent == nil || !host.Status.Agent.RDPReady {
		t.Errorf("the brokers' part of the status is %+v, %+v", host.Status.Enrolment, host.Status.Agent)
	}
	for _, entry := range host.ManagedFields {
		if entry.Manager == FieldManager && entry.Subresource != "status" {
			t.Errorf("the operator owns fields of a person's SessionHost: %s", entry.FieldsV1)
		}
	}
}

func TestSessionHostWithoutItsPoolIsKept(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	w.create(t, pool, &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "pc"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}})
	w.hostToken(t, ns, "pc", "")
	if err := w.Delete(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonReferenceNotFound, `HostPool "linux" not found`)
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "pc"}, &rdv.SessionHost{}); apierrors.IsNotFound(err) {
		t.Error("a person's SessionHost was removed")
	}
}
