package controllers

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
)

func (r *gatewayReconciler) writeStatus(ctx context.Context, s *gatewayScope) error {
	gw := s.gw
	want, fixed := render.GatewayReplicas(gw)
	if !fixed {
		want = 1 // until the autoscaler has written its number into the Deployment
	}
	status := rdv.GatewayStatus{
		ObservedGeneration: gw.Generation,
		Address:            serviceAddress(s.service),
		Pods:               podCount(s.deployment, want),
		CABundle:           s.caBundle,
	}
	if s.tls != nil {
		status.CertificateExpires = s.tls.Status.NotAfter
	}
	for _, ws := range s.served {
		status.Workspaces = append(status.Workspaces, ws.Name)
	}
	var others []metav1.Condition
	rollout, progress := s.rollout()
	available, missing := gatewayAvailable(s.deployment, want)
	switch status.Rollout = rollout; {
	case rollout != nil:
		others = append(others, isTrue(rdv.ConditionReconciling, rdv.ReasonProgressing, progress))
	case missing && available.Status == metav1.ConditionTrue:
		others = append(others, isTrue(rdv.ConditionReconciling, rdv.ReasonPodsNotReady, available.Message))
	}
	status.Conditions = summarise(r.now(), gw.Status.Conditions, gw.Generation, "serves at "+gw.Spec.Hostname, []metav1.Condition{
		s.refs.condition(rdv.ConditionReferencesResolved, "all references resolve"),
		s.certificates.condition(rdv.ConditionCertificatesReady, "all certificates are issued"),
		available,
	}, others)
	r.warnOfStall(gw, gw.Status.Conditions, status.Conditions)
	switch before := gw.Status.Rollout; {
	case before == nil && rollout != nil:
		r.tell(gw, eventRolloutBegun, actionRoll, "%s", progress)
	case before != nil && rollout == nil:
		r.tell(gw, eventRolloutFinished, actionRoll, "relay %s, gateway %s", before.RelayImage, before.GatewayImage)
	}
	return r.writeChangedStatus(ctx, gw, &gw.Status, &status, "sessions", "instances")
}

// gatewayAvailable says whether a gateway serves: brokers send nobody to one that is not Ready, so one pod is enough, and
// that the Deployment has just been changed is nothing that clients need to know. missing says that there are fewer pods
// than there should be.
func gatewayAvailable(d *appsv1.Deployment, want int32) (c metav1.Condition, missing bool) {
	if d == nil || d.Status.AvailableReplicas < 1 {
		return availableCondition("gateway", d, want, true), true
	}
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	have := d.Status.AvailableReplicas
	message := fmt.Sprintf("%d of %d gateway pods are ready", have, want)
	if have < want {
		message += ": see kubectl describe deployment " + d.Name
	}
	return isTrue(rdv.ConditionAvailable, rdv.ReasonReady, message), have < want
}

// serviceAddress is where a Service is reached: at its load balancer, or else inside the cluster.
func serviceAddress(s *corev1.Service) string {
	if s == nil {
		return ""
	}
	for _, ingress := range s.Status.LoadBalancer.Ingress {
		if ingress.Hostname != "" {
			return ingress.Hostname
		}
		if ingress.IP != "" {
			return ingress.IP
		}
	}
	return s.Spec.ClusterIP
}
