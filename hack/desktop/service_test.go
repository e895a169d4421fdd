package main

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

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

const (
	unitFile = "/etc/systemd/system/" + unit
	settings = "/etc/default/rendezvous-agent"
)

// TestServiceInstallReports has systemd itself fail to start the agent, in the ways that people have met, and asks what
// the one who installs it is told. Nobody answers at the broker's address: that must keep no agent from starting.
func TestServiceInstallReports(t *testing.T) {
	if os.Geteuid() != 0 || testing.Short() {
		t.Skip("machines of one's own take root, and half a minute")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	m := &machineTest{T: t, ctx: ctx}
	root, err := rdpkit.EnsureMachine(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	m.must(err)
	net, err := rdpkit.NewNetns("service")
	m.must(err)
	t.Cleanup(func() { net.Close() })
	m.box, err = rdpkit.NewBox(ctx, root, rdpkit.BoxOptions{Netns: net.Name, Hostname: "desk-2", Systemd: true})
	m.must(err)
	t.Cleanup(func() { m.box.Close() })
	bin := t.TempDir()
	build(ctx, t, "../..", bin, "./cmd/agent")
	program, err := os.ReadFile(filepath.Join(bin, "agent"))
	m.must(err)
	const downloaded = "/root/Downloads/rdv-agent" // in a home folder, and nobody else's to read
	m.must(m.box.WriteFile(downloaded, program, 0o700))
	m.must(m.box.WriteFile("/etc/rendezvous/token", []byte("a-token"), 0o600))
	before := m.files()

	install := func(args ...string) (string, error) {
		argv := append([]string{downloaded, "service", "install", "--broker", "https://127.0.0.1:1", "--token-file", "/etc/rendezvous/token", "--host", "desk-2"}, args...)
		out, err := m.box.Command(ctx, argv...).CombinedOutput()
		return string(out), err
	}
	// says wants an installation to fail, to name the cause and the way out, and to leave nothing behind.
	says := func(what, login string, wants ...string) {
		t.Helper()
		out, err := install("--login=" + login)
		if err == nil {
			t.Errorf("%s: reported as a success:\n%s", what, out)
		}
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("%s: no word of %q in:\n%s", what, want, out)
			}
		}
		m.must(errors.Join(os.RemoveAll(m.box.Path(unitFile+".d")), os.RemoveAll(m.box.Path(settings))))
		if _, err := os.Stat(m.box.Path(unitFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the unit is still there (%v)", what, err)
		}
		m.same(before)
		m.step(what)
	}

	m.do("mount", "-t", "tmpfs", "-o", "noexec,mode=755", "tmpfs", "/usr/local/sbin")
	says("where programs may not run", "connection", "mounted with noexec", "/usr or /opt", "service install")
	m.do("umount", "/usr/local/sbin")

	dropIn := func(text string) {
		t.Helper()
		m.must(m.box.WriteFile(unitFile+".d/test.conf", []byte("[Service]\n"+text), 0o644))
		m.do("systemctl", "daemon-reload")
	}
	dropIn("NoExecPaths=/usr/local\n")
	says("where systemd may not run it", "off", "Permission denied", "systemd may not run /usr/local/sbin/rdv-agent")

	m.must(m.box.WriteFile(settings, []byte("RDV_AGENT_DRAIN_SECONDS=soon\n"), 0o644))
	says("with a setting that can't be read", "connection", "RDV_AGENT_DRAIN_SECONDS", `"soon"`)

	m.do("systemctl", "reset-failed") // systemd bounds how often xrdp is restarted
	out, err := install()
	if err != nil {
		t.Fatalf("installed from a home folder: %v\n%s\n%s", err, out, m.journal())
	}
	if !strings.Contains(out, "goes on trying") || !strings.Contains(out, "127.0.0.1:1") {
		t.Errorf("no word of the broker that doesn't answer:\n%s", out)
	}
	if command := m.do("systemctl", "show", "-p", "ExecStart", "--value", unit); !strings.Contains(command, "path=/usr/local/sbin/rdv-agent ") {
		t.Errorf("the service runs %s", command)
	}
	if status := m.do("systemctl", "show", "-p", "StatusText", "--value", unit); !strings.Contains(status, "not enrolled yet") {
		t.Errorf("systemd says of it: %s", status)
	}
	m.step("installed from a home folder, while the broker is away")

	// An update that can't start keeps the service that runs.
	running := m.do("cat", unitFile)
	m.must(m.box.WriteFile(settings, []byte("RDV_AGENT_DRAIN_SECONDS=soon\n"), 0o644))
	out, err = install("--log-level=debug")
	if err == nil || !strings.Contains(out, `"soon"`) {
		t.Errorf("an update that doesn't start: %v\n%s", err, out)
	}
	if now := m.do("cat", unitFile); now != running {
		t.Errorf("an update that doesn't start leaves this unit:\n%s", now)
	}
	m.must(os.Remove(m.box.Path(settings)))
	if out, err = install("--log-level=debug"); err != nil || !strings.Contains(m.do("cat", unitFile), "--log-level=debug") {
		t.Errorf("an update: %v\n%s", err, out)
	}
	m.step("updated")

	// An agent that hangs is started again.
	dropIn("WatchdogSec=2\nTimeoutAbortSec=1\n")
	m.do("systemctl", "restart", unit)
	hung := m.pid(unit)
	m.do("kill", "-STOP", hung)
	m.eventually("another agent in place of one that hangs", func() error {
		if now := m.pid(unit); now == hung || now == "0" {
			return fmt.Errorf("its process is %s, and was %s", now, hung)
		}
		return nil
	})
	m.do("systemctl", "reset-failed")
	m.do("/usr/local/sbin/rdv-agent", "service", "uninstall")
	m.must(os.RemoveAll(m.box.Path(unitFile + ".d")))
	m.same(before)
}
