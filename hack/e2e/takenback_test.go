package e2e

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/stage"
)

// revoke sets the workspace's revocations, as JSON; "" takes them away.
func revoke(ctx context.Context, list string) error {
	patch := `{"spec":{"revocations":null}}`
	if list != "" {
		patch = `{"spec":{"revocations":` + list + `}}`
	}
	_, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "workspace", "demo", "--type=merge", "-p", patch)
	return err
}

// ends waits for a person's RDP client to end.
func ends(t *testing.T, d *stage.Desktop, what string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := d.ExitCode(ctx); err != nil {
		t.Fatalf("%s: the session goes on: %v", what, err)
	}
}

// What was given can be taken back, from one who works while another works on: a user, a ticket, and given again.
func TestTakenBack(t *testing.T) {
	grantBob(t)
	bob := newBob(t)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := revoke(ctx, ""); err != nil {
			t.Error(err)
		}
		endSessions(ctx)
	})
	notYet(t, w.podColor)
	a := connect(t, w.alice, "linux-desktop", w.podColor)
	b := connect(t, bob, "linux-desktop", w.podColor)
	if err := w.alice.Type(t.Context(), "mark=still-hers\n"); err != nil {
		t.Fatal(err)
	}

	if err := revoke(t.Context(), `[{"user":"alice@example.test","reason":"laptop stolen"}]`); err != nil {
		t.Fatal(err)
	}
	ends(t, a, "a disabled user")
	if out, err := w.alice.Rdv(t.Context(), "list"); err == nil || !strings.Contains(err.Error(), "laptop stolen") {
		t.Errorf("a disabled user reads the feed: %s %v", out, err)
	}
	if err := bob.Type(t.Context(), "echo bob works on > on\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/bob/on", "bob works on")

	if err := revoke(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), 20*time.Second, func() error { _, err := w.alice.Rdv(t.Context(), "list"); return err }); err != nil {
		t.Fatal(err)
	}
	notYet(t, w.podColor)
	a = connect(t, w.alice, "linux-desktop", w.podColor)
	if err := w.alice.Type(t.Context(), "echo $mark > mine\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/alice/mine", "still-hers")

	// One ticket, of which the timeline tells the id.
	explain, err := w.alice.Rdv(t.Context(), "explain", a.ActivityID)
	if err != nil {
		t.Fatal(err)
	}
	id := regexp.MustCompile(`by ticket (\w+)`).FindStringSubmatch(explain)
	if id == nil {
		t.Fatalf("the timeline names no ticket:\n%s", explain)
	}
	if err := revoke(t.Context(), fmt.Sprintf(`[{"ticket":%q}]`, id[1])); err != nil {
		t.Fatal(err)
	}
	ends(t, a, "a revoked ticket")
	notYet(t, w.podColor)
	connect(t, w.alice, "linux-desktop", w.podColor) // with another
	select {
	case <-b.Done():
		t.Errorf("bob's session ended: %s", tail(b.Output(), 10))
	default:
	}
}

// A machine whose key is revoked is out at once, its session host says so, and the old key doesn't come back; with a new
// token it is a host again.
func TestRevokedMachine(t *testing.T) {
	enrolMachine(t)
	key := client.ObjectKey{Namespace: stage.Namespace, Name: outside}
	var sh rdv.SessionHost
	if err := w.Client.Get(t.Context(), key, &sh); err != nil {
		t.Fatal(err)
	}
	before := sh.Status.Enrolment
	if before == nil || len(before.KeyFingerprint) != 64 || before.HostUID != string(sh.UID) {
		t.Fatalf("the enrolment names no key and object: %+v", before)
	}
	t.Cleanup(func() { // as a new machine, for the tests after this one
		ctx := context.WithoutCancel(t.Context())
		w.machine.Agent.Stop()
		w.machine.Agent = nil
		w.machine.Command(ctx, "rm", "-rf", "/var/lib/rendezvous-agent").Run()
		if err := removeHost(ctx, w.Client, outside); err != nil {
			t.Error(err)
		}
	})
	if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "annotate", "sessionhost", outside, "--overwrite",
		fmt.Sprintf("rendezvous.dev/revoke-enrolment=e2e-%d", time.Now().Unix())); err != nil {
		t.Fatal(err)
	}
	since := len(w.machine.Agent.Output())
	if err := eventually(t.Context(), 30*time.Second, func() error {
		if err := w.hostReady(t.Context(), outside); err == nil {
			return errors.New("the host still takes sessions")
		}
		if out := w.machine.Agent.Output()[since:]; !strings.Contains(out, "control channel lost") && !strings.Contains(out, "no control channel") {
			return errors.New("the agent still has its control channel")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	if err := w.hostReady(t.Context(), outside); err == nil {
		t.Error("the revoked key came back")
	}
	if err := w.Client.Get(t.Context(), key, &sh); err != nil || sh.Status.Enrolment == nil || sh.Status.Enrolment.RevokedFor == "" {
		t.Errorf("the status doesn't say that the key was revoked: %+v %v", sh.Status.Enrolment, err)
	}
}
