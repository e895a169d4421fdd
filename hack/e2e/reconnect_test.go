package e2e

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/stage"
)

// A relay that dies takes its connections with it. The client's own reconnect, FreeRDP's, must land in the session that
// it lost, though another host is free and emptier: the same shell still knows what it was told before.
func TestReconnectAfterRelayKill(t *testing.T) {
	for _, mode := range []string{"tsgu", "raw"} {
		t.Run(mode, func(t *testing.T) {
			d := showDesktop(t, "linux-desktop", mode, w.podColor, "+auto-reconnect", "/auto-reconnect-max-retries:20")
			secondHost(t)
			before := joins(t, "linux-0")

			// Only this shell will know the word, and only its display has the colour.
			mark := fmt.Sprintf("%s%d", mode, time.Now().UnixNano()%1e9)
			painted := rdpkit.RandomColor()
			if err := w.alice.Type(t.Context(), fmt.Sprintf("mark=%s; xsetroot -solid rgb:%02x/%02x/%02x\n", mark, painted.R, painted.G, painted.B)); err != nil {
				t.Fatal(err)
			}
			waitForDesktop(t, d, painted)

			killed := time.Now()
			for _, pid := range relayPIDs(t) {
				n, err := strconv.Atoi(pid)
				if err == nil {
					err = syscall.Kill(n, syscall.SIGKILL)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			// In raw mode FreeRDP notices a lost connection when it next writes: a key that types nothing. The picture of
			// before stays on the screen meanwhile, so it is no proof: the word is.
			if err := eventually(t.Context(), 2*time.Minute, func() error {
				select {
				case <-d.Done():
					t.Fatalf("the client gave up: %s", tail(d.Output(), 20))
				default:
				}
				if out, err := w.alice.Command(t.Context(), "xdotool", "key", "shift").CombinedOutput(); err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				if joins(t, "linux-0") == before {
					return errors.New("linux-0 has joined no session since the kill")
				}
				return nil
			}); err != nil {
				t.Fatalf("%v\n%s", err, tail(d.Output(), 30))
			}
			t.Logf("%s: back %s after the kill", mode, time.Since(killed).Round(100*time.Millisecond))
			waitForDesktop(t, d, painted)
			if err := w.alice.Type(t.Context(), "touch /tmp/rdv-$mark\n"); err != nil {
				t.Fatal(err)
			}
			if err := eventually(t.Context(), 20*time.Second, func() error {
				_, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "exec", "linux-0", "-c", "desktop", "--", "rm", "/tmp/rdv-"+mark)
				return err
			}); err != nil {
				t.Fatalf("the session is not the one from before: %v", err)
			}
			if n := joins(t, "linux-1"); n > 0 {
				t.Errorf("linux-1 joined %d sessions, though the user's was on linux-0", n)
			}
			// The desktop as other tests know it.
			if err := w.alice.Type(t.Context(), fmt.Sprintf("xsetroot -solid rgb:%02x/%02x/%02x\n", w.podColor.R, w.podColor.G, w.podColor.B)); err != nil {
				t.Fatal(err)
			}
			waitForDesktop(t, d, w.podColor)
		})
	}
}

// secondHost gives pool linux a second, empty host until the test ends.
func secondHost(t *testing.T) {
	t.Helper()
	scale := func(ctx context.Context, replicas int) error {
		_, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "hostpool", "linux", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"replicas":%d}}`, replicas))
		return err
	}
	if err := scale(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := scale(ctx, 1); err != nil {
			t.Error(err)
		}
		if err := eventually(ctx, 2*time.Minute, func() error {
			for _, obj := range []client.Object{&corev1.Pod{ObjectMeta: meta("linux-1")}, &rdv.SessionHost{ObjectMeta: meta("linux-1")}} {
				if err := w.Client.Get(ctx, client.ObjectKeyFromObject(obj), obj); client.IgnoreNotFound(err) != nil || err == nil {
					return errors.Join(errors.New("linux-1 is still there"), err)
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	if err := eventually(t.Context(), 2*time.Minute, func() error { return w.hostReady(t.Context(), "linux-1") }); err != nil {
		t.Fatal(err)
	}
}

// joins counts the sessions that a pod's agent has joined so far, as its log tells.
func joins(t *testing.T, host string) int {
	t.Helper()
	out, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "logs", host, "-c", "agent")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, `"msg":"session joined"`)
}
