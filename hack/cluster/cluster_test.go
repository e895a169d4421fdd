package main

import (
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares text with testdata/name.
func golden(t *testing.T, name, text string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if text != string(want) {
		t.Errorf("%s differs; \"go test -run %s -update\" rewrites it. Got:\n%s", file, t.Name(), text)
	}
}

func TestNodeConfigs(t *testing.T) {
	files, err := layout{"/state"}.nodeConfigs("localhost/rdv-cluster/pause:key")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 4 {
		t.Errorf("%d files", len(files))
	}
	for name, text := range files {
		golden(t, filepath.Base(name), text)
	}
}

func TestNFTRules(t *testing.T) {
	golden(t, "rules.nft", nftRules([]string{"eth0", "wlan0"}))
	if got := nftRules(nil); strings.Contains(got, "iifname") {
		t.Errorf("without devices there is nothing to name:\n%s", got)
	}
}

func TestAddonsRender(t *testing.T) {
	values := map[string]any{
		"Image":   map[string]string{"coredns": "coredns:1", "certmanager": "certmanager:1", "dex": "dex:1", "localpathprovisioner": "provisioner:1", "volume": "volume:1"},
		"Volumes": "/state/volumes",
		"DNSIP":   dnsIP, "Domain": clusterDomain, "Upstreams": "192.0.2.53",
		"DexConfig": "{\"a\": \"b\"}\n", "DexConfigHash": "hash",
	}
	for _, name := range []string{"base.yaml", "issued.yaml"} {
		text, err := renderAddon(name, values)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, text)
	}
	values["Upstreams"] = ""
	text, err := renderAddon("base.yaml", values)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text, "forward") {
		t.Error("CoreDNS refuses a forward without a server")
	}
	delete(values, "DNSIP")
	if _, err := renderAddon("base.yaml", values); err == nil {
		t.Error("a missing value must be an error")
	}
}

func TestUpstreamsLeaveOutLoopback(t *testing.T) {
	got := upstreams("# x\nnameserver 127.0.0.53\nsearch a b\nnameserver 192.0.2.1\nnameserver ::1\nnameserver 2001:db8::1\n")
	if want := []string{"192.0.2.1", "2001:db8::1"}; !slices.Equal(got, want) {
		t.Errorf("upstreams = %q, want %q", got, want)
	}
}

func TestOutsideDevicesHaveTheDefaultRoute(t *testing.T) {
	const routes = "Iface\tDestination\tGateway\neth7\t00000000\t0102A8C0\nrdv-node0\t0000600A\t00000000\n"
	got := outsideDevices(routes)
	if !slices.Contains(got, "eth7") || slices.Contains(got, "rdv-node0") || slices.Contains(got, "Iface") {
		t.Errorf("outsideDevices = %q, want eth7 and this machine's hardware only", got)
	}
}

func TestMountPointsAreLatestFirstAndBelow(t *testing.T) {
	const mountinfo = `24 1 0:22 / /state/kubelet rw - tmpfs tmpfs rw
25 24 0:23 / /state/kubelet/pod\040one/volume rw - tmpfs tmpfs rw
26 1 0:24 / /statement rw - tmpfs tmpfs rw
27 1 0:25 / /state rw - tmpfs tmpfs rw
`
	want := []string{"/state/kubelet/pod one/volume", "/state/kubelet"}
	if got := mountPoints(mountinfo, "/state"); !slices.Equal(got, want) {
		t.Errorf("mountPoints = %q, want %q", got, want)
	}
}

func TestTeardownKnowsItsProcesses(t *testing.T) {
	c := &cluster{layout: layout{"/state"}}
	for _, tc := range []struct {
		exe             string
		args            []string
		component, shim bool
	}{
		{"/state/bin/kubelet", []string{"/state/bin/kubelet", "--config=x"}, true, false},
		{"/state/bin/netpol", []string{"/state/bin/netpol", "--hostname-override=x"}, true, false},
		{"/other/bin/kubelet", []string{"/other/bin/kubelet"}, false, false},
		{"/state/bin/kubectl", []string{"kubectl", "get", "pods"}, false, false},
		{"/usr/bin/containerd", []string{"/usr/bin/containerd", "--config", "/state/config/containerd.toml"}, true, false},
		{"/usr/bin/containerd", []string{"/usr/bin/containerd"}, false, false},
		{"/usr/bin/containerd-shim-runc-v2", []string{"shim", "-address", "/state/run/containerd/containerd.sock"}, false, true},
		{"/usr/bin/containerd-shim-runc-v2", []string{"shim", "-address", "/run/containerd/containerd.sock"}, false, false},
	} {
		if got := c.isComponent(tc.exe, tc.args); got != tc.component {
			t.Errorf("isComponent(%q) = %v", tc.args, got)
		}
		if got := c.isShim(tc.exe, tc.args); got != tc.shim {
			t.Errorf("isShim(%q) = %v", tc.args, got)
		}
	}
}

func TestTeardownRefusesAForeignDirectory(t *testing.T) {
	dir := t.TempDir()
	c := &cluster{layout: layout{dir}}
	if err := c.checkOurs(); err != nil {
		t.Errorf("an empty directory: %v", err)
	}
	precious := filepath.Join(dir, "thesis.txt")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.teardown(t.Context()); err == nil || !strings.Contains(err.Error(), "RDV_CLUSTER_DIR") {
		t.Errorf("error = %v, want one that names RDV_CLUSTER_DIR", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error("a foreign file is gone")
	}
}

func TestRecordSurvivesDamage(t *testing.T) {
	c := &cluster{layout: layout{t.TempDir()}}
	want := record{BootID: "b", Node: "n", Addons: "a", Booted: true}
	if err := c.writeRecord(want); err != nil {
		t.Fatal(err)
	}
	if got := c.readRecord(); got != want {
		t.Errorf("record = %+v, want %+v", got, want)
	}
	if err := os.WriteFile(c.recordFile(), []byte("{half"), 0o644); err != nil {
		t.Fatal(err)
	}
	if c.readRecord().Booted {
		t.Error("a damaged record counts as booted")
	}
}

func TestKeyFollowsSources(t *testing.T) {
	dir := t.TempDir()
	a := artifact{sources: []string{"."}}
	write := func(name, text string) string {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		key, err := a.key(dir)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	first := write("main.go", "package main")
	if write("main_test.go", "package main") != first {
		t.Error("a test changes the key")
	}
	if write("README.md", "text") != first {
		t.Error("a document changes the key")
	}
	if write("go.sum", "x") == first {
		t.Error("another go.sum keeps the key")
	}
}

func TestProcessIdentity(t *testing.T) {
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	if err := startDetached([]string{"/bin/sleep", "60"}, nil, filepath.Join(dir, "log"), pidFile); err != nil {
		t.Fatal(err)
	}
	p, up := running(pidFile)
	if !up {
		t.Fatal("it does not run")
	}
	if stranger := (process{p.PID, p.Start + 1}); stranger.alive() {
		t.Error("a process with the pid but another start counts as the same")
	}
	if err := (process{p.PID, p.Start + 1}).stop(0); err != nil || !p.alive() {
		t.Errorf("stopping a stranger ended the process (%v)", err)
	}
	if err := p.stop(0); err != nil || p.alive() {
		t.Errorf("it was not stopped (%v)", err)
	}
}

func TestParallelReportsTheFirstFailure(t *testing.T) {
	broken := errors.New("broken")
	err := parallel(t.Context(),
		func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
		func(context.Context) error { return broken },
	)
	if !errors.Is(err, broken) || errors.Is(err, context.Canceled) {
		t.Errorf("error = %v, want the failure without its echo", err)
	}
}

func TestEventuallyKeepsTheLastError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		tries := 0
		if err := eventually(ctx, time.Second, func(context.Context) error {
			if tries++; tries < 3 {
				return errors.New("not yet")
			}
			return nil
		}); err != nil || tries != 3 {
			t.Errorf("error %v after %d tries, want success at the third", err, tries)
		}
		err := eventually(ctx, time.Second, func(context.Context) error { return errors.New("no such object") })
		if err == nil || !strings.Contains(err.Error(), "no such object") || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error = %v, want the deadline and the last reason", err)
		}
	})
}

func TestPolicyRulesAreTakenOut(t *testing.T) {
	const other = "*filter\n:INPUT ACCEPT [1:2]\n:FORWARD ACCEPT [0:0]\n:mine - [0:0]\n-A INPUT -j mine\nCOMMIT\n"
	saved := strings.Replace(other, ":mine", ":KUBE-ROUTER-INPUT - [0:0]\n:KUBE-NWPLCY-DEFAULT - [0:0]\n:KUBE-POD-FW-X - [0:0]\n:mine", 1)
	saved = strings.Replace(saved, "-A INPUT -j mine\n", "-A INPUT -m comment --comment \"kube-router netpol - 4IA2\" -j KUBE-ROUTER-INPUT\n-A INPUT -j mine\n-A KUBE-ROUTER-INPUT -d 10.96.0.0/16 -j RETURN\n", 1)
	if got := withoutPolicyRules(saved); got != other {
		t.Errorf("left are\n%s\nwant\n%s", got, other)
	}
}
