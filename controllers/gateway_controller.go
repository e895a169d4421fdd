package controllers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// gatewayReconciler keeps a Gateway's pods, and their place on the bus of each Workspace that picks the Gateway.
type gatewayReconciler struct{ base }

// gatewayScope is one pass over one Gateway.
type gatewayScope struct {
	pass
	gw *rdv.Gateway

	// Set by gather.
	picked []*rdv.Workspace // that select the gateway, by name

	// Set by applyCertificates.
	tls        *certmanager.Certificate
	tlsIssued  bool
	caBundle   string
	served     []*rdv.Workspace // of picked, those whose certificates can be mounted
	identities map[string]bool  // names of the Certificates for picked

	// Set by applyNetwork.
	service *corev1.Service

	// Set by applyPods.
	deployment *appsv1.Deployment
	pods       gatewayPods
}

// +kubebuilder:rbac:groups=rendezvous.dev,resources=gateways,verbs=get;list;watch
// +kubebuilder:rbac:groups=rendezvous.dev,resources=gateways/status,verbs=patch
// +kubebuilder:rbac:groups=apps,resources=replicasets,verbs=get;list;patch;watch
// +kubebuilder:rbac:groups=autoscaling,resources=horizontalpodautoscalers,verbs=create;delete;get;list;patch;watch

func (r *gatewayReconciler) setup(mgr ctrl.Manager) error {
	c := mgr.GetClient()
	controller := ctrl.NewControllerManagedBy(mgr).
		For(&rdv.Gateway{}).
		Owns(&certmanager.Certificate{}).
		Owns(&appsv1.Deployment{}).
		Owns(&autoscalingv2.HorizontalPodAutoscaler{}).
		Owns(&corev1.Service{}).
		Owns(&corev1.ConfigMap{}, builder.OnlyMetadata).
		Owns(&policyv1.PodDisruptionBudget{}, builder.OnlyMetadata).
		Owns(&networkingv1.NetworkPolicy{}, builder.OnlyMetadata).
		Watches(&corev1.Secret{}, byLabel(rdv.LabelGateway), builder.OnlyMetadata).
		Watches(&corev1.Pod{}, byLabel(rdv.LabelGateway)).
		Watches(&appsv1.ReplicaSet{}, byLabel(rdv.LabelGateway)).
		Watches(&corev1.Secret{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			if ws := o.GetLabels()[rdv.LabelWorkspace]; ws == "" || o.GetName() != render.WorkspaceTickets(ws) {
				return nil
			}
			return requestsFor(ctx, c, gateways(), client.InNamespace(o.GetNamespace()))
		}), builder.OnlyMetadata).
		Watches(&rdv.Gateway{}, inNamespace(c, gateways), builder.WithPredicates(reachedElsewhere())).
		Watches(&rdv.Workspace{}, inNamespace(c, gateways), builder.WithPredicates(specOrLabels()))
	return r.watchIssuers(controller, c, gateways).Complete(r)
}

// Reconcile makes one pass over a Gateway.
func (r *gatewayReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	gw, err := getOrNil(ctx, r.Client, req.Namespace, req.Name, &rdv.Gateway{})
	if err != nil {
		return ctrl.Result{}, err
	}
	if gw == nil || rdv.Gone(gw) { // garbage collection does the rest
		r.Forget("Gateway", req.NamespacedName)
		return ctrl.Result{}, nil
	}
	if !gw.DeletionTimestamp.IsZero() {
		return r.leave(ctx, gw)
	}
	if err := r.hold(ctx, gw); err != nil {
		return ctrl.Result{}, err
	}
	s := &gatewayScope{gw: gw, identities: map[string]bool{}}
	if err := r.gather(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	err = inOrder(ctx, s, r.applyCertificates, r.applyNetwork, r.applyPods, r.prune)
	err = errors.Join(err, r.writeStatus(ctx, s))
	return ctrl.Result{RequeueAfter: s.requeue}, err
}

// gather checks the issuer and finds the Workspaces that pick the Gateway.
func (r *gatewayReconciler) gather(ctx context.Context, s *gatewayScope) error {
	gw := s.gw
	if err := r.checkIssuer(ctx, gw.Namespace, "spec.certificates.issuerRef", gw.Spec.Certificates.IssuerRef, &s.refs); err != nil {
		return err
	}
	list := &rdv.WorkspaceList{}
	if err := r.Client.List(ctx, list, client.InNamespace(gw.Namespace)); err != nil {
		return fmt.Errorf("list Workspaces: %w", err)
	}
	for i := range list.Items {
		ws := &list.Items[i]
		// A selector that can't be read is the Workspace's own condition.
		if selector, err := rules.GatewaySelector(ws); err == nil && !rdv.Gone(ws) && selector.Matches(labels.Set(gw.Labels)) {
			s.picked = append(s.picked, ws)
		}
	}
	slices.SortFunc(s.picked, func(a, b *rdv.Workspace) int { return cmp.Compare(a.Name, b.Name) })
	if len(s.picked) == 0 {
		s.refs.add(rdv.ReasonPending, "no Workspace in this namespace picks the gateway: create one, or let a gatewaySelector match this object's labels")
	}
	return nil
}

// applyCertificates keeps the public certificate and one identity per Workspace. A Workspace is served once its secrets
// can be mounted, so that one whose issuer fails holds up no other; from then on it stays served, so that a Secret that
// is missing for a moment restarts nothing.
func (r *gatewayReconciler) applyCertificates(ctx context.Context, s *gatewayScope) error {
	gw := s.gw
	public := render.GatewayCertificate(gw)
	if err := r.applyAll(ctx, &s.pass, gw, public); err != nil {
		return err
	}
	var err error
	if s.tls, s.tlsIssued, err = r.issued(ctx, gw, public.Name, &s.certificates); err != nil {
		return err
	}
	if s.tlsIssued {
		if s.caBundle, _, err = r.caOf(ctx, gw.Namespace, public.Spec.SecretName); err != nil {
			return err
		}
	}
	for _, ws := range s.picked {
		identity := render.GatewayIdentityCertificate(gw, ws)
		s.identities[identity.Name] = true
		if err := r.applyAll(ctx, &s.pass, gw, identity); err != nil {
			return err
		}
		_, ok, err := r.issued(ctx, gw, identity.Name, &s.certificates)
		if err != nil {
			return err
		}
		tickets, err := secretMetadata(ctx, r.Client, gw.Namespace, render.WorkspaceTickets(ws.Name))
		if err != nil {
			return err
		}
		if tickets == nil {
			s.certificates.add(rdv.ReasonCertificatePend, fmt.Sprintf("waits for the ticket signer of Workspace %q (Secret %q)", ws.Name, render.WorkspaceTickets(ws.Name)))
		}
		if (ok && tickets != nil) || slices.Contains(gw.Status.Workspaces, ws.Name) {
			s.served = append(s.served, ws)
		}
	}
	return nil
}

// applyNetwork keeps who finds and who reaches the pods.
func (r *gatewayReconciler) applyNetwork(ctx context.Context, s *gatewayScope) error {
	gw := s.gw
	around, err := r.surroundings(ctx, gw.Namespace)
	if err != nil {
		return err
	}
	if err := r.applyPolicy(ctx, &s.pass, gw, gw.Name, render.GatewayNetworkPolicy(gw, around)); err != nil {
		return err
	}
	service := render.GatewayService(gw)
	err = r.applyAll(ctx, &s.pass, gw,
		service, render.GatewayRelaysService(gw), render.GatewayDisruptionBudget(gw))
	if err != nil {
		return err
	}
	s.service, err = getOrNil(ctx, r.Client, gw.Namespace, service.Name, &corev1.Service{})
	return err
}

// applyPods keeps the pods. The first ones wait for the public certificate and for one Workspace to serve.
func (r *gatewayReconciler) applyPods(ctx context.Context, s *gatewayScope) error {
	gw := s.gw
	relayConfig, err := render.RelayConfigMap(gw)
	if err != nil {
		return err
	}
	gatewayConfig, err := r.render.GatewayConfigMap(gw, s.served)
	if err != nil {
		return err
	}
	if err := r.applyAll(ctx, &s.pass, gw, relayConfig, gatewayConfig); err != nil {
		return err
	}
	if s.deployment, err = getOrNil(ctx, r.Client, gw.Namespace, gw.Name, &appsv1.Deployment{}); err != nil {
		return err
	}
	if gw.Spec.Autoscaling != nil && s.deployment != nil && metav1.IsControlledBy(s.deployment, gw) {
		if err := r.HandOverReplicas(ctx, s.deployment); err != nil {
			return err
		}
	}
	want, err := r.render.GatewayDeployment(gw, s.served)
	if err != nil {
		return err
	}
	if err := r.seePods(ctx, s, want); err != nil {
		return err
	}
	if err := r.writeDeletionCosts(ctx, s); err != nil {
		return err
	}
	if (s.tlsIssued && len(s.served) > 0) || s.deployment != nil {
		if err := r.roll(ctx, s, want); err != nil {
			return err
		}
	}
	if hpa := render.GatewayAutoscaler(gw); hpa != nil {
		if err := r.applyAll(ctx, &s.pass, gw, hpa); err != nil {
			return err
		}
	}
	s.deployment, err = getOrNil(ctx, r.Client, gw.Namespace, want.Name, &appsv1.Deployment{})
	return err
}

// prune removes the identities towards Workspaces that pick the Gateway no more, and an autoscaler that isn't asked for.
func (r *gatewayReconciler) prune(ctx context.Context, s *gatewayScope) error {
	gw, mine := s.gw, client.MatchingLabels{rdv.LabelGateway: s.gw.Name, rdv.LabelManagedBy: rdv.ManagedBy}
	wanted := map[string]bool{render.GatewayTLS(gw.Name): true}
	for name := range s.identities {
		wanted[name] = true
	}
	errs := []error{r.pruneCertificates(ctx, gw, mine, wanted)}
	if gw.Spec.Autoscaling == nil {
		errs = append(errs, r.Prune(ctx, gw, autoscalingv2.SchemeGroupVersion.WithKind("HorizontalPodAutoscaler"), mine, nil))
	}
	return errors.Join(errs...)
}
