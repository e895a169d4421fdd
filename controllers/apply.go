package controllers

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// FieldManager is the operator's name in managedFields.
const FieldManager = "rendezvous-operator"

// RefusedError says that a child can't be had as the spec asks. But for ReasonPending trying again changes nothing: a person
// must act.
type RefusedError struct {
	Reason  string // ReasonConflict, ReasonRejected or ReasonPending
	Message string
	// Leaving is the object that is in the way until it is gone, with ReasonPending.
	Leaving string
}

func (e *RefusedError) Error() string { return e.Message }

// Applier is the one place where the operator writes children. It is safe for concurrent use.
type Applier struct {
	Client client.Client
	// Live reads past the cache, where a stale answer would do harm.
	Live client.Reader

	mu sync.Mutex
	// applied remembers, per owner and child, what was applied last and what came of it: while neither changes there is
	// nothing to ask the API server. Guarded by mu.
	applied map[objectKey]map[objectKey]appliedState
}

type objectKey struct {
	schema.GroupKind
	types.NamespacedName
}

type appliedState struct {
	intent [sha256.Size]byte
	is     string // by versionOf
}

// versionOf changes with what an apply may change, and not with a mere status. Of most kinds the API server counts the
// generations of the spec; of the others it takes all that is not status.
func versionOf(obj client.Object) string {
	var version any = []any{obj.GetUID(), obj.GetGeneration(), obj.GetLabels(), obj.GetAnnotations(), obj.GetOwnerReferences()}
	if _, only := obj.(*metav1.PartialObjectMetadata); obj.GetGeneration() == 0 {
		content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(obj)
		if only || err != nil {
			return obj.GetResourceVersion()
		}
		delete(content, "status")
		for _, field := range []string{"resourceVersion", "managedFields"} {
			unstructured.RemoveNestedField(content, "metadata", field)
		}
		version = content
	}
	text, err := json.Marshal(version)
	if err != nil {
		return obj.GetResourceVersion()
	}
	sum := sha256.Sum256(text)
	return string(sum[:])
}

// Forget drops what is remembered for an owner that is gone.
func (a *Applier) Forget(kind string, name types.NamespacedName) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.applied, objectKey{rdv.GroupVersion.WithKind(kind).GroupKind(), name})
}

func (a *Applier) lastApplied(owner, child objectKey) appliedState {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.applied[owner][child]
}

// remember keeps what was applied; the zero state is as good as none.
func (a *Applier) remember(owner, child objectKey, state appliedState) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.applied == nil {
		a.applied = map[objectKey]map[objectKey]appliedState{}
	}
	if a.applied[owner] == nil {
		a.applied[owner] = map[objectKey]appliedState{}
	}
	a.applied[owner][child] = state
}

// Apply makes the object as wanted, with owner as its controller. An object of that name that somebody else owns, or that
// isn't marked as owner's child, is never touched: that is a *RefusedError, and so is what the API server finds invalid, and
// a Certificate that would overwrite somebody's Secret.
func (a *Applier) Apply(ctx context.Context, owner, want client.Object) error {
	scheme := a.Client.Scheme()
	gvk, err := apiutil.GVKForObject(want, scheme)
	if err != nil {
		return err
	}
	ownerGVK, err := apiutil.GVKForObject(owner, scheme)
	if err != nil {
		return err
	}
	ownerKey := objectKey{ownerGVK.GroupKind(), client.ObjectKeyFromObject(owner)}
	key := objectKey{gvk.GroupKind(), client.ObjectKeyFromObject(want)}
	what := fmt.Sprintf("%s %q", gvk.Kind, want.GetName())

	live, err := a.get(ctx, want, gvk)
	if err != nil {
		return fmt.Errorf("get %s: %w", what, err)
	}
	if live != nil {
		if err := refusal(live, want, owner, ownerGVK, what); err != nil {
			return err
		}
	} else if cert, ok := want.(*certmanager.Certificate); ok {
		if err := a.checkSecret(ctx, cert); err != nil {
			return err
		}
	}
	intent, err := intentOf(want, gvk, *metav1.NewControllerRef(owner, ownerGVK))
	if err != nil {
		return fmt.Errorf("apply %s: %w", what, err)
	}
	text, err := json.Marshal(intent.Object)
	if err != nil {
		return fmt.Errorf("apply %s: %w", what, err)
	}
	hash := sha256.Sum256(text)
	if live != nil && a.lastApplied(ownerKey, key) == (appliedState{hash, versionOf(live)}) {
		return nil
	}
	err = a.Client.Apply(ctx, client.ApplyConfigurationFromUnstructured(intent), client.FieldOwner(FieldManager), client.ForceOwnership)
	switch {
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsForbidden(err) && !isTerminatingNamespace(err):
		return &RefusedError{Reason: rdv.ReasonRejected, Message: fmt.Sprintf("%s was refused: %s", what, apiMessage(err))}
	case err != nil:
		return fmt.Errorf("apply %s: %w", what, err)
	}
	result := likeness(want, gvk)
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(intent.Object, result); err != nil {
		return fmt.Errorf("read %s as applied: %w", what, err)
	}
	if _, err := slimPod(result); err != nil { // as the cache has it
		return err
	}
	a.remember(ownerKey, key, appliedState{hash, versionOf(result)})
	return nil
}

// refusal is a *RefusedError where an object that is there can't become, or stay, owner's child.
func refusal(live, want, owner client.Object, ownerGVK schema.GroupVersionKind, what string) error {
	switch {
	case metav1.IsControlledBy(live, owner):
		return nil
	case !live.GetDeletionTimestamp().IsZero(), ofEarlier(live, owner, ownerGVK):
		return &RefusedError{Reason: rdv.ReasonPending, Message: what + " is about to be deleted: it is created again once it is gone", Leaving: what}
	case adoptable(live, want):
		return nil
	}
	return &RefusedError{Reason: rdv.ReasonConflict, Message: fmt.Sprintf("%s exists and %s: delete it, or choose another name for this object", what, ownedBy(live))}
}

// checkSecret refuses a Certificate that is yet to be made where its Secret is there and is no Certificate's of that name:
// cert-manager would overwrite it. The Secret of a Certificate that was deleted, or restored from a backup, is its own.
func (a *Applier) checkSecret(ctx context.Context, cert *certmanager.Certificate) error {
	name := cert.Spec.SecretName
	live, err := a.get(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: cert.Namespace, Name: name}}, secretKind)
	if err != nil {
		return fmt.Errorf("get Secret %q: %w", name, err)
	}
	if live == nil || live.GetAnnotations()[certmanager.CertificateNameKey] == cert.Name {
		return nil
	}
	return &RefusedError{Reason: rdv.ReasonConflict, Message: fmt.Sprintf("Secret %q exists and %s, and Certificate %q would overwrite it: delete the Secret, or choose another name for this object", name, ownedBy(live), cert.Name)}
}

// ofEarlier says that an object's controller is one that had owner's kind and name before: garbage collection will remove it.
func ofEarlier(live, owner client.Object, ownerGVK schema.GroupVersionKind) bool {
	ref := metav1.GetControllerOf(live)
	if ref == nil || ref.Kind != ownerGVK.Kind || ref.Name != owner.GetName() || ref.UID == owner.GetUID() {
		return false
	}
	gv, err := schema.ParseGroupVersion(ref.APIVersion)
	return err == nil && gv.Group == ownerGVK.Group
}

// adoptable says that an object that nobody owns was made by an operator as just this child: it has the name, and every
// label that says whose it is. Backup tools restore objects so, and so does a deletion that orphans.
func adoptable(live, want metav1.Object) bool {
	return len(live.GetOwnerReferences()) == 0 && live.GetDeletionTimestamp().IsZero() && bearsMarks(live, want)
}

// bearsMarks says that an object has every label of want's that says whose it is.
func bearsMarks(live, want metav1.Object) bool {
	has, marks := live.GetLabels(), want.GetLabels()
	for key, value := range marks {
		if (key == rdv.LabelManagedBy || strings.HasPrefix(key, rdv.GroupVersion.Group+"/")) && has[key] != value {
			return false
		}
	}
	return marks[rdv.LabelManagedBy] != ""
}

// get is the object as it is, or nil. What the cache doesn't know is looked up once more past it, for a first apply must
// not take over what somebody else has just made.
func (a *Applier) get(ctx context.Context, want client.Object, gvk schema.GroupVersionKind) (client.Object, error) {
	live := likeness(want, gvk)
	key := client.ObjectKeyFromObject(want)
	err := a.Client.Get(ctx, key, live)
	if apierrors.IsNotFound(err) {
		live = likeness(want, gvk)
		err = a.Live.Get(ctx, key, live)
	}
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return live, err
}

// likeness is an empty object to read into: metadata alone for the kinds of which we watch no more, so that their
// content, Secrets' above all, is never held in memory.
func likeness(obj client.Object, gvk schema.GroupVersionKind) client.Object {
	switch obj.(type) {
	case *corev1.Secret, *corev1.ConfigMap, *corev1.PersistentVolumeClaim, *corev1.ServiceAccount, *rbacv1.Role, *rbacv1.RoleBinding,
		*policyv1.PodDisruptionBudget, *networkingv1.NetworkPolicy:
		return metadataOf(gvk)
	}
	return obj.DeepCopyObject().(client.Object)
}

func metadataOf(gvk schema.GroupVersionKind) *metav1.PartialObjectMetadata {
	m := &metav1.PartialObjectMetadata{}
	m.SetGroupVersionKind(gvk)
	return m
}

// intentOf is the whole of what we want to own in the object, and nothing that merely has a zero value in Go. Owners that want
// names stand beside the controller.
func intentOf(want client.Object, gvk schema.GroupVersionKind, controller metav1.OwnerReference) (*unstructured.Unstructured, error) {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return nil, err
	}
	u := &unstructured.Unstructured{Object: content}
	u.SetGroupVersionKind(gvk)
	u.SetOwnerReferences(append([]metav1.OwnerReference{controller}, want.GetOwnerReferences()...))
	unstructured.RemoveNestedField(content, "status")
	// Go writes a time that is not set as null, which would be a wish of its own.
	for _, path := range [][]string{{"metadata", "creationTimestamp"}, {"spec", "template", "metadata", "creationTimestamp"}} {
		if v, found, _ := unstructured.NestedFieldNoCopy(content, path...); found && v == nil {
			unstructured.RemoveNestedField(content, path...)
		}
	}
	return u, nil
}

// HandOverReplicas lets go of a Deployment's number of replicas without changing it, for an autoscaler to take over: a field
// that its last owner drops would fall back to its default, one pod. A second field manager owns it from then on.
func (a *Applier) HandOverReplicas(ctx context.Context, d *appsv1.Deployment) error {
	if d.Spec.Replicas == nil || !ownsReplicas(d) {
		return nil
	}
	u := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"replicas": int64(*d.Spec.Replicas)}}}
	u.SetGroupVersionKind(appsv1.SchemeGroupVersion.WithKind("Deployment"))
	u.SetNamespace(d.Namespace)
	u.SetName(d.Name)
	u.SetUID(d.UID)
	u.SetResourceVersion(d.ResourceVersion)
	err := a.Client.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(FieldManager+"-autoscaling"))
	if err != nil {
		return fmt.Errorf("hand over the replicas of Deployment %q: %w", d.Name, err)
	}
	return nil
}

// ownsReplicas says whether a Deployment's number of replicas is the operator's.
func ownsReplicas(d *appsv1.Deployment) bool {
	for _, entry := range d.ManagedFields {
		if entry.Manager != FieldManager || entry.Subresource != "" || entry.FieldsV1 == nil {
			continue
		}
		var fields struct {
			Spec map[string]any `json:"f:spec"`
		}
		if json.Unmarshal(entry.FieldsV1.GetRawBytes(), &fields) == nil && fields.Spec["f:replicas"] != nil {
			return true
		}
	}
	return false
}

// Delete removes an object as it was seen: one that was replaced or has changed since is left to the pass that its change
// brings.
func (a *Applier) Delete(ctx context.Context, obj client.Object) error {
	return a.remove(ctx, obj, client.Preconditions{UID: new(obj.GetUID()), ResourceVersion: new(obj.GetResourceVersion())})
}

// DeleteByUID removes an object whatever has changed of it since it was seen, unless it was replaced.
func (a *Applier) DeleteByUID(ctx context.Context, obj client.Object, opts ...client.DeleteOption) error {
	return a.remove(ctx, obj, append(opts, client.Preconditions{UID: new(obj.GetUID())})...)
}

func (a *Applier) remove(ctx context.Context, obj client.Object, opts ...client.DeleteOption) error {
	err := a.Client.Delete(ctx, obj, opts...)
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete %T %q: %w", obj, obj.GetName(), err)
	}
	return nil
}

// Prune deletes the owner's children of one kind that are no longer wanted. It looks at those with the given labels, and
// touches only what refers to the owner by UID.
func (a *Applier) Prune(ctx context.Context, owner client.Object, gvk schema.GroupVersionKind, labels client.MatchingLabels, wanted map[string]bool) error {
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(gvk.GroupVersion().WithKind(gvk.Kind + "List"))
	if err := a.Client.List(ctx, list, client.InNamespace(owner.GetNamespace()), labels); err != nil {
		return fmt.Errorf("list %s: %w", gvk.Kind, err)
	}
	var errs []error
	for i := range list.Items {
		item := &list.Items[i]
		if wanted[item.Name] || !refersTo(item, owner.GetUID()) || !item.DeletionTimestamp.IsZero() {
			continue
		}
		item.SetGroupVersionKind(gvk)
		errs = append(errs, a.Delete(ctx, item))
	}
	return errors.Join(errs...)
}

// Adopt sees to it that a Secret that cert-manager made for one of our Certificates goes when both the Certificate and owner
// are gone; cert-manager, by default, leaves its Secrets behind. Owner alone would not do: the garbage collector might
// remove the Secret before the Certificate, and cert-manager would make it anew. The Certificate alone would not either: a
// key would be lost with a Certificate that somebody deletes by mistake. Neither is made controller, since cert-manager may
// be told to be.
func (a *Applier) Adopt(ctx context.Context, owner client.Object, cert *certmanager.Certificate, secret *metav1.PartialObjectMetadata) error {
	if refersTo(secret, owner.GetUID()) && refersTo(secret, cert.GetUID()) {
		return nil
	}
	var refs []metav1.OwnerReference
	for _, obj := range []client.Object{owner, cert} {
		gvk, err := apiutil.GVKForObject(obj, a.Client.Scheme())
		if err != nil {
			return err
		}
		refs = append(refs, metav1.OwnerReference{APIVersion: gvk.GroupVersion().String(), Kind: gvk.Kind, Name: obj.GetName(), UID: obj.GetUID()})
	}
	u := &unstructured.Unstructured{}
	u.SetGroupVersionKind(secretKind)
	u.SetNamespace(secret.Namespace)
	u.SetName(secret.Name)
	u.SetUID(secret.UID) // if it is another one by now, nothing happens
	u.SetOwnerReferences(refs)
	err := a.Client.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(FieldManager), client.ForceOwnership)
	if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		return fmt.Errorf("adopt Secret %q: %w", secret.Name, err)
	}
	return nil
}

// ApplyStatus writes the operator's part of an object's status: the fields in status, and no others.
func (a *Applier) ApplyStatus(ctx context.Context, obj client.Object, status map[string]any) error {
	gvk, err := apiutil.GVKForObject(obj, a.Client.Scheme())
	if err != nil {
		return err
	}
	u := &unstructured.Unstructured{Object: map[string]any{"status": status}}
	u.SetGroupVersionKind(gvk)
	u.SetNamespace(obj.GetNamespace())
	u.SetName(obj.GetName())
	u.SetUID(obj.GetUID())
	err = a.Client.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(FieldManager), client.ForceOwnership)
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("status of %s %q: %w", gvk.Kind, obj.GetName(), err)
	}
	return nil
}

func refersTo(obj metav1.Object, uid types.UID) bool {
	for _, ref := range obj.GetOwnerReferences() {
		if ref.UID == uid {
			return true
		}
	}
	return false
}

// ownedBy says to whom an object belongs.
func ownedBy(obj metav1.Object) string {
	if ref := metav1.GetControllerOf(obj); ref != nil {
		return fmt.Sprintf("belongs to %s %q", ref.Kind, ref.Name)
	}
	if refs := obj.GetOwnerReferences(); len(refs) > 0 {
		return fmt.Sprintf("belongs to %s %q", refs[0].Kind, refs[0].Name)
	}
	return "is not managed by this operator"
}

// apiMessage is the API server's own words, on one line.
func apiMessage(err error) string {
	message := err.Error()
	if status := apierrors.APIStatus(nil); errors.As(err, &status) {
		message = status.Status().Message
	}
	return strings.Join(strings.Fields(message), " ")
}

func isTerminatingNamespace(err error) bool {
	return apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
}
