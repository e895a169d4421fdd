package e2e

import (
	"context"
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/stage"
)

// inPod runs a shell script as root in the desktop of linux-0.
func inPod(ctx context.Context, script string) (string, error) {
	return w.Kubectl(ctx, "", "-n", stage.Namespace, "exec", "linux-0", "-c", "desktop", "--", "sh", "-c", script)
}

// grantBob lets bob use linux-desktop until the test ends.
func grantBob(t *testing.T) {
	t.Helper()
	patch := func(ctx context.Context, op string) error {
		_, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "workspace", "demo", "--type=json", "-p", op)
		return err
	}
	if err := patch(t.Context(), `[{"op":"add","path":"/spec/resources/0/access/users","value":["bob@example.test"]}]`); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := patch(context.WithoutCancel(t.Context()), `[{"op":"remove","path":"/spec/resources/0/access/users"}]`); err != nil {
			t.Error(err)
		}
	})
}

// newBob is bob at a machine of his own, signed in, until the test ends.
func newBob(t *testing.T) *stage.User {
	t.Helper()
	bob, err := w.NewSecondUser(t.Context(), w.roots)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bob.Close)
	if err := bob.Login(t.Context(), "bob@example.test", "bob-demo"); err != nil {
		t.Fatal(err)
	}
	return bob
}

// connect has a person connect and waits for the desktop. The connection ends with the test, if it hasn't before.
func connect(t *testing.T, u *stage.User, resource string, want color.RGBA, freerdp ...string) *stage.Desktop {
	t.Helper()
	d, err := u.Connect(t.Context(), resource, "tsgu", freerdp...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := u.WaitForColor(ctx, want, 0.3); err != nil {
		explain, _ := u.Rdv(t.Context(), "explain", d.ActivityID)
		t.Fatalf("no desktop: %v\n%s\n%s", err, tail(d.Output(), 20), explain)
	}
	return d
}

// picture keeps what a person sees, for people to look at: bin/e2e/NAME.png.
func picture(t *testing.T, u *stage.User, name string) {
	t.Helper()
	shot, err := u.Screenshot(t.Context())
	if err == nil {
		if err = os.MkdirAll(filepath.Join(w.Root, "bin", "e2e"), 0o755); err == nil {
			err = shot.Save(filepath.Join(w.Root, "bin", "e2e", name+".png"))
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// podSays waits until a script in the pod prints what is wanted.
func podSays(t *testing.T, script, want string) {
	t.Helper()
	if err := eventually(t.Context(), 30*time.Second, func() error {
		got, err := inPod(t.Context(), script)
		if err == nil && !strings.Contains(got, want) {
			err = fmt.Errorf("`%s` says %q, want %q", script, got, want)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// startedIn gives when the session of an account in the pod began, and how often it was resumed.
func startedIn(t *testing.T, account string) (started string, resumed int) {
	t.Helper()
	record, err := inPod(t.Context(), "cat /home/"+account+"/.rdv-session")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(record, "\n") {
		switch key, value, _ := strings.Cut(line, "="); key {
		case "user":
			if value != account {
				t.Errorf("the session in %s's home is %s's", account, value)
			}
		case "started":
			started = value
		case "resumed":
			resumed++
		}
	}
	return started, resumed
}

// endSessions ends every session in the pod, so that the next test begins with none.
func endSessions(ctx context.Context) error {
	_, err := inPod(ctx, `for p in /proc/[0-9]*; do read -r name <$p/comm && test "$name" = Xorg && kill "${p#/proc/}"; done 2>/dev/null; true`)
	return err
}

// alice works, closes her client; bob comes to the same host and meets a desktop of his own; both at one time; the agent
// is killed; alice comes back from another screen: to hers.
func TestOwnDesktop(t *testing.T) {
	grantBob(t)
	bob := newBob(t)
	t.Cleanup(func() { endSessions(context.WithoutCancel(t.Context())) })
	if err := endSessions(t.Context()); err != nil {
		t.Fatal(err)
	}
	notYet(t, w.podColor)

	a := connect(t, w.alice, "linux-desktop", w.podColor)
	mark := randomWord(10)
	if err := w.alice.Type(t.Context(), fmt.Sprintf("mark=%s; echo hers > note; id -un > who; id -u > uid\n", mark)); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/alice/who", "alice")
	began, _ := startedIn(t, "alice")
	picture(t, w.alice, "alice")
	a.Stop()

	b := connect(t, bob, "linux-desktop", w.podColor)
	if err := bob.Type(t.Context(), "id -un > who; id -u > uid; ls /home/alice > looked 2>&1; cat /home/alice/note >> looked 2>&1\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/bob/who", "bob")
	podSays(t, "grep -c 'Permission denied' /home/bob/looked", "2")
	podSays(t, "test $(cat /home/alice/uid) -ne $(cat /home/bob/uid) && stat -c %a /home/alice /home/bob | sort -u", "700")
	if was, _ := startedIn(t, "bob"); was < began {
		t.Errorf("bob's session began at %s, before alice's at %s", was, began)
	}
	picture(t, bob, "bob")

	// Both at one time, alice from a larger screen: the same shell of hers still knows its word.
	notYet(t, w.podColor)
	a = connect(t, w.alice, "linux-desktop", w.podColor, "/size:1200x700")
	if err := w.alice.Type(t.Context(), "echo $mark > back\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/alice/back", mark)
	if again, n := startedIn(t, "alice"); again != began || n != 1 {
		t.Errorf("alice's session began at %s and was resumed %d times; want %s, once", again, n, began)
	}
	select {
	case <-b.Done():
		t.Errorf("bob's session ended: %s", tail(b.Output(), 10))
	default:
	}

	// The agent dies with both connections; what it knew of whose is whose lives on.
	killAgent(t)
	for _, d := range []*stage.Desktop{a, b} {
		d.Stop()
	}
	if err := eventually(t.Context(), time.Minute, func() error { return w.hostReady(t.Context(), "linux-0") }); err != nil {
		t.Fatal(err)
	}
	connect(t, bob, "linux-desktop", w.podColor)
	if err := bob.Type(t.Context(), "id -un > again\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/bob/again", "bob")
	notYet(t, w.podColor)
	connect(t, w.alice, "linux-desktop", w.podColor)
	if err := w.alice.Type(t.Context(), "echo $mark > afterwards\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/alice/afterwards", mark)

	// Bob kills all that is his, which ends his session and nobody else's; the next one is his again.
	was, _ := startedIn(t, "bob")
	if err := bob.Type(t.Context(), "kill -9 -1\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "ls -d /proc/[0-9]* | xargs stat -c %U 2>/dev/null | grep -c bob || true", "0")
	if err := eventually(t.Context(), 30*time.Second, func() error {
		shot, err := bob.Screenshot(t.Context())
		if err == nil && shot.Fraction(w.podColor) > 0.01 {
			err = errors.New("bob's old picture is still there")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	connect(t, bob, "linux-desktop", w.podColor)
	if err := bob.Type(t.Context(), "id -un > anew\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/bob/anew", "bob")
	if now, _ := startedIn(t, "bob"); now == was {
		t.Error("bob's session lived through kill -9 -1")
	}
	if err := w.alice.Type(t.Context(), "echo $mark > untouched\n"); err != nil {
		t.Fatal(err)
	}
	podSays(t, "cat /home/alice/untouched", mark)
}

// killAgent kills the agent of linux-0 and waits until the kubelet has started another.
func killAgent(t *testing.T) {
	t.Helper()
	var pod corev1.Pod
	key := client.ObjectKey{Namespace: stage.Namespace, Name: "linux-0"}
	count := func() (n int32, err error) {
		if err := w.Client.Get(t.Context(), key, &pod); err != nil {
			return 0, err
		}
		for _, c := range pod.Status.InitContainerStatuses {
			if c.Name == "agent" {
				return c.RestartCount, nil
			}
		}
		return 0, errors.New("linux-0 has no agent")
	}
	before, err := count()
	if err != nil {
		t.Fatal(err)
	}
	killed := false
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range cmdlines {
		data, err := os.ReadFile(f)
		if err == nil && strings.HasPrefix(string(data), "/agent\x00run\x00") && strings.Contains(string(data), "\x00--host=linux-0\x00") {
			var pid int
			fmt.Sscan(filepath.Base(filepath.Dir(f)), &pid)
			killed = syscall.Kill(pid, syscall.SIGKILL) == nil
		}
	}
	if !killed {
		t.Fatal("no agent of linux-0 runs here")
	}
	if err := eventually(t.Context(), time.Minute, func() error {
		n, err := count()
		if err == nil && n == before {
			err = errors.New("the agent was not started again")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// Two people whose names come out alike: the second is refused, and told of whom and what to do.
func TestAccountOfSomebodyElse(t *testing.T) {
	grantBob(t)
	bob := newBob(t)
	entry := func(ctx context.Context, value string) error {
		_, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "configmap", "linux-accounts", "--type=merge", "-p", `{"data":{"bob":`+value+`}}`)
		return err
	}
	var accounts corev1.ConfigMap
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "linux-accounts"}, &accounts); err != nil {
		t.Fatal(err)
	}
	was := "null"
	if v, ok := accounts.Data["bob"]; ok {
		was = fmt.Sprintf("%q", v)
	}
	t.Cleanup(func() {
		if err := entry(context.WithoutCancel(t.Context()), was); err != nil {
			t.Error(err)
		}
	})
	if err := entry(t.Context(), `"59000 bob@elsewhere.test"`); err != nil {
		t.Fatal(err)
	}
	// Brokers believe what they read for ten seconds.
	if err := eventually(t.Context(), 30*time.Second, func() error {
		d, err := bob.Connect(t.Context(), "linux-desktop", "tsgu")
		if err != nil {
			return err
		}
		defer d.Stop()
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
		defer cancel()
		if _, err := d.ExitCode(ctx); err != nil {
			return fmt.Errorf("bob was not refused: %w", err)
		}
		explain, err := bob.Rdv(t.Context(), "explain", d.ActivityID)
		for _, want := range []string{"account-refused", "bob@elsewhere.test and bob@example.test", "spec.accounts.nameClaim"} {
			if err == nil && !strings.Contains(explain, want) {
				err = fmt.Errorf("the timeline says nothing of %q:\n%s", want, explain)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// Accounts that the host knows are used as they are; who has none there is refused.
func TestExistingAccounts(t *testing.T) {
	enrolMachine(t)
	policy := func(ctx context.Context, p string) error {
		_, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "hostpool", "machines", "--type=merge", "-p", `{"spec":{"accounts":{"policy":"`+p+`"}}}`)
		return err
	}
	run := func(ctx context.Context, argv ...string) (string, error) {
		out, err := w.machine.Command(ctx, argv...).CombinedOutput()
		return string(out), err
	}
	if err := policy(t.Context(), "Existing"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := policy(ctx, "Create"); err != nil {
			t.Error(err)
		}
		endOnMachine(ctx)
		run(ctx, "userdel", "--remove", "alice")
		run(ctx, "rm", "-f", "/var/lib/rendezvous-agent/accounts.json", rdpkit.LoginDir+"/accounts/passwd", rdpkit.LoginDir+"/accounts/group")
		restartAgent(t)
	})
	// The machine as a directory would have it: alice is there, under an id that is not the pool's to give.
	endOnMachine(t.Context())
	run(t.Context(), "rm", "-rf", "/home/alice", "/var/lib/rendezvous-agent/accounts.json", rdpkit.LoginDir+"/accounts/passwd", rdpkit.LoginDir+"/accounts/group")
	restartAgent(t)
	notYet(t, w.outColor)

	d, err := w.alice.Connect(t.Context(), "machine-desktop", "tsgu")
	if err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), 30*time.Second, func() error {
		if !strings.Contains(w.machine.Desktop.Output(), "AUTHFAIL: user=alice") {
			return errors.New("alice, who has no account there, was not refused")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	d.Stop()

	if out, err := run(t.Context(), "useradd", "--uid", "4711", "--create-home", "--shell", "/bin/bash", "alice"); err != nil {
		t.Fatal(err, out)
	}
	connect(t, w.alice, "machine-desktop", w.outColor)
	if err := w.alice.Type(t.Context(), "id > who\n"); err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), 20*time.Second, func() error {
		got, err := w.machine.ReadFile("/home/alice/who")
		if err == nil && !strings.Contains(string(got), "uid=4711(alice)") {
			err = fmt.Errorf("she is %s", got)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// endOnMachine ends every session on the outside machine.
func endOnMachine(ctx context.Context) {
	w.machine.Command(ctx, "sh", "-c", `for p in /proc/[0-9]*; do read -r name <$p/comm && test "$name" = Xorg && kill "${p#/proc/}"; done 2>/dev/null; sleep 1`).Run()
}

// restartAgent stops the outside machine's agent and starts it again, as its service manager would.
func restartAgent(t *testing.T) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	w.machine.Agent.Stop()
	if err := w.machine.StartAgent(outside); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if err := eventually(ctx, time.Minute, func() error {
		if !strings.Contains(w.machine.Agent.Output(), `"msg":"configured"`) {
			return errors.New("the agent has not been heard since its start")
		}
		return w.hostReady(ctx, outside)
	}); err != nil {
		t.Fatalf("%v\nagent: %s", err, tail(w.machine.Agent.Output(), 10))
	}
}

func mustScreenshot(t *testing.T, u *stage.User) rdpkit.Picture {
	t.Helper()
	shot, err := u.Screenshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return shot
}
