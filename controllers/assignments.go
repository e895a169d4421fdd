package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// assignmentsConfigMap names where a pool's machines are kept that were deleted while they were somebody's.
func assignmentsConfigMap(pool string) string { return pool + "-assignments" }

// recordAssignment keeps whose a machine was, for the day when a SessionHost of its name is made again: the machine still has
// that person's files. A pod's go with it, or stand in a claim that says whose it is. The record has no owner, so that it
// outlives the pool; people delete it.
func (r *sessionHostReconciler) recordAssignment(ctx context.Context, host *rdv.SessionHost) error {
	if isPoolMade(host) || madeItself(host) {
		return nil
	}
	pool := host.Spec.HostPoolRef.Name
	known, found, err := r.assignments(ctx, host.Namespace, pool)
	if err != nil {
		return err
	}
	user := host.Spec.AssignedUser
	if known[host.Name] == user {
		return nil
	}
	if !found {
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
			Namespace: host.Namespace, Name: assignmentsConfigMap(pool),
			Labels: map[string]string{rdv.LabelManagedBy: rdv.ManagedBy, rdv.LabelHostPool: pool},
		}, Data: map[string]string{host.Name: user}}
		err := r.Client.Create(ctx, m, client.FieldOwner(FieldManager))
		if isTerminatingNamespace(err) { // the machine's name goes with it
			return nil
		}
		if err != nil {
			return fmt.Errorf("create ConfigMap %q: %w", m.Name, err)
		}
		return nil
	}
	entry := any(user)
	if user == "" {
		entry = nil
	}
	patch, err := json.Marshal(map[string]any{"data": map[string]any{host.Name: entry}})
	if err != nil {
		return err
	}
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: host.Namespace, Name: assignmentsConfigMap(pool)}}
	if err := r.Client.Patch(ctx, m, client.RawPatch(types.MergePatchType, patch), client.FieldOwner(FieldManager)); err != nil {
		return fmt.Errorf("patch ConfigMap %q: %w", m.Name, err)
	}
	return nil
}

func (r *sessionHostReconciler) assignments(ctx context.Context, namespace, pool string) (map[string]string, bool, error) {
	m, err := getOrNil(ctx, r.Live, namespace, assignmentsConfigMap(pool), &corev1.ConfigMap{})
	if err != nil || m == nil || m.Labels[rdv.LabelManagedBy] != rdv.ManagedBy {
		return nil, false, err
	}
	return m.Data, true, nil
}

// isPoolMade says that a pool made the host from its template: it is a pod.
func isPoolMade(host *rdv.SessionHost) bool { return host.Labels[rdv.LabelManagedBy] == rdv.ManagedBy }

// madeItself says that a machine made the host with its pool's token. Whoever deletes it wants it enrolled anew, and whoever has
// the token could take its name: so it is nobody's then.
func madeItself(host *rdv.SessionHost) bool { return host.Labels[rdv.LabelMadeByToken] != "" }

// greet gives a host that is new its finalizer, and with it the user whose it was before it was deleted: brokers assign no
// host without the finalizer, and a token is made only afterwards.
func (r *sessionHostReconciler) greet(ctx context.Context, host *rdv.SessionHost) error {
	if slices.Contains(host.Finalizers, rdv.Finalizer) {
		return nil
	}
	before := host.DeepCopy()
	restored, where := "", ""
	if host.Spec.AssignedUser == "" {
		var err error
		if restored, where, err = r.userBefore(ctx, host); err != nil {
			return err
		}
		host.Spec.AssignedUser = restored
	}
	host.Finalizers = append(slices.Clone(host.Finalizers), rdv.Finalizer)
	if err := r.patchMeta(ctx, before, host); err != nil {
		return err
	}
	if restored != "" {
		r.tell(host, eventAssignmentRestored, actionAssign, "assigned to %s again, whose it was when a SessionHost of this name was deleted (%s): set spec.assignedUser to give it to another user, or to an empty string to free it", restored, where)
	}
	return nil
}

// userBefore is whose a host of this name was, and what says so.
func (r *sessionHostReconciler) userBefore(ctx context.Context, host *rdv.SessionHost) (user, where string, err error) {
	if isPoolMade(host) {
		return r.userOfClaims(ctx, host)
	}
	if madeItself(host) {
		return "", "", nil
	}
	known, _, err := r.assignments(ctx, host.Namespace, host.Spec.HostPoolRef.Name)
	return known[host.Name], fmt.Sprintf("ConfigMap %q", assignmentsConfigMap(host.Spec.HostPoolRef.Name)), err
}
