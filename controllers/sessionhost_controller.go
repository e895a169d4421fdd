package controllers

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// sessionHostReconciler keeps a SessionHost's own registration token and, where its pool made it, its pod. What the host
// reports is written by the brokers; here it becomes conditions.
type sessionHostReconciler struct {
	base
	rollout rollout
}

// sessionHostScope is one pass over one SessionHost.
type sessionHostScope struct {
	pass
	host *rdv.SessionHost

	// Set by gather.
	pool     *rdv.HostPool
	ws       *rdv.Workspace
	wantPod  *corev1.Pod // nil unless the pool made the host, and its pod can be rendered
	pod      *corev1.Pod // as it is
	feedCA   string
	feedSeen bool // the Workspace's feed certificate is there, with or without a CA

	// Set by decide.
	podDecision plan.PodDecision

	// Set by applyClaims.
	filesOf       string
	claimsMissing bool // the pod can't have them now

	// Set by applyRegistration.
	registration plan.Token
	hasSecret    bool
}

// +kubebuilder:rbac:groups=rendezvous.dev,resources=sessionhosts/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=pods,verbs=create;delete;get;list;patch;watch

func (r *sessionHostReconciler) setup(mgr ctrl.Manager) error {
	c := mgr.GetClient()
	return ctrl.NewControllerManagedBy(mgr).
		For(&rdv.SessionHost{}).
		Owns(&corev1.Pod{}).
		Owns(&corev1.Secret{}, builder.OnlyMetadata).
		Watches(&corev1.PersistentVolumeClaim{}, byLabel(rdv.LabelSessionHost), builder.OnlyMetadata).
		Watches(&rdv.HostPool{}, byField(c, indexHostPool, sessionHosts, name), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&rdv.Workspace{}, hostsOfWorkspace(c, name), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&corev1.Secret{}, hostsOfWorkspace(c, feedTLSOf), builder.OnlyMetadata).
		WithOptions(controller.Options{MaxConcurrentReconciles: maxConcurrentHosts}).
		Complete(r)
}

// maxConcurrentHosts is more than of other kinds: hosts are many, and a pass over one mostly waits for the API server.
const maxConcurrentHosts = 16

// hostsOfWorkspace wakes the SessionHosts of all pools of the Workspace that workspace finds in a changed object.
func hostsOfWorkspace(c client.Reader, workspace func(client.Object) string) handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) (requests []reconcile.Request) {
		ws := workspace(o)
		if ws == "" {
			return nil
		}
		inHere := client.InNamespace(o.GetNamespace())
		for _, pool := range requestsFor(ctx, c, hostPools(), inHere, client.MatchingFields{indexWorkspace: ws}) {
			requests = append(requests, requestsFor(ctx, c, sessionHosts(), inHere, client.MatchingFields{indexHostPool: pool.Name})...)
		}
		return requests
	})
}

// Reconcile makes one pass over a SessionHost.
func (r *sessionHostReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	host, err := getOrNil(ctx, r.Client, req.Namespace, req.Name, &rdv.SessionHost{})
	if err != nil {
		return ctrl.Result{}, err
	}
	if host == nil || rdv.Gone(host) { // garbage collection does the rest
		r.Forget("SessionHost", req.NamespacedName)
		return ctrl.Result{}, nil
	}
	if !host.DeletionTimestamp.IsZero() {
		return r.leave(ctx, host)
	}
	if err := r.greet(ctx, host); err != nil {
		return ctrl.Result{}, err
	}
	s := &sessionHostScope{host: host, registration: tokenOf("", host.Status.Registration)}
	if err := r.gather(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	err = inOrder(ctx, s, r.decide, r.applyClaims, r.applyRegistration, r.applyPod)
	err = errors.Join(err, r.writeStatus(ctx, s))
	return ctrl.Result{RequeueAfter: s.requeue}, err
}

// gather resolves the pool and its Workspace, and sees the pod.
func (r *sessionHostReconciler) gather(ctx context.Context, s *sessionHostScope) (err error) {
	host := s.host
	if s.pool, err = getOrNil(ctx, r.Client, host.Namespace, host.Spec.HostPoolRef.Name, &rdv.HostPool{}); err != nil {
		return err
	}
	if s.pool == nil {
		s.refs.addProblem(rules.HostPool(host, nil))
		return nil
	}
	if metav1.IsControlledBy(host, s.pool) { // the others are machines
		if s.pod, err = r.livePod(ctx, host); err != nil {
			return err
		}
	}
	workspace := s.pool.Spec.WorkspaceRef.Name
	if s.ws, err = getOrNil(ctx, r.Client, host.Namespace, workspace, &rdv.Workspace{}); err != nil {
		return err
	}
	if s.ws == nil {
		s.refs.add(rdv.ReasonReferenceNotFound, fmt.Sprintf("HostPool %q: spec.workspaceRef: Workspace %q not found: create it", s.pool.Name, workspace))
		return nil
	}
	if s.feedCA, s.feedSeen, err = r.caOf(ctx, host.Namespace, render.WorkspaceTLS(workspace)); err != nil {
		return err
	}
	return r.renderPod(ctx, s)
}

// livePod is the host's pod, nil where there is none. The cache's word that there is none is checked, for a pod that was
// just made must not lose the token that it was made with.
func (r *sessionHostReconciler) livePod(ctx context.Context, host *rdv.SessionHost) (*corev1.Pod, error) {
	for _, reader := range []client.Reader{r.Client, r.Live} {
		pod := &corev1.Pod{}
		err := reader.Get(ctx, client.ObjectKeyFromObject(host), pod)
		if err == nil {
			return pod, nil
		}
		if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("get Pod %q: %w", host.Name, err)
		}
	}
	return nil, nil
}

func (r *sessionHostReconciler) renderPod(ctx context.Context, s *sessionHostScope) error {
	if !metav1.IsControlledBy(s.host, s.pool) {
		return nil
	}
	template, invalid, err := r.podTemplate(ctx, s.pool)
	switch {
	case err != nil:
		return err
	case invalid != nil:
		s.refs.add(rdv.ReasonPodInvalid, fmt.Sprintf("HostPool %q: %v", s.pool.Name, invalid))
		return nil
	case template == nil: // the pool is about to remove this host
		return nil
	}
	pod, err := r.render.Pod(s.host, s.pool, template)
	if err != nil {
		return err
	}
	keeper, err := r.namespaceRef(ctx, s.host.Namespace)
	if err != nil {
		return err
	}
	pod.OwnerReferences = []metav1.OwnerReference{keeper}
	s.wantPod = pod
	return nil
}

// decide says what is to be done about the pod, since a new pod needs an unspent token first.
func (r *sessionHostReconciler) decide(ctx context.Context, s *sessionHostScope) error {
	if s.wantPod == nil {
		return nil
	}
	seen := plan.Pod{}
	if pod := s.pod; pod != nil {
		if !metav1.IsControlledBy(pod, s.host) && bearsMarks(pod, s.wantPod) && onlyItsNamespaces(pod) {
			s.podDecision = plan.PodDecision{Action: plan.PodDelete} // a predecessor's
			return nil
		}
		if !metav1.IsControlledBy(pod, s.host) && !adoptable(pod, s.wantPod) {
			s.podDecision = plan.PodDecision{Action: plan.PodKeep} // applying it will say to whom it belongs
			return nil
		}
		seen = plan.Pod{
			Exists:      true,
			Terminating: !pod.DeletionTimestamp.IsZero(),
			Finished:    pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded,
			Created:     pod.CreationTimestamp.Time,
			Hash:        pod.Annotations[render.AnnotationPodHash],
			Revoked:     revoked(s.host),
		}
	}
	s.podDecision = plan.DecidePod(seen, s.wantPod.Annotations[render.AnnotationPodHash], sessionsOf(s.host), r.now())
	if s.podDecision.Action == plan.PodDelete && !seen.Finished && !seen.Revoked {
		turn, err := r.rollout.turn(ctx, r.Client, s.host, r.now())
		if err != nil {
			return err
		}
		if !turn {
			s.podDecision = plan.PodDecision{Action: plan.PodWait, Next: rolloutRetry}
		}
	}
	s.wakeAfter(s.podDecision.Next)
	return nil
}

// applyRegistration keeps the host's own token. A machine has one until it is enrolled; a pod keeps its spent one, which it
// mounts, and gets another before it is made anew.
func (r *sessionHostReconciler) applyRegistration(ctx context.Context, s *sessionHostScope) error {
	host := s.host
	if s.pool == nil || s.ws == nil {
		return nil
	}
	seen, uid, err := r.seenToken(ctx, host, func(o client.Object) rdv.RegistrationStatus { return o.(*rdv.SessionHost).Status.Registration })
	if err != nil {
		return err
	}
	policy, prefix, now := tokenPolicy(s.pool, host), plan.TokenPrefix(host.Namespace, s.pool.Name, host.Name), r.now()
	spentBy := ""
	if host.Status.Enrolment != nil {
		spentBy = host.Status.Enrolment.TokenHash
	}
	spent := spentBy != "" && spentBy == seen.Hash

	if s.wantPod == nil && !plan.WantHostToken(seen, policy.RotateFor, spentBy) {
		return r.dropRegistration(ctx, s, seen, spent)
	}
	decision := plan.TokenDecision{}
	if s.wantPod != nil && s.pod != nil && revoked(host) && s.podDecision.Action != plan.PodKeep {
		// The pod that is about to go mounts the Secret, and must not read the token of the one that follows. Brokers take
		// no token that the annotation has revoked.
		s.registration, s.hasSecret = seen, seen.Text != ""
		return nil
	}
	if !spent || seen.Text == "" || seen.MadeFor != policy.RotateFor || s.podDecision.Action == plan.PodCreate {
		decision = plan.DecideToken(seen, prefix, policy, now)
		if spent {
			decision = plan.TokenDecision{Replace: true, Next: policy.Lifetime}
		}
	}
	if decision.Replace {
		seen = newToken(prefix, policy, now)
	}
	broker := render.PublicURL(s.ws)
	if s.wantPod != nil {
		broker = r.render.BrokerURL(host.Namespace, s.ws.Name)
	}
	secret := render.HostRegistrationSecret(host, render.Registration{
		Token: seen.Text, Expires: seen.Expires, CA: s.feedCA, Broker: broker,
	})
	secret.UID = uid
	done, err := r.applyOne(ctx, &s.pass, host, secret)
	if err != nil {
		return err
	}
	if !done {
		s.registration = plan.Token{MadeFor: s.registration.MadeFor} // a token that is in no Secret enrols nobody
		return nil
	}
	s.registration, s.hasSecret = seen, true
	s.wakeAfter(decision.Next)
	return nil
}

// dropRegistration removes a token that is not needed: of one that was never spent the hash goes too, so that it enrols
// nobody.
func (r *sessionHostReconciler) dropRegistration(ctx context.Context, s *sessionHostScope, seen plan.Token, spent bool) error {
	host := s.host
	s.registration = plan.Token{MadeFor: seen.MadeFor}
	if spent {
		s.registration = plan.Token{Hash: seen.Hash, MadeFor: seen.MadeFor}
	}
	secret, err := secretMetadata(ctx, r.Client, host.Namespace, render.RegistrationSecretName(host.Name))
	if err != nil || secret == nil || !metav1.IsControlledBy(secret, host) || !secret.DeletionTimestamp.IsZero() {
		return err
	}
	return r.Delete(ctx, secret)
}

// applyPod keeps the pod. It is made only when its token and the CA to check the broker with can be mounted.
func (r *sessionHostReconciler) applyPod(ctx context.Context, s *sessionHostScope) error {
	if s.wantPod == nil {
		return nil
	}
	switch s.podDecision.Action {
	case plan.PodCreate:
		if !s.hasSecret || !s.feedSeen || s.claimsMissing {
			return nil
		}
		return r.applyAll(ctx, &s.pass, s.host, s.wantPod)
	case plan.PodKeep:
		if s.claimsMissing { // an apply makes the pod that the cache still has
			return nil
		}
		return r.applyAll(ctx, &s.pass, s.host, s.wantPod)
	case plan.PodDelete:
		if err := r.Delete(ctx, s.pod); err != nil {
			return err
		}
		why := "the pool's template has changed"
		if s.pod.Status.Phase == corev1.PodFailed || s.pod.Status.Phase == corev1.PodSucceeded {
			why = "it had ended: " + string(s.pod.Status.Phase) + " " + s.pod.Status.Reason
		}
		r.tell(s.host, eventPodReplaced, actionReplace, "pod %s makes room for a new one: %s", s.pod.Name, why)
	}
	return nil
}
