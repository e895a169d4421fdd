package controllers

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/wire/identity"
)

// revisionAnnotation is where the Deployment controller numbers its ReplicaSets.
const revisionAnnotation = "deployment.kubernetes.io/revision"

// gatewayPods are a Gateway's pods as one pass sees them.
type gatewayPods struct {
	relay   string               // the image that the relays are to run
	image   string               // that the gateway containers are to run
	current *appsv1.ReplicaSet   // the Deployment's newest; nil where there is none
	others  []*appsv1.ReplicaSet // the Deployment's earlier ones
	rolling bool                 // the current pods get a new gateway image in place
	serving []gatewayPod         // by name
	leaving []gatewayPod         // that are on their way out, by name
}

// gatewayPod is one of them.
type gatewayPod struct {
	plan.GatewayPod
	*corev1.Pod
	current bool // of the current ReplicaSet, which is as wanted
}

// seePods finds the pods, how many sessions each has, and whether they are as wanted.
func (r *gatewayReconciler) seePods(ctx context.Context, s *gatewayScope, want *appsv1.Deployment) error {
	gw := s.gw
	seen := gatewayPods{relay: want.Spec.Template.Spec.InitContainers[0].Image, image: want.Annotations[render.AnnotationGatewayImage]}
	mine := []client.ListOption{client.InNamespace(gw.Namespace), client.MatchingLabels(render.GatewayPodLabels(gw.Name))}
	sets := &appsv1.ReplicaSetList{}
	if err := r.Client.List(ctx, sets, mine...); err != nil {
		return fmt.Errorf("list ReplicaSets: %w", err)
	}
	for i := range sets.Items {
		set := &sets.Items[i]
		switch {
		case s.deployment == nil || !metav1.IsControlledBy(set, s.deployment):
			continue
		case seen.current == nil || revision(set) > revision(seen.current):
			if seen.current != nil {
				seen.others = append(seen.others, seen.current)
			}
			seen.current = set
		default:
			seen.others = append(seen.others, set)
		}
	}
	seen.rolling = inPlace(s.deployment, seen.current, want)
	list := &corev1.PodList{}
	pods := client.Reader(r.Client)
	if seen.rolling { // a cache that lags could have two pods go at one time
		pods = r.Live
	}
	if err := pods.List(ctx, list, mine...); err != nil {
		return fmt.Errorf("list Pods: %w", err)
	}
	sessions := map[string]int32{}
	for _, i := range gw.Status.Instances {
		if slices.Contains(gw.Status.Workspaces, i.Workspace) { // what one that left wrote last is still there
			sessions[i.Name] += i.Sessions
		}
	}
	asWanted := seen.current != nil && seen.current.Annotations[render.AnnotationPodHash] == want.Annotations[render.AnnotationPodHash] &&
		(seen.rolling || seen.current.Annotations[render.AnnotationGatewayImage] == seen.image)
	for i := range list.Items {
		pod := &list.Items[i]
		if pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
			continue
		}
		p := gatewayPod{Pod: pod, current: asWanted && metav1.IsControlledBy(pod, seen.current)}
		p.GatewayPod = seeGatewayPod(pod, seen.image, sessions[instanceOf(pod)])
		if pod.DeletionTimestamp.IsZero() {
			seen.serving = append(seen.serving, p)
		} else {
			seen.leaving = append(seen.leaving, p)
		}
	}
	byName := func(a, b gatewayPod) int { return cmp.Compare(a.Pod.Name, b.Pod.Name) }
	slices.SortFunc(seen.serving, byName)
	slices.SortFunc(seen.leaving, byName)
	s.pods = seen
	return nil
}

// inPlace says whether what stands between the Deployment and what is wanted is the gateway container's image alone, so
// that the pods can stay. So it is, too, while a change in place has begun, whatever image it was for.
func inPlace(d *appsv1.Deployment, current *appsv1.ReplicaSet, want *appsv1.Deployment) bool {
	if d == nil || current == nil {
		return false
	}
	hash := want.Annotations[render.AnnotationPodHash]
	return d.Annotations[render.AnnotationPodHash] == hash && current.Annotations[render.AnnotationPodHash] == hash &&
		(d.Annotations[render.AnnotationRolling] != "" || d.Annotations[render.AnnotationGatewayImage] != want.Annotations[render.AnnotationGatewayImage])
}

// seeGatewayPod says how a pod stands towards the image that its gateway container is to run.
func seeGatewayPod(pod *corev1.Pod, image string, sessions int32) plan.GatewayPod {
	p := plan.GatewayPod{Name: pod.Name, Sessions: sessions, Updated: pod.Annotations[render.AnnotationGatewayImage] == image}
	for _, c := range pod.Spec.Containers {
		if c.Name == render.GatewayContainer && c.Image == image {
			p.Updated = true
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			p.Ready = c.Status == corev1.ConditionTrue
		}
	}
	id := gatewayContainerID(pod)
	p.Back = p.Updated && p.Ready && id != "" && id != pod.Annotations[render.AnnotationReplaced]
	cost, _ := strconv.ParseInt(pod.Annotations[corev1.PodDeletionCost], 10, 32) // what can't be read counts as 0 to Kubernetes, too
	p.Cost = int32(cost)
	return p
}

func gatewayContainerID(pod *corev1.Pod) string {
	for _, c := range pod.Status.ContainerStatuses {
		if c.Name == render.GatewayContainer {
			return c.ContainerID
		}
	}
	return ""
}

// instanceOf is the name by which brokers know a pod, empty while it has no address.
func instanceOf(pod *corev1.Pod) string {
	addr, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		return ""
	}
	return identity.InstanceName(addr)
}

func revision(set *appsv1.ReplicaSet) int64 {
	n, _ := strconv.ParseInt(set.Annotations[revisionAnnotation], 10, 64)
	return n
}

// writeDeletionCosts tells Kubernetes which pods to take first when there are too many.
func (r *gatewayReconciler) writeDeletionCosts(ctx context.Context, s *gatewayScope) error {
	pods := make([]plan.GatewayPod, len(s.pods.serving))
	for i, p := range s.pods.serving {
		pods[i] = p.GatewayPod
	}
	costs := plan.DeletionCosts(pods)
	for _, p := range s.pods.serving {
		cost, change := costs[p.Pod.Name]
		if !change {
			continue
		}
		err := r.annotate(ctx, p.Pod, map[string]string{corev1.PodDeletionCost: strconv.Itoa(int(cost))}, nil)
		if err != nil {
			return err
		}
	}
	return nil
}

// roll declares the Deployment. Where only the gateway container's image is new, it is given to the pods that there are:
// Kubernetes lets a pod's images change, and restarts that container alone, so the relay beside it and its sessions go on.
// For its Deployment to see nothing to roll in the end, the ReplicaSet's template is changed to be the Deployment's new one.
func (r *gatewayReconciler) roll(ctx context.Context, s *gatewayScope, want *appsv1.Deployment) error {
	seen, gw := s.pods, s.gw
	if !seen.rolling {
		return r.applyAll(ctx, &s.pass, gw, want)
	}
	d := s.deployment
	state := plan.Rolling{
		Paused: d.Spec.Paused && d.Annotations[render.AnnotationRolling] != "" && d.Status.ObservedGeneration >= d.Generation,
		Template: seen.current.Annotations[render.AnnotationGatewayImage] == seen.image && seen.current.Status.ObservedGeneration >= seen.current.Generation &&
			!slices.ContainsFunc(seen.others, func(set *appsv1.ReplicaSet) bool { return passesFor(set, seen) }),
	}
	for _, p := range seen.serving {
		if p.current {
			state.Pods = append(state.Pods, p.GatewayPod)
		}
	}
	step, name := plan.RollGateway(state)
	if step == plan.RollFinish {
		return r.applyAll(ctx, &s.pass, gw, want)
	}
	if err := r.applyAll(ctx, &s.pass, gw, render.RollingGatewayDeployment(want, d.Annotations[render.AnnotationGatewayImage])); err != nil {
		return err
	}
	switch step {
	case plan.RollTemplate:
		for _, set := range seen.others {
			if !passesFor(set, seen) {
				continue
			}
			retired := map[string]any{"template": map[string]any{"metadata": map[string]any{"annotations": map[string]string{render.AnnotationRetired: seen.current.Name}}}}
			if err := r.annotate(ctx, set, nil, retired); err != nil {
				return err
			}
		}
		template := map[string]any{"template": map[string]any{"spec": gatewayImage(seen.image)}}
		return r.annotate(ctx, seen.current, map[string]string{render.AnnotationGatewayImage: seen.image}, template)
	case plan.RollPod:
		for _, p := range seen.serving {
			if p.Pod.Name == name {
				return r.annotate(ctx, p.Pod, map[string]string{
					render.AnnotationGatewayImage: seen.image,
					render.AnnotationReplaced:     gatewayContainerID(p.Pod),
				}, gatewayImage(seen.image))
			}
		}
	}
	return nil
}

// passesFor says whether an earlier ReplicaSet would look to the Deployment, which takes the oldest that fits, like the one
// of its new template.
func passesFor(set *appsv1.ReplicaSet, seen gatewayPods) bool {
	return set.Annotations[render.AnnotationPodHash] == seen.current.Annotations[render.AnnotationPodHash] &&
		set.Annotations[render.AnnotationGatewayImage] == seen.image && set.Spec.Template.Annotations[render.AnnotationRetired] == ""
}

func gatewayImage(image string) map[string]any {
	return map[string]any{"containers": []map[string]string{{"name": render.GatewayContainer, "image": image}}}
}

// annotate patches annotations, and the spec where one is given, of a pod or ReplicaSet that is still the one that was
// seen. One that is gone meanwhile is no error.
func (r *gatewayReconciler) annotate(ctx context.Context, obj client.Object, annotations map[string]string, spec any) error {
	patch := map[string]any{"metadata": map[string]any{"uid": obj.GetUID(), "annotations": annotations}}
	if annotations == nil {
		patch["metadata"] = map[string]any{"uid": obj.GetUID()}
	}
	if spec != nil {
		patch["spec"] = spec
	}
	text, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	likeness := obj.DeepCopyObject().(client.Object)
	err = r.Client.Patch(ctx, likeness, client.RawPatch(types.StrategicMergePatchType, text), client.FieldOwner(FieldManager))
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("patch %T %q: %w", obj, obj.GetName(), err)
	}
	return nil
}

// maxDraining bounds what the status lists.
const maxDraining = 32

// rollout is what the status says of pods on their way in and out, and the same as a sentence. It is nil where there are
// none.
func (s *gatewayScope) rollout() (*rdv.GatewayRollout, string) {
	seen := s.pods
	r := &rdv.GatewayRollout{RelayImage: seen.relay, GatewayImage: seen.image, InPlace: seen.rolling}
	trouble := ""
	for _, p := range seen.serving {
		if p.current && (p.Updated || !seen.rolling) {
			r.UpdatedPods++
			if t := podTrouble(p.Pod, ""); t != "" {
				trouble = "; " + t
			}
		} else {
			r.OldPods++
		}
	}
	var sessions int32
	for _, p := range seen.leaving {
		sessions += p.Sessions
		until := p.DeletionTimestamp.Add(-render.GatewayGraceBeyondDrain * time.Second)
		r.Draining = append(r.Draining, rdv.DrainingPod{Pod: p.Pod.Name, Sessions: p.Sessions, Until: metav1.NewTime(until)})
	}
	slices.SortStableFunc(r.Draining, func(a, b rdv.DrainingPod) int { return b.Until.Compare(a.Until.Time) })

	var summary, message []string
	total := r.UpdatedPods + r.OldPods
	switch {
	case seen.rolling:
		summary = append(summary, fmt.Sprintf("%d/%d in place", r.UpdatedPods, total))
		message = append(message, fmt.Sprintf("the gateway container of %d of %d pods has the new image %s; sessions are not touched%s", r.UpdatedPods, total, seen.image, trouble))
	case r.OldPods > 0:
		summary = append(summary, fmt.Sprintf("%d/%d updated", r.UpdatedPods, total))
		message = append(message, fmt.Sprintf("%d of %d pods updated%s", r.UpdatedPods, total, trouble))
	}
	if n := len(r.Draining); n > 0 {
		last := r.Draining[0].Until.UTC().Format("15:04 MST on January 2")
		what := count(int(sessions), "session")
		if sessions == 0 {
			what = "no session of their own, but perhaps agents' connections to other pods"
		}
		text := fmt.Sprintf("%s drain%s: %s, until %s at the latest", count(n, "pod"), plural(n == 1, "s", ""), what, last)
		summary = append(summary, fmt.Sprintf("%d drain%s (%d)", n, plural(n == 1, "s", ""), sessions))
		message = append(message, text)
		r.Draining = r.Draining[:min(n, maxDraining)]
	}
	if len(message) == 0 {
		return nil, ""
	}
	r.Summary = strings.Join(summary, ", ")
	return r, strings.Join(message, "; ")
}

// count is n of a thing.
func count(n int, noun string) string {
	return fmt.Sprintf("%d %s%s", n, noun, plural(n == 1, "", "s"))
}

func plural(one bool, singular, several string) string {
	if one {
		return singular
	}
	return several
}
