package controllers

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// Claims are no children as others are: nothing of ours goes with them unless the retention policy says so.
// +kubebuilder:rbac:groups="",resources=persistentvolumeclaims,verbs=create;delete;get;list;patch;watch

var claimKind = corev1.SchemeGroupVersion.WithKind("PersistentVolumeClaim")

// podTemplate reads a pool's template, and says what in it can't be honoured: also that it would read what other objects of
// ours keep to themselves.
func (b *base) podTemplate(ctx context.Context, pool *rdv.HostPool) (template *corev1.PodTemplateSpec, invalid, err error) {
	if template, invalid = render.PodTemplate(pool); template == nil || invalid != nil {
		return nil, invalid, nil
	}
	var faults []string
	secrets := render.TemplateSecrets(template)
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		secret, err := secretMetadata(ctx, b.Client, pool.Namespace, name)
		if err != nil {
			return nil, nil, err
		}
		if secret != nil && secret.Labels[rdv.LabelManagedBy] == rdv.ManagedBy {
			faults = append(faults, render.SecretRefused(secrets[name], name))
		}
	}
	if name := render.TemplateServiceAccount(template); name != "" {
		account, err := getOrNil(ctx, b.Client, pool.Namespace, name, metadataOf(corev1.SchemeGroupVersion.WithKind("ServiceAccount")))
		if err != nil {
			return nil, nil, err
		}
		if account != nil && account.Labels[rdv.LabelManagedBy] == rdv.ManagedBy {
			faults = append(faults, render.ServiceAccountRefused(name))
		}
	}
	claims := render.TemplateClaims(template)
	for _, name := range slices.Sorted(maps.Keys(claims)) {
		claim, err := getOrNil(ctx, b.Client, pool.Namespace, name, metadataOf(claimKind))
		if err != nil {
			return nil, nil, err
		}
		if claim != nil && claim.Labels[rdv.LabelManagedBy] == rdv.ManagedBy {
			faults = append(faults, fmt.Sprintf("spec.template.spec.volumes[%s]: PersistentVolumeClaim %q is host %q's own; use spec.volumeClaimTemplates", claims[name], name, claim.Labels[rdv.LabelSessionHost]))
		}
	}
	if len(faults) > 0 {
		return nil, render.TemplateFaults(faults), nil
	}
	return template, nil, nil
}

// checkSharedClaims tells of claims in the pool's template that several hosts can't mount.
func (r *hostPoolReconciler) checkSharedClaims(ctx context.Context, s *hostPoolScope) error {
	shared := render.SharedClaims(s.pool, s.template)
	for _, volume := range slices.Sorted(maps.Keys(shared)) {
		claim, err := getOrNil(ctx, r.Live, s.pool.Namespace, shared[volume], &corev1.PersistentVolumeClaim{})
		if err != nil {
			return err
		}
		if claim == nil {
			s.refs.add(rdv.ReasonReferenceNotFound, rules.ClaimField(volume, shared[volume])+" not found: create it, or use spec.volumeClaimTemplates, which gives each host a claim of its own")
			continue
		}
		s.refs.addProblem(rules.SharedClaim(volume, shared[volume], claim.Spec.AccessModes))
	}
	return nil
}

// claim is a host's claim as it is, by its metadata; nil where there is none.
func (b *base) claim(ctx context.Context, namespace, name string) (*metav1.PartialObjectMetadata, error) {
	for _, reader := range []client.Reader{b.Client, b.Live} {
		m := metadataOf(claimKind)
		found, err := getOrNil(ctx, reader, namespace, name, m)
		if err != nil || found != nil {
			return found, err
		}
	}
	return nil, nil
}

// applyClaims keeps a pod's claims, and whose they are. One that is there is never changed but in who owns it: a claim is kept
// from host to host of the same name.
func (r *sessionHostReconciler) applyClaims(ctx context.Context, s *sessionHostScope) error {
	if s.wantPod == nil || len(s.pool.Spec.VolumeClaimTemplates) == 0 {
		return nil
	}
	user := ""
	if s.pool.Spec.Type == rdv.Personal {
		user = s.host.Spec.AssignedUser
	}
	// First what is there: claims are one person's, all of them or none.
	live := map[string]*metav1.PartialObjectMetadata{}
	for _, want := range render.Claims(s.host, s.pool, "") {
		claim, err := r.claim(ctx, want.Namespace, want.Name)
		if err != nil {
			return err
		}
		live[want.Name] = claim
		what := fmt.Sprintf("PersistentVolumeClaim %q", want.Name)
		switch {
		case claim == nil:
		case !bearsMarks(claim, want):
			s.claimsMissing = true
			s.refs.add(rdv.ReasonConflict, fmt.Sprintf("%s exists and is not a claim of this host: delete it, or choose another name in spec.volumeClaimTemplates of HostPool %q", what, s.pool.Name))
		case claim.DeletionTimestamp != nil:
			s.claimsMissing = true
			s.filesOf = orOf(s.filesOf, claim)
			s.refs.add(rdv.ReasonPending, what+" is being deleted: it is made again once it is gone, which takes until no pod mounts it")
			s.wakeAfter(goneRetry)
			if s.pod != nil && sessionsOf(s.host) == 0 && s.podDecision.Action == plan.PodKeep {
				s.podDecision = plan.PodDecision{Action: plan.PodDelete}
			}
		case claim.Annotations[rdv.AnnotationFilesOf] != "" && !strings.EqualFold(claim.Annotations[rdv.AnnotationFilesOf], user):
			s.claimsMissing = true
			s.filesOf = orOf(s.filesOf, claim)
			s.refs.add(rdv.ReasonReferenceInvalid, notTheirs(s, what, user))
		}
	}
	if s.claimsMissing {
		return nil
	}
	s.filesOf = user
	for _, want := range render.Claims(s.host, s.pool, user) {
		if s.pool.Spec.PersistentVolumeClaimRetentionPolicy.WhenDeleted == rdv.DeleteClaims {
			want.OwnerReferences = []metav1.OwnerReference{{APIVersion: rdv.GroupVersion.String(), Kind: "HostPool", Name: s.pool.Name, UID: s.pool.UID}}
		}
		if claim := live[want.Name]; claim != nil {
			if err := r.markClaim(ctx, claim, want); err != nil {
				return err
			}
			continue
		}
		err := r.Client.Create(ctx, want, client.FieldOwner(FieldManager))
		switch {
		case apierrors.IsInvalid(err), apierrors.IsForbidden(err) && !isTerminatingNamespace(err):
			s.claimsMissing = true
			s.refs.add(rdv.ReasonRejected, fmt.Sprintf("PersistentVolumeClaim %q was refused: %s", want.Name, apiMessage(err)))
			s.wakeAfter(rejectedRetry)
		case err != nil:
			return fmt.Errorf("create PersistentVolumeClaim %q: %w", want.Name, err)
		}
	}
	return nil
}

func orOf(user string, claim *metav1.PartialObjectMetadata) string {
	if user != "" {
		return user
	}
	return claim.Annotations[rdv.AnnotationFilesOf]
}

// notTheirs says that a claim holds another person's files than the host's.
func notTheirs(s *sessionHostScope, what, user string) string {
	of := s.filesOf
	is := fmt.Sprintf("spec.assignedUser is %q", user)
	if user == "" {
		is = "spec.assignedUser is empty"
	}
	if s.pool.Spec.Type != rdv.Personal {
		is = fmt.Sprintf("HostPool %q is %s", s.pool.Name, s.pool.Spec.Type)
	}
	return fmt.Sprintf("%s holds the files of %s, but %s: nobody else gets them. Assign the host to %s, or delete the claim, and the files with it", what, of, is, of)
}

// markClaim puts right whose a claim is, and with whom it goes.
func (b *base) markClaim(ctx context.Context, claim *metav1.PartialObjectMetadata, want *corev1.PersistentVolumeClaim) error {
	after := claim.DeepCopy()
	if of := want.Annotations[rdv.AnnotationFilesOf]; of != "" && after.Annotations[rdv.AnnotationFilesOf] == "" {
		metav1.SetMetaDataAnnotation(&after.ObjectMeta, rdv.AnnotationFilesOf, of)
	}
	isPools := func(ref metav1.OwnerReference) bool {
		return ref.Kind == "HostPool" && strings.HasPrefix(ref.APIVersion, rdv.GroupVersion.Group+"/")
	}
	after.OwnerReferences = append(slices.DeleteFunc(slices.Clone(after.OwnerReferences), isPools), want.OwnerReferences...)
	if maps.Equal(after.Annotations, claim.Annotations) && slices.Equal(after.OwnerReferences, claim.OwnerReferences) {
		return nil
	}
	return b.patchMeta(ctx, claim, after)
}

// userOfClaims is whose files are in the claims that a new host would mount.
func (r *sessionHostReconciler) userOfClaims(ctx context.Context, host *rdv.SessionHost) (user, where string, err error) {
	pool, err := getOrNil(ctx, r.Client, host.Namespace, host.Spec.HostPoolRef.Name, &rdv.HostPool{})
	if err != nil || pool == nil || pool.Spec.Type != rdv.Personal {
		return "", "", err
	}
	for _, want := range render.Claims(host, pool, "") {
		claim, err := getOrNil(ctx, r.Live, want.Namespace, want.Name, metadataOf(claimKind))
		if err != nil {
			return "", "", err
		}
		if claim != nil && claim.DeletionTimestamp == nil && bearsMarks(claim, want) && claim.Annotations[rdv.AnnotationFilesOf] != "" {
			return claim.Annotations[rdv.AnnotationFilesOf], fmt.Sprintf("PersistentVolumeClaim %q", claim.Name), nil
		}
	}
	return "", "", nil
}

// leaveClaims writes on the claims of a host that goes whose they are, and deletes those of one that goes because there are too
// many, where the pool says so.
func (r *sessionHostReconciler) leaveClaims(ctx context.Context, host *rdv.SessionHost, pool *rdv.HostPool) error {
	if pool == nil || !isPoolMade(host) {
		return nil
	}
	user := ""
	if pool.Spec.Type == rdv.Personal {
		user = host.Spec.AssignedUser
	}
	scaled := host.Spec.Retiring && pool.Spec.PersistentVolumeClaimRetentionPolicy.WhenScaled == rdv.DeleteClaims
	for _, want := range render.Claims(host, pool, user) {
		claim, err := r.claim(ctx, want.Namespace, want.Name)
		if err != nil {
			return err
		}
		if claim == nil || claim.DeletionTimestamp != nil || !bearsMarks(claim, want) {
			continue
		}
		if scaled && user == "" && claim.Annotations[rdv.AnnotationFilesOf] == "" {
			if err := r.Delete(ctx, claim); err != nil {
				return err
			}
			continue
		}
		want.OwnerReferences = slices.DeleteFunc(slices.Clone(claim.OwnerReferences), func(ref metav1.OwnerReference) bool { return ref.Kind != "HostPool" })
		if err := r.markClaim(ctx, claim, want); err != nil {
			return err
		}
	}
	return nil
}
