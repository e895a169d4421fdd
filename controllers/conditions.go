package controllers

import (
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// maxMessage keeps a condition readable, and within the API's bound of 32768.
const maxMessage = 1024

func condition(conditionType string, status metav1.ConditionStatus, reason, message string) metav1.Condition {
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-1], "") + "…"
	}
	return metav1.Condition{Type: conditionType, Status: status, Reason: reason, Message: message}
}

func isTrue(conditionType, reason, message string) metav1.Condition {
	return condition(conditionType, metav1.ConditionTrue, reason, message)
}

func isFalse(conditionType, reason, message string) metav1.Condition {
	return condition(conditionType, metav1.ConditionFalse, reason, message)
}

func isUnknown(conditionType, reason, message string) metav1.Condition {
	return condition(conditionType, metav1.ConditionUnknown, reason, message)
}

// needsPerson are the reasons that don't go away by waiting.
var needsPerson = map[string]bool{
	rdv.ReasonReferenceNotFound: true,
	rdv.ReasonReferenceInvalid:  true,
	rdv.ReasonIssuerNotFound:    true,
	rdv.ReasonIssuerNotReady:    true,
	rdv.ReasonCertificateFailed: true,
	rdv.ReasonDiscoveryFailed:   true,
	rdv.ReasonPodInvalid:        true,
	rdv.ReasonConflict:          true,
	rdv.ReasonRejected:          true,
}

// summarise completes an object's conditions. deciding are those that Ready sums up, in the order in which they are to
// be put right; others stand beside them. Times of the last transition carry over from before.
func summarise(now time.Time, before []metav1.Condition, generation int64, readyMessage string, deciding, others []metav1.Condition) []metav1.Condition {
	ready := isTrue(rdv.ConditionReady, rdv.ReasonReady, readyMessage)
	for _, c := range deciding {
		if c.Status != metav1.ConditionTrue {
			// kstatus takes Ready: Unknown for "still on its way", so what is unknown makes Ready false.
			ready = isFalse(rdv.ConditionReady, c.Reason, c.Message)
			break
		}
	}
	reconciling := isFalse(rdv.ConditionReconciling, rdv.ReasonReady, "")
	stalled := isFalse(rdv.ConditionStalled, rdv.ReasonReady, "")
	switch {
	case ready.Status == metav1.ConditionTrue:
	case needsPerson[ready.Reason]:
		stalled = isTrue(rdv.ConditionStalled, ready.Reason, ready.Message)
		reconciling.Reason = ready.Reason
	default:
		reconciling = isTrue(rdv.ConditionReconciling, ready.Reason, ready.Message)
		stalled.Reason = ready.Reason
	}
	after := slices.Concat([]metav1.Condition{ready}, deciding, others)
	// Among others there may be a Reconciling condition that tells more.
	if !slices.ContainsFunc(others, func(c metav1.Condition) bool { return c.Type == rdv.ConditionReconciling }) {
		after = append(after, reconciling)
	}
	after = append(after, stalled)
	for i := range after {
		c := &after[i]
		c.ObservedGeneration = generation
		c.LastTransitionTime = metav1.NewTime(now)
		for _, old := range before {
			if old.Type == c.Type && old.Status == c.Status {
				c.LastTransitionTime = old.LastTransitionTime
			}
		}
	}
	return after
}

// problems gathers what is wrong with one condition's subject. The first one gives the reason; all give the message.
type problems []problem

type problem struct {
	reason, message string
	leaving         []string // instead of message: what is waited for
}

func (p *problems) add(reason, message string) {
	*p = append(*p, problem{reason: reason, message: message})
}

// addLeaving adds an object that is about to be deleted, and whose place is waited for. All make one problem: where an object
// is recreated, these are all the children of its predecessor.
func (p *problems) addLeaving(what string) {
	for i := range *p {
		if one := &(*p)[i]; len(one.leaving) > 0 {
			one.leaving = append(one.leaving, what)
			return
		}
	}
	*p = append(*p, problem{reason: rdv.ReasonPending, leaving: []string{what}})
}

// maxNamed bounds how many objects a message lists.
const maxNamed = 5

// firstOf lists names, and says how many more there are.
func firstOf(names []string) string {
	if len(names) <= maxNamed {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:maxNamed], ", "), len(names)-maxNamed)
}

func (p problem) text() string {
	if len(p.leaving) == 0 {
		return p.message
	}
	return "waiting for objects of this name's predecessor to be deleted, to create them again: " + firstOf(p.leaving)
}

// condition is true with the given message where there are no problems.
func (p problems) condition(conditionType, whenTrue string) metav1.Condition {
	if len(p) == 0 {
		return isTrue(conditionType, rdv.ReasonReady, whenTrue)
	}
	// What needs a person goes first: the rest may well be its consequence.
	sorted := slices.Clone(p)
	slices.SortStableFunc(sorted, func(a, b problem) int {
		switch {
		case needsPerson[a.reason] == needsPerson[b.reason]:
			return 0
		case needsPerson[a.reason]:
			return -1
		}
		return 1
	})
	messages := make([]string, len(sorted))
	for i, one := range sorted {
		messages[i] = one.text()
	}
	return isFalse(conditionType, sorted[0].reason, strings.Join(messages, "; "))
}
