package controllers

import (
	"context"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
)

func (r *hostPoolReconciler) writeStatus(ctx context.Context, s *hostPoolScope) error {
	pool := s.pool
	status := rdv.HostPoolStatus{
		ObservedGeneration: pool.Generation,
		Hosts:              int32(len(s.hosts)),
		Registration:       registrationStatus(s.registration, ""),
	}
	if s.registration.Hash != "" {
		status.Registration.SecretName = render.RegistrationSecretName(pool.Name)
	}
	for i := range s.hosts {
		host := &s.hosts[i]
		if by := host.Labels[rdv.LabelMadeByToken]; by != "" && by == rdv.MadeByToken(s.registration.Hash) {
			status.RegisteredHosts++
		}
		status.Sessions += sessionsOf(host)
		if takesSessions(host) {
			status.ReadyHosts++
			free, _ := placesOf(&pool.Spec, host)
			status.FreePlaces += free
		}
	}
	var others []metav1.Condition
	if pool.Spec.Autoscaling != nil {
		status.Autoscaling = pool.Status.Autoscaling
		if s.scale != nil {
			status.Autoscaling = scalingStatus(s.scale.Scaled)
			others = append(others, r.scaledCondition(s))
		} else if before := meta.FindStatusCondition(pool.Status.Conditions, rdv.ConditionScaled); before != nil {
			others = append(others, *before) // what is wrong with the pool shows elsewhere
		}
	}
	if len(s.waiting) > 0 {
		others = append(others, isTrue(rdv.ConditionReconciling, rdv.ReasonProgressing,
			fmt.Sprintf("too many hosts; these take no new session, and go once no session is on them and nobody is assigned: %s", strings.Join(s.waiting, ", "))))
	}
	resolved := "all references resolve"
	if fields := render.TemplateOverrides(s.template); len(fields) > 0 {
		resolved += "; set by the operator, whatever spec.template says: " + strings.Join(fields, ", ")
	}
	ready := fmt.Sprintf("%d of %d hosts take sessions", status.ReadyHosts, status.Hosts)
	deciding := []metav1.Condition{s.refs.condition(rdv.ConditionReferencesResolved, resolved)}
	if registration := r.registrationCondition(s, status.RegisteredHosts); registration.Status != metav1.ConditionTrue && s.registration.Hash != "" {
		// The token has expired, as whoever chose Manual meant it to, or has made its hosts. Those that are members go on:
		// Ready does not suffer.
		others = append(others, registration)
	} else {
		deciding = append(deciding, registration)
	}
	deciding = append(deciding, r.availableCondition(s, status))
	status.Conditions = summarise(r.now(), pool.Status.Conditions, pool.Generation, ready, deciding, others)
	r.warnOfStall(pool, pool.Status.Conditions, status.Conditions)
	if before := pool.Status.Autoscaling; s.scale != nil && before != nil && before.DesiredHosts != s.scale.Desired {
		r.tell(pool, eventScaled, actionScale, "from %d to %s: %s free and %d on their way, %d wanted", before.DesiredHosts, count(int(s.scale.Desired), "host"),
			count(int(s.scale.Free), "place"), s.scale.Coming, s.scale.Wanted)
	}
	return r.writeChangedStatus(ctx, pool, &pool.Status, &status)
}

func scalingStatus(d plan.Scaled) *rdv.HostPoolScaling {
	status := &rdv.HostPoolScaling{DesiredHosts: d.Desired, EnoughHosts: d.Enough}
	if !d.Since.IsZero() {
		status.SurplusSince = &metav1.Time{Time: d.Since.UTC().Truncate(time.Second)} // a status holds whole seconds
	}
	return status
}

// scaledCondition says what autoscaling sees and does.
func (r *hostPoolReconciler) scaledCondition(s *hostPoolScope) metav1.Condition {
	const condition = rdv.ConditionScaled
	d := s.scale
	seen := fmt.Sprintf("%s free, %d wanted", count(int(d.Free), "place"), d.Wanted)
	switch {
	case d.Limited:
		return isFalse(condition, rdv.ReasonAtMaximum, fmt.Sprintf("%s, but spec.autoscaling.maxReplicas is %d: raise it", seen, d.Desired))
	case d.Free < d.Wanted:
		return isFalse(condition, rdv.ReasonTooFewPlaces, fmt.Sprintf("%s: hosts are on their way, %d in all", seen, d.Desired))
	case !d.Since.IsZero():
		until := d.Since.Add(autoscalingPolicy(&s.pool.Spec).Delay).UTC().Format("15:04:05 MST")
		return isTrue(condition, rdv.ReasonTooManyPlaces, fmt.Sprintf("%s: %d of %s are enough, and the rest goes if that is so until %s", seen, d.Enough, count(int(d.Desired), "host"), until))
	}
	return isTrue(condition, rdv.ReasonEnoughPlaces, fmt.Sprintf("%s, with %s", seen, count(int(d.Desired), "host")))
}

// takesSessions says whether a host is ready and not drained.
func takesSessions(host *rdv.SessionHost) bool {
	return meta.IsStatusConditionTrue(host.Status.Conditions, rdv.ConditionReady) &&
		!meta.IsStatusConditionTrue(host.Status.Conditions, rdv.ConditionDraining)
}

func (r *hostPoolReconciler) registrationCondition(s *hostPoolScope, made int32) metav1.Condition {
	const condition = rdv.ConditionRegistrationReady
	secret := render.RegistrationSecretName(s.pool.Name)
	switch {
	case s.expired:
		return isFalse(condition, rdv.ReasonTokenExpired, fmt.Sprintf("the token in Secret %q has expired, as rotation is Manual: change the annotation %s to get another", secret, rdv.AnnotationRotate))
	case s.registration.Hash == "":
		return isFalse(condition, rdv.ReasonPending, "no registration token is made yet")
	case made >= s.pool.Spec.Registration.MaxHosts():
		return isFalse(condition, rdv.ReasonTokenUsedUp, fmt.Sprintf("the token in Secret %q has made %d hosts, as many as spec.registration.maxHostsPerToken allows, and enrols no further machine: raise that, or change the annotation %s to get another token", secret, made, rdv.AnnotationRotate))
	}
	return isTrue(condition, rdv.ReasonReady, fmt.Sprintf("machines enrol with the token in Secret %q", secret))
}

func (r *hostPoolReconciler) availableCondition(s *hostPoolScope, status rdv.HostPoolStatus) metav1.Condition {
	const condition = rdv.ConditionAvailable
	switch {
	case status.ReadyHosts > 0:
		return isTrue(condition, rdv.ReasonReady, fmt.Sprintf("%d of %d hosts take sessions", status.ReadyHosts, status.Hosts))
	case status.Hosts == 0 && s.pool.Spec.Template != nil && s.pool.Spec.Autoscaling == nil && fixedHosts(&s.pool.Spec) == 0:
		return isTrue(condition, rdv.ReasonNoHosts, "spec.replicas is 0: no host is wanted")
	case status.Hosts == 0 && s.pool.Spec.Template == nil:
		return isFalse(condition, rdv.ReasonNoHosts, fmt.Sprintf("no session host has enrolled: start the agent on a machine with the token in Secret %q", render.RegistrationSecretName(s.pool.Name)))
	}
	return isFalse(condition, rdv.ReasonNoHosts, fmt.Sprintf("0 of %d hosts take sessions: see kubectl get sessionhosts", status.Hosts))
}
