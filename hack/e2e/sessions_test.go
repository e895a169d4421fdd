package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/stage"
)

// listed is what `kubectl get sessions` says of one.
type listed struct{ ID, User, Account, Host, State string }

func sessions(ctx context.Context, selector ...string) ([]listed, error) {
	out, err := w.Kubectl(ctx, "", append([]string{"-n", stage.Namespace, "get", "sessions", "-o", "json"}, selector...)...)
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct{ User, Account, Host, State string }
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	var all []listed
	for _, i := range list.Items {
		all = append(all, listed{i.Metadata.Name, i.Status.User, i.Status.Account, i.Status.Host, i.Status.State})
	}
	return all, nil
}

// sessionOf waits for a user's one session on linux-0 in a state.
func sessionOf(t *testing.T, user, state string) (s listed) {
	t.Helper()
	if err := eventually(t.Context(), 20*time.Second, func() error {
		all, err := sessions(t.Context(), "--field-selector", "user="+user+",host=linux-0")
		if err != nil {
			return err
		}
		if len(all) != 1 || all[0].State != state {
			return fmt.Errorf("%s's sessions are %+v, want one that is %s", user, all, state)
		}
		s = all[0]
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

// An administrator's day: see who is where, tell them, send them away, and log them off; and only them.
func TestSessions(t *testing.T) {
	grantBob(t)
	bob := newBob(t)
	t.Cleanup(func() { endSessions(context.WithoutCancel(t.Context())) })
	if err := endSessions(t.Context()); err != nil {
		t.Fatal(err)
	}
	notYet(t, w.podColor)
	// FreeRDP comes back by itself from a lost connection, which to it this is, too.
	a := connect(t, w.alice, "linux-desktop", w.podColor, "-auto-reconnect")
	b := connect(t, bob, "linux-desktop", w.podColor)
	s := sessionOf(t, "alice@example.test", "Active")
	if s.Account != "alice" || s.Host != "linux-0" {
		t.Errorf("she is listed as %+v", s)
	}
	if err := w.alice.Type(t.Context(), "mark=kept\n"); err != nil {
		t.Fatal(err)
	}

	// A message, which alice sees and bob doesn't.
	hers, err := w.alice.WaitForChange(t.Context(), mustScreenshot(t, w.alice))
	if err != nil {
		hers = mustScreenshot(t, w.alice)
	}
	his := mustScreenshot(t, bob)
	if _, err := w.KubectlRdv(t.Context(), "message", s.ID, "-n", stage.Namespace, "--text", "We restart at 18:00. Please save your work."); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if _, err := w.alice.WaitForChange(ctx, hers); err != nil {
		t.Errorf("no message is on alice's screen: %v", err)
	}
	picture(t, w.alice, "message")
	if now := mustScreenshot(t, bob); string(now.PNG) != string(his.PNG) {
		picture(t, bob, "message-bob")
		t.Error("bob's screen changed, too")
	}

	// Sent away, she may come back, to what she left.
	if _, err := w.KubectlRdv(t.Context(), "disconnect", s.ID, "-n", stage.Namespace); err != nil {
		t.Fatal(err)
	}
	ends(t, a, "a disconnected session")
	sessionOf(t, "alice@example.test", "Disconnected")
	notYet(t, w.podColor)
	a = connect(t, w.alice, "linux-desktop", w.podColor)
	if out, err := w.alice.Command(t.Context(), "xdotool", "mousemove", "850", "453", "click", "1", "sleep", "0.5").CombinedOutput(); err != nil { // OK
		t.Fatalf("%v: %s", err, out)
	}
	if err := w.alice.Type(t.Context(), "echo $mark > kept\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/alice/kept", "kept")

	// Logged off, what she left is gone.
	s = sessionOf(t, "alice@example.test", "Active")
	if _, err := w.Kubectl(t.Context(), "", "-n", stage.Namespace, "delete", "session", s.ID); err != nil {
		t.Fatal(err)
	}
	ends(t, a, "a session that was logged off")
	if err := eventually(t.Context(), 20*time.Second, func() error {
		all, err := sessions(t.Context(), "--field-selector", "user=alice@example.test,host=linux-0")
		if err == nil && len(all) > 0 {
			err = fmt.Errorf("she is still listed: %+v", all)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if out, err := inPod(t.Context(), "ls -d /proc/[0-9]* | xargs stat -c %U 2>/dev/null | grep -c alice || true"); err != nil || strings.TrimSpace(out) != "0" {
		t.Errorf("%s processes of hers are left: %v", strings.TrimSpace(out), err)
	}
	if err := bob.Type(t.Context(), "echo on > sessions\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/bob/sessions", "on")
	select {
	case <-b.Done():
		t.Errorf("bob's session ended: %s", tail(b.Output(), 10))
	default:
	}
	// Bob ends his own.
	sessionOf(t, "bob@example.test", "Active")
	out, err := bob.Rdv(t.Context(), "sessions", "-o", "json")
	if err != nil || strings.Contains(out, "alice") {
		t.Fatalf("rdv sessions: %s %v", out, err)
	}
	id := sessionOf(t, "bob@example.test", "Active").ID
	if _, err := bob.Rdv(t.Context(), "sessions", "end", id); err != nil {
		t.Fatal(err)
	}
	ends(t, b, "a session that its user ended")
	if _, err := bob.Rdv(t.Context(), "sessions", "end", s.ID); err == nil {
		t.Error(errors.New("bob may end a session that isn't his"))
	}
}
