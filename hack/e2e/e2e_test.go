// Package e2e is the product as its users meet it: a real cluster, cert-manager, Dex, xrdp and FreeRDP 3; nothing is
// mocked. All tests share one stage, so they run one after the other, and each puts right what it changed.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/color"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/cluster/apt"
	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/stage"
)

// outside is the name of the session host that is no pod.
const outside = "outside-1"

// world is what the tests share.
type world struct {
	*stage.Stage
	roots   rdpkit.Roots
	started time.Time
	// early is a token from the start of the run, which has expired by the time the refusals are tested.
	early    string
	alice    *stage.User
	machine  *stage.Machine
	podColor color.RGBA
	outColor color.RGBA
}

var w world

func TestMain(m *testing.M) {
	code, err := setUpAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func setUpAndRun(m *testing.M) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Minute)
	defer cancel()
	root, err := filepath.Abs("../..")
	if err != nil {
		return 0, err
	}
	say := stage.NewProgress(os.Stderr)
	if _, err := exec.LookPath("tcpdump"); err != nil {
		if err := apt.Install(ctx, "tcpdump"); err != nil {
			return 0, err
		}
	}
	if w.Stage, err = stage.Up(ctx, root, say); err != nil {
		return 0, err
	}
	w.started = time.Now()
	if w.early, err = w.Token(ctx, "alice", "rdv"); err != nil {
		return 0, err
	}
	if w.roots, err = rdpkit.Ensure(ctx, slog.New(slog.DiscardHandler)); err != nil {
		return 0, err
	}

	// Colours that no earlier run painted: whoever sees them sees this run's desktops.
	w.podColor, w.outColor = rdpkit.RandomColor(), rdpkit.RandomColor()
	if err := w.paintPods(ctx, w.podColor); err != nil {
		return 0, err
	}
	if err := removeHost(ctx, w.Client, outside); err != nil {
		return 0, err
	}
	if w.machine, err = w.NewMachine(ctx, w.roots, outside, rdpkit.Hex(w.outColor)); err != nil {
		return 0, err
	}
	defer w.machine.Close()
	if w.alice, err = w.NewUser(ctx, w.roots); err != nil {
		return 0, err
	}
	defer w.alice.Close()
	if err := w.alice.Login(ctx, "alice@example.test", "alice-demo"); err != nil {
		return 0, err
	}
	code := m.Run()
	if err := removeHost(context.WithoutCancel(ctx), w.Client, outside); err != nil {
		return code, err
	}
	return code, nil
}

// paintPods gives the sample's pod another colour and waits for the new one. The pool would wait for a desktop that an
// earlier run left; a person who can't, deletes the pod.
func (w *world) paintPods(ctx context.Context, c color.RGBA) error {
	patch := fmt.Sprintf(`[{"op":"replace","path":"/spec/template/spec/containers/0/env","value":[{"name":"RDV_DESKTOP_COLOR","value":%q}]}]`, rdpkit.Hex(c))
	if _, err := w.Kubectl(ctx, "", "-n", stage.Namespace, "patch", "hostpool", "linux", "--type=json", "-p", patch); err != nil {
		return err
	}
	var old corev1.Pod
	key := client.ObjectKey{Namespace: stage.Namespace, Name: "linux-0"}
	if err := client.IgnoreNotFound(w.Client.Get(ctx, key, &old)); err != nil {
		return err
	}
	if err := w.Client.Delete(ctx, &corev1.Pod{ObjectMeta: meta("linux-0")}); client.IgnoreNotFound(err) != nil {
		return err
	}
	return eventually(ctx, 2*time.Minute, func() error {
		var pod corev1.Pod
		if err := w.Client.Get(ctx, key, &pod); err != nil {
			return err
		}
		if pod.UID == old.UID {
			return errors.New("pod linux-0 is still the old one")
		}
		painted := corev1.EnvVar{Name: "RDV_DESKTOP_COLOR", Value: rdpkit.Hex(c)}
		if !slices.Contains(pod.Spec.Containers[0].Env, painted) {
			return errors.New("pod linux-0 does not have the new colour")
		}
		var sh rdv.SessionHost
		if err := w.Client.Get(ctx, key, &sh); err != nil {
			return err
		}
		// What is said of the host may still be of the old pod: the new one's agent enrols anew.
		if e, a := sh.Status.Enrolment, sh.Status.Agent; e == nil || e.Time.Before(&pod.CreationTimestamp) || a == nil || a.LastHeartbeat.Before(&e.Time) {
			return errors.New("the new pod's agent has not reported yet")
		}
		return w.hostReady(ctx, "linux-0")
	})
}

// hostReady is nil where the SessionHost takes sessions.
func (w *world) hostReady(ctx context.Context, name string) error {
	var sh rdv.SessionHost
	if err := w.Client.Get(ctx, client.ObjectKey{Namespace: stage.Namespace, Name: name}, &sh); err != nil {
		return err
	}
	c := apimeta.FindStatusCondition(sh.Status.Conditions, rdv.ConditionReady)
	if c == nil || c.Status != "True" || c.ObservedGeneration != sh.Generation {
		return fmt.Errorf("SessionHost %s is not ready: %+v", name, c)
	}
	return nil
}

// removeHost deletes a SessionHost, waits for nobody who is on it, and comes back once it is gone.
func removeHost(ctx context.Context, c client.Client, name string) error {
	host := &rdv.SessionHost{ObjectMeta: meta(name)}
	skip := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"`+rdv.AnnotationSkipDrain+`":"true"}}}`))
	if err := c.Patch(ctx, host, skip); client.IgnoreNotFound(err) != nil {
		return err
	}
	if err := c.Delete(ctx, host); client.IgnoreNotFound(err) != nil {
		return err
	}
	was := host.UID
	return eventually(ctx, time.Minute, func() error {
		err := c.Get(ctx, client.ObjectKeyFromObject(host), host)
		if client.IgnoreNotFound(err) != nil || err == nil && host.UID == was { // a pool makes another at once
			return errors.Join(errors.New("SessionHost "+name+" is still there"), err)
		}
		return nil
	})
}

// eventually tries until it succeeds or the time is up.
func eventually(ctx context.Context, limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", limit, err)
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// enrolMachine enrols the outside machine, once for all tests, and waits until it takes sessions.
func enrolMachine(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	if w.machine.Agent == nil {
		var secret corev1.Secret
		if err := w.Client.Get(ctx, client.ObjectKey{Namespace: stage.Namespace, Name: "machines-registration"}, &secret); err != nil {
			t.Fatal(err)
		}
		if err := w.machine.Enrol(string(secret.Data["token"]), outside); err != nil {
			t.Fatal(err)
		}
	}
	if err := eventually(ctx, time.Minute, func() error { return w.hostReady(ctx, outside) }); err != nil {
		t.Fatalf("%v\nagent: %s", err, w.machine.Agent.Output())
	}
}

// showDesktop connects alice and asserts on the picture. The desktop is closed with the test.
func showDesktop(t *testing.T, resource, mode string, want color.RGBA, freerdp ...string) *stage.Desktop {
	t.Helper()
	notYet(t, want)
	d, err := w.alice.Connect(t.Context(), resource, mode, freerdp...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	waitForDesktop(t, d, want)
	return d
}

// notYet waits until a colour is nowhere on alice's screen: the picture of an earlier session proves nothing for the next.
func notYet(t *testing.T, want color.RGBA) {
	t.Helper()
	if err := eventually(t.Context(), 20*time.Second, func() error {
		shot, err := w.alice.Screenshot(t.Context())
		// Some pixels of an icon or a letter's edge may be of any colour.
		if err == nil && shot.Fraction(want) > 0.01 {
			err = errors.New("the desktop of an earlier session is still on the screen")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// waitForDesktop waits until a session's desktop is on alice's screen.
func waitForDesktop(t *testing.T, d *stage.Desktop, want color.RGBA) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := w.alice.WaitForColor(ctx, want, 0.3); err != nil {
		explain, _ := w.alice.Rdv(t.Context(), "explain", d.ActivityID)
		t.Fatalf("no desktop: %v\n%s\n%s", err, tail(d.Output(), 30), explain)
	}
}

func TestDesktop(t *testing.T) {
	for _, mode := range []string{"tsgu", "raw", "arm"} {
		t.Run("pod/"+mode, func(t *testing.T) {
			d := showDesktop(t, "linux-desktop", mode, w.podColor)
			assertTimeline(t, d.ActivityID)
		})
		t.Run("outside/"+mode, func(t *testing.T) {
			enrolMachine(t)
			d := showDesktop(t, "machine-desktop", mode, w.outColor)
			assertTimeline(t, d.ActivityID)
		})
	}
}

// assertTimeline asks for the connect's story, which must tell of every step that somebody takes per connect.
func assertTimeline(t *testing.T, activity string) {
	t.Helper()
	var out string
	err := eventually(t.Context(), 15*time.Second, func() (err error) {
		if out, err = w.alice.Rdv(t.Context(), "explain", activity); err != nil {
			return err
		}
		for _, component := range []string{"rdv", "relay", "gateway", "broker", "agent"} {
			if !strings.Contains(out, component) {
				return fmt.Errorf("the timeline of %s does not tell what the %s did", activity, component)
			}
		}
		return nil
	})
	if err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
}

func TestNothingListensOnSessionHosts(t *testing.T) {
	var pod corev1.Pod
	if err := w.Client.Get(t.Context(), client.ObjectKey{Namespace: stage.Namespace, Name: "linux-0"}, &pod); err != nil {
		t.Fatal(err)
	}
	if open := openPorts(t.Context(), pod.Status.PodIP, 1, 65535); len(open) > 0 {
		t.Errorf("the session-host pod answers on ports %v", open)
	}
	enrolMachine(t)
	listeners, err := w.machine.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listeners {
		if !l.Addr().IsLoopback() {
			t.Errorf("the outside machine listens on %s", l)
		}
	}
	if len(listeners) == 0 {
		t.Error("the outside machine listens nowhere at all, not even on loopback: this check sees nothing")
	}
	for _, ports := range [][2]int{{20, 25}, {80, 80}, {443, 443}, {3350, 3350}, {3389, 3389}, {5900, 5912}} {
		if open := openPorts(t.Context(), w.machine.Net.Addr, ports[0], ports[1]); len(open) > 0 {
			t.Errorf("the outside machine answers on ports %v", open)
		}
	}
	// The same scan does find what is there.
	var relays corev1.PodList
	if err := w.Client.List(t.Context(), &relays, client.InNamespace(stage.Namespace), client.MatchingLabels{rdv.LabelGateway: "gateway-a"}); err != nil || len(relays.Items) == 0 {
		t.Fatalf("no gateway pods: %v", err)
	}
	if open := openPorts(t.Context(), relays.Items[0].Status.PodIP, 8443, 8443); len(open) != 1 {
		t.Error("the scan does not find the relay's own listener")
	}
}

// openPorts dials every port in the range and returns those that answer.
func openPorts(ctx context.Context, ip string, from, to int) []int {
	type result struct {
		port int
		open bool
	}
	ports, results := make(chan int), make(chan result)
	for range 128 {
		go func() {
			for p := range ports {
				d, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
				conn, err := dial(d, ip, p)
				cancel()
				if err == nil {
					conn.Close()
				}
				results <- result{p, err == nil}
			}
		}()
	}
	go func() {
		for p := from; p <= to; p++ {
			ports <- p
		}
		close(ports)
	}()
	var open []int
	for range to - from + 1 {
		if r := <-results; r.open {
			open = append(open, r.port)
		}
	}
	return open
}

// relayPIDs finds the relay processes of the stage's gateway pods.
func relayPIDs(t *testing.T) []string {
	t.Helper()
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var pids []string
	for _, f := range cmdlines {
		data, err := os.ReadFile(f)
		if err == nil && bytes.HasPrefix(data, []byte("/relay\x00")) {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	if len(pids) == 0 {
		t.Fatal("no relay process found")
	}
	return pids
}

// capture records the traffic of an interface until the test's end or the returned stop.
func capture(t *testing.T, netns, iface, filter string) (file string, stop func()) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "capture.pcap")
	args := []string{"tcpdump", "-i", iface, "-U", "-s", "0", "-Z", "root", "-w", file, filter}
	if netns != "" {
		args = append([]string{"ip", "netns", "exec", netns}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatalf("tcpdump: %v", err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			time.Sleep(300 * time.Millisecond) // what is in the kernel's buffer
			cmd.Process.Signal(os.Interrupt)
			cmd.Wait()
		}
	}
	t.Cleanup(stop)
	if err := eventually(t.Context(), 10*time.Second, func() error {
		if info, err := os.Stat(file); err != nil || info.Size() < 24 {
			return fmt.Errorf("tcpdump does not capture: %v", err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return file, stop
}

func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

func dial(ctx context.Context, ip string, port int) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(ip, fmt.Sprint(port)))
}

func meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: stage.Namespace, Name: name}
}

// busDialer resolves the sample's names for NATS.
type busDialer struct{}

func (busDialer) Dial(network, address string) (net.Conn, error) {
	return stage.Dialer().Dial(network, address)
}

// SkipTLSHandshake leaves TLS to NATS.
func (busDialer) SkipTLSHandshake() bool { return false }
