package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

// What wine 10 has nothing for: Unix sockets (the agent's health socket, and the login socket, which Windows has no use for). And
// what isn't Windows': file modes, and shell scripts in the place of RDP clients.
const (
	agentBeyondWine  = "^(TestActsWithoutLogin|TestForeignRDPCertificate|TestHealth|TestUnsafeLogins)$"
	clientBeyondWine = "^(TestLoginBrowser|TestConnectTSGU|TestConnectRaw|TestModesNeedFreeRDP3|TestClientThatHandsOver|TestClientEndedBySignal|TestConnectARM|TestRefusalsAreFound)$"
)

// TestWindowsBuilds runs the Windows builds under wine: rdv.exe and agent.exe, that as a service, and the tests of both
// packages, which enrol, keep a control channel, serve sessions and sign in against brokers of their own. Nobody has tried
// them on Windows yet; wine is not Windows, but nearer to it than a compiler.
func TestWindowsBuilds(t *testing.T) {
	if os.Geteuid() != 0 || testing.Short() {
		t.Skip("machines of one's own take root, and two minutes")
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("THE WINDOWS BUILDS WERE NOT RUN: they are for amd64, and wine runs them on a processor of that kind alone")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
	t.Cleanup(cancel)
	root, err := rdpkit.EnsureWine(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		t.Fatalf("THE WINDOWS BUILDS WERE NOT RUN: %v", err)
	}
	bin := t.TempDir()
	build(ctx, t, "../..", bin, "./cmd/agent", "GOOS=windows", "GOARCH=amd64")
	build(ctx, t, "../..", bin, "./cmd/rdv", "GOOS=windows", "GOARCH=amd64")
	for _, pkg := range []string{"agent", "client"} {
		cmd := exec.CommandContext(ctx, "go", "-C", "../..", "test", "-c", "-o", filepath.Join(bin, pkg, pkg+".test.exe"), "./"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=windows", "GOARCH=amd64")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
		if err := os.CopyFS(filepath.Join(bin, pkg, "testdata"), os.DirFS(filepath.Join("../..", pkg, "testdata"))); err != nil {
			t.Fatal(err)
		}
	}
	net, err := rdpkit.NewNetns("wine")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { net.Close() })
	box, err := rdpkit.NewBox(ctx, root, rdpkit.BoxOptions{
		Netns: net.Name, Hostname: "win-1", Env: []string{"WINEDEBUG=-all", "XDG_RUNTIME_DIR=/run"}, Binds: []rdpkit.Bind{{Host: bin, Box: "/win"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { box.Close() })
	// wine runs a Windows program and gives what it says.
	wine := func(argv ...string) (string, error) {
		cmd := box.Command(ctx, append([]string{"wine"}, argv...)...)
		cmd.Env = append(cmd.Env, "HOME=/root")
		return outputOf(t, cmd)
	}
	if out, err := wine("wineboot", "--init"); err != nil {
		t.Fatalf("wineboot: %v\n%s", err, out)
	}
	// What made the prefix goes on for a while, with a service manager of its own.
	if out, err := outputOf(t, box.Command(ctx, "sh", "-c", "wineserver --kill; wineserver --wait")); err != nil {
		t.Fatalf("wineserver: %v\n%s", err, out)
	}
	// Without a program that stays, wine would shut Windows down after each command, and boot it, with all services, for the next.
	stays, err := box.Start("sh", "-c", "sleep 3600 | HOME=/root exec wine cmd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stays.Stop)
	// The service manager takes no orders while it boots, and is done when the last of the services that start by themselves is.
	if err := within(ctx, time.Minute, func() error {
		out, err := wine("sc", "query", "PlugPlay")
		if err == nil && !strings.Contains(out, "RUNNING") {
			err = errors.New(out)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}

	t.Run("rdv", func(t *testing.T) {
		out, err := wine(`Z:\win\rdv.exe`, "list")
		if err == nil || !strings.Contains(out, "rdv login") {
			t.Errorf("somebody who has not signed in is told: %v\n%s", err, out)
		}
	})
	t.Run("service", func(t *testing.T) { windowsService(t, box, wine) })
	for pkg, beyond := range map[string]string{"agent": agentBeyondWine, "client": clientBeyondWine} {
		t.Run("tests of "+pkg, func(t *testing.T) {
			cmd := box.Command(ctx, "sh", "-c", `cd "$0" && exec wine "$1" -test.v -test.timeout=4m -test.skip="$2"`, "/win/"+pkg, `Z:\win\`+pkg+`\`+pkg+".test.exe", beyond)
			out, err := outputOf(t, cmd)
			if n := strings.Count(out, "--- PASS: "); err != nil || n < 25 {
				t.Errorf("%v, %d tests passed\n%s", err, n, out)
			}
			for line := range strings.Lines(out) {
				if strings.Contains(line, "--- SKIP: ") {
					t.Log(strings.TrimSpace(line))
				}
			}
		})
	}
}

// outputOf runs a command of wine's and gives what it says. Not by a pipe: wine's own servers go on after the first command, and
// would keep that open.
func outputOf(t *testing.T, cmd *exec.Cmd) (string, error) {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "output")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	err = cmd.Run()
	text, readErr := os.ReadFile(f.Name())
	return strings.ReplaceAll(string(text), "\r", ""), errors.Join(err, readErr)
}

// windowsService installs, updates and removes the service, and has it fail.
func windowsService(t *testing.T, box *rdpkit.Box, wine func(...string) (string, error)) {
	if err := box.WriteFile("/win/token", []byte("a-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	service := func(args ...string) (string, error) {
		return wine(append([]string{`Z:\win\agent.exe`, "service"}, args...)...)
	}
	install := func(args ...string) (string, error) {
		return service(append([]string{"install", "--broker", "https://127.0.0.1:1", "--token-file", `Z:\win\token`, "--host", "win-1"}, args...)...)
	}
	// image is the service's command line; empty where there is no service.
	image := func() string {
		out, err := wine("reg", "query", `HKLM\System\CurrentControlSet\Services\rendezvous-agent`, "/v", "ImagePath")
		if err != nil {
			return ""
		}
		return out
	}
	runs := func(want bool) {
		t.Helper()
		if out, _ := wine("sc", "query", "rendezvous-agent"); strings.Contains(out, "RUNNING") != want {
			t.Errorf("the service runs: %t\n%s", !want, out)
		}
	}
	const logins = `--login-dir=C:\logins` // which needs what only Linux has, or wine lacks

	out, err := install(logins)
	if err == nil || !strings.Contains(out, "did not start") || !strings.Contains(out, "--login-dir: listen unix") {
		t.Errorf("a first start that fails: %v\n%s", err, out)
	}
	if left := image(); left != "" {
		t.Errorf("a service that did not start was left behind: %s", left)
	}

	if out, err := install(); err != nil || !strings.Contains(out, "the service runs") {
		t.Fatalf("install: %v\n%s", err, out)
	}
	runs(true)
	first := image()
	if !strings.Contains(first, `"C:\Program Files\Rendezvous\rdv-agent.exe" run`) {
		t.Errorf("the service is %s", first)
	}
	if _, err := os.Stat(box.Path("/root/.wine/drive_c/Program Files/Rendezvous/rdv-agent.exe")); err != nil {
		t.Error(err)
	}
	text, err := box.ReadFile("/root/.wine/drive_c/ProgramData/rendezvous-agent/agent.log")
	if err != nil || !strings.Contains(string(text), "enrolment failed") {
		t.Errorf("its log: %v\n%s", err, text)
	}

	out, err = install(logins)
	if err == nil || !strings.Contains(out, "runs as it was installed before") {
		t.Errorf("an update that fails: %v\n%s", err, out)
	}
	if now := image(); now != first {
		t.Errorf("after an update that failed the service is %s", now)
	}
	runs(true)

	if out, err := install("--log-level=debug"); err != nil || !strings.Contains(image(), "--log-level=debug") {
		t.Errorf("a second installation: %v\n%s\n%s", err, out, image())
	}
	runs(true)
	for range 2 { // the second finds nothing to do
		if out, err := service("uninstall"); err != nil {
			t.Errorf("uninstall: %v\n%s", err, out)
		}
	}
	if left := image(); left != "" {
		t.Errorf("uninstalled, the service is still there: %s", left)
	}
}
