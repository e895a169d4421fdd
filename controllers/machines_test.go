package controllers

import (
	"errors"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
)

// enrolKey takes the broker's part: the host enrolled with this token and key, after this revocation.
func (w *world) enrolKey(t *testing.T, ns, host, token, key, revokedFor string) {
	t.Helper()
	uid := read(t, w, ns, host, &rdv.SessionHost{}).UID
	w.patchStatus(t, &rdv.SessionHost{}, ns, host, fmt.Sprintf(
		`{"status":{"enrolment":{"time":%q,"tokenHash":%q,"hostUID":%q,"keyFingerprint":%q,"revokedFor":%q}}}`,
		w.clock.now().UTC().Format(time.RFC3339), plan.HashToken(token), uid, key, revokedFor))
}

func (w *world) revoke(t *testing.T, ns, host, value string) {
	t.Helper()
	w.patch(t, &rdv.SessionHost{}, ns, host, fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, rdv.AnnotationRevoke, value))
}

// A machine whose enrolment is revoked gets a token to come back with, once per value.
func TestRevokedMachine(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.create(t, newPool(ns), &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "pc"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}})
	first := w.hostToken(t, ns, "pc", "")
	w.enrolKey(t, ns, "pc", first, "aa", "")
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionEnrolled, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.vanishes(t, &corev1.Secret{}, ns, "pc-registration")

	// A token that was made since and nobody used goes with the enrolment.
	w.patch(t, &rdv.SessionHost{}, ns, "pc", `{"metadata":{"annotations":{"rendezvous.dev/rotate-registration":"reinstall"}}}`)
	unspent := w.hostToken(t, ns, "pc", first)
	w.revoke(t, ns, "pc", "stolen")
	second := w.hostToken(t, ns, "pc", unspent)
	if s := read(t, w, ns, "pc", &rdv.SessionHost{}).Status.Registration.RotatedFor; s != "reinstall/stolen" {
		t.Errorf("the token is made for %q", s)
	}
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionEnrolled, metav1.ConditionFalse, rdv.ReasonRevoked, `enrol the machine with the token in Secret "pc-registration"`)
	w.patchStatus(t, &rdv.SessionHost{}, ns, "pc", `{"status":{"enrolment":{"keyFingerprint":null,"revokedFor":"stolen"}}}`) // as brokers do
	w.settled(t, ns)
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonRevoked, "")
	if now := w.hostToken(t, ns, "pc", ""); now != second {
		t.Error("one revocation made two tokens")
	}
	w.enrolKey(t, ns, "pc", second, "bb", "stolen")
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionEnrolled, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.vanishes(t, &corev1.Secret{}, ns, "pc-registration")
	w.settled(t, ns)

	w.revoke(t, ns, "pc", "stolen again")
	w.hostToken(t, ns, "pc", second)
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionEnrolled, metav1.ConditionFalse, rdv.ReasonRevoked, "")
}

// A pod whose enrolment is revoked is replaced at once, sessions or not, and never sees the token of the one that follows.
func TestRevokedPod(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pod := poolWithPod(t, w, ns)
	first := w.hostToken(t, ns, "linux-0", "")
	w.enrolKey(t, ns, "linux-0", first, "aa", "")
	w.patchStatus(t, &rdv.SessionHost{}, ns, "linux-0", `{"status":{"agent":{"connected":true,"rdpReady":true,"sessions":3}}}`)
	w.patch(t, &corev1.Pod{}, ns, "linux-0", `{"metadata":{"finalizers":["example.com/a-kubelet-that-takes-its-time"]}}`)
	w.settled(t, ns)

	w.revoke(t, ns, "linux-0", "stolen")
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionEnrolled, metav1.ConditionFalse, rdv.ReasonRevoked, "the pod is being replaced")
	eventually(t, func() error {
		if read(t, w, ns, "linux-0", &corev1.Pod{}).DeletionTimestamp.IsZero() {
			return errors.New("the pod stays")
		}
		return nil
	})
	w.settled(t, ns)
	if now := w.hostToken(t, ns, "linux-0", ""); now != first {
		t.Fatal("the pod that goes is handed the next pod's token")
	}
	w.patch(t, &corev1.Pod{}, ns, "linux-0", `{"metadata":{"finalizers":null}}`)
	second := w.hostToken(t, ns, "linux-0", first)
	eventually(t, func() error {
		now := &corev1.Pod{}
		if err := w.Get(t.Context(), client.ObjectKeyFromObject(pod), now); err != nil {
			return err
		}
		if now.UID == pod.UID {
			return errors.New("the pod is the old one")
		}
		return nil
	})
	// The revocation stays recorded until the new pod has enrolled, and doesn't end that one.
	w.patchStatus(t, &rdv.SessionHost{}, ns, "linux-0", `{"status":{"enrolment":{"keyFingerprint":null,"revokedFor":"stolen"}}}`)
	w.settled(t, ns)
	again := read(t, w, ns, "linux-0", &corev1.Pod{})
	w.enrolKey(t, ns, "linux-0", second, "bb", "stolen")
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionEnrolled, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.settled(t, ns)
	if now := read(t, w, ns, "linux-0", &corev1.Pod{}); now.UID != again.UID || !now.DeletionTimestamp.IsZero() {
		t.Error("one revocation replaced two pods")
	}
}

func TestSecondMachineShows(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.create(t, newPool(ns), &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "pc"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}})
	is := func(status metav1.ConditionStatus, reason, words string) {
		t.Helper()
		w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionOneMachine, status, reason, words)
	}
	is(metav1.ConditionUnknown, rdv.ReasonNotConnected, "")
	w.enrolKey(t, ns, "pc", w.hostToken(t, ns, "pc", ""), "aa", "")
	w.patchStatus(t, &rdv.SessionHost{}, ns, "pc", `{"status":{"agent":{"connected":true,"rdpReady":true}}}`)
	is(metav1.ConditionTrue, rdv.ReasonReady, "")
	w.clock.advance(time.Minute)
	seen := func() {
		t.Helper()
		w.patchStatus(t, &rdv.SessionHost{}, ns, "pc", fmt.Sprintf(`{"status":{"agent":{"secondMachineSeen":%q}}}`, w.clock.now().UTC().Format(time.RFC3339)))
	}
	seen()
	is(metav1.ConditionFalse, rdv.ReasonSecondMachine, "remove the agent's state folder and enrol it under a name of its own")
	is(metav1.ConditionFalse, rdv.ReasonSecondMachine, rdv.AnnotationRevoke)
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonSecondMachine, "")
	w.clock.advance(secondMachineFor + time.Second)
	w.poke(t, &rdv.SessionHost{}, ns, "pc")
	is(metav1.ConditionTrue, rdv.ReasonReady, "")
	// Another enrolment puts the second machine out.
	seen()
	is(metav1.ConditionFalse, rdv.ReasonSecondMachine, "")
	w.clock.advance(time.Minute)
	w.enrolKey(t, ns, "pc", "another", "bb", "")
	is(metav1.ConditionTrue, rdv.ReasonReady, "")
}

func TestEnrolmentOfAnotherObject(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.create(t, newPool(ns), &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "pc"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}})
	w.enrolKey(t, ns, "pc", w.hostToken(t, ns, "pc", ""), "aa", "")
	w.patchStatus(t, &rdv.SessionHost{}, ns, "pc", `{"status":{"enrolment":{"hostUID":"from-a-backup"}}}`)
	w.is(t, &rdv.SessionHost{}, ns, "pc", rdv.ConditionEnrolled, metav1.ConditionFalse, rdv.ReasonNotEnrolled, "delete this SessionHost")
}

// The hosts that machines made with the pool's token are counted, and a token that is used up shows.
func TestRegisteredHosts(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Registration.MaxHostsPerToken = new(int32(2))
	w.create(t, pool)
	made := func(name, token string) {
		t.Helper()
		h := &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}}}
		if token != "" {
			h.Labels = map[string]string{rdv.LabelMadeByToken: rdv.MadeByToken(plan.HashToken(token))}
		}
		w.create(t, h)
	}
	counts := func(want int32) {
		t.Helper()
		eventually(t, func() error {
			if n := read(t, w, ns, "linux", &rdv.HostPool{}).Status.RegisteredHosts; n != want {
				return fmt.Errorf("%d are counted, want %d", n, want)
			}
			return nil
		})
	}
	token := w.token(t, ns, "linux", "")
	made("declared", "")
	made("m1", token)
	counts(1)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionRegistrationReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	made("m2", token)
	counts(2)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionRegistrationReady, metav1.ConditionFalse, rdv.ReasonTokenUsedUp, "has made 2 hosts, as many as spec.registration.maxHostsPerToken allows")
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"metadata":{"annotations":{"rendezvous.dev/rotate-registration":"more"}}}`)
	w.token(t, ns, "linux", token)
	counts(0)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionRegistrationReady, metav1.ConditionTrue, rdv.ReasonReady, "")
}
