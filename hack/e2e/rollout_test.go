package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/stage"
	"rendezvous.dev/rendezvous/wire/identity"
)

const theGateway = "gateway-a"

// A session lives on while the gateway gets new images, fewer pods, and while its node is drained; and the Gateway says how
// far that is.
func TestGatewayRollouts(t *testing.T) {
	enrolMachine(t)
	tag := fmt.Sprint("e2e-", time.Now().Unix())
	t.Cleanup(func() {
		patchGateway(t, `{"spec":{"replicas":1,"relay":{"image":null},"admission":{"image":null}}}`)
	})
	patchGateway(t, `{"spec":{"replicas":3}}`)
	servingPods(t, 3)
	d := showDesktop(t, "linux-desktop", "tsgu", w.podColor)
	answers(t, d, "rolls")

	t.Run("a new gateway image goes into the pods that there are", func(t *testing.T) {
		before := servingPods(t, 3)
		sets := replicaSets(t)
		images, err := w.VariantImages(t.Context(), tag, "gateway")
		if err != nil {
			t.Fatal(err)
		}
		image := images["gateway"]
		patchGateway(t, `{"spec":{"admission":{"image":"`+image+`"}}}`)
		progress(t, func(r *rdv.GatewayRollout, message string) error {
			if r == nil || !r.InPlace || r.GatewayImage != image || !strings.Contains(message, "sessions are not touched") {
				return fmt.Errorf("rollout %+v, %q", r, message)
			}
			return nil
		})
		settles(t)
		after := servingPods(t, 3)
		for name, now := range after {
			old, ok := before[name]
			if !ok || old.UID != now.UID {
				t.Errorf("pod %s was replaced", name)
			}
			if n := relayRestarts(now); n != relayRestarts(old) {
				t.Errorf("the relay of pod %s was restarted", name)
			}
			if now.Spec.Containers[0].Image != image || restarts(now, "gateway") != restarts(old, "gateway")+1 {
				t.Errorf("the gateway container of pod %s has image %s and %d restarts, before %d", name, now.Spec.Containers[0].Image, restarts(now, "gateway"), restarts(old, "gateway"))
			}
		}
		for _, name := range replicaSets(t) {
			if !slices.Contains(sets, name) {
				t.Errorf("the Deployment rolled: there is a new ReplicaSet %s", name)
			}
		}
		answers(t, d, "inplace")
		other := showDesktop(t, "machine-desktop", "raw", w.outColor)
		other.Stop()
	})

	t.Run("of three pods the one with the session stays", func(t *testing.T) {
		var holder types.UID
		if err := eventually(t.Context(), 90*time.Second, func() error {
			holder = ""
			for _, pod := range servingPods(t, 3) {
				n := sessionsOn(t, pod)
				cost := pod.Annotations[corev1.PodDeletionCost]
				switch {
				case n == 1 && cost == "1" && holder == "":
					holder = pod.UID
				case n != 0 || cost != "" && cost != "0":
					return fmt.Errorf("pod %s: %d sessions, deletion cost %q", pod.Name, n, cost)
				}
			}
			if holder == "" {
				return errors.New("no pod is known to hold the session")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		patchGateway(t, `{"spec":{"replicas":1}}`)
		for _, pod := range servingPods(t, 1) {
			if pod.UID != holder {
				t.Error("the pod with the session went, and empty ones stayed")
			}
		}
		// The pods that went may carry the agent's way to the one that stayed, and so drain for as long.
		answers(t, d, "scaled")
	})

	t.Run("a new relay image comes with new pods, and the old one drains", func(t *testing.T) {
		var old corev1.Pod
		for _, old = range servingPods(t, 1) {
		}
		images, err := w.VariantImages(t.Context(), tag, "relay")
		if err != nil {
			t.Fatal(err)
		}
		image := images["relay"]
		patchGateway(t, `{"spec":{"relay":{"image":"`+image+`"}}}`)
		drains(t, old.Name)
		answers(t, d, "drains")
		// A node is drained: the new pod is evicted, with a session on it that goes on, too.
		other := showDesktop(t, "machine-desktop", "raw", w.outColor)
		var evicted corev1.Pod
		for _, evicted = range servingPods(t, 1) {
		}
		if evicted.UID == old.UID || evicted.Spec.InitContainers[0].Image != image {
			t.Fatalf("the new session is on pod %s", evicted.Name)
		}
		if err := w.Client.SubResource("eviction").Create(t.Context(), &evicted, &policyv1.Eviction{}); err != nil {
			t.Fatal(err)
		}
		drains(t, old.Name, evicted.Name)
		for _, pod := range servingPods(t, 1) {
			if pod.UID == evicted.UID {
				t.Error("the evicted pod is not replaced")
			}
		}
		// Longer than brokers believe a gateway container that is gone.
		time.Sleep(40 * time.Second)
		drains(t, old.Name, evicted.Name)
		select {
		case <-other.Done():
			t.Errorf("the evicted pod's session ended: %s", tail(other.Output(), 10))
		default:
		}
		other.Stop()
		answers(t, d, "evicted")
		d.Stop()
		settles(t)
		for _, pod := range []corev1.Pod{old, evicted} {
			if err := eventually(t.Context(), time.Minute, func() error {
				if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(&pod), &corev1.Pod{}); client.IgnoreNotFound(err) != nil || err == nil {
					return fmt.Errorf("pod %s is still there, though its last session ended: %v", pod.Name, err)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		}
	})
}

func patchGateway(t *testing.T, patch string) {
	t.Helper()
	if _, err := w.Kubectl(context.WithoutCancel(t.Context()), "", "-n", stage.Namespace, "patch", "gateway", theGateway, "--type=merge", "-p", patch); err != nil {
		t.Fatal(err)
	}
}

// servingPods waits until the gateway has this many pods that are not on their way out, all ready.
func servingPods(t *testing.T, want int) map[string]corev1.Pod {
	t.Helper()
	found := map[string]corev1.Pod{}
	if err := eventually(t.Context(), 2*time.Minute, func() error {
		clear(found)
		var pods corev1.PodList
		if err := w.Client.List(t.Context(), &pods, client.InNamespace(stage.Namespace), client.MatchingLabels{rdv.LabelGateway: theGateway}); err != nil {
			return err
		}
		for _, p := range pods.Items {
			if !p.DeletionTimestamp.IsZero() {
				continue
			}
			found[p.Name] = p
			if !slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			}) {
				return fmt.Errorf("pod %s is not ready", p.Name)
			}
		}
		if len(found) != want {
			return fmt.Errorf("%d pods serve, want %d", len(found), want)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

func replicaSets(t *testing.T) (names []string) {
	t.Helper()
	var sets appsv1.ReplicaSetList
	if err := w.Client.List(t.Context(), &sets, client.InNamespace(stage.Namespace), client.MatchingLabels{rdv.LabelGateway: theGateway}); err != nil {
		t.Fatal(err)
	}
	for _, s := range sets.Items {
		names = append(names, s.Name)
	}
	return names
}

func relayRestarts(pod corev1.Pod) int32 {
	for _, c := range pod.Status.InitContainerStatuses {
		if c.Name == "relay" {
			return c.RestartCount
		}
	}
	return -1
}

// sessionsOn is what the brokers say of a pod.
func sessionsOn(t *testing.T, pod corev1.Pod) int32 {
	t.Helper()
	var gw rdv.Gateway
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: theGateway}, &gw); err != nil {
		t.Fatal(err)
	}
	addr, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range gw.Status.Instances {
		if i.Name == identity.InstanceName(addr) {
			return i.Sessions
		}
	}
	return 0
}

// progress waits until the Gateway says what check wants to hear.
func progress(t *testing.T, check func(r *rdv.GatewayRollout, message string) error) {
	t.Helper()
	if err := eventually(t.Context(), 2*time.Minute, func() error {
		var gw rdv.Gateway
		if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: theGateway}, &gw); err != nil {
			return err
		}
		message := ""
		if c := apimeta.FindStatusCondition(gw.Status.Conditions, rdv.ConditionReconciling); c != nil && c.Status == "True" {
			message = c.Message
		}
		return check(gw.Status.Rollout, message)
	}); err != nil {
		t.Fatal(err)
	}
}

// settles waits until nothing is on its way in or out.
func settles(t *testing.T) {
	t.Helper()
	progress(t, func(r *rdv.GatewayRollout, message string) error {
		if r != nil || message != "" {
			return fmt.Errorf("still under way: %+v, %q", r, message)
		}
		return nil
	})
}

// drains waits until the Gateway tells of these pods that they drain, each with one session. Others may drain with none.
func drains(t *testing.T, names ...string) {
	t.Helper()
	progress(t, func(r *rdv.GatewayRollout, message string) error {
		if r == nil || r.OldPods > 0 || !strings.Contains(message, fmt.Sprintf("%d session", len(names))) {
			return fmt.Errorf("rollout %+v, %q", r, message)
		}
		var sessions int32
		for _, p := range r.Draining {
			sessions += p.Sessions
		}
		for _, name := range names {
			if !slices.ContainsFunc(r.Draining, func(p rdv.DrainingPod) bool { return p.Pod == name && p.Sessions == 1 && !p.Until.IsZero() }) {
				return fmt.Errorf("%s is not among %+v", name, r.Draining)
			}
		}
		if sessions != int32(len(names)) {
			return fmt.Errorf("%d sessions in %+v", sessions, r.Draining)
		}
		return nil
	})
}

// A host too many takes no new session, says so, and goes; the one with a session stays.
func TestHostPoolScale(t *testing.T) {
	replicas := func(n int) {
		if _, err := w.Kubectl(context.WithoutCancel(t.Context()), "", "-n", stage.Namespace, "patch", "hostpool", "linux", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"replicas":%d}}`, n)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { replicas(1) })
	servingPods(t, 1) // an earlier test may have left it rolling
	d := showDesktop(t, "linux-desktop", "tsgu", w.podColor)
	answers(t, d, "alone")
	replicas(2)
	if err := eventually(t.Context(), 2*time.Minute, func() error { return w.hostReady(t.Context(), "linux-1") }); err != nil {
		t.Fatal(err)
	}
	replicas(1)
	if err := eventually(t.Context(), time.Minute, func() error {
		var sh rdv.SessionHost
		if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "linux-1"}, &sh); client.IgnoreNotFound(err) != nil || err == nil {
			return fmt.Errorf("linux-1 is still there (%v): %+v, %+v", err, sh.Spec, sh.Status.Agent)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	answers(t, d, "left")
	if err := w.hostReady(t.Context(), "linux-0"); err != nil {
		t.Error(err)
	}
}
