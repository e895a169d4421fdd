package controllers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/source"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// workspaceReconciler keeps what a Workspace needs: its CA, its certificates, its brokers.
type workspaceReconciler struct {
	base
	discovery *Discovery
}

// workspaceScope is one pass over one Workspace.
type workspaceScope struct {
	pass
	ws *rdv.Workspace

	// Set by gather.
	oidcCA    string
	oidcCAErr bool // oidcCA is named, but can't be had
	resources int32
	gateways  []string
	pools     []rdv.HostPool // all of the workspace, whether or not a resource names them

	// Set by applyCertificates.
	certificatesIssued bool

	// Set by applyBroker.
	deployment *appsv1.Deployment
}

// Children are removed by garbage collection, so delete is asked for only where they can become unwanted while their owner
// stays. The brokers' Role is granted by the operator, which must hold all that it grants: hence the verbs on
// certificaterequests, and some on sessionhosts and gateways. Finalizers are updated by nobody; clusters that check
// blockOwnerDeletion ask for the right all the same.
// Secrets: those of certificates are adopted and their ca.crt is read; registration tokens are kept in some; a Workspace
// may name one.
// +kubebuilder:rbac:groups=rendezvous.dev,resources=workspaces,verbs=get;list;watch
// +kubebuilder:rbac:groups=rendezvous.dev,resources=workspaces/status,verbs=patch
// +kubebuilder:rbac:groups=rendezvous.dev,resources=workspaces/finalizers;hostpools/finalizers;sessionhosts/finalizers;gateways/finalizers,verbs=update
// +kubebuilder:rbac:groups=cert-manager.io,resources=certificaterequests,verbs=create;delete;get;list;watch
// +kubebuilder:rbac:groups=cert-manager.io,resources=certificates;issuers,verbs=create;delete;get;list;patch;watch
// +kubebuilder:rbac:groups=cert-manager.io,resources=clusterissuers,verbs=get;list;watch
// +kubebuilder:rbac:groups=apps,resources=deployments,verbs=create;get;list;patch;watch
// +kubebuilder:rbac:groups="",resources=configmaps;services;serviceaccounts,verbs=create;get;list;patch;watch
// +kubebuilder:rbac:groups="",resources=secrets,verbs=create;delete;get;list;patch;watch
// +kubebuilder:rbac:groups=rbac.authorization.k8s.io,resources=roles;rolebindings,verbs=create;get;list;patch;watch
// Sessions (package sessionsapi): the API server is asked whether an administrator may see or end them, and told by which CA it
// knows this operator.
// +kubebuilder:rbac:groups=authorization.k8s.io,resources=subjectaccessreviews,verbs=create
// +kubebuilder:rbac:groups=apiregistration.k8s.io,resources=apiservices,resourceNames=v1alpha1.live.rendezvous.dev,verbs=get;patch
// +kubebuilder:rbac:groups=policy,resources=poddisruptionbudgets,verbs=create;get;list;patch;watch
// +kubebuilder:rbac:groups=networking.k8s.io,resources=networkpolicies,verbs=create;get;list;patch;watch

func (r *workspaceReconciler) setup(mgr ctrl.Manager) error {
	c := mgr.GetClient()
	controller := ctrl.NewControllerManagedBy(mgr).
		For(&rdv.Workspace{}).
		Owns(&certmanager.Issuer{}).
		Owns(&certmanager.Certificate{}).
		Owns(&appsv1.Deployment{}).
		Owns(&corev1.Service{}).
		Owns(&corev1.ConfigMap{}, builder.OnlyMetadata).
		Owns(&corev1.ServiceAccount{}, builder.OnlyMetadata).
		Owns(&rbacv1.Role{}, builder.OnlyMetadata).
		Owns(&rbacv1.RoleBinding{}, builder.OnlyMetadata).
		Owns(&policyv1.PodDisruptionBudget{}, builder.OnlyMetadata).
		Owns(&networkingv1.NetworkPolicy{}, builder.OnlyMetadata).
		Watches(&corev1.Secret{}, byLabel(rdv.LabelWorkspace), builder.OnlyMetadata).
		Watches(&rdv.HostPool{}, byField(c, indexHostPool, workspaces, name), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&rdv.HostPool{}, ofWorkspace(), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&rdv.Gateway{}, inNamespace(c, workspaces), builder.WithPredicates(specOrLabels())).
		WatchesRawSource(source.Channel(r.discovery.events, &handler.TypedEnqueueRequestForObject[*rdv.Workspace]{}))
	return r.watchIssuers(controller, c, workspaces).Complete(r)
}

// ofWorkspace wakes the Workspace that a HostPool belongs to.
func ofWorkspace() handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []ctrl.Request {
		pool := o.(*rdv.HostPool)
		return []ctrl.Request{{NamespacedName: client.ObjectKey{Namespace: pool.Namespace, Name: pool.Spec.WorkspaceRef.Name}}}
	})
}

// specOrLabels lets changes of status pass unseen.
func specOrLabels() predicate.Predicate {
	return predicate.Or(predicate.GenerationChangedPredicate{}, predicate.LabelChangedPredicate{})
}

// Reconcile makes one pass over a Workspace.
func (r *workspaceReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	ws, err := getOrNil(ctx, r.Client, req.Namespace, req.Name, &rdv.Workspace{})
	if err != nil {
		return ctrl.Result{}, err
	}
	if ws == nil || rdv.Gone(ws) { // garbage collection does the rest
		r.Forget("Workspace", req.NamespacedName)
		r.discovery.Forget(req.NamespacedName)
		return ctrl.Result{}, nil
	}
	if !ws.DeletionTimestamp.IsZero() {
		return r.leave(ctx, ws)
	}
	if err := r.hold(ctx, ws); err != nil {
		return ctrl.Result{}, err
	}
	s := &workspaceScope{ws: ws}
	if err := r.gather(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	err = inOrder(ctx, s, r.applyCertificates, r.applyAccess, r.applyBroker, r.prune)
	err = errors.Join(err, r.writeStatus(ctx, s))
	return ctrl.Result{RequeueAfter: s.requeue}, err
}

// inOrder runs the phases of a pass until one fails.
func inOrder[S any](ctx context.Context, s S, phases ...func(context.Context, S) error) error {
	for _, phase := range phases {
		if err := phase(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// gather resolves what the Workspace names.
func (r *workspaceReconciler) gather(ctx context.Context, s *workspaceScope) error {
	ws := s.ws
	for _, named := range rules.WorkspaceIssuers(ws) {
		if err := r.checkIssuer(ctx, ws.Namespace, named.Field, named.Ref, &s.refs); err != nil {
			return err
		}
	}
	if err := r.gatherOIDCCA(ctx, s); err != nil {
		return err
	}
	for i := range ws.Spec.Resources {
		resource := &ws.Spec.Resources[i]
		pool, err := getOrNil(ctx, r.Client, ws.Namespace, resource.HostPoolRef.Name, &rdv.HostPool{})
		if err != nil {
			return err
		}
		problem := rules.ResourcePool(ws, resource, pool)
		if problem.OK() {
			s.resources++
		}
		s.refs.addProblem(problem)
	}
	pools := &rdv.HostPoolList{}
	if err := r.Client.List(ctx, pools, client.InNamespace(ws.Namespace), client.MatchingFields{indexWorkspace: ws.Name}); err != nil {
		return fmt.Errorf("list HostPools: %w", err)
	}
	s.pools = pools.Items
	return r.gatherGateways(ctx, s)
}

// bundleRetry is how soon a change of a CA bundle is seen: what lacks our label is in no cache.
const bundleRetry = 10 * time.Second

// gatherOIDCCA finds what the identity provider's certificate is checked with: nothing where the Workspace leaves that to
// the system's roots.
func (r *workspaceReconciler) gatherOIDCCA(ctx context.Context, s *workspaceScope) error {
	oidc := s.ws.Spec.Identity.OIDC
	before := len(s.refs)
	switch {
	case oidc.CABundle != "":
		certificates, problem := rules.Certificates("spec.identity.oidc.caBundle", oidc.CABundle)
		s.oidcCA = certificates
		s.refs.addProblem(problem)
	case oidc.CABundleRef != nil:
		ref := *oidc.CABundleRef
		s.wakeAfter(bundleRetry)
		value, err := readKey(ctx, r.Live, s.ws.Namespace, "spec.identity.oidc.caBundleRef", ref, &s.refs)
		if err != nil {
			return err
		}
		if len(s.refs) == before {
			certificates, problem := rules.Certificates(fmt.Sprintf("spec.identity.oidc.caBundleRef: key %q of %s %q", ref.Key, ref.Kind, ref.Name), value)
			s.oidcCA = certificates
			s.refs.addProblem(problem)
		}
	}
	s.oidcCAErr = len(s.refs) > before
	return nil
}

func (r *workspaceReconciler) gatherGateways(ctx context.Context, s *workspaceScope) error {
	selector, err := rules.GatewaySelector(s.ws)
	if err != nil {
		s.refs.addProblem(rules.BadSelector(err))
		return nil
	}
	list := &rdv.GatewayList{}
	if err := r.Client.List(ctx, list, client.InNamespace(s.ws.Namespace), client.MatchingLabelsSelector{Selector: selector}); err != nil {
		return fmt.Errorf("list Gateways: %w", err)
	}
	for i := range list.Items {
		if list.Items[i].DeletionTimestamp.IsZero() {
			s.gateways = append(s.gateways, list.Items[i].Name)
		}
	}
	slices.Sort(s.gateways)
	if len(s.gateways) == 0 {
		s.refs.add(rdv.ReasonPending, "spec.gatewaySelector picks no Gateway in this namespace: create one, or change the selector")
	}
	return nil
}

// applyCertificates keeps the internal CA, unless another issuer is named, and the certificates.
func (r *workspaceReconciler) applyCertificates(ctx context.Context, s *workspaceScope) error {
	ws := s.ws
	if ws.Spec.Certificates.InternalIssuerRef == nil {
		err := r.applyAll(ctx, &s.pass, ws,
			render.InternalSelfSignedIssuer(ws), render.InternalCACertificate(ws), render.InternalCAIssuer(ws))
		if err != nil {
			return err
		}
		if _, _, err := r.issued(ctx, ws, render.InternalCACertificate(ws).Name, &s.certificates); err != nil {
			return err
		}
	}
	s.certificatesIssued = true
	for _, cert := range []*certmanager.Certificate{
		r.render.FeedCertificate(ws), r.render.BrokerIdentityCertificate(ws), render.TicketCertificate(ws), render.SigningCertificate(ws),
		render.OperatorIdentityCertificate(ws),
	} {
		if err := r.applyAll(ctx, &s.pass, ws, cert); err != nil {
			return err
		}
		_, ok, err := r.issued(ctx, ws, cert.Name, &s.certificates)
		if err != nil {
			return err
		}
		s.certificatesIssued = s.certificatesIssued && ok
	}
	return nil
}

// applyAccess keeps what the brokers may do and who may reach them.
func (r *workspaceReconciler) applyAccess(ctx context.Context, s *workspaceScope) error {
	ws := s.ws
	around, err := r.surroundings(ctx, ws.Namespace)
	if err != nil {
		return err
	}
	if err := r.applyPolicy(ctx, &s.pass, ws, render.WorkspaceBroker(ws.Name), r.render.BrokerNetworkPolicy(ws, around)); err != nil {
		return err
	}
	return r.applyAll(ctx, &s.pass, ws,
		render.BrokerScope(ws, s.pools), render.BrokerServiceAccount(ws), render.BrokerRole(ws), render.BrokerRoleBinding(ws),
		render.BrokerService(ws), render.BusService(ws), render.BrokerPeersService(ws), render.BrokerSessionsService(ws),
		render.BrokerDisruptionBudget(ws))
}

// applyBroker keeps the brokers. Their first pods wait for the certificates that they mount: the kubelet would wait for
// them too, but looks ever more seldom.
func (r *workspaceReconciler) applyBroker(ctx context.Context, s *workspaceScope) error {
	ws := s.ws
	configMap, err := r.render.BrokerConfigMap(ws, s.oidcCA)
	if err != nil {
		return err
	}
	// With a CA that can't be had just now, brokers keep the last one.
	if !s.oidcCAErr || !r.exists(ctx, configMap) {
		if err := r.applyAll(ctx, &s.pass, ws, configMap); err != nil {
			return err
		}
	}
	deployment, err := r.render.BrokerDeployment(ws)
	if err != nil {
		return err
	}
	if s.certificatesIssued || r.exists(ctx, deployment) {
		if err := r.applyAll(ctx, &s.pass, ws, deployment); err != nil {
			return err
		}
	}
	s.deployment, err = getOrNil(ctx, r.Client, ws.Namespace, deployment.Name, &appsv1.Deployment{})
	return err
}

// exists says whether a child is there. When that can't be told, it is taken for missing.
func (a *Applier) exists(ctx context.Context, child client.Object) bool {
	live, err := a.get(ctx, child, child.GetObjectKind().GroupVersionKind())
	return err == nil && live != nil
}

// prune removes the internal CA where another issuer is named.
func (r *workspaceReconciler) prune(ctx context.Context, s *workspaceScope) error {
	if s.ws.Spec.Certificates.InternalIssuerRef == nil {
		return nil
	}
	ws, mine := s.ws, client.MatchingLabels{rdv.LabelWorkspace: s.ws.Name, rdv.LabelManagedBy: rdv.ManagedBy}
	wanted := map[string]bool{
		render.WorkspaceTLS(ws.Name): true, render.WorkspaceBrokerIdentity(ws.Name): true,
		render.WorkspaceTickets(ws.Name): true, render.WorkspaceSigning(ws.Name): true,
		render.WorkspaceOperatorIdentity(ws.Name): true,
	}
	return errors.Join(
		r.Prune(ctx, ws, certmanager.SchemeGroupVersion.WithKind(certmanager.IssuerKind), mine, nil),
		r.pruneCertificates(ctx, ws, mine, wanted),
	)
}
