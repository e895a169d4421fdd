package controllers

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// Events are few: what an operator on call wants to have seen when looking back. Conditions say how things are.
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reasons of events, and what the operator did or does.
const (
	eventRolloutBegun    = "RolloutBegun"
	eventRolloutFinished = "RolloutFinished"
	eventScaled          = "Scaled"
	eventHostRemoved     = "HostRemoved"
	eventPodReplaced     = "PodReplaced"
	eventDraining        = "Draining"
	eventDrainSkipped    = "DrainSkipped"
	eventDrainDeadline   = "DrainDeadlinePassed"
	eventDrainUncounted  = "DrainNotCounted"

	eventAssignmentRestored = "AssignmentRestored"

	actionRoll    = "Roll"
	actionScale   = "Scale"
	actionReplace = "Replace"
	actionResolve = "Resolve"
	actionDrain   = "Drain"
	actionAssign  = "Assign"
)

// tell records that something happened to an object.
func (b *base) tell(obj client.Object, reason, action, note string, args ...any) {
	b.events.Eventf(obj, nil, corev1.EventTypeNormal, reason, action, note, args...)
}

// warnOfStall records that an object has begun to need a person, and why.
func (b *base) warnOfStall(obj client.Object, before, after []metav1.Condition) {
	stalled := meta.FindStatusCondition(after, rdv.ConditionStalled)
	if stalled != nil && stalled.Status == metav1.ConditionTrue && !meta.IsStatusConditionTrue(before, rdv.ConditionStalled) {
		b.events.Eventf(obj, nil, corev1.EventTypeWarning, stalled.Reason, actionResolve, "%s", stalled.Message)
	}
}
