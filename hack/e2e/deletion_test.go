package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/stage"
)

// podUID is the UID of a pod that is not on its way out.
func podUID(ctx context.Context, name string) (string, error) {
	var pod corev1.Pod
	if err := w.Client.Get(ctx, client.ObjectKey{Namespace: stage.Namespace, Name: name}, &pod); err != nil {
		return "", err
	}
	if pod.DeletionTimestamp != nil {
		return "", fmt.Errorf("pod %s is being deleted", name)
	}
	return string(pod.UID), nil
}

// A prune as Argo CD does it, in the foreground, of the host that alice works on: she goes on until she is logged off.
func TestDeletedHostKeepsItsSession(t *testing.T) {
	if err := endSessions(t.Context()); err != nil {
		t.Fatal(err)
	}
	notYet(t, w.podColor)
	d := connect(t, w.alice, "linux-desktop", w.podColor)
	s := sessionOf(t, "alice@example.test", "Active")
	uid, err := podUID(t.Context(), "linux-0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the pool has made another meanwhile; the tests after this one know linux-0
		ctx := context.WithoutCancel(t.Context())
		for _, host := range []string{"linux-0", "linux-1"} {
			if err := removeHost(ctx, w.Client, host); err != nil {
				t.Error(err)
			}
		}
		if err := eventually(ctx, 3*time.Minute, func() error { return w.hostReady(ctx, "linux-0") }); err != nil {
			t.Error(err)
		}
	})
	if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "delete", "sessionhost", "linux-0", "--cascade=foreground", "--wait=false"); err != nil {
		t.Fatal(err)
	}
	host := &rdv.SessionHost{ObjectMeta: meta("linux-0")}
	says(t, host, rdv.ConditionDraining, metav1.ConditionTrue, "waits for 1 session to end, until ", "rendezvous.dev/skip-drain=true")
	// The garbage collector has had its turn once it has taken the foreground's finalizer off.
	if err := eventually(t.Context(), time.Minute, func() error {
		if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(host), host); err != nil {
			return err
		}
		if len(host.Finalizers) != 1 || host.Finalizers[0] != rdv.Finalizer {
			return fmt.Errorf("its finalizers are %q", host.Finalizers)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if now, err := podUID(t.Context(), "linux-0"); err != nil || now != uid {
		t.Fatalf("the pod under alice's session is %s, was %s: %v", now, uid, err)
	}
	if err := w.alice.Type(t.Context(), "echo still > here\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/alice/here", "still")

	if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "delete", "session", s.ID); err != nil {
		t.Fatal(err)
	}
	ends(t, d, "a session that was logged off")
	if err := eventually(t.Context(), 2*time.Minute, func() error {
		if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(host), host); err == nil {
			return errors.New("the SessionHost is still there, though nobody is on it")
		} else if client.IgnoreNotFound(err) != nil {
			return err
		}
		if now, err := podUID(t.Context(), "linux-0"); err == nil && now == uid {
			return errors.New("the pod outlives its SessionHost")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// A Personal desktop's file is there again on a new pod, and after its SessionHost was deleted.
func TestFilesOutliveTheirPod(t *testing.T) {
	linux := &rdv.HostPool{}
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "linux"}, linux); err != nil {
		t.Fatal(err)
	}
	var template corev1.PodTemplateSpec
	if err := json.Unmarshal(linux.Spec.Template.Raw, &template); err != nil {
		t.Fatal(err)
	}
	desktop := &template.Spec.Containers[0]
	desktop.VolumeMounts = append(desktop.VolumeMounts, corev1.VolumeMount{Name: "files", MountPath: "/files"})
	raw, err := json.Marshal(map[string]any{"spec": template.Spec})
	if err != nil {
		t.Fatal(err)
	}
	create(t, &rdv.HostPool{ObjectMeta: meta("own"), Spec: rdv.HostPoolSpec{
		WorkspaceRef: linux.Spec.WorkspaceRef, Type: rdv.Personal, Template: &runtime.RawExtension{Raw: raw},
		VolumeClaimTemplates: []rdv.VolumeClaimTemplate{{
			Metadata: rdv.ClaimMetadata{Name: "files"},
			Spec: corev1.PersistentVolumeClaimSpec{
				AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
				Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("64Mi")}},
			},
		}},
		PersistentVolumeClaimRetentionPolicy: rdv.ClaimRetentionPolicy{WhenDeleted: rdv.DeleteClaims},
	}})
	claim := client.ObjectKey{Namespace: stage.Namespace, Name: "files-own-0"}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := w.Client.Delete(ctx, &rdv.HostPool{ObjectMeta: meta("own")}); err != nil {
			t.Error(err)
		}
		if err := eventually(ctx, 2*time.Minute, func() error { // whenDeleted: Delete
			if err := w.Client.Get(ctx, claim, &corev1.PersistentVolumeClaim{}); client.IgnoreNotFound(err) != nil || err == nil {
				return errors.Join(errors.New("the claim is still there"), err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	ready := func(not string) (uid string) {
		t.Helper()
		if err := eventually(t.Context(), 3*time.Minute, func() (err error) {
			if uid, err = podUID(t.Context(), "own-0"); err != nil || uid == not {
				return errors.Join(errors.New("pod own-0 is not a new one"), err)
			}
			_, err = w.Kubectl(t.Context(), "", "-n", stage.Namespace, "exec", "own-0", "-c", "desktop", "--", "true")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return uid
	}
	has := func() {
		t.Helper()
		out, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "exec", "own-0", "-c", "desktop", "--", "cat", "/files/mine")
		if err != nil || strings.TrimSpace(out) != "alice's" {
			t.Errorf("her file says %q, %v", out, err)
		}
	}
	first := ready("")
	if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "exec", "own-0", "-c", "desktop", "--", "sh", "-c", `echo "alice's" >/files/mine`); err != nil {
		t.Fatal(err)
	}
	edit(t, &rdv.SessionHost{ObjectMeta: meta("own-0")}, func(h *rdv.SessionHost) { h.Spec.AssignedUser = "alice@example.test" })
	if err := w.Client.Delete(t.Context(), &corev1.Pod{ObjectMeta: meta("own-0")}); err != nil {
		t.Fatal(err)
	}
	second := ready(first)
	has()
	if err := removeHost(t.Context(), w.Client, "own-0"); err != nil {
		t.Fatal(err)
	}
	ready(second)
	has()
	var host rdv.SessionHost
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "own-0"}, &host); err != nil || host.Spec.AssignedUser != "alice@example.test" {
		t.Errorf("the host with alice's files is %q's, %v", host.Spec.AssignedUser, err)
	}
}
