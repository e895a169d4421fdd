package controllers

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
)

// heartbeatLost is how old a heartbeat in the status may be. Brokers write one every five minutes and say at once when an
// agent goes; this is for when no broker is left to say so.
const heartbeatLost = 15 * time.Minute

func (r *sessionHostReconciler) writeStatus(ctx context.Context, s *sessionHostScope) error {
	host := s.host
	status := rdv.SessionHostStatus{ObservedGeneration: host.Generation, FilesOf: s.filesOf}
	secret := ""
	if s.hasSecret {
		secret = render.RegistrationSecretName(host.Name)
	}
	status.Registration = registrationStatus(s.registration, secret)

	connected := r.connectedCondition(s)
	others := []metav1.Condition{r.drainingCondition(s)}
	if s.podDecision.Action == plan.PodWait && s.pod != nil && s.pod.DeletionTimestamp.IsZero() && s.pod.Status.Phase == corev1.PodRunning {
		message := "the pool's template has changed: the pod is replaced once others of the pool are back"
		if sessionsOf(host) > 0 {
			message = "the pool's template has changed: the pod is replaced once no session is on it"
		}
		others = append(others, isTrue(rdv.ConditionReconciling, rdv.ReasonProgressing, message))
	}
	status.Conditions = summarise(r.now(), host.Status.Conditions, host.Generation, "takes sessions", []metav1.Condition{
		s.refs.condition(rdv.ConditionReferencesResolved, "all references resolve"),
		enrolledCondition(s),
		r.oneMachineCondition(s),
		connected,
		healthyCondition(s, connected),
	}, others)
	r.warnOfStall(host, host.Status.Conditions, status.Conditions)
	return r.writeChangedStatus(ctx, host, &host.Status, &status, "enrolment", "agent")
}

func enrolledCondition(s *sessionHostScope) metav1.Condition {
	const condition = rdv.ConditionEnrolled
	host := s.host
	switch {
	case revoked(host) && s.wantPod != nil:
		return isFalse(condition, rdv.ReasonRevoked, fmt.Sprintf("the enrolment was revoked (annotation %s): the pod is being replaced, and its agent enrols with a new key", rdv.AnnotationRevoke))
	case revoked(host) && s.hasSecret:
		return isFalse(condition, rdv.ReasonRevoked, fmt.Sprintf("the enrolment was revoked (annotation %s): enrol the machine with the token in Secret %q", rdv.AnnotationRevoke, render.RegistrationSecretName(host.Name)))
	case revoked(host):
		return isFalse(condition, rdv.ReasonRevoked, fmt.Sprintf("the enrolment was revoked (annotation %s): a new registration token is on its way", rdv.AnnotationRevoke))
	case host.Status.Enrolment != nil && host.Status.Enrolment.HostUID != "" && host.Status.Enrolment.HostUID != string(host.UID):
		return isFalse(condition, rdv.ReasonNotEnrolled, "status.enrolment is of a SessionHost that had this name before: delete this SessionHost, and enrol the machine again")
	case host.Status.Enrolment != nil:
		return isTrue(condition, rdv.ReasonReady, "the agent holds a certificate")
	case s.wantPod == nil && s.hasSecret:
		return isFalse(condition, rdv.ReasonNotEnrolled, fmt.Sprintf("no agent has enrolled yet: start one on the machine with the token in Secret %q", render.RegistrationSecretName(host.Name)))
	case s.wantPod == nil:
		return isFalse(condition, rdv.ReasonNotEnrolled, "no agent has enrolled yet")
	case s.pod == nil && !s.feedSeen && s.ws != nil:
		return isFalse(condition, rdv.ReasonPending, fmt.Sprintf("the pod is made once Workspace %q has its certificate (Secret %q)", s.ws.Name, render.WorkspaceTLS(s.ws.Name)))
	}
	return isFalse(condition, rdv.ReasonNotEnrolled, podTrouble(s.pod, "the pod's agent has not enrolled yet"))
}

// revoked says that the host's enrolment was revoked, or that the brokers are about to, and that it has not enrolled since.
func revoked(host *rdv.SessionHost) bool {
	e := host.Status.Enrolment
	if e == nil {
		return false
	}
	want := rdv.RevokeFor(host.Annotations)
	return e.KeyFingerprint == "" && e.RevokedFor != "" || want != "" && want != e.RevokedFor
}

// secondMachineFor is how long the sight of a second machine is shown: brokers note it every five minutes while it lasts.
const secondMachineFor = 15 * time.Minute

func (r *sessionHostReconciler) oneMachineCondition(s *sessionHostScope) metav1.Condition {
	const condition = rdv.ConditionOneMachine
	agent, enrolment := s.host.Status.Agent, s.host.Status.Enrolment
	if agent == nil {
		return isUnknown(condition, rdv.ReasonNotConnected, "no broker has heard of the agent yet")
	}
	if seen := agent.SecondMachineSeen; seen != nil && (enrolment == nil || enrolment.Time.Before(seen)) {
		if left := secondMachineFor - r.now().Sub(seen.Time); left > 0 {
			s.wakeAfter(left)
			return isFalse(condition, rdv.ReasonSecondMachine, fmt.Sprintf("two machines connect as this host by turns: one is a clone, or has its key. On a clone, remove the agent's state folder and enrol it under a name of its own. "+
				"If you don't know the other machine, set the annotation %s to a new value, and enrol the right one with the new token", rdv.AnnotationRevoke))
		}
	}
	return isTrue(condition, rdv.ReasonReady, "one machine connects as this host")
}

// podTrouble says which container of a pod waits, and for what; else it says otherwise. The kubelet's own messages are left
// out, for they change with each try.
func podTrouble(pod *corev1.Pod, otherwise string) string {
	if pod == nil {
		return "the pod is being made"
	}
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for _, c := range list {
			w := c.State.Waiting
			if w == nil || w.Reason == "" || w.Reason == "PodInitializing" || w.Reason == "ContainerCreating" {
				continue
			}
			reason := w.Reason
			if reason == "ErrImagePull" { // it takes turns with this one
				reason = "ImagePullBackOff"
			}
			return fmt.Sprintf("container %q of the pod waits: %s; see kubectl describe pod %s", c.Name, reason, pod.Name)
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return fmt.Sprintf("the pod is not scheduled: %s; see kubectl describe pod %s", c.Reason, pod.Name)
		}
	}
	return otherwise
}

func (r *sessionHostReconciler) connectedCondition(s *sessionHostScope) metav1.Condition {
	const condition = rdv.ConditionConnected
	agent := s.host.Status.Agent
	switch {
	case agent == nil:
		return isUnknown(condition, rdv.ReasonNotConnected, "no broker has heard of the agent yet")
	case !agent.Connected:
		message := "the agent is not on the control channel: is the machine up, and can it reach the brokers?"
		if s.wantPod != nil {
			message = podTrouble(s.pod, "the agent is not on the control channel; see kubectl logs "+s.host.Name+" -c agent")
		}
		return isFalse(condition, rdv.ReasonNotConnected, message)
	case agent.LastHeartbeat != nil:
		left := heartbeatLost - r.now().Sub(agent.LastHeartbeat.Time)
		if left <= 0 {
			return isFalse(condition, rdv.ReasonHeartbeatLost, fmt.Sprintf("no broker has noted a heartbeat for %d minutes: do the workspace's brokers run?", int(heartbeatLost.Minutes())))
		}
		s.wakeAfter(left)
	}
	return isTrue(condition, rdv.ReasonReady, "the agent is on the control channel")
}

func healthyCondition(s *sessionHostScope, connected metav1.Condition) metav1.Condition {
	const condition = rdv.ConditionHealthy
	agent := s.host.Status.Agent
	switch {
	case agent == nil || connected.Status != metav1.ConditionTrue:
		return isUnknown(condition, rdv.ReasonNotConnected, "only a connected agent can say whether the RDP server answers")
	case !agent.RDPReady:
		message := "the RDP server does not answer the agent"
		if agent.Message != "" {
			message += ": " + agent.Message
		}
		return isFalse(condition, rdv.ReasonRDPNotReady, message)
	}
	return isTrue(condition, rdv.ReasonReady, "the RDP server answers")
}

func (r *sessionHostReconciler) drainingCondition(s *sessionHostScope) metav1.Condition {
	const condition = rdv.ConditionDraining
	drain, retiring := s.host.Spec.Drain, s.host.Spec.Retiring
	if drain == nil && !retiring {
		return isFalse(condition, rdv.ReasonNotDraining, "")
	}
	if !retiring && drain.Until != nil {
		left := drain.Until.Sub(r.now())
		if left <= 0 {
			return isFalse(condition, rdv.ReasonNotDraining, "spec.drain.until has passed")
		}
		s.wakeAfter(left)
	}
	agent := s.host.Status.Agent
	switch {
	case retiring:
		return isTrue(condition, rdv.ReasonRetiring, "the pool has hosts too many: this one takes no new session, and goes once none runs")
	case agent == nil || !agent.DrainAcknowledged:
		return isTrue(condition, rdv.ReasonDrainRequested, "asked for; the host has not acknowledged it yet")
	case agent.Sessions > 0:
		return isTrue(condition, rdv.ReasonDrainRequested, "the host takes no new session; running ones go on")
	}
	return isTrue(condition, rdv.ReasonDrained, "the host takes no new session, and none runs")
}
