package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

// mallory is an ordinary account of the outside machine, of somebody who may run any program there.
const mallory = "mallory"

// intruder is mallory at work: an RDP client in the machine's own network, which reaches xrdp through a program that runs
// as mallory and dials from an address of her choice.
type intruder struct {
	t   *testing.T
	rdp *rdpkit.Client
}

func newIntruder(t *testing.T) *intruder {
	t.Helper()
	if out, err := w.machine.Command(t.Context(), "sh", "-c", "id mallory || useradd --create-home "+mallory).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c, err := rdpkit.NewClient(t.Context(), w.roots, rdpkit.ClientOptions{BoxOptions: rdpkit.BoxOptions{Netns: w.machine.Net.Name, Hostname: mallory}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &intruder{t, c}
}

// run runs a program on the machine as mallory, and gives what it printed.
func (i *intruder) run(argv ...string) string {
	i.t.Helper()
	ctx, cancel := context.WithTimeout(i.t.Context(), 20*time.Second)
	defer cancel()
	out, err := w.machine.CommandAs(ctx, mallory, argv...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		i.t.Fatalf("%v: %v: %s", argv, err, out)
	}
	return string(out)
}

// tunnel starts the intruder program's way to xrdp at a port of the machine's loopback.
func (i *intruder) tunnel(port int, args ...string) *rdpkit.Program {
	i.t.Helper()
	argv := append([]string{"setpriv", "--reuid", mallory, "--regid", mallory, "--clear-groups", "--inh-caps=-all", "--", "intruder"}, args...)
	p, err := w.machine.Start(argv...)
	if err != nil {
		i.t.Fatal(err)
	}
	i.t.Cleanup(p.Stop)
	if err := eventually(i.t.Context(), 10*time.Second, func() error {
		if !strings.Contains(p.Output(), "ready") {
			return fmt.Errorf("the tunnel at %d is not ready: %s", port, p.Output())
		}
		return nil
	}); err != nil {
		i.t.Fatal(err)
	}
	return p
}

// client starts mallory's RDP client at a tunnel; she says that she is alice.
func (i *intruder) client(port int) *rdpkit.Program {
	i.t.Helper()
	p, err := i.rdp.Start("xfreerdp3", fmt.Sprintf("/v:127.0.0.1:%d", port), "/u:alice", "/p:x", "/cert:ignore", "/size:1280x720", "-decorations", "/log-level:WARN")
	if err != nil {
		i.t.Fatal(err)
	}
	return p
}

// sees fails the test where alice's desktop is on mallory's screen.
func (i *intruder) sees(what string) {
	i.t.Helper()
	shot, err := i.rdp.Screenshot(i.t.Context())
	if err != nil {
		i.t.Fatal(err)
	}
	if shot.Fraction(w.outColor) > 0.05 {
		shot.Save("/tmp/intruder.png")
		i.t.Fatalf("%s: mallory sees alice's desktop (/tmp/intruder.png)", what)
	}
}

// refusals gives the agent's lines about logins that it refused, since a point in its output.
func refusals(since int) (lines []string) {
	for _, line := range strings.Split(w.machine.Agent.Output()[since:], "\n") {
		if strings.Contains(line, `"msg":"login refused"`) {
			lines = append(lines, line)
		}
	}
	return lines
}

// attack runs one attempt through a tunnel: xrdp must refuse it, mallory see nothing, and the agent say why, with the session
// that it aimed at where there is one.
func (i *intruder) attack(what string, port int, reason, activity string) {
	i.t.Helper()
	since := len(w.machine.Agent.Output())
	p := i.client(port)
	defer p.Stop()
	if err := eventually(i.t.Context(), 20*time.Second, func() error {
		for _, line := range refusals(since) {
			if strings.Contains(line, `"reason":"`+reason+`"`) && (activity == "" || strings.Contains(line, activity)) {
				return nil
			}
		}
		return fmt.Errorf("the agent did not refuse it as %q: %v", reason, refusals(since))
	}); err != nil {
		i.t.Fatalf("%s: %v\n%s", what, err, tail(w.machine.Desktop.Output(), 10))
	}
	time.Sleep(time.Second) // whatever xrdp would show, it shows by now
	i.sees(what)
}

// victimAddress is where the agent dials from for the one session that there is.
func victimAddress(t *testing.T) string {
	t.Helper()
	address := ""
	if err := eventually(t.Context(), 10*time.Second, func() error {
		table, err := w.machine.Command(t.Context(), "cat", "/proc/net/tcp").Output()
		if err != nil {
			return err
		}
		for _, line := range strings.Split(string(table), "\n") {
			f := strings.Fields(line)
			if len(f) > 3 && f[2] == "0100007F:0D3D" && f[3] == "01" && !strings.HasPrefix(f[1], "0100007F") {
				var b [4]byte
				fmt.Sscanf(f[1], "%02x%02x%02x%02x", &b[3], &b[2], &b[1], &b[0])
				address = net.IP(b[:]).String()
				return nil
			}
		}
		return errors.New("the agent has no connection to the RDP server")
	}); err != nil {
		t.Fatal(err)
	}
	return address
}

// A user of the session host who may run any program there never becomes somebody else. With a real xrdp, whose socket to
// its session manager, whose TCP port and whose PAM he may try; and with the agent's own socket.
func TestIntruder(t *testing.T) {
	enrolMachine(t)
	endOnMachine(t.Context())
	i := newIntruder(t)

	i.tunnel(4001, "forward", "4001", "127.0.0.1")
	i.attack("from localhost, with no session there", 4001, "not-ours", "")
	i.tunnel(4002, "forward", "4002", "127.77.77.77")
	i.attack("from a made-up address", 4002, "not-ours", "")

	notYet(t, w.outColor)
	d := connect(t, w.alice, "machine-desktop", w.outColor)
	address := victimAddress(t)
	i.tunnel(4003, "forward", "4003", address)
	i.attack("from alice's address, while she works", 4003, "shared", d.ActivityID)
	if err := eventually(t.Context(), 15*time.Second, func() error {
		explain, err := w.alice.Rdv(t.Context(), "explain", d.ActivityID)
		if err == nil && !strings.Contains(explain, "login refused") {
			err = fmt.Errorf("alice's timeline tells nothing of the attempt:\n%s", explain)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	// She works on, in a desktop that is hers.
	if err := w.alice.Type(t.Context(), "id -un > works\n"); err != nil {
		t.Fatal(err)
	}
	if err := eventually(t.Context(), 20*time.Second, func() error {
		got, err := w.machine.ReadFile("/home/alice/works")
		if err == nil && strings.TrimSpace(string(got)) != "alice" {
			err = fmt.Errorf("she is %s", got)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}

	// The sockets that decide.
	for _, socket := range []string{"/run/xrdp-sesman/sesman.socket", "/run/xrdp/sockdir/sesman.socket", rdpkit.LoginDir + "/agent.sock"} {
		if out := i.run("intruder", "ask", socket, "{}"); !strings.Contains(out, "permission denied") {
			t.Errorf("mallory may speak to %s: %s", socket, out)
		}
	}
	// Were the agent's socket open to all, it would still answer root alone.
	since := len(w.machine.Agent.Output())
	if out, err := w.machine.Command(t.Context(), "chmod", "0666", rdpkit.LoginDir+"/agent.sock").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ask := fmt.Sprintf(`{"user":"alice","remote":%q,"service":"xrdp-sesman"}`, address)
	if out := i.run("intruder", "ask", rdpkit.LoginDir+"/agent.sock", ask); strings.Contains(out, "account") || !strings.Contains(out, "error") {
		t.Errorf("the agent answered mallory: %s", out)
	}
	if lines := refusals(since); len(lines) != 1 || !strings.Contains(lines[0], `"reason":"caller"`) {
		t.Errorf("the agent says of it: %v", lines)
	}
	w.machine.Command(t.Context(), "chmod", "0600", rdpkit.LoginDir+"/agent.sock").Run()
	if out := i.run(rdpkit.LoginDir+"/login", "pam"); !strings.Contains(out, "permission denied") && !strings.Contains(out, "error") {
		t.Errorf("mallory ran PAM's helper: %s", out)
	}
	for _, f := range []string{"/home/alice/works", "/var/lib/rendezvous-agent/accounts.json", "/home/alice/.Xauthority"} {
		if out := i.run("cat", f); !strings.Contains(out, "Permission denied") {
			t.Errorf("mallory reads %s: %s", f, out)
		}
	}

	// After her session: the address is worth nothing.
	d.Stop()
	if err := eventually(t.Context(), 15*time.Second, func() error {
		if !strings.Contains(w.machine.Agent.Output(), `"msg":"session ended"`) {
			return errors.New("the session has not ended")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	i.attack("from alice's address, after her session", 4003, "not-ours", "")
}

// The race: mallory waits for alice's connection, and has hers beside it within a millisecond, before PAM asks about
// either. Alice may be kept out, and then knows why; mallory never gets in.
func TestIntruderRaces(t *testing.T) {
	enrolMachine(t)
	endOnMachine(t.Context())
	i := newIntruder(t)
	raced, in := 0, 0
	for round := range 4 {
		notYet(t, w.outColor)
		port := fmt.Sprint(4010 + round)
		tunnel := i.tunnel(4010+round, "lurk", port, "30")
		attacker := i.client(4010 + round) // waits in the tunnel
		time.Sleep(500 * time.Millisecond)
		since := len(w.machine.Agent.Output())
		d, err := w.alice.Connect(t.Context(), "machine-desktop", "tsgu")
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if err := eventually(t.Context(), 20*time.Second, func() error {
			i.sees("race")
			if lines := refusals(since); len(lines) > 0 {
				got = "refused"
				if !strings.Contains(lines[0], `"reason":"shared"`) || !strings.Contains(lines[0], d.ActivityID) {
					t.Errorf("the agent refused with %s", lines[0])
				}
				return nil
			}
			shot, err := w.alice.Screenshot(t.Context())
			if err == nil && shot.Fraction(w.outColor) > 0.3 {
				got = "in"
				return nil
			}
			return errors.New("alice neither got in nor was she refused")
		}); err != nil {
			t.Fatalf("%v\n%s", err, tail(w.machine.Agent.Output(), 5))
		}
		time.Sleep(2 * time.Second)
		i.sees("after the race")
		if strings.Contains(tunnel.Output(), "from 127.") {
			raced++
		}
		if got == "in" {
			in++
		}
		attacker.Stop()
		tunnel.Stop()
		d.Stop()
		endOnMachine(t.Context())
	}
	t.Logf("mallory was beside alice in %d of 4 rounds; alice got in %d times", raced, in)
	if raced == 0 {
		t.Error("mallory never got her connection in: this test sees nothing")
	}
	// Alone again, alice gets in.
	notYet(t, w.outColor)
	connect(t, w.alice, "machine-desktop", w.outColor)
}
