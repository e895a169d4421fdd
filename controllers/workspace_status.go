package controllers

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

func (r *workspaceReconciler) writeStatus(ctx context.Context, s *workspaceScope) error {
	ws := s.ws
	status := rdv.WorkspaceStatus{
		ObservedGeneration: ws.Generation,
		URL:                render.PublicURL(ws),
		Brokers:            podCount(s.deployment, render.BrokerReplicas(ws)),
		Resources:          s.resources,
		Gateways:           s.gateways,
	}
	status.Conditions = summarise(r.now(), ws.Status.Conditions, ws.Generation, "users subscribe to "+status.URL, []metav1.Condition{
		s.refs.condition(rdv.ConditionReferencesResolved, "all references resolve"),
		s.certificates.condition(rdv.ConditionCertificatesReady, "all certificates are issued"),
		r.identityCondition(s),
		availableCondition("broker", s.deployment, render.BrokerReplicas(ws), true),
	}, nil)
	r.warnOfStall(ws, ws.Status.Conditions, status.Conditions)
	return r.writeChangedStatus(ctx, ws, &ws.Status, &status)
}

// identityCondition says whether the OIDC provider answers.
func (r *workspaceReconciler) identityCondition(s *workspaceScope) metav1.Condition {
	issuer := s.ws.Spec.Identity.OIDC.IssuerURL
	if s.oidcCAErr {
		return isUnknown(rdv.ConditionIdentityReady, rdv.ReasonPending, "the CA bundle of spec.identity.oidc must be put right first")
	}
	known := r.discovery.Check(client.ObjectKeyFromObject(s.ws), issuer, s.oidcCA)
	s.wakeAfter(known.Next)
	switch {
	case !known.Known:
		return isUnknown(rdv.ConditionIdentityReady, rdv.ReasonPending, fmt.Sprintf("spec.identity.oidc.issuerURL: %s is being asked", issuer))
	case known.Err != nil:
		return isFalse(rdv.ConditionIdentityReady, rdv.ReasonDiscoveryFailed, fmt.Sprintf("spec.identity.oidc.issuerURL: %s: %v", issuer, known.Err))
	}
	return isTrue(rdv.ConditionIdentityReady, rdv.ReasonReady, issuer+" answers")
}

// podCount is ready/wanted.
func podCount(d *appsv1.Deployment, want int32) string {
	if d == nil {
		return fmt.Sprintf("0/%d", want)
	}
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	return fmt.Sprintf("%d/%d", d.Status.ReadyReplicas, want)
}

// availableCondition says whether a Deployment, as it is declared now, has pods that serve.
func availableCondition(noun string, d *appsv1.Deployment, want int32, waits bool) metav1.Condition {
	const condition = rdv.ConditionAvailable
	if d == nil {
		message := fmt.Sprintf("the %s Deployment is not made yet", noun)
		if waits {
			message += ": it waits for its certificates"
		}
		return isFalse(condition, rdv.ReasonPending, message)
	}
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	have := d.Status
	switch {
	case have.ObservedGeneration < d.Generation:
		return isFalse(condition, rdv.ReasonProgressing, fmt.Sprintf("the %s Deployment %q is being rolled out", noun, d.Name))
	case have.AvailableReplicas < 1 || have.AvailableReplicas < want-1: // one may be missing: that is what a disruption budget allows
		return isFalse(condition, rdv.ReasonPodsNotReady, fmt.Sprintf("%d of %d %s pods are ready: see kubectl describe deployment %s", have.AvailableReplicas, want, noun, d.Name))
	}
	return isTrue(condition, rdv.ReasonReady, fmt.Sprintf("%d of %d %s pods are ready", have.AvailableReplicas, want, noun))
}

// writeChangedStatus applies the operator's status fields if they differ from what is there. foreign are the fields that
// others write.
func (b *base) writeChangedStatus(ctx context.Context, obj client.Object, before, after any, foreign ...string) error {
	was, err := statusFields(before, foreign)
	if err != nil {
		return err
	}
	is, err := statusFields(after, foreign)
	if err != nil {
		return err
	}
	if equality.Semantic.DeepEqual(was, is) {
		return nil
	}
	return b.ApplyStatus(ctx, obj, is)
}

func statusFields(status any, foreign []string) (map[string]any, error) {
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(status)
	if err != nil {
		return nil, err
	}
	for _, name := range foreign {
		delete(fields, name)
	}
	return fields, nil
}
