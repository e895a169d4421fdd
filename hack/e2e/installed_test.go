package e2e

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/netlab"
	"rendezvous.dev/rendezvous/hack/stage"
)

const (
	installed      = "installed-1"
	installedCable = 5
)

// A machine as a company has it: a Debian with systemd and xrdp from Debian's packages. Its administrator runs the one
// command that the README names, and alice lands there in a desktop of her own, with no password.
func TestServiceInstall(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	root, err := rdpkit.EnsureMachine(ctx, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	line, err := netlab.New(ctx, "installed", installedCable)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { line.Close() })
	if err := line.NoInbound(ctx); err != nil {
		t.Fatal(err)
	}
	box, err := rdpkit.NewBox(ctx, root, rdpkit.BoxOptions{Netns: line.Name, Hostname: installed, DNS: []string{stage.DNS}, Systemd: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { box.Close() })
	do := func(argv ...string) string {
		t.Helper()
		out, err := box.Command(ctx, argv...).CombinedOutput()
		if err != nil {
			journal, _ := box.Command(ctx, "journalctl", "--no-pager", "-n", "60", "-o", "cat").CombinedOutput()
			t.Fatalf("%s: %v\n%s\n%s", strings.Join(argv, " "), err, out, journal)
		}
		return string(out)
	}
	// The outside machine would be as good a host for alice.
	if err := removeHost(ctx, w.Client, outside); err != nil {
		t.Fatal(err)
	}
	if w.machine.Agent != nil {
		w.machine.Agent.Stop()
		w.machine.Agent = nil
		w.machine.Command(ctx, "rm", "-rf", "/var/lib/rendezvous-agent").Run()
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := removeHost(ctx, w.Client, installed); err != nil {
			t.Error(err)
		}
	})
	var secret corev1.Secret
	if err := w.Client.Get(ctx, client.ObjectKey{Namespace: stage.Namespace, Name: "machines-registration"}, &secret); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(w.Root, "bin", "linux", "agent"))
	if err == nil {
		err = errors.Join(box.WriteFile("/usr/local/sbin/rdv-agent", program, 0o755), box.WriteFile("/etc/rendezvous/token", secret.Data["token"], 0o600),
			box.WriteFile("/etc/rendezvous/company-ca.crt", w.CompanyCA, 0o644))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Log(do("rdv-agent", "service", "install", "--broker", stage.WorkspaceURL, "--ca-file", "/etc/rendezvous/company-ca.crt",
		"--token-file", "/etc/rendezvous/token", "--host", installed, "--rdp-cert-dir", "/var/lib/rdp-cert"))
	if err := eventually(ctx, time.Minute, func() error { return w.hostReady(ctx, installed) }); err != nil {
		t.Fatalf("%v\n%s", err, do("journalctl", "--no-pager", "-n", "60", "-o", "cat"))
	}

	before, err := w.alice.Screenshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.alice.Connect(ctx, "machine-desktop", "tsgu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	pctx, stop := context.WithTimeout(ctx, 40*time.Second)
	defer stop()
	if _, err := w.alice.WaitForChange(pctx, before); err != nil {
		explain, _ := w.alice.Rdv(ctx, "explain", d.ActivityID)
		t.Fatalf("no desktop: %v\n%s\n%s\n%s", err, tail(d.Output(), 20), explain, do("journalctl", "--no-pager", "-n", "40", "-o", "cat"))
	}
	// Debian's session is a bare xterm at the upper left: keys go to the window under the pointer.
	typed := func() error {
		for _, argv := range [][]string{{"mousemove", "100", "100"}, {"type", "--delay", "25", "--", "id > who"}, {"key", "Return"}} {
			if out, err := w.alice.Command(ctx, append([]string{"xdotool"}, argv...)...).CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		time.Sleep(time.Second)
		got, err := box.ReadFile("/home/alice/who")
		if err == nil && !strings.Contains(string(got), "(alice)") {
			err = fmt.Errorf("she is %q", got)
		}
		return err
	}
	if err := eventually(ctx, 30*time.Second, typed); err != nil {
		t.Fatal(err)
	}
	picture(t, w.alice, "installed")
	if shadow := do("getent", "shadow", "alice"); !strings.HasPrefix(shadow, "alice:!") {
		t.Errorf("the account has a password: %s", shadow)
	}
	d.Stop()
	do("rdv-agent", "login", "status")
	do("rdv-agent", "service", "uninstall")
	if pam := do("cat", "/etc/pam.d/xrdp-sesman"); strings.Contains(pam, "pam_exec") {
		t.Errorf("uninstalled, PAM still asks the agent:\n%s", pam)
	}
}
