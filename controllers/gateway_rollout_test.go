package controllers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

// gatewayCluster takes the part of the Deployment controller and of the kubelet for one gateway, as far as a change in
// place has to do with them.
type gatewayCluster struct {
	*world
	ns string
	// started counts the gateway containers that were started, by pod.
	started map[string]int
	// most is how many pods were seen that had to start theirs anew at one time.
	most int
	// broken images never become ready.
	broken string
}

// replicaSet makes the Deployment's newest ReplicaSet, with pods that run.
func (c *gatewayCluster) replicaSet(t *testing.T, revision int, pods int) *appsv1.ReplicaSet {
	t.Helper()
	d := read(t, c.world, c.ns, "gw", &appsv1.Deployment{})
	set := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: c.ns, Name: fmt.Sprintf("gw-%d", revision), Labels: d.Spec.Template.Labels,
			Annotations: map[string]string{
				revisionAnnotation:            fmt.Sprint(revision),
				render.AnnotationPodHash:      d.Annotations[render.AnnotationPodHash],
				render.AnnotationGatewayImage: d.Annotations[render.AnnotationGatewayImage],
			},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment"))},
		},
		Spec: appsv1.ReplicaSetSpec{Replicas: new(int32(pods)), Selector: d.Spec.Selector, Template: d.Spec.Template},
	}
	c.create(t, set)
	for i := range pods {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: c.ns, Name: fmt.Sprintf("%s-%d", set.Name, i), Labels: d.Spec.Template.Labels,
				OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(set, appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))},
			},
			Spec: *d.Spec.Template.Spec.DeepCopy(),
		}
		c.create(t, pod)
		c.patchStatus(t, pod, c.ns, pod.Name, fmt.Sprintf(`{"status":{"phase":"Running","podIP":"10.0.%d.%d"}}`, revision, i))
	}
	return set
}

// turn lets the controllers look once: the Deployment's and ReplicaSets' see what is declared, and the kubelet starts one
// container that is declared anew.
func (c *gatewayCluster) turn(ctx context.Context) error {
	d := &appsv1.Deployment{}
	if err := c.Get(ctx, client.ObjectKey{Namespace: c.ns, Name: "gw"}, d); err != nil {
		return err
	}
	d.Status.ObservedGeneration, d.Status.Replicas, d.Status.ReadyReplicas, d.Status.AvailableReplicas = d.Generation, *d.Spec.Replicas, *d.Spec.Replicas, *d.Spec.Replicas
	errs := []error{c.Status().Update(ctx, d)}
	sets := &appsv1.ReplicaSetList{}
	errs = append(errs, c.List(ctx, sets, client.InNamespace(c.ns)))
	for i := range sets.Items {
		sets.Items[i].Status.ObservedGeneration = sets.Items[i].Generation
		errs = append(errs, c.Status().Update(ctx, &sets.Items[i]))
	}
	pods := &corev1.PodList{}
	errs = append(errs, c.List(ctx, pods, client.InNamespace(c.ns), client.MatchingLabels(render.GatewayPodLabels("gw"))))
	away := 0
	for i := range pods.Items {
		pod := &pods.Items[i]
		image, running := pod.Spec.Containers[0].Image, ""
		if len(pod.Status.ContainerStatuses) > 0 {
			running = pod.Status.ContainerStatuses[0].Image
		}
		if image == running {
			continue
		}
		away++
		ready := image != c.broken
		c.started[pod.Name]++
		pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: render.GatewayContainer, Image: image, ContainerID: fmt.Sprintf("c://%s-%d", pod.Name, c.started[pod.Name]), Ready: ready}}
		pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		if !ready {
			pod.Status.Conditions[0].Status = corev1.ConditionFalse
			pod.Status.ContainerStatuses[0].State.Waiting = &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff"}
		}
		errs = append(errs, c.Status().Update(ctx, pod))
	}
	c.most = max(c.most, away)
	return errors.Join(errs...)
}

// until takes turns until done is content.
func (c *gatewayCluster) until(t *testing.T, done func() error) {
	t.Helper()
	eventually(t, func() error {
		// A conflict with the operator's writes is gone at the next turn.
		return errors.Join(c.turn(t.Context()), done())
	})
}

func newGatewayCluster(t *testing.T, w *world, ns string, pods int) *gatewayCluster {
	t.Helper()
	readyGateway(t, w, ns)
	w.patch(t, &rdv.Gateway{}, ns, "gw", fmt.Sprintf(`{"spec":{"replicas":%d,"admission":{"image":"gateway:1"}}}`, pods))
	eventually(t, func() error {
		if d := read(t, w, ns, "gw", &appsv1.Deployment{}); d.Annotations[render.AnnotationGatewayImage] != "gateway:1" || *d.Spec.Replicas != int32(pods) {
			return fmt.Errorf("the Deployment is %v", d.Annotations)
		}
		return nil
	})
	c := &gatewayCluster{world: w, ns: ns, started: map[string]int{}}
	c.replicaSet(t, 1, pods)
	c.until(t, func() error { return nil })
	c.most = 0
	c.settled(t, ns)
	return c
}

// inPlace waits until the image is in the pods that there were, and nothing is left to roll.
func (c *gatewayCluster) inPlace(t *testing.T, set, image string, pods int) {
	t.Helper()
	c.until(t, func() error {
		d := read(t, c.world, c.ns, "gw", &appsv1.Deployment{})
		rs := read(t, c.world, c.ns, set, &appsv1.ReplicaSet{})
		switch {
		case d.Spec.Paused || d.Annotations[render.AnnotationRolling] != "":
			return fmt.Errorf("the Deployment is paused still: %v", d.Annotations)
		case d.Spec.Template.Spec.Containers[0].Image != image:
			return fmt.Errorf("the Deployment has image %s", d.Spec.Template.Spec.Containers[0].Image)
		case !equality.Semantic.DeepEqual(d.Spec.Template, rs.Spec.Template):
			return errors.New("the Deployment would roll: its template is not its ReplicaSet's")
		}
		for i := range pods {
			if got := read(t, c.world, c.ns, fmt.Sprintf("%s-%d", set, i), &corev1.Pod{}).Spec.Containers[0].Image; got != image {
				return fmt.Errorf("pod %d has image %s", i, got)
			}
		}
		if r := read(t, c.world, c.ns, "gw", &rdv.Gateway{}).Status.Rollout; r != nil {
			return fmt.Errorf("the rollout is not over: %+v", r)
		}
		return nil
	})
}

func TestGatewayImageInPlace(t *testing.T) {
	w, ns := start(t)
	c := newGatewayCluster(t, w, ns, 3)
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"admission":{"image":"gateway:2"}}}`)
	var told string
	c.until(t, func() error {
		if r := read(t, w, ns, "gw", &rdv.Gateway{}).Status.Rollout; r != nil && r.InPlace && r.UpdatedPods == 1 {
			told = r.Summary
			return nil
		}
		return errors.New("no progress shown")
	})
	if told != "1/3 in place" {
		t.Errorf("summary %q", told)
	}
	c.inPlace(t, "gw-1", "gateway:2", 3)
	w.event(t, ns, "gw", eventRolloutBegun, "new image gateway:2")
	w.event(t, ns, "gw", eventRolloutFinished, "gateway gateway:2")
	if c.most != 1 {
		t.Errorf("%d pods were away at one time", c.most)
	}
	for pod, n := range c.started {
		if n != 2 {
			t.Errorf("pod %s started its gateway container %d times", pod, n)
		}
	}
	before := w.settled(t, ns)
	w.poke(t, &rdv.Gateway{}, ns, "gw")
	w.onlyChanges(t, "nothing", ns, before, "*v1alpha1.Gateway/gw")

	// A broken image stops at the first pod, says so, and can be taken back.
	c.broken = "gateway:broken"
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"admission":{"image":"gateway:broken"}}}`)
	c.until(t, func() error {
		if m := c.reconciling(t); !strings.Contains(m, "1 of 3 pods has the new image gateway:broken") || !strings.Contains(m, "ImagePullBackOff") {
			return fmt.Errorf("Reconciling says %q", m)
		}
		return nil
	})
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"admission":{"image":"gateway:2"}}}`)
	c.inPlace(t, "gw-1", "gateway:2", 3)
	if c.started["gw-1-0"]+c.started["gw-1-1"]+c.started["gw-1-2"] != 8 {
		t.Errorf("more than one pod was touched: %v", c.started)
	}
}

// An earlier ReplicaSet with the very template that is now to be had must not be taken for it: its pods would come new.
func TestGatewayImageInPlaceWithAnEarlierTwin(t *testing.T) {
	w, ns := start(t)
	c := newGatewayCluster(t, w, ns, 1)
	set := read(t, w, ns, "gw-1", &appsv1.ReplicaSet{})
	twin := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "gw-0", Labels: set.Labels, Annotations: map[string]string{}, OwnerReferences: set.OwnerReferences},
		Spec:       *set.Spec.DeepCopy(),
	}
	for k, v := range set.Annotations {
		twin.Annotations[k] = v
	}
	twin.Annotations[revisionAnnotation], twin.Annotations[render.AnnotationGatewayImage] = "0", "gateway:0"
	twin.Spec.Replicas, twin.Spec.Template.Spec.Containers[0].Image = new(int32(0)), "gateway:0"
	w.create(t, twin)
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"admission":{"image":"gateway:0"}}}`)
	c.inPlace(t, "gw-1", "gateway:0", 1)
	if twin = read(t, w, ns, "gw-0", &appsv1.ReplicaSet{}); equality.Semantic.DeepEqual(twin.Spec.Template, read(t, w, ns, "gw", &appsv1.Deployment{}).Spec.Template) {
		t.Error("the Deployment would take the earlier ReplicaSet")
	}
}

// Brokers send nobody to a gateway that is not Ready: it stays so while any of its pods serves.
func TestGatewayStaysReadyWhileItChanges(t *testing.T) {
	w, ns := start(t)
	readyGateway(t, w, ns)
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"replicas":3}}`)
	// The Deployment's controller, nobody here, has seen nothing of it.
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReconciling, metav1.ConditionTrue, rdv.ReasonPodsNotReady, "1 of 3 gateway pods are ready")
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	w.patchStatus(t, &appsv1.Deployment{}, ns, "gw", `{"status":{"readyReplicas":0,"availableReplicas":0}}`)
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReady, metav1.ConditionFalse, rdv.ReasonProgressing, "")
}

func (c *gatewayCluster) reconciling(t *testing.T) string {
	t.Helper()
	for _, condition := range read(t, c.world, c.ns, "gw", &rdv.Gateway{}).Status.Conditions {
		if condition.Type == rdv.ConditionReconciling && condition.Status == metav1.ConditionTrue {
			return condition.Message
		}
	}
	return ""
}

// Anything else that is new in the template needs new pods; the old ones drain, and the status says for how long.
func TestGatewayRollout(t *testing.T) {
	w, ns := start(t)
	c := newGatewayCluster(t, w, ns, 2)
	w.patch(t, &rdv.Gateway{}, ns, "gw", `{"spec":{"relay":{"image":"relay:2"},"admission":{"image":"gateway:2"}}}`)
	c.until(t, func() error {
		d := read(t, w, ns, "gw", &appsv1.Deployment{})
		if d.Spec.Paused || d.Spec.Template.Spec.InitContainers[0].Image != "relay:2" || d.Spec.Template.Spec.Containers[0].Image != "gateway:2" {
			return errors.New("the Deployment does not roll")
		}
		return nil
	})
	c.replicaSet(t, 2, 1)
	c.until(t, func() error {
		r := read(t, w, ns, "gw", &rdv.Gateway{}).Status.Rollout
		if r == nil || r.Summary != "1/3 updated" || r.RelayImage != "relay:2" || r.GatewayImage != "gateway:2" || r.InPlace {
			return fmt.Errorf("rollout is %+v", r)
		}
		return nil
	})

	// Brokers tell of sessions: the emptier pod is the cheaper one.
	w.patchStatus(t, &rdv.Gateway{}, ns, "gw", `{"status":{"instances":[{"name":"10-0-1-0","workspace":"demo","sessions":14},{"name":"10-0-1-1","workspace":"demo","sessions":2}]}}`)
	eventually(t, func() error {
		for pod, want := range map[string]string{"gw-1-0": "14", "gw-1-1": "2", "gw-2-0": ""} {
			if got := read(t, w, ns, pod, &corev1.Pod{}).Annotations[corev1.PodDeletionCost]; got != want {
				return fmt.Errorf("deletion cost of %s is %q", pod, got)
			}
		}
		return nil
	})
	// Its node is the kubelet's, so that it drains and is not just gone.
	for _, pod := range []string{"gw-1-0", "gw-1-1"} {
		if err := w.SubResource("binding").Create(t.Context(), read(t, w, ns, pod, &corev1.Pod{}), &corev1.Binding{Target: corev1.ObjectReference{Kind: "Node", Name: "node"}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Delete(t.Context(), read(t, w, ns, "gw-1-0", &corev1.Pod{}), client.GracePeriodSeconds(3600)); err != nil {
		t.Fatal(err)
	}
	until := read(t, w, ns, "gw-1-0", &corev1.Pod{}).DeletionTimestamp.Add(-30 * time.Second)
	c.until(t, func() error {
		want := "1 of 2 pods updated; 1 pod drains: 14 sessions, until " + until.UTC().Format("15:04 UTC on January 2")
		if got := c.reconciling(t); !strings.HasPrefix(got, want) {
			return fmt.Errorf("Reconciling says %q, want %q", got, want)
		}
		r := read(t, w, ns, "gw", &rdv.Gateway{}).Status.Rollout
		if text, _ := json.Marshal(r.Draining); r.Summary != "1/2 updated, 1 drains (14)" || len(r.Draining) != 1 || r.Draining[0].Pod != "gw-1-0" || !r.Draining[0].Until.Time.Equal(until) {
			return fmt.Errorf("rollout is %+v, draining %s", r, text)
		}
		return nil
	})
	for _, pod := range []string{"gw-1-0", "gw-1-1"} {
		if err := w.Delete(t.Context(), read(t, w, ns, pod, &corev1.Pod{}), client.GracePeriodSeconds(0)); err != nil {
			t.Fatal(err)
		}
	}
	c.until(t, func() error {
		if m := c.reconciling(t); m != "" {
			return fmt.Errorf("Reconciling says %q", m)
		}
		return nil
	})
}
