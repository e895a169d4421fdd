package controllers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
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
	waiting []string // hosts too many that can't go yet
}

// +kubebuilder:rbac:groups=rendezvous.dev,resources=hostpools,verbs=get;list;watch
// +kubebuilder:rbac:groups=rendezvous.dev,resources=hostpools/status,verbs=patch
// +kubebuilder:rbac:groups=rendezvous.dev,resources=sessionhosts,verbs=create;delete;get;list;patch;watch

func (r *hostPoolReconciler) setup(mgr ctrl.Manager) error {
	c := mgr.GetClient()
	return ctrl.NewControllerManagedBy(mgr).
		For(&rdv.HostPool{}).
		Owns(&corev1.Secret{}, builder.OnlyMetadata).
		Owns(&networkingv1.NetworkPolicy{}, builder.OnlyMetadata).
		Watches(&rdv.SessionHost{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			pool := o.(*rdv.SessionHost).Spec.HostPoolRef.Name
			return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: o.GetNamespace(), Name: pool}}}
		})).
		Watches(&rdv.Workspace{}, byField(c, indexWorkspace, hostPools, name), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&corev1.Secret{}, byField(c, indexWorkspace, hostPools, feedTLSOf), builder.OnlyMetadata).
		Watches(&certmanager.Issuer{}, byIssuer(c, certmanager.IssuerKind, hostPools)).
		Watches(&certmanager.ClusterIssuer{}, byIssuer(c, certmanager.ClusterIssuerKind, hostPools)).
		Complete(r)
}

// Reconcile makes one pass over a HostPool.
func (r *hostPoolReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	pool, err := getOrNil(ctx, r.Client, req.Namespace, req.Name, &rdv.HostPool{})
	if err != nil {
		return ctrl.Result{}, err
	}
	if pool == nil || !pool.DeletionTimestamp.IsZero() { // garbage collection does the rest
		r.Forget("HostPool", req.NamespacedName)
		return ctrl.Result{}, nil
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
	if s.ws == nil {
		s.refs.add(rdv.ReasonReferenceNotFound, fmt.Sprintf("spec.workspaceRef: Workspace %q not found: create it", pool.Spec.WorkspaceRef.Name))
	}
	if c := pool.Spec.RDPCertificate; c != nil {
		if err := checkIssuer(ctx, r.Client, pool.Namespace, "spec.rdpCertificate.issuerRef", c.IssuerRef, &s.refs); err != nil {
			return err
		}
	}
	if s.template, s.templErr = render.PodTemplate(pool); s.templErr != nil {
		s.refs.add(rdv.ReasonPodInvalid, s.templErr.Error())
	}
	list := &rdv.SessionHostList{}
	if err := r.Client.List(ctx, list, client.InNamespace(pool.Namespace), client.MatchingFields{indexHostPool: pool.Name}); err != nil {
		return fmt.Errorf("list SessionHosts: %w", err)
	}
	s.hosts = list.Items
	slices.SortFunc(s.hosts, func(a, b rdv.SessionHost) int { return cmp.Compare(a.Name, b.Name) })
	return nil
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
	ca, err := secretKey(ctx, r.Live, pool.Namespace, render.WorkspaceTLS(s.ws.Name), "ca.crt")
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

// applyHosts makes SessionHosts from the template, and removes empty ones when there are too many. Those that people or
// brokers made are not counted.
func (r *hostPoolReconciler) applyHosts(ctx context.Context, s *hostPoolScope) error {
	pool := s.pool
	if err := r.applyAll(ctx, &s.pass, pool, render.PoolNetworkPolicy(pool)); err != nil {
		return err
	}
	if s.templErr != nil || s.ws == nil {
		return nil
	}
	taken, err := r.takenNames(ctx, s)
	if err != nil {
		return err
	}
	var mine []plan.Host
	byName := map[string]*rdv.SessionHost{}
	for i := range s.hosts {
		host := &s.hosts[i]
		byName[host.Name] = host
		if !metav1.IsControlledBy(host, pool) {
			continue
		}
		if !host.DeletionTimestamp.IsZero() { // its name is not free yet
			taken[host.Name] = true
			continue
		}
		mine = append(mine, plan.Host{
			Name:     host.Name,
			Sessions: sessionsOf(host),
			Assigned: host.Spec.AssignedUser != "",
			Serving:  meta.IsStatusConditionTrue(host.Status.Conditions, rdv.ConditionReady),
		})
	}
	changes := plan.Hosts(pool.Name, wantedHosts(pool), mine, taken)
	for _, name := range changes.Delete {
		if err := r.Delete(ctx, byName[name]); err != nil {
			return err
		}
	}
	s.waiting = changes.Waiting
	for _, host := range mine {
		if slices.Contains(changes.Delete, host.Name) {
			continue
		}
		if err := r.applyAll(ctx, &s.pass, pool, render.SessionHost(pool, host.Name)); err != nil {
			return err
		}
	}
	for _, name := range changes.Create {
		if err := r.applyAll(ctx, &s.pass, pool, render.SessionHost(pool, name)); err != nil {
			return err
		}
	}
	return nil
}

// wantedHosts is how many hosts a pool makes.
func wantedHosts(pool *rdv.HostPool) int32 {
	switch {
	case pool.Spec.Template == nil:
		return 0
	case pool.Spec.Replicas == nil:
		return 1
	}
	return *pool.Spec.Replicas
}

// takenNames are names like POOL-0 of SessionHosts and Pods that the pool did not make.
func (r *hostPoolReconciler) takenNames(ctx context.Context, s *hostPoolScope) (map[string]bool, error) {
	taken := map[string]bool{}
	all := &rdv.SessionHostList{}
	if err := r.Client.List(ctx, all, client.InNamespace(s.pool.Namespace)); err != nil {
		return nil, fmt.Errorf("list SessionHosts: %w", err)
	}
	for i := range all.Items {
		host := &all.Items[i]
		if strings.HasPrefix(host.Name, s.pool.Name+"-") && !metav1.IsControlledBy(host, s.pool) {
			taken[host.Name] = true
		}
	}
	return taken, nil
}

func sessionsOf(host *rdv.SessionHost) int32 {
	if host.Status.Agent == nil {
		return 0
	}
	return host.Status.Agent.Sessions
}
