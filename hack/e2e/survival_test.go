package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/stage"
	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// A session goes on, and new ones begin, whatever of ours is restarted around it.
func TestSessionsSurvive(t *testing.T) {
	enrolMachine(t)
	d := showDesktop(t, "linux-desktop", "tsgu", w.podColor)
	answers(t, d, "before")

	t.Run("the gateway container is killed", func(t *testing.T) {
		pod := gatewayPod(t)
		for _, pid := range processes(t, "/gateway") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if err := eventually(t.Context(), time.Minute, func() error {
			now := gatewayPod(t)
			if now.UID != pod.UID {
				return errors.New("the pod was replaced, though only a container died")
			}
			for _, c := range now.Status.ContainerStatuses {
				if c.Name == "gateway" && c.RestartCount > restarts(pod, "gateway") && c.Ready {
					return nil
				}
			}
			return errors.New("the gateway container is not back")
		}); err != nil {
			t.Fatal(err)
		}
		answers(t, d, "gateway")
	})

	t.Run("every broker is replaced", func(t *testing.T) {
		if err := w.Client.DeleteAllOf(t.Context(), &corev1.Pod{}, client.InNamespace(stage.Namespace),
			client.MatchingLabels{rdv.LabelWorkspace: "demo", rdv.LabelComponent: "broker"}); err != nil {
			t.Fatal(err)
		}
		if err := eventually(t.Context(), 30*time.Second, func() error {
			if brokersKnow(t.Context()) == nil {
				return errors.New("the brokers are still counted as ready")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		answers(t, d, "nobroker")
		if err := eventually(t.Context(), 90*time.Second, func() error { return brokersKnow(t.Context(), "linux-0", outside) }); err != nil {
			t.Fatal(err)
		}
		other := showDesktop(t, "machine-desktop", "raw", w.outColor)
		other.Stop()
		answers(t, d, "brokers")
	})

	t.Run("the relay's pod is replaced", func(t *testing.T) {
		old := gatewayPod(t)
		// A request that no earlier run has left there, and that the node has room for.
		patch := fmt.Sprintf(`{"spec":{"relay":{"resources":{"requests":{"cpu":null,"memory":"%d"}}}}}`, 64<<20+time.Now().UnixMilli()%1_000_000)
		if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "patch", "gateway", "gateway-a", "--type=merge", "-p", patch); err != nil {
			t.Fatal(err)
		}
		if err := eventually(t.Context(), time.Minute, func() error {
			if now := gatewayPod(t); now.UID == old.UID {
				return errors.New("no new gateway pod is ready")
			}
			var gone corev1.Pod
			if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(&old), &gone); err != nil || gone.DeletionTimestamp.IsZero() {
				return fmt.Errorf("the old pod is not draining: %v", err)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		answers(t, d, "drain")
		// New sessions take the new pod, while the old one waits for its last.
		other := showDesktop(t, "machine-desktop", "raw", w.outColor)
		other.Stop()
		answers(t, d, "still")
		d.Stop()
		if err := eventually(t.Context(), time.Minute, func() error {
			var gone corev1.Pod
			if err := w.Client.Get(t.Context(), client.ObjectKeyFromObject(&old), &gone); client.IgnoreNotFound(err) != nil || err == nil {
				return fmt.Errorf("the drained pod is still there, though its last session ended: %v", err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
}

// answers types a command into the session and waits until the host has carried it out.
func answers(t *testing.T, d *stage.Desktop, word string) {
	t.Helper()
	file := "/tmp/rdv-e2e-" + word
	if err := w.alice.Type(t.Context(), "touch "+file+"\n"); err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), 20*time.Second, func() error {
		select {
		case <-d.Done():
			return fmt.Errorf("the client ended: %s", tail(d.Output(), 10))
		default:
		}
		_, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "exec", "linux-0", "-c", "desktop", "--", "rm", file)
		return err
	}); err != nil {
		t.Fatalf("the session does not answer (%s): %v", word, err)
	}
}

// gatewayPod is the gateway's pod that is ready and not on its way out.
func gatewayPod(t *testing.T) corev1.Pod {
	t.Helper()
	var pods corev1.PodList
	if err := w.Client.List(t.Context(), &pods, client.InNamespace(stage.Namespace), client.MatchingLabels{rdv.LabelGateway: "gateway-a"}); err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && p.DeletionTimestamp.IsZero() {
				return p
			}
		}
	}
	if len(pods.Items) == 0 {
		t.Fatal("there is no gateway pod")
	}
	return pods.Items[0]
}

func restarts(pod corev1.Pod, container string) int32 {
	for _, c := range pod.Status.ContainerStatuses {
		if c.Name == container {
			return c.RestartCount
		}
	}
	return 0
}

// processes finds those whose program is path, in whatever container of the demo's namespace.
func processes(t *testing.T, path string) []int {
	t.Helper()
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	var pids []int
	for _, l := range links {
		target, err := os.Readlink(l)
		if err != nil || strings.TrimSuffix(target, " (deleted)") != path {
			continue
		}
		environ, _ := os.ReadFile(filepath.Join(filepath.Dir(l), "environ"))
		if !strings.Contains(string(environ), "POD_NAMESPACE="+stage.Namespace) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(l))); err == nil {
			pids = append(pids, pid)
		}
	}
	if len(pids) == 0 {
		t.Fatalf("no process runs %s in %s", path, stage.Namespace)
	}
	return pids
}

// brokersKnow is nil once the brokers are up, and have heard of the hosts again.
func brokersKnow(ctx context.Context, hosts ...string) error {
	var ws rdv.Workspace
	if err := w.Client.Get(ctx, client.ObjectKey{Namespace: stage.Namespace, Name: "demo"}, &ws); err != nil {
		return err
	}
	if ws.Status.Brokers != "2/2" {
		return fmt.Errorf("brokers: %s", ws.Status.Brokers)
	}
	for _, h := range hosts {
		if err := w.hostReady(ctx, h); err != nil {
			return err
		}
	}
	// kube-proxy learns of a ready pod a moment after its status does: several new connections must get through.
	for range 8 {
		resp, err := w.HTTP().Get(stage.WorkspaceURL + brokerapi.PathWorkspace)
		if err != nil {
			return err
		}
		resp.Body.Close()
	}
	return nil
}
