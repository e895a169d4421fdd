package controllers

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
)

func template(image string) *runtime.RawExtension {
	return &runtime.RawExtension{Raw: fmt.Appendf(nil, `{"spec":{"containers":[{"name":"desktop","image":%q}]}}`, image)}
}

// token waits until the pool's Secret and status tell of the same token, and gives it.
func (w *world) token(t *testing.T, ns, pool string, differs string) string {
	t.Helper()
	var text string
	eventually(t, func() error {
		secret, hp := &corev1.Secret{}, &rdv.HostPool{}
		if err := errors.Join(w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: pool + "-registration"}, secret),
			w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: pool}, hp)); err != nil {
			return err
		}
		text = string(secret.Data[render.KeyToken])
		registration := hp.Status.Registration
		switch {
		case text == differs:
			return errors.New("the token is still the same")
		case registration.TokenHash != plan.HashToken(text):
			return errors.New("status and Secret differ")
		case registration.Expires == nil || string(secret.Data[render.KeyExpires]) != registration.Expires.UTC().Format(time.RFC3339):
			return errors.New("expiry differs")
		}
		return nil
	})
	return text
}

func TestHostPoolToken(t *testing.T) {
	w, ns := start(t)
	w.create(t, newPool(ns))
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonReferenceNotFound, `spec.workspaceRef: Workspace "demo" not found: create it`)
	readyWorkspace(t, w, ns)
	first := w.token(t, ns, "linux", "")
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionRegistrationReady, metav1.ConditionTrue, rdv.ReasonReady, `"linux-registration"`)
	eventually(t, func() error {
		secret := read(t, w, ns, "linux-registration", &corev1.Secret{})
		if string(secret.Data["ca.crt"]) != "CA of "+ns || string(secret.Data["broker"]) != "https://desk.example.test" {
			return fmt.Errorf("the Secret holds %q, %q", secret.Data["ca.crt"], secret.Data["broker"])
		}
		return nil
	})

	// Somebody writes a token of their own.
	w.patch(t, &corev1.Secret{}, ns, "linux-registration", `{"stringData":{"token":"rdvreg.`+ns+`.linux.-.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}}`)
	second := w.token(t, ns, "linux", first)
	if second == "rdvreg."+ns+".linux.-.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" {
		t.Fatal("a written token was taken over")
	}
	// Somebody deletes the Secret.
	if err := w.Delete(t.Context(), read(t, w, ns, "linux-registration", &corev1.Secret{})); err != nil {
		t.Fatal(err)
	}
	third := w.token(t, ns, "linux", second)
	// Somebody asks for another.
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"metadata":{"annotations":{"rendezvous.dev/rotate-registration":"1"}}}`)
	fourth := w.token(t, ns, "linux", third)
	w.settled(t, ns)
	if now := w.token(t, ns, "linux", ""); now != fourth {
		t.Error("one annotation rotated twice")
	}
	// Two thirds of a day pass.
	w.clock.advance(17 * time.Hour)
	w.poke(t, &rdv.HostPool{}, ns, "linux")
	fifth := w.token(t, ns, "linux", fourth)

	// With Manual, it expires, and stays so.
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"registration":{"rotation":"Manual"}}}`)
	// A pass that has not seen the change yet would rotate once more.
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionRegistrationReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.clock.advance(25 * time.Hour)
	w.poke(t, &rdv.HostPool{}, ns, "linux")
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionRegistrationReady, metav1.ConditionFalse, rdv.ReasonTokenExpired, "rendezvous.dev/rotate-registration")
	if now := w.token(t, ns, "linux", ""); now != fifth {
		t.Error("a Manual token was rotated")
	}
}

func (w *world) hosts(t *testing.T, ns string, want ...string) {
	t.Helper()
	eventually(t, func() error {
		list := &rdv.SessionHostList{}
		if err := w.List(t.Context(), list, client.InNamespace(ns)); err != nil {
			return err
		}
		var names []string
		for _, h := range list.Items {
			names = append(names, h.Name)
		}
		if !slices.Equal(names, want) {
			return fmt.Errorf("hosts are %v, want %v", names, want)
		}
		return nil
	})
}

func TestHostPoolReplicas(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	// A machine that somebody enrolled under one of the names.
	w.create(t, &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "linux-1"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}})
	pool := newPool(ns)
	pool.Spec.Template, pool.Spec.Replicas = template("desktop:1"), new(int32(2))
	w.create(t, pool)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	controlled(t, w, ns, "linux-0", &rdv.SessionHost{}, pool)
	appears(t, w, ns, "linux-0", &corev1.Pod{})
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "linux-1"}, &corev1.Pod{}); err == nil {
		t.Error("a machine's SessionHost got a pod")
	}
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionAvailable, metav1.ConditionFalse, rdv.ReasonNoHosts, "0 of 3 hosts take sessions")

	// Busy hosts stay, though there are too many; the emptiest takes no new session.
	w.patchStatus(t, &rdv.SessionHost{}, ns, "linux-0", `{"status":{"agent":{"connected":true,"rdpReady":true,"sessions":1}}}`)
	w.patchStatus(t, &rdv.SessionHost{}, ns, "linux-2", `{"status":{"agent":{"connected":true,"rdpReady":true,"sessions":2}}}`)
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":1}}`)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReconciling, metav1.ConditionTrue, rdv.ReasonProgressing, "nobody is assigned: linux-0")
	w.retires(t, ns, "linux-0", true)
	w.retires(t, ns, "linux-2", false)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonRetiring, "hosts too many")
	// Empty, it does not go before its agent has said that it takes no session; an earlier word does not count.
	generation := read(t, w, ns, "linux-0", &rdv.SessionHost{}).Generation
	acknowledge := func(name string, generation int64) {
		w.patchStatus(t, &rdv.SessionHost{}, ns, name, fmt.Sprintf(`{"status":{"agent":{"connected":true,"sessions":0,"drainAcknowledged":true,"acknowledgedGeneration":%d}}}`, generation))
	}
	acknowledge("linux-0", generation-1)
	w.settled(t, ns)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	// Until then it can be taken back.
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":2}}`)
	w.retires(t, ns, "linux-0", false)
	acknowledge("linux-0", generation)
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":1}}`)
	w.retires(t, ns, "linux-0", true)
	w.settled(t, ns)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	acknowledge("linux-0", read(t, w, ns, "linux-0", &rdv.SessionHost{}).Generation)
	w.hosts(t, ns, "linux-1", "linux-2")
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":2}}`)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	// A host that is off the bus can't say so: it goes once the brokers must know.
	w.patchStatus(t, &rdv.SessionHost{}, ns, "linux-0", `{"status":{"agent":{"connected":false}}}`)
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":1}}`)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionDraining, metav1.ConditionTrue, rdv.ReasonRetiring, "")
	w.settled(t, ns)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	w.clock.advance(retireSettle)
	w.poke(t, &rdv.HostPool{}, ns, "linux")
	w.hosts(t, ns, "linux-1", "linux-2")
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":2}}`)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	// A drain of a person's own is left alone.
	w.patch(t, &rdv.SessionHost{}, ns, "linux-2", `{"spec":{"drain":{"mode":"NoNewSessions","reason":"mine"}}}`)
	w.settled(t, ns)
	if host := read(t, w, ns, "linux-2", &rdv.SessionHost{}); host.Spec.Drain == nil || host.Spec.Retiring {
		t.Errorf("linux-2 became %+v", host.Spec)
	}

	// One that is deleted comes back.
	if err := w.Delete(t.Context(), read(t, w, ns, "linux-0", &rdv.SessionHost{})); err != nil {
		t.Fatal(err)
	}
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
}

// retires waits until a host is told to take no session, or is told so no more.
func (w *world) retires(t *testing.T, ns, name string, want bool) {
	t.Helper()
	eventually(t, func() error {
		if host := read(t, w, ns, name, &rdv.SessionHost{}); host.Spec.Retiring != want {
			return fmt.Errorf("%s: retiring is %v", name, host.Spec.Retiring)
		}
		return nil
	})
}

// serves has a host be as its agent and its broker would have it, with so many sessions.
func (w *world) serves(t *testing.T, ns, name string, sessions int) {
	t.Helper()
	host := appears(t, w, ns, name, &rdv.SessionHost{})
	w.patchStatus(t, &rdv.SessionHost{}, ns, name, fmt.Sprintf(
		`{"status":{"enrolment":{"time":"2026-05-04T12:00:00Z","tokenHash":"x"},"agent":{"connected":true,"rdpReady":true,"sessions":%d,"drainAcknowledged":%v,"acknowledgedGeneration":%d}}}`,
		sessions, host.Spec.Retiring, host.Generation))
}

func TestHostPoolAutoscaling(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Template, pool.Spec.MaxSessionsPerHost = template("desktop:1"), new(int32(4))
	pool.Spec.Autoscaling = &rdv.HostPoolAutoscaling{MaxReplicas: 3, MinFreePlaces: new(int32(3))}
	w.create(t, pool)
	w.hosts(t, ns, "linux-0")
	w.is(t, pool, ns, "linux", rdv.ConditionScaled, metav1.ConditionFalse, rdv.ReasonTooFewPlaces, "0 places free, 3 wanted: hosts are on their way, 1 in all")
	w.serves(t, ns, "linux-0", 0)
	w.is(t, pool, ns, "linux", rdv.ConditionScaled, metav1.ConditionTrue, rdv.ReasonEnoughPlaces, "4 places free, 3 wanted, with 1 host")
	w.serves(t, ns, "linux-0", 2)
	w.hosts(t, ns, "linux-0", "linux-1")
	w.serves(t, ns, "linux-1", 4)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	w.serves(t, ns, "linux-2", 4)
	w.is(t, pool, ns, "linux", rdv.ConditionScaled, metav1.ConditionFalse, rdv.ReasonAtMaximum, "2 places free, 3 wanted, but spec.autoscaling.maxReplicas is 3: raise it")
	w.settled(t, ns)
	if pool = read(t, w, ns, "linux", &rdv.HostPool{}); pool.Status.FreePlaces != 2 || pool.Status.Autoscaling.DesiredHosts != 3 {
		t.Errorf("status is %+v", pool.Status)
	}

	// Fewer would do: they go after a while, the emptiest first, and drained before.
	w.serves(t, ns, "linux-1", 0)
	w.serves(t, ns, "linux-2", 0)
	w.is(t, pool, ns, "linux", rdv.ConditionScaled, metav1.ConditionTrue, rdv.ReasonTooManyPlaces, "10 places free, 3 wanted: 2 of 3 hosts are enough")
	w.settled(t, ns)
	w.hosts(t, ns, "linux-0", "linux-1", "linux-2")
	w.clock.advance(defaultScaleDownDelay)
	w.poke(t, &rdv.HostPool{}, ns, "linux")
	w.retires(t, ns, "linux-2", true)
	w.serves(t, ns, "linux-2", 0)
	w.hosts(t, ns, "linux-0", "linux-1")
	w.is(t, pool, ns, "linux", rdv.ConditionScaled, metav1.ConditionTrue, rdv.ReasonEnoughPlaces, "6 places free, 3 wanted, with 2 hosts")
	w.event(t, ns, "linux", eventScaled, "from 3 to 2 hosts")
	w.event(t, ns, "linux", eventHostRemoved, `"linux-2"`)

	// By hand again.
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"autoscaling":null,"replicas":2}}`)
	eventually(t, func() error {
		if s := read(t, w, ns, "linux", &rdv.HostPool{}).Status; s.Autoscaling != nil {
			return fmt.Errorf("still %+v", s.Autoscaling)
		}
		return nil
	})
	w.hosts(t, ns, "linux-0", "linux-1")
}

func TestHostPoolBadTemplate(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Template = &runtime.RawExtension{Raw: []byte(`{"spec":{"containers":[{"name":"desktop","imgae":"x"}]}}`)}
	w.create(t, pool)
	w.is(t, pool, ns, "linux", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonPodInvalid, `unknown field "spec.containers[0].imgae"`)
	w.hosts(t, ns)
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"template":{"spec":{"containers":[{"name":"desktop","image":"x"}]}}}}`)
	w.hosts(t, ns, "linux-0")
	w.is(t, pool, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")

	// What only the API server finds wrong shows at the host.
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":2,"template":{"spec":{"containers":[{"name":"desktop","image":"x","resources":{"requests":{"cpu":"2"},"limits":{"cpu":"1"}}}]}}}}`)
	w.is(t, &rdv.SessionHost{}, ns, "linux-1", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonRejected, `Pod "linux-1" was refused`)
}

func TestHostPoolNamesItsIssuer(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.RDPCertificate = &rdv.RDPCertificate{IssuerRef: clusterIssuer("rdp-" + ns)}
	w.create(t, pool)
	w.event(t, ns, "linux", rdv.ReasonIssuerNotFound, "not found: create it")
	w.is(t, pool, ns, "linux", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonIssuerNotFound, `spec.rdpCertificate.issuerRef: ClusterIssuer "rdp-`+ns+`" not found`)
	w.issuer(t, "rdp-"+ns)
	w.is(t, pool, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.is(t, pool, ns, "linux", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonNoHosts, `start the agent on a machine with the token in Secret "linux-registration"`)
}
