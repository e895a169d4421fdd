package controllers

import (
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

func homes() rdv.VolumeClaimTemplate {
	return rdv.VolumeClaimTemplate{
		Metadata: rdv.ClaimMetadata{Name: "home", Labels: map[string]string{"team": "design"}},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}
}

func poolWithHomes(ns string, kind rdv.HostPoolType) *rdv.HostPool {
	pool := newPool(ns)
	pool.Spec.Type, pool.Spec.Template = kind, template("desktop:1")
	pool.Spec.VolumeClaimTemplates = []rdv.VolumeClaimTemplate{homes()}
	return pool
}

// forgetClaim takes the part of the controller that keeps claims while a pod mounts them.
func (w *world) forgetClaim(t *testing.T, ns, name string) {
	t.Helper()
	w.patch(t, &corev1.PersistentVolumeClaim{}, ns, name, `{"metadata":{"finalizers":null}}`)
}

// collect takes the garbage collector's part for what a SessionHost or HostPool leaves behind.
func (w *world) collect(t *testing.T, ns, owner string) {
	t.Helper()
	w.deletePod(t, ns, owner)
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: owner + "-registration"}}
	if err := w.Delete(t.Context(), secret); client.IgnoreNotFound(err) != nil {
		t.Fatal(err)
	}
}

// A desktop's claim outlives its pod and its SessionHost, and is its person's for good.
func TestClaimIsOnePersons(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.create(t, poolWithHomes(ns, rdv.Personal))
	pod := appears(t, w, ns, "linux-0", &corev1.Pod{})
	claim := read(t, w, ns, "home-linux-0", &corev1.PersistentVolumeClaim{}) // before its pod
	if claim.Labels["team"] != "design" || claim.Labels[rdv.LabelSessionHost] != "linux-0" || len(claim.OwnerReferences) > 0 || claim.Annotations[rdv.AnnotationFilesOf] != "" {
		t.Errorf("the claim is %+v", claim.ObjectMeta)
	}
	mounted := false
	for _, v := range pod.Spec.Volumes {
		mounted = mounted || v.Name == "home" && v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == "home-linux-0"
	}
	if !mounted {
		t.Errorf("the pod's volumes are %+v", pod.Spec.Volumes)
	}
	isOf := func(user string) {
		t.Helper()
		eventually(t, func() error {
			claim, host := &corev1.PersistentVolumeClaim{}, &rdv.SessionHost{}
			err := errors.Join(w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "home-linux-0"}, claim), w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "linux-0"}, host))
			if err != nil || claim.Annotations[rdv.AnnotationFilesOf] != user || host.Status.FilesOf != user {
				return fmt.Errorf("the claim is %q's, the host holds the files of %q, %v", claim.Annotations[rdv.AnnotationFilesOf], host.Status.FilesOf, err)
			}
			return nil
		})
	}
	w.patch(t, &rdv.SessionHost{}, ns, "linux-0", `{"spec":{"assignedUser":"alice@example.test"}}`)
	isOf("alice@example.test")

	// The SessionHost is deleted, and its pool makes another of its name: hers again, with her files.
	uid, claimUID := read(t, w, ns, "linux-0", &rdv.SessionHost{}).UID, claim.UID
	w.deletes(t, &rdv.SessionHost{}, ns, "linux-0")
	eventually(t, func() error {
		host := &rdv.SessionHost{}
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "linux-0"}, host); err != nil || host.UID == uid {
			return fmt.Errorf("no new host: %v", err)
		}
		if host.Spec.AssignedUser != "alice@example.test" {
			return fmt.Errorf("the new host is %q's", host.Spec.AssignedUser)
		}
		return nil
	})
	isOf("alice@example.test")
	if now := read(t, w, ns, "home-linux-0", &corev1.PersistentVolumeClaim{}); now.UID != claimUID {
		t.Error("the claim is another one")
	}

	w.collect(t, ns, "linux-0")

	// The pool is deleted, and one of its name made: the same.
	w.deletes(t, &rdv.HostPool{}, ns, "linux")
	w.vanishes(t, &rdv.HostPool{}, ns, "linux")
	w.deletes(t, &rdv.SessionHost{}, ns, "linux-0") // the garbage collector's part
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-0")
	w.collect(t, ns, "linux-0")
	w.collect(t, ns, "linux")
	w.create(t, poolWithHomes(ns, rdv.Personal))
	appears(t, w, ns, "linux-0", &rdv.SessionHost{})
	isOf("alice@example.test")

	// Somebody gives the host to bob: not with alice's files.
	appears(t, w, ns, "linux-0", &corev1.Pod{})
	w.patch(t, &rdv.SessionHost{}, ns, "linux-0", `{"spec":{"assignedUser":"bob@example.test"}}`)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonReferenceInvalid,
		`PersistentVolumeClaim "home-linux-0" holds the files of alice@example.test, but spec.assignedUser is "bob@example.test": nobody else gets them. Assign the host to alice@example.test, or delete the claim, and the files with it`)
	isOf("alice@example.test")
	w.deletePod(t, ns, "linux-0")
	w.settled(t, ns)
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "linux-0"}, &corev1.Pod{}); !apierrors.IsNotFound(err) {
		t.Fatalf("bob has a pod with alice's files: %v", err)
	}
	// The claim is deleted: bob gets a new one.
	w.deletes(t, &corev1.PersistentVolumeClaim{}, ns, "home-linux-0")
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonPending, `"home-linux-0" is being deleted`)
	w.forgetClaim(t, ns, "home-linux-0")
	appears(t, w, ns, "linux-0", &corev1.Pod{})
	isOf("bob@example.test")
	if now := read(t, w, ns, "home-linux-0", &corev1.PersistentVolumeClaim{}); now.UID == claimUID {
		t.Error("bob has alice's claim")
	}
}

func TestClaimRetention(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := poolWithHomes(ns, rdv.Pooled)
	pool.Spec.Replicas = new(int32(2))
	w.create(t, pool)
	appears(t, w, ns, "linux-1", &corev1.Pod{})
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":1}}`)
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-1")
	w.stays(t, &corev1.PersistentVolumeClaim{}, ns, "home-linux-1")
	w.collect(t, ns, "linux-1")

	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":2,"persistentVolumeClaimRetentionPolicy":{"whenDeleted":"Delete","whenScaled":"Delete"}}}`)
	appears(t, w, ns, "linux-1", &corev1.Pod{})
	eventually(t, func() error {
		for _, name := range []string{"home-linux-0", "home-linux-1"} {
			claim := &corev1.PersistentVolumeClaim{}
			if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, claim); err != nil || len(claim.OwnerReferences) != 1 || claim.OwnerReferences[0].Kind != "HostPool" {
				return fmt.Errorf("claim %s goes with %+v, %v", name, claim.OwnerReferences, err)
			}
		}
		return nil
	})
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":1}}`)
	w.vanishes(t, &rdv.SessionHost{}, ns, "linux-1")
	eventually(t, func() error {
		claim := &corev1.PersistentVolumeClaim{}
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "home-linux-1"}, claim); err != nil || claim.DeletionTimestamp == nil {
			return fmt.Errorf("the claim of a host that was too many stays: %v", err)
		}
		return nil
	})
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"persistentVolumeClaimRetentionPolicy":{"whenDeleted":"Retain"}}}`)
	eventually(t, func() error {
		if refs := read(t, w, ns, "home-linux-0", &corev1.PersistentVolumeClaim{}).OwnerReferences; len(refs) > 0 {
			return fmt.Errorf("the claim goes with %+v", refs)
		}
		return nil
	})
}

// A template as one has it from elsewhere, and one that reaches for what is others'.
func TestTemplatesOwnParts(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Template = &runtime.RawExtension{Raw: []byte(`{"metadata":{"name":"ignored","namespace":"ignored","labels":{"team":"design"}},
		"spec":{"containers":[{"name":"desktop","image":"x"}]}}`)}
	w.create(t, pool)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady,
		"set by the operator, whatever spec.template says: metadata.name, metadata.namespace")
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"template":{"spec":{"volumes":[{"name":"keys","secret":{"secretName":"demo-tickets"}}]}}}}`)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonPodInvalid,
		`spec.template.spec.volumes[keys].secret: Secret "demo-tickets" holds keys of a workspace, a gateway or a host`)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonPodInvalid, `"demo-tickets" holds keys`)
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"template":{"spec":{"volumes":null,"shareProcessNamespace":true,"hostIPC":true}}}}`)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonPodInvalid,
		"shareProcessNamespace: must not be true, for a desktop would reach the agent's process and its key; leave it out")
}

func TestForeignAndSharedClaims(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	foreign := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "home-linux-0"}, Spec: homes().Spec}
	shared := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "homes"}, Spec: homes().Spec}
	pool := poolWithHomes(ns, rdv.Personal)
	w.create(t, foreign, pool)
	w.is(t, &rdv.SessionHost{}, ns, "linux-0", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonConflict,
		`PersistentVolumeClaim "home-linux-0" exists and is not a claim of this host`)
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "linux-0"}, &corev1.Pod{}); !apierrors.IsNotFound(err) {
		t.Errorf("a pod mounts somebody's claim: %v", err)
	}

	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":3,"volumeClaimTemplates":null,"template":{"spec":{
		"containers":[{"name":"desktop","image":"desktop:1","volumeMounts":[{"name":"home","mountPath":"/home"}]}],
		"volumes":[{"name":"home","persistentVolumeClaim":{"claimName":"homes"}}]}}}}`)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonReferenceNotFound,
		`spec.template.spec.volumes[home]: PersistentVolumeClaim "homes" not found`)
	w.create(t, shared)
	w.poke(t, &rdv.HostPool{}, ns, "linux")
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonReferenceInvalid,
		`spec.template.spec.volumes[home]: PersistentVolumeClaim "homes" is ReadWriteOnce, but all hosts of the pool would share it`)
	w.patch(t, &rdv.HostPool{}, ns, "linux", `{"spec":{"replicas":1}}`)
	w.is(t, &rdv.HostPool{}, ns, "linux", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
}
