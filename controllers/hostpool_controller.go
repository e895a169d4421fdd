package controllers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// hostPoolReconciler keeps a HostPool's registration token and, where it has a template, its SessionHosts.
type hostPoolReconciler struct{ base }

// hostPoolScope is one pass over one HostPool.
type hostPoolScope struct {
	pass
	pool *rdv.HostPool

	// Set by gather.
	ws       *rdv.Workspace
	hosts    []rdv.SessionHost // all that name the pool, by name
	template *corev1.PodTemplateSpec
	templErr error

	// Set by applyRegistration.
	registration plan.Token
	expired      bool

	// Set by applyHosts.
	waiting []string            // hosts too many that can't go yet
	scale   *plan.ScaleDecision // where the pool scales by itself
}

// +kubebuilder:rbac:groups=rendezvous.dev,resources=hostpools,verbs=get;list;watch
// +kubebuilder:rbac:groups=rendezvous.dev,resources=hostpools/status,verbs=patch
// +kubebuilder:rbac:groups=rendezvous.dev,resources=sessionhosts,verbs=create;delete;get;list;patch;watch

func (r *hostPoolReconciler) setup(mgr ctrl.Manager) error {
	c := mgr.GetClient()
	controller := ctrl.NewControllerManagedBy(mgr).
		For(&rdv.HostPool{}).
		Owns(&corev1.Secret{}, builder.OnlyMetadata).
		Owns(&networkingv1.NetworkPolicy{}, builder.OnlyMetadata).
		Owns(&rbacv1.Role{}, builder.OnlyMetadata).
		Owns(&rbacv1.RoleBinding{}, builder.OnlyMetadata).
		Watches(&rdv.SessionHost{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			pool := o.(*rdv.SessionHost).Spec.HostPoolRef.Name
			return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: o.GetNamespace(), Name: pool}}}
		})).
		Watches(&rdv.Gateway{}, inNamespace(c, hostPools), builder.WithPredicates(reachedElsewhere())).
		Watches(&rdv.Workspace{}, byField(c, indexWorkspace, hostPools, name), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&corev1.Secret{}, byField(c, indexWorkspace, hostPools, feedTLSOf), builder.OnlyMetadata)
	return r.watchIssuers(controller, c, hostPools).Complete(r)
}

// Reconcile makes one pass over a HostPool.
func (r *hostPoolReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	pool, err := getOrNil(ctx, r.Client, req.Namespace, req.Name, &rdv.HostPool{})
	if err != nil {
		return ctrl.Result{}, err
	}
	if pool == nil || rdv.Gone(pool) { // garbage collection does the rest
		r.Forget("HostPool", req.NamespacedName)
		return ctrl.Result{}, nil
	}
	if !pool.DeletionTimestamp.IsZero() {
		return r.leave(ctx, pool)
	}
	if err := r.hold(ctx, pool); err != nil {
		return ctrl.Result{}, err
	}
	s := &hostPoolScope{pool: pool, registration: tokenOf("", pool.Status.Registration)}
	if err := r.gather(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	err = inOrder(ctx, s, r.applyRegistration, r.applyHosts)
	err = errors.Join(err, r.writeStatus(ctx, s))
	return ctrl.Result{RequeueAfter: s.requeue}, err
}

// gather resolves what the HostPool names, and finds its hosts.
func (r *hostPoolReconciler) gather(ctx context.Context, s *hostPoolScope) (err error) {
	pool := s.pool
	if s.ws, err = getOrNil(ctx, r.Client, pool.Namespace, pool.Spec.WorkspaceRef.Name, &rdv.Workspace{}); err != nil {
		return err
	}
	s.refs.addProblem(rules.PoolWorkspace(pool, s.ws))
	if c := pool.Spec.RDPCertificate; c != nil {
		if err := r.checkIssuer(ctx, pool.Namespace, "spec.rdpCertificate.issuerRef", c.IssuerRef, &s.refs); err != nil {
			return err
		}
	}
	if s.template, s.templErr, err = r.podTemplate(ctx, pool); err != nil {
		return err
	}
	if s.templErr != nil {
		s.refs.add(rdv.ReasonPodInvalid, s.templErr.Error())
	}
	if err := r.checkSharedClaims(ctx, s); err != nil {
		return err
	}
	s.hosts, err = r.hostsOf(ctx, pool)
	return err
}

// applyRegistration keeps the pool's token. Without its Workspace a pool can enrol nobody, and keeps what it has.
func (r *hostPoolReconciler) applyRegistration(ctx context.Context, s *hostPoolScope) error {
	pool := s.pool
	if s.ws == nil {
		return nil
	}
	seen, uid, err := r.seenToken(ctx, pool, func(o client.Object) rdv.RegistrationStatus { return o.(*rdv.HostPool).Status.Registration })
	if err != nil {
		return err
	}
	policy, prefix, now := tokenPolicy(pool, pool), plan.TokenPrefix(pool.Namespace, pool.Name, ""), r.now()
	decision := plan.DecideToken(seen, prefix, policy, now)
	if decision.Replace {
		seen = newToken(prefix, policy, now)
	}
	ca, _, err := r.caOf(ctx, pool.Namespace, render.WorkspaceTLS(s.ws.Name))
	if err != nil {
		return err
	}
	secret := render.PoolRegistrationSecret(pool, render.Registration{
		Token: seen.Text, Expires: seen.Expires, CA: ca, Broker: render.PublicURL(s.ws),
	})
	secret.UID = uid
	done, err := r.applyOne(ctx, &s.pass, pool, secret)
	if err != nil {
		return err
	}
	if !done {
		s.registration = plan.Token{} // a token that is in no Secret enrols nobody
		return nil
	}
	s.registration, s.expired = seen, decision.Expired
	s.wakeAfter(decision.Next)
	return nil
}

// applyHosts makes SessionHosts from the template, and retires those that are too many until they can go. Hosts that people
// or brokers made are left alone.
func (r *hostPoolReconciler) applyHosts(ctx context.Context, s *hostPoolScope) error {
	pool := s.pool
	around, err := r.surroundings(ctx, pool.Namespace)
	if err != nil {
		return err
	}
	if err := r.applyPolicy(ctx, &s.pass, pool, render.PoolNetworkPolicyName(pool.Name), render.PoolNetworkPolicy(pool, around)); err != nil {
		return err
	}
	if pool.Spec.Accounts != nil {
		// Where accounts are unset later the list stays: they are still those people's on the hosts.
		if err := r.applyAll(ctx, &s.pass, pool, render.PoolAccounts(pool), render.PoolAccountsRole(pool), render.PoolAccountsRoleBinding(pool)); err != nil {
			return err
		}
	}
	if s.templErr != nil || s.ws == nil {
		return nil
	}
	var mine []plan.Host
	var others plan.Host
	var earlier []string
	leaving := map[string]bool{}
	byName := map[string]*rdv.SessionHost{}
	for i := range s.hosts {
		host := &s.hosts[i]
		switch {
		case ofEarlier(host, pool, rdv.GroupVersion.WithKind("HostPool")):
			earlier = append(earlier, host.Name)
		case !metav1.IsControlledBy(host, pool) && !isRestored(host, pool):
			seen := r.seeHost(s, host)
			others.Free, others.Places = others.Free+seen.Free, others.Places+seen.Places
		case !host.DeletionTimestamp.IsZero():
			leaving[host.Name] = true
		default:
			byName[host.Name] = host
			mine = append(mine, r.seeHost(s, host))
		}
	}
	var lookup error
	taken := func(name string) bool {
		other, err := getOrNil(ctx, r.Client, pool.Namespace, name, &rdv.SessionHost{})
		lookup = errors.Join(lookup, err)
		return leaving[name] || other != nil
	}
	if len(earlier) > 0 { // they have the names, and perhaps people on them
		for _, name := range earlier {
			s.refs.addLeaving(fmt.Sprintf("SessionHost %q", name))
		}
		s.wakeAfter(goneRetry)
		return nil
	}
	changes := plan.Hosts(pool.Name, r.wantedHosts(s, mine, others), mine, taken)
	if lookup != nil {
		return lookup
	}
	if pool.Spec.Type == rdv.Personal || len(pool.Spec.VolumeClaimTemplates) > 0 {
		// The one that follows a host that is leaving has its name, and with it its user and claims.
		changes.Create = changes.Create[:max(0, len(changes.Create)-len(leaving))]
	}
	s.waiting = changes.Waiting
	for _, name := range changes.Delete {
		if err := r.Delete(ctx, byName[name]); err != nil {
			return err
		}
		r.tell(pool, eventHostRemoved, actionScale, "SessionHost %q was one too many, drained and empty", name)
		delete(byName, name)
	}
	for _, seen := range mine {
		want := render.SessionHost(pool, seen.Name, slices.Contains(changes.Retire, seen.Name))
		if host := byName[seen.Name]; host == nil || metav1.IsControlledBy(host, pool) && isAsWanted(host, want) {
			continue
		}
		if err := r.applyAll(ctx, &s.pass, pool, want); err != nil {
			return err
		}
	}
	for _, name := range changes.Create {
		if err := r.applyAll(ctx, &s.pass, pool, render.SessionHost(pool, name, false)); err != nil {
			return err
		}
	}
	return nil
}

// isRestored says that a host that nobody owns was made from the pool's template: a backup tool has restored it.
func isRestored(host *rdv.SessionHost, pool *rdv.HostPool) bool {
	number, ok := strings.CutPrefix(host.Name, pool.Name+"-")
	_, err := strconv.ParseUint(number, 10, 31)
	return ok && err == nil && adoptable(host, render.SessionHost(pool, host.Name, false))
}

// isAsWanted says whether a host, which is the pool's, needs no write.
func isAsWanted(host, want *rdv.SessionHost) bool {
	for key, value := range want.Labels {
		if host.Labels[key] != value {
			return false
		}
	}
	return host.Spec.Retiring == want.Spec.Retiring
}

const (
	// hostPatience is how long a host that isn't ready is expected to become so.
	hostPatience = 5 * time.Minute
	// retireSettle is how long after a host was told to take no session the brokers certainly know, should the host be
	// off the bus and unable to say so.
	retireSettle = 10 * time.Second
)

// seeHost is a host as the plan sees it.
func (r *hostPoolReconciler) seeHost(s *hostPoolScope, host *rdv.SessionHost) plan.Host {
	seen := plan.Host{
		Name:     host.Name,
		Sessions: sessionsOf(host),
		Assigned: host.Spec.AssignedUser != "",
		Serving:  meta.IsStatusConditionTrue(host.Status.Conditions, rdv.ConditionReady),
		Retiring: host.Spec.Retiring,
	}
	drain := host.Spec.Drain
	if drained := drain != nil && (drain.Until == nil || r.now().Before(drain.Until.Time)); seen.Serving && !drained {
		seen.Free, seen.Places = placesOf(&s.pool.Spec, host)
	}
	if s.pool.Spec.Autoscaling != nil && !seen.Serving && !seen.Assigned {
		left := hostPatience
		if ready := meta.FindStatusCondition(host.Status.Conditions, rdv.ConditionReady); ready != nil {
			left -= r.now().Sub(ready.LastTransitionTime.Time)
		}
		seen.Coming = left > 0
		s.wakeAfter(left)
	}
	if seen.Retiring {
		var left time.Duration
		if seen.Drained, left = r.takesNone(host); left > 0 {
			s.wakeAfter(left)
		}
	}
	return seen
}

// takesNone says whether it is certain that no session begins on a host that was told to retire, or after how long to look
// again.
func (r *hostPoolReconciler) takesNone(host *rdv.SessionHost) (certain bool, left time.Duration) {
	agent := host.Status.Agent
	switch {
	case agent == nil: // it never ran
		return true, 0
	case agent.Connected: // what it said of an earlier drain means nothing
		return agent.DrainAcknowledged && agent.AcknowledgedGeneration == host.Generation, 0
	}
	told := meta.FindStatusCondition(host.Status.Conditions, rdv.ConditionDraining)
	if told == nil || told.Status != metav1.ConditionTrue {
		return false, 0
	}
	left = retireSettle - r.now().Sub(told.LastTransitionTime.Time)
	return left <= 0, left
}

// placesOf is how many sessions more a host takes that is ready and does not drain, and how many in all.
func placesOf(pool *rdv.HostPoolSpec, host *rdv.SessionHost) (free, all int32) {
	if pool.Type == rdv.Personal {
		if host.Spec.AssignedUser == "" && sessionsOf(host) == 0 {
			return 1, 1
		}
		return 0, 1
	}
	return max(0, pool.MaxSessions()-sessionsOf(host)), pool.MaxSessions()
}

// wantedHosts is how many hosts the pool makes.
func (r *hostPoolReconciler) wantedHosts(s *hostPoolScope, mine []plan.Host, others plan.Host) int32 {
	spec := &s.pool.Spec
	switch {
	case spec.Template == nil:
		return 0
	case spec.Autoscaling != nil:
		d := plan.Autoscale(autoscalingPolicy(spec), mine, others, scaledBefore(s.pool.Status.Autoscaling), r.now())
		s.scale = &d
		s.wakeAfter(d.Next)
		return d.Desired
	}
	return fixedHosts(spec)
}

// fixedHosts is how many hosts a pool with a template makes that does not scale by itself.
func fixedHosts(spec *rdv.HostPoolSpec) int32 {
	if spec.Replicas == nil {
		return 1
	}
	return *spec.Replicas
}

const defaultScaleDownDelay = 10 * time.Minute

func autoscalingPolicy(spec *rdv.HostPoolSpec) plan.Autoscaling {
	a := spec.Autoscaling
	policy := plan.Autoscaling{Min: 1, Max: a.MaxReplicas, Delay: defaultScaleDownDelay, PerHost: spec.MaxSessions()}
	if spec.Type == rdv.Personal {
		policy.PerHost = 1
	}
	if a.MinReplicas != nil {
		policy.Min = *a.MinReplicas
	}
	if a.MinFreePlaces != nil {
		policy.FreePlaces = *a.MinFreePlaces
	}
	if a.MinFreePercent != nil {
		policy.FreePercent = *a.MinFreePercent
	}
	if a.ScaleDownDelaySeconds != nil {
		policy.Delay = time.Duration(*a.ScaleDownDelaySeconds) * time.Second
	}
	return policy
}

func scaledBefore(status *rdv.HostPoolScaling) plan.Scaled {
	if status == nil {
		return plan.Scaled{}
	}
	before := plan.Scaled{Decided: true, Desired: status.DesiredHosts, Enough: status.EnoughHosts}
	if status.SurplusSince != nil {
		before.Since = status.SurplusSince.Time
	}
	return before
}

func sessionsOf(host *rdv.SessionHost) int32 {
	if host.Status.Agent == nil {
		return 0
	}
	return host.Status.Agent.Sessions
}
