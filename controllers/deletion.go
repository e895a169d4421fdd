package controllers

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
)

// An object of the four kinds carries a finalizer from the first pass on, before anything is made for it. Once it is being
// deleted, it takes no new session, and the finalizer goes when nobody is on it; then garbage collection removes its
// children. What ends the wait earlier is in plan.Depart.
// +kubebuilder:rbac:groups=rendezvous.dev,resources=workspaces;hostpools;gateways,verbs=patch
// +kubebuilder:rbac:groups="",resources=namespaces,verbs=get
// +kubebuilder:rbac:groups=apps,resources=deployments,verbs=delete

// departureRetry is how soon it is looked again at an object that waits: neither a namespace that is now being deleted, nor
// an annotation of another object, wakes it.
const departureRetry = 5 * time.Second

// hold puts the finalizer on an object. It changes obj to be as it is then.
func (b *base) hold(ctx context.Context, obj client.Object) error {
	if slices.Contains(obj.GetFinalizers(), rdv.Finalizer) {
		return nil
	}
	before := obj.DeepCopyObject().(client.Object)
	obj.SetFinalizers(append(slices.Clone(obj.GetFinalizers()), rdv.Finalizer))
	return b.patchMeta(ctx, before, obj)
}

// release takes the finalizer off.
func (b *base) release(ctx context.Context, obj client.Object) error {
	before := obj.DeepCopyObject().(client.Object)
	obj.SetFinalizers(slices.DeleteFunc(slices.Clone(obj.GetFinalizers()), func(f string) bool { return f == rdv.Finalizer }))
	return b.patchMeta(ctx, before, obj)
}

// patchMeta writes what differs, if the object is still as it was seen. A pass over one that has changed is made again. The
// field manager is another than that of applies, which state all that they want.
func (b *base) patchMeta(ctx context.Context, before, after client.Object) error {
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	if err := b.Client.Patch(ctx, after, patch, client.FieldOwner(FieldManager+"-deletion")); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("metadata of %T %q: %w", after, after.GetName(), err)
	}
	return nil
}

// departure is a pass over one object that is being deleted.
type departure struct {
	plan.Departure
	kind   string // as kubectl takes it
	what   string // is waited for, such as "2 sessions on linux-0"; may be empty where there are none
	orphan string // why nobody counts its sessions, where that is so
}

// depart decides about an object that is being deleted: unless why is plan.Waits, its finalizer may be taken off. message says
// what is waited for.
func (b *base) depart(ctx context.Context, obj client.Object, d departure) (why plan.Cause, message string, next time.Duration, err error) {
	d.Since = obj.GetDeletionTimestamp().Time
	d.Orphans = d.Orphans || slices.Contains(obj.GetFinalizers(), metav1.FinalizerOrphanDependents)
	d.Skip = d.Skip || skipsDrain(obj)
	if !d.Skip {
		if d.NamespaceGoing, err = b.namespaceGoing(ctx, obj.GetNamespace()); err != nil {
			return plan.Waits, "", 0, err
		}
	}
	d.Uncounted = d.orphan != ""
	why, next = plan.Depart(d.Departure, b.now())
	lost := func(reason, because string) {
		if d.Sessions > 0 {
			b.events.Eventf(obj, nil, corev1.EventTypeWarning, reason, actionDrain, "deleted with %s: %s", d.what, because)
		}
	}
	switch why {
	case plan.Waits:
		if next == 0 || next > departureRetry {
			next = departureRetry
		}
		until := d.Since.Add(d.Deadline).UTC().Format("15:04 MST on January 2")
		message = fmt.Sprintf("is being deleted: waits for %s to end, until %s at the latest. To log people off: kubectl delete session; not to wait: kubectl annotate %s %s %s=true",
			d.what, until, d.kind, obj.GetName(), rdv.AnnotationSkipDrain)
		if d.Sessions == 0 {
			message = "is being deleted: waits for word that no new session begins"
		}
		return why, message, next, nil
	case plan.WasSkipped:
		lost(eventDrainSkipped, "annotation "+rdv.AnnotationSkipDrain)
	case plan.WasDeadline:
		lost(eventDrainDeadline, fmt.Sprintf("the deadline of %v has passed", d.Deadline))
	case plan.WasUncounted:
		lost(eventDrainUncounted, d.orphan)
	}
	return why, "", 0, nil
}

// skipsDrain says whether an object's annotation asks not to wait for its sessions.
func skipsDrain(obj metav1.Object) bool {
	return strings.EqualFold(obj.GetAnnotations()[rdv.AnnotationSkipDrain], "true")
}

func drainDeadline(seconds *int32) time.Duration {
	if seconds == nil {
		return rdv.DefaultDrainDeadline
	}
	return time.Duration(*seconds) * time.Second
}

// countedSessions are the sessions on a host of which somebody would say when they end: not those that a broker wrote down
// before all brokers went, nor those on a machine that has been off for a while.
func countedSessions(host *rdv.SessionHost, now time.Time) int32 {
	agent := host.Status.Agent
	if agent == nil || agent.LastHeartbeat != nil && now.Sub(agent.LastHeartbeat.Time) > heartbeatLost {
		return 0
	}
	return agent.Sessions
}

// onHosts sums up the sessions on hosts, and says where they are. settled says that no host takes a new one.
func onHosts(hosts []rdv.SessionHost, now time.Time) (sessions int32, what string, settled bool) {
	var names []string
	settled = true
	for i := range hosts {
		host := &hosts[i]
		if n := countedSessions(host, now); n > 0 {
			sessions += n
			names = append(names, host.Name)
		}
		if agent := host.Status.Agent; agent != nil && agent.Connected && !agent.DrainAcknowledged {
			settled = false
		}
	}
	return sessions, fmt.Sprintf("%s on %s", count(int(sessions), "session"), firstOf(names)), settled
}

// leavingConditions are those of an object that waits for its sessions: what else is known of it stays.
func leavingConditions(now time.Time, before []metav1.Condition, generation int64, message string, others ...metav1.Condition) []metav1.Condition {
	set := append([]metav1.Condition{
		isFalse(rdv.ConditionReady, rdv.ReasonTerminating, message),
		isTrue(rdv.ConditionReconciling, rdv.ReasonTerminating, message),
		isFalse(rdv.ConditionStalled, rdv.ReasonTerminating, ""),
		isTrue(rdv.ConditionDraining, rdv.ReasonTerminating, message),
	}, others...)
	after := slices.Clone(before)
	for _, c := range set {
		c.ObservedGeneration, c.LastTransitionTime = generation, metav1.NewTime(now)
		if i := slices.IndexFunc(after, func(old metav1.Condition) bool { return old.Type == c.Type }); i < 0 {
			after = append(after, c)
		} else {
			if after[i].Status == c.Status {
				c.LastTransitionTime = after[i].LastTransitionTime
			}
			after[i] = c
		}
	}
	return after
}

// tellDraining records, once, that an object has begun to wait for its sessions.
func (b *base) tellDraining(obj client.Object, before []metav1.Condition, message string) {
	for _, c := range before {
		if c.Type == rdv.ConditionDraining && c.Reason == rdv.ReasonTerminating {
			return
		}
	}
	b.tell(obj, eventDraining, actionDrain, "%s", message)
}

// namespaceOf is the metadata of a namespace, past the cache: the operator may be held to some.
func (b *base) namespaceOf(ctx context.Context, namespace string) (*metav1.PartialObjectMetadata, error) {
	ns := metadataOf(corev1.SchemeGroupVersion.WithKind("Namespace"))
	err := b.Live.Get(ctx, types.NamespacedName{Name: namespace}, ns)
	if err != nil {
		return nil, fmt.Errorf("get Namespace %q: %w", namespace, err)
	}
	return ns, nil
}

// namespaceGoing says that a namespace is being deleted: whoever did that meant everything in it.
func (b *base) namespaceGoing(ctx context.Context, namespace string) (bool, error) {
	ns, err := b.namespaceOf(ctx, namespace)
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	return err == nil && !ns.DeletionTimestamp.IsZero(), err
}

// namespaceRefs remembers the UIDs of namespaces for a while. It is safe for concurrent use.
type namespaceRefs struct {
	mu    sync.Mutex
	known map[string]namespaceRef
}

type namespaceRef struct {
	ref metav1.OwnerReference
	at  time.Time
}

const namespaceRefsFor = time.Minute

// namespaceRef makes the namespace a second owner of a session host's pod. A deletion in the foreground (Argo CD's default)
// removes children before their owner, finalizer or not: but none that has another owner, which a namespace always is.
func (b *base) namespaceRef(ctx context.Context, namespace string) (metav1.OwnerReference, error) {
	n := b.namespaces
	n.mu.Lock()
	known, ok := n.known[namespace]
	n.mu.Unlock()
	if ok && b.now().Sub(known.at) < namespaceRefsFor {
		return known.ref, nil
	}
	ns, err := b.namespaceOf(ctx, namespace)
	if err != nil {
		return metav1.OwnerReference{}, err
	}
	ref := metav1.OwnerReference{APIVersion: "v1", Kind: "Namespace", Name: ns.Name, UID: ns.UID}
	n.mu.Lock()
	n.known[namespace] = namespaceRef{ref, b.now()}
	n.mu.Unlock()
	return ref, nil
}

// onlyItsNamespaces says that an object has owners, and that each is a namespace: its other owners are gone.
func onlyItsNamespaces(obj metav1.Object) bool {
	for _, ref := range obj.GetOwnerReferences() {
		if ref.Kind != "Namespace" || ref.APIVersion != "v1" {
			return false
		}
	}
	return len(obj.GetOwnerReferences()) > 0
}

// leave lets a Workspace go once no session is on its hosts.
func (r *workspaceReconciler) leave(ctx context.Context, ws *rdv.Workspace) (ctrl.Result, error) {
	pools, hosts := &rdv.HostPoolList{}, []rdv.SessionHost{}
	inHere := client.InNamespace(ws.Namespace)
	if err := r.Client.List(ctx, pools, inHere, client.MatchingFields{indexWorkspace: ws.Name}); err != nil {
		return ctrl.Result{}, fmt.Errorf("list HostPools: %w", err)
	}
	for i := range pools.Items {
		of, err := r.hostsOf(ctx, &pools.Items[i])
		if err != nil {
			return ctrl.Result{}, err
		}
		hosts = append(hosts, of...)
	}
	d := departure{kind: "workspace", Departure: plan.Departure{Deadline: drainDeadline(ws.Spec.DrainDeadlineSeconds)}}
	d.Sessions, d.what, d.Settled = onHosts(hosts, r.now())
	why, message, next, err := r.depart(ctx, ws, d)
	switch {
	case err != nil:
		return ctrl.Result{}, err
	case why != plan.Waits:
		return ctrl.Result{}, r.release(ctx, ws)
	}
	r.tellDraining(ws, ws.Status.Conditions, message)
	status := ws.Status.DeepCopy()
	status.ObservedGeneration = ws.Generation
	status.Conditions = leavingConditions(r.now(), ws.Status.Conditions, ws.Generation, message)
	return ctrl.Result{RequeueAfter: next}, r.writeChangedStatus(ctx, ws, &ws.Status, status)
}

// hostsOf are the SessionHosts that name a pool, by name. They are the cache's own: not to be changed.
func (b *base) hostsOf(ctx context.Context, pool *rdv.HostPool) ([]rdv.SessionHost, error) {
	list := &rdv.SessionHostList{}
	// A pool may have a thousand, and any of them may bring a pass: they are read where they are.
	err := b.Client.List(ctx, list, client.InNamespace(pool.Namespace), client.MatchingFields{indexHostPool: pool.Name}, client.UnsafeDisableDeepCopy)
	if err != nil {
		return nil, fmt.Errorf("list SessionHosts: %w", err)
	}
	slices.SortFunc(list.Items, func(a, b rdv.SessionHost) int { return strings.Compare(a.Name, b.Name) })
	return list.Items, nil
}

// leave lets a HostPool go once no session is on its hosts. Those that it made are deleted meanwhile: each drains and goes, the
// empty ones at once.
func (r *hostPoolReconciler) leave(ctx context.Context, pool *rdv.HostPool) (ctrl.Result, error) {
	hosts, err := r.hostsOf(ctx, pool)
	if err != nil {
		return ctrl.Result{}, err
	}
	d := departure{kind: "hostpool", Departure: plan.Departure{Deadline: drainDeadline(pool.Spec.DrainDeadlineSeconds)}}
	d.Sessions, d.what, d.Settled = onHosts(hosts, r.now())
	why, message, next, err := r.depart(ctx, pool, d)
	switch {
	case err != nil:
		return ctrl.Result{}, err
	case why != plan.Waits:
		return ctrl.Result{}, r.release(ctx, pool)
	}
	for i := range hosts {
		host := &hosts[i]
		if !metav1.IsControlledBy(host, pool) || !host.DeletionTimestamp.IsZero() {
			continue
		}
		if err := r.Delete(ctx, host.DeepCopy()); err != nil {
			return ctrl.Result{}, err
		}
	}
	r.tellDraining(pool, pool.Status.Conditions, message)
	status := pool.Status.DeepCopy()
	status.ObservedGeneration, status.Hosts, status.Sessions = pool.Generation, int32(len(hosts)), d.Sessions
	status.ReadyHosts, status.FreePlaces = 0, 0
	status.Conditions = leavingConditions(r.now(), pool.Status.Conditions, pool.Generation, message,
		isFalse(rdv.ConditionAvailable, rdv.ReasonTerminating, message))
	return ctrl.Result{RequeueAfter: next}, r.writeChangedStatus(ctx, pool, &pool.Status, status)
}

// leave lets a SessionHost go once no session is on it, with its pod.
func (r *sessionHostReconciler) leave(ctx context.Context, host *rdv.SessionHost) (ctrl.Result, error) {
	d := departure{kind: "sessionhost", Departure: plan.Departure{Deadline: rdv.DefaultDrainDeadline, Sessions: countedSessions(host, r.now())}}
	pool, err := getOrNil(ctx, r.Client, host.Namespace, host.Spec.HostPoolRef.Name, &rdv.HostPool{})
	if err != nil {
		return ctrl.Result{}, err
	}
	switch {
	case pool == nil || rdv.Gone(pool):
		d.orphan = fmt.Sprintf("its HostPool %q is gone", host.Spec.HostPoolRef.Name)
	default:
		d.Deadline = drainDeadline(pool.Spec.DrainDeadlineSeconds)
		d.Skip = rdv.Leaving(pool) && skipsDrain(pool)
		ws, err := getOrNil(ctx, r.Client, host.Namespace, pool.Spec.WorkspaceRef.Name, &rdv.Workspace{})
		if err != nil {
			return ctrl.Result{}, err
		}
		if ws == nil || rdv.Gone(ws) {
			d.orphan = fmt.Sprintf("its Workspace %q is gone", pool.Spec.WorkspaceRef.Name)
		}
	}
	d.Skip = d.Skip || revoked(host) // whoever has its key may say that sessions are there
	agent := host.Status.Agent
	d.what = count(int(d.Sessions), "session")
	d.Settled = agent == nil || agent.Connected && agent.DrainAcknowledged && (host.Spec.Retiring || agent.AcknowledgedGeneration == host.Generation)
	why, message, next, err := r.depart(ctx, host, d)
	if err != nil {
		return ctrl.Result{}, err
	}
	if why != plan.Waits {
		if err := r.recordAssignment(ctx, host); err != nil {
			return ctrl.Result{}, err
		}
		if err := r.leaveClaims(ctx, host, pool); err != nil {
			return ctrl.Result{}, err
		}
		if why != plan.WasOrphaning {
			if err := r.deletePodOf(ctx, host); err != nil {
				return ctrl.Result{}, err
			}
		}
		return ctrl.Result{}, r.release(ctx, host)
	}
	if d.Sessions > 0 {
		r.tellDraining(host, host.Status.Conditions, message)
	}
	s := &sessionHostScope{host: host}
	connected := r.connectedCondition(s)
	status := host.Status.DeepCopy()
	status.ObservedGeneration = host.Generation
	status.Conditions = leavingConditions(r.now(), host.Status.Conditions, host.Generation, message, connected, healthyCondition(s, connected))
	return ctrl.Result{RequeueAfter: next}, r.writeChangedStatus(ctx, host, &host.Status, status, "enrolment", "agent")
}

// deletePodOf removes a host's pod, which has another owner besides. A deletion in the foreground may have taken the host off
// its owners: its labels tell.
func (r *sessionHostReconciler) deletePodOf(ctx context.Context, host *rdv.SessionHost) error {
	pod, err := r.livePod(ctx, host)
	if err != nil || pod == nil || !pod.DeletionTimestamp.IsZero() {
		return err
	}
	ours := pod.Labels[rdv.LabelManagedBy] == rdv.ManagedBy && pod.Labels[rdv.LabelSessionHost] == host.Name
	if !metav1.IsControlledBy(pod, host) && !(ours && onlyItsNamespaces(pod)) {
		return nil
	}
	return r.DeleteByUID(ctx, pod)
}

// leave lets a Gateway go once its pods have drained. They do that themselves, when they are told to end: their relays take
// nobody any more and wait for their last session, for spec.relay.drain.deadlineSeconds at most.
func (r *gatewayReconciler) leave(ctx context.Context, gw *rdv.Gateway) (ctrl.Result, error) {
	s := &gatewayScope{gw: gw}
	var err error
	if s.deployment, err = getOrNil(ctx, r.Client, gw.Namespace, gw.Name, &appsv1.Deployment{}); err != nil {
		return ctrl.Result{}, err
	}
	want, err := r.render.GatewayDeployment(gw, nil)
	if err != nil {
		return ctrl.Result{}, err
	}
	if err := r.seePods(ctx, s, want); err != nil {
		return ctrl.Result{}, err
	}
	d := departure{kind: "gateways.rendezvous.dev", Departure: plan.Departure{Deadline: render.GatewayDrain(gw) + gatewayGoneGrace, Settled: true}}
	d.Orphans = s.deployment != nil && s.deployment.DeletionTimestamp.IsZero() && !metav1.IsControlledBy(s.deployment, gw)
	left := slices.Concat(s.pods.serving, s.pods.leaving)
	var sessions int32
	for _, p := range left {
		sessions += p.Sessions
	}
	// A pod that is there has its reasons, whatever the brokers have heard.
	d.Sessions, d.what = int32(len(left)), fmt.Sprintf("%s with %s", count(len(left), "pod"), count(int(sessions), "session"))
	why, message, next, err := r.depart(ctx, gw, d)
	if err != nil {
		return ctrl.Result{}, err
	}
	if why == plan.WasOrphaning {
		return ctrl.Result{}, r.release(ctx, gw)
	}
	if why != plan.Waits {
		for _, p := range left { // who doesn't wait for sessions doesn't wait for their hours of grace either
			if err := r.DeleteByUID(ctx, p.Pod, client.GracePeriodSeconds(render.GatewayGraceBeyondDrain)); err != nil {
				return ctrl.Result{}, err
			}
		}
		return ctrl.Result{}, r.release(ctx, gw)
	}
	if d := s.deployment; d != nil && metav1.IsControlledBy(d, gw) && d.DeletionTimestamp.IsZero() {
		if err := r.DeleteByUID(ctx, d, client.PropagationPolicy(metav1.DeletePropagationBackground)); err != nil {
			return ctrl.Result{}, err
		}
	}
	r.tellDraining(gw, gw.Status.Conditions, message)
	status := gw.Status.DeepCopy()
	status.ObservedGeneration = gw.Generation
	status.Rollout, _ = s.rollout()
	status.Pods = fmt.Sprintf("%d/0", len(left))
	status.Conditions = leavingConditions(r.now(), gw.Status.Conditions, gw.Generation, message,
		isFalse(rdv.ConditionAvailable, rdv.ReasonTerminating, message))
	return ctrl.Result{RequeueAfter: next}, r.writeChangedStatus(ctx, gw, &gw.Status, status, "sessions", "instances")
}

// gatewayGoneGrace is for how much longer than their own deadline a gateway's pods are waited for: one on a node that is lost
// never ends.
const gatewayGoneGrace = 2 * time.Minute
