package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

// TestSessionHelper has the desktop image's helper, which is the agent's own program, show messages on real sessions and
// log one off: what an agent beside the desktop's container tells it. The agent's part is ../doorman's.
func TestSessionHelper(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	roots, err := rdpkit.Ensure(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	must(err)
	machineNet, err := rdpkit.NewNetns("machine")
	must(err)
	defer machineNet.Close()
	userNet, err := rdpkit.NewNetns("user")
	must(err)
	defer userNet.Close()
	must(rdpkit.Join(machineNet, machineAddr, userNet, userAddr))

	// The login folder: who logs in is loginFolder's script; the helper and what tells it are the agent's.
	logins, err := loginFolder(alice, bob)
	must(err)
	defer os.RemoveAll(logins)
	bin := t.TempDir()
	for _, b := range [][]string{{"../..", "agent", "./cmd/agent"}, {"..", "doorman", "./doorman"}} {
		cmd := exec.CommandContext(ctx, "go", "-C", b[0], "build", "-o", filepath.Join(bin, b[1]), b[2])
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
	}
	must(os.Rename(filepath.Join(bin, "agent"), filepath.Join(logins, "agent")))
	script, err := os.ReadFile(filepath.Join(logins, "login"))
	must(err)
	must(os.WriteFile(filepath.Join(logins, "login"), []byte(strings.Replace(string(script), "#!/bin/sh\n", "#!/bin/sh\ntest \"$1\" != session-helper || exec "+rdpkit.LoginDir+"/agent session-helper\n", 1)), 0o755))

	colour := rdpkit.RandomColor()
	machine, err := rdpkit.NewMachine(ctx, roots, rdpkit.MachineOptions{
		BoxOptions: rdpkit.BoxOptions{Netns: machineNet.Name, Hostname: "desk-1"}, Color: rdpkit.Hex(colour), LoginDir: logins,
	})
	must(err)
	defer machine.Close()
	company := newCA("Company CA")
	cert, key, _ := company.issue(poolName)
	must(machine.WriteFile(rdpkit.CertDir+"/tls.crt", cert, 0o644))
	must(machine.WriteFile(rdpkit.CertDir+"/tls.key", key, 0o640))
	must(machine.WaitServing(ctx))
	for _, p := range []person{alice, bob} {
		stop, err := forward(machineNet, p)
		must(err)
		defer stop()
	}
	client, err := rdpkit.NewClient(ctx, roots, rdpkit.ClientOptions{BoxOptions: rdpkit.BoxOptions{
		Netns: userNet.Name, Hostname: "laptop", CAs: [][]byte{company.pem()}, Hosts: map[string]string{poolName: machineAddr.Addr().String()},
	}})
	must(err)
	defer client.Close()

	bobs, err := client.Start(bob.logIn()...)
	must(err)
	_, err = client.WaitForColor(ctx, colour, 0.3)
	must(err)
	bobs.Stop() // his desktop stays
	alices, err := client.Start(alice.logIn()...)
	must(err)
	defer alices.Stop()
	before, err := client.WaitForColor(ctx, colour, 0.3)
	must(err)
	sessions, err := machine.Sessions(ctx)
	must(err)
	if len(sessions) != 2 {
		t.Fatalf("sessions: %+v", sessions)
	}
	display := map[string]string{}
	for _, s := range sessions {
		display[s.User] = strings.TrimPrefix(s.Display, ":")
	}

	// tell is what an agent in the next container does, which shares the network and this folder, and nothing else.
	tell := func(act string, p person, text string) error {
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "doorman"), "tell", logins, act, fmt.Sprint(p.uid), display[p.name], text)
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s\n%s", err, out, lastOf(machine.Desktop.Output()))
		}
		return err
	}
	text := "Maintenance at 18:00: please save your work.\n<b>This is no markup</b>, $(nor a command) — größer, 中文 ✓"
	must(tell("message", alice, text))
	must(within(ctx, 20*time.Second, func() error {
		if all := programsOf(machine, alice); !strings.Contains(all, "gxmessage") {
			return fmt.Errorf("her programs: %s", all)
		}
		return nil
	}))
	time.Sleep(2 * time.Second)
	shot, err := client.Screenshot(ctx)
	must(err)
	if picture := os.Getenv("RDV_PICTURE"); picture != "" {
		must(save(shot, picture))
	}
	if b, a := before.Fraction(colour), shot.Fraction(colour); a > b-0.05 {
		t.Errorf("the message covers nothing: the background was %.2f of the screen and is %.2f", b, a)
	}
	if err := tell("message", person{name: "alice", uid: bob.uid}, "x"); err == nil || !strings.Contains(err.Error(), "not there any more") {
		t.Errorf("a message on alice's display as bob: %v", err)
	}

	must(tell("logoff", alice, ""))
	must(within(ctx, 20*time.Second, func() error {
		select {
		case <-alices.Done():
			return nil
		default:
			return errors.New("her client is still there")
		}
	}))
	left, err := machine.Sessions(ctx)
	must(err)
	if len(left) != 1 || left[0].User != "bob" {
		t.Errorf("after alice was logged off: %+v", left)
	}
	t.Logf("alice's programs that go on: %q", programsOf(machine, alice))
	must(tell("logoff", bob, "")) // whom nobody is connected to
	left, err = machine.Sessions(ctx)
	must(err)
	if len(left) != 0 {
		t.Errorf("after bob was logged off: %+v", left)
	}
	t.Logf("alice's client said:\n%s", lastOf(alices.Output()))
}

// programsOf names a person's processes on the machine.
func programsOf(m *rdpkit.Machine, p person) string {
	var names []string
	all, _ := filepath.Glob(m.Path("/proc/[0-9]*/status"))
	for _, status := range all {
		text, err := os.ReadFile(status)
		if err == nil && strings.Contains(string(text), fmt.Sprintf("\nUid:\t%d\t", p.uid)) {
			name, _, _ := strings.Cut(strings.TrimPrefix(string(text), "Name:\t"), "\n")
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

func lastOf(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}
