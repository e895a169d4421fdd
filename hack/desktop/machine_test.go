package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

const (
	rdvAgent = "/usr/local/sbin/rdv-agent"
	doorman  = "/usr/local/sbin/doorman"
	unit     = "rendezvous-agent.service"
	certDir  = "/var/lib/rdp-cert"
	mallory  = "mallory" // has an account and a password on the machine, and no business with the brokers
	secret   = "correct-horse"
	// Of the machine's ports that are seen from outside, this one's connections come to xrdp from 127.0.0.1.
	nobodysDoor = 13391
)

// machineTest is a Debian with xrdp as shipped, systemd and the agent's program, and a user's machine beside it.
type machineTest struct {
	*testing.T
	ctx    context.Context
	box    *rdpkit.Box
	client *rdpkit.Client
}

// TestMachine has the real agent install itself and login by connection on a machine with Debian's xrdp and systemd, brings
// people there, and has all taken back.
func TestMachine(t *testing.T) {
	if os.Geteuid() != 0 || testing.Short() {
		t.Skip("machines of one's own take root, and two minutes")
	}
	m := newMachineTest(t)
	before := m.files()

	// As shipped, anybody talks to sesman.
	m.reachable(true, "/run/xrdp/sockdir/sesman.socket")
	if out := m.do(rdvAgent, "login", "plan", "--rdp-cert-dir", certDir); !strings.Contains(out, "-@include common-auth") {
		t.Errorf("the plan:\n%s", out)
	}
	m.same(before)

	install := []string{rdvAgent, "service", "install", "--broker", "https://127.0.0.1:1", "--token-file", "/etc/hostname", "--host", "desk-1", "--rdp-cert-dir", certDir}
	if out := m.do(append(install, "--dry-run")...); !strings.Contains(out, "+auth  [success=ignore default=die]") {
		t.Errorf("the dry run:\n%s", out)
	}
	m.same(before)
	m.do(install...)
	m.step("installed")
	m.eventually("the agent in its unit", func() error {
		fi, err := os.Stat(m.box.Path("/run/rendezvous-login/agent.sock"))
		if err == nil && fi.Mode().Perm() != 0o600 {
			err = fmt.Errorf("its socket has mode %v", fi.Mode())
		}
		return err
	})
	m.do(rdvAgent, "login", "status")
	installed := m.files()
	sesman := m.pid("xrdp-sesman")
	if out := m.do(install...); !strings.Contains(out, "nothing to change") {
		t.Errorf("the second time:\n%s", out)
	}
	m.same(installed)
	if again := m.pid("xrdp-sesman"); again != sesman {
		t.Errorf("sesman was restarted with nothing changed: %s, then %s", sesman, again)
	}
	m.reachable(false, "/run/xrdp/sockdir/sesman.socket")
	m.reachable(false, "/run/xrdp-sesman/sesman.socket")
	if user := m.do("ps", "-o", "user=", "-p", m.pid("xrdp")); strings.TrimSpace(user) != "xrdp" {
		t.Errorf("xrdp runs as %q", user)
	}

	// The brokers' part from here on, with the rights of the agent's unit.
	m.box.WriteFile("/etc/systemd/system/"+unit+".d/doorman.conf", fmt.Appendf(nil, "[Service]\nType=simple\nWatchdogSec=0\nExecStart=\nExecStart=%s serve alice:20001=0.0.0.0:13389 bob:20002=0.0.0.0:13390 carol:20003=0.0.0.0:13392 0.0.0.0:%d\n", doorman, nobodysDoor), 0o644)
	m.do("systemctl", "daemon-reload")
	m.do("systemctl", "restart", unit)
	m.eventually("the doorman", func() error { // systemd takes a unit for started before that
		if !slices.Contains(m.listeners(), netip.MustParseAddrPort("0.0.0.0:13389")) && !slices.Contains(m.listeners(), netip.MustParseAddrPort("[::]:13389")) {
			return errors.New("it does not listen")
		}
		return nil
	})
	// What the unit may write, as its own processes see it.
	for path, want := range map[string]bool{"/etc": true, "/home": true, "/var/lib/rendezvous-agent": true, certDir: true, "/root": false, "/usr": false, "/var/log": false} {
		err := m.box.Command(m.ctx, "nsenter", "--target", m.pid(unit), "--mount", "touch", path+"/.rdv-test").Run()
		if (err == nil) != want {
			t.Errorf("the agent may write %s: %t", path, err == nil)
		}
		os.Remove(m.box.Path(path + "/.rdv-test"))
	}
	m.step("installed twice, and closed")

	m.impostor()
	m.step("carol's session did not begin on another's screen")
	session := m.connect(13389, "alice", "any")
	m.typed("id > ~/who", "/home/alice/who", "uid=20001(alice) gid=20001(alice) groups=20001(alice)\n")
	if fi, err := os.Stat(m.box.Path("/home/alice")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("her home: %v, %v", fi.Mode(), err)
	}
	m.step("alice is logged in, with an account and no password")
	for _, l := range m.listeners() {
		if l.Addr().IsLoopback() != (l == rdpkit.RDPAddr) || l.Port() == 3389 && l != rdpkit.RDPAddr {
			t.Errorf("%v listens", l)
		}
	}
	m.refused(13390, "alice", "any")        // bob's connection
	m.refused(nobodysDoor, mallory, secret) // nobody's, and the right password
	m.refused(13390, mallory, secret)       // bob's, and the right password
	m.step("nobody else is")

	// A boot, as far as xrdp can tell; and what an upgrade of xrdp does to whoever works.
	m.do("systemctl", "stop", "xrdp", "xrdp-sesman")
	session.Stop()
	m.must(errors.Join(os.RemoveAll(m.box.Path("/run/xrdp")), os.RemoveAll(m.box.Path("/run/xrdp-sesman"))))
	m.do("systemd-tmpfiles", "--create", "rendezvous-login.conf")
	m.do("systemctl", "start", "xrdp-sesman", "xrdp")
	m.eventually("all as set up after a boot", func() error {
		out, err := m.box.Command(m.ctx, rdvAgent, "login", "status").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
		return err
	})
	m.reachable(false, "/run/xrdp/sockdir/sesman.socket")
	m.do("chmod", "0755", "/run/xrdp-sesman")
	if out, err := m.box.Command(m.ctx, rdvAgent, "login", "status").CombinedOutput(); err == nil || !strings.Contains(string(out), "every user of this machine") {
		t.Errorf("an open socket went unnoticed: %v\n%s", err, out)
	}
	m.do("chmod", "0750", "/run/xrdp-sesman")
	orphan := m.sessionsOf("alice")
	m.connect(13389, "alice", "any")
	m.typed("id -un > ~/again", "/home/alice/again", "alice\n")
	if now := m.sessionsOf("alice"); orphan == "" || !strings.HasPrefix(now, orphan+" ") {
		t.Errorf("docs/operations.md says that desktops outlive xrdp's session manager, and are lost to it: they were %q and are %q", orphan, now)
	}
	m.step("alice is back after a boot")

	// Passwords count for connections of other machines, and for no other.
	if out := m.do(rdvAgent, "login", "install", "--login=password", "--rdp-cert-dir", certDir); !strings.Contains(out, "1 desktop runs") {
		t.Errorf("no word of alice's desktop, which is lost by this:\n%s", out)
	}
	m.do(rdvAgent, "login", "status")
	m.refused(3389, mallory, "wrong")
	m.connect(3389, mallory, secret)
	m.typed("id -un > ~/who", "/home/mallory/who", mallory+"\n")
	m.refused(nobodysDoor, mallory, secret)
	m.refused(13390, mallory, secret)
	m.refused(13390, "alice", "any")
	m.connect(13390, "bob", "any")
	m.typed("id > ~/who", "/home/bob/who", "uid=20002(bob) gid=20002(bob) groups=20002(bob)\n")
	m.reachable(false, "/run/xrdp/sockdir/sesman.socket")
	m.step("with passwords")

	// What administrators have done, with what the agent's unit may: bob is the one who is connected.
	act := func(what, text string) (string, error) {
		out, err := m.box.Command(m.ctx, "systemd-run", "--wait", "--pipe", "--quiet", "-p", "NoNewPrivileges=yes", "-p", "ProtectSystem=strict",
			"-p", "ProtectControlGroups=yes", "-p", "ProtectKernelTunables=yes", doorman, "act", what, "20002", m.displayOf("bob"), text).CombinedOutput()
		return string(out), err
	}
	if out, err := act("message", "hello"); err == nil || !strings.Contains(out, "install gxmessage") {
		t.Errorf("a message without a program for it: %v\n%s", err, out)
	}
	if out, err := act("logoff", ""); err != nil {
		t.Errorf("log-off: %v\n%s", err, out)
	}
	if left := m.sessionsOf("bob"); left != "" {
		t.Errorf("bob was logged off and has X servers %s", left)
	}
	if others := m.sessionsOf("alice"); others == "" {
		t.Error("alice's desktop ended with bob's")
	}
	m.step("bob was logged off")

	if err := os.RemoveAll(m.box.Path("/etc/systemd/system/" + unit + ".d")); err != nil {
		t.Fatal(err)
	}
	m.do(rdvAgent, "service", "uninstall")
	m.same(before)
	m.do("systemctl", "is-active", "xrdp", "xrdp-sesman")
	m.reachable(true, "/run/xrdp/sockdir/sesman.socket")
	m.step("all is as it was")
}

// impostor has another user pose as the X server of the next session, which then doesn't begin.
func (m *machineTest) impostor() {
	m.Helper()
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	var said strings.Builder
	server := m.box.CommandAs(ctx, mallory, "/usr/lib/xorg/Xorg", ":77", "-config", "xrdp/xorg.conf", "-ac", "-noreset", "-nolisten", "tcp", "-logfile", "/tmp/impostor.log")
	cmd := m.box.CommandAs(ctx, mallory, doorman, "pose", "@/tmp/.X11-unix/X10", "@/tmp/.X11-unix/X77")
	cmd.Stdout, cmd.Stderr = &said, &said
	m.must(errors.Join(server.Start(), cmd.Start()))
	for _, name := range []string{"X10", "X77"} {
		m.eventually("the impostor", func() error {
			if !strings.Contains(m.do("cat", "/proc/net/unix"), "@/tmp/.X11-unix/"+name) {
				return errors.New("not there")
			}
			return nil
		})
	}
	// Carol, because the xrdp of a session that fails goes on trying, and would take the user's next one.
	p := m.connect(13392, "carol", "any")
	m.eventually("a session that doesn't begin", func() error {
		if !strings.Contains(m.journal(), "the session does not begin") {
			return errors.New("not yet")
		}
		return nil
	})
	if out, err := m.box.Command(m.ctx, "pgrep", "-u", "carol", "xterm").Output(); err == nil {
		m.Errorf("carol's programs run on another's screen: %s", out)
	}
	p.Stop()
	cancel()
	cmd.Wait()
	server.Wait()
	m.Logf("the impostor: %s", said.String())
}

func newMachineTest(t *testing.T) *machineTest {
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	t.Cleanup(cancel)
	m := &machineTest{T: t, ctx: ctx}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	root, err := rdpkit.EnsureMachine(ctx, log)
	m.must(err)
	roots, err := rdpkit.Ensure(ctx, log)
	m.must(err)
	bin := t.TempDir()
	build(ctx, t, "../..", bin, "./cmd/agent")
	build(ctx, t, "..", bin, "./doorman")
	machineNet, err := rdpkit.NewNetns("machine")
	m.must(err)
	t.Cleanup(func() { machineNet.Close() })
	userNet, err := rdpkit.NewNetns("user")
	m.must(err)
	t.Cleanup(func() { userNet.Close() })
	m.must(rdpkit.Join(machineNet, machineAddr, userNet, userAddr))

	m.box, err = rdpkit.NewBox(ctx, root, rdpkit.BoxOptions{Netns: machineNet.Name, Hostname: "desk-1", Systemd: true})
	m.must(err)
	t.Cleanup(func() { m.box.Close() })
	for from, to := range map[string]string{"agent": rdvAgent, "doorman": doorman} {
		data, err := os.ReadFile(filepath.Join(bin, from))
		m.must(err)
		m.must(m.box.WriteFile(to, data, 0o755))
	}
	m.do("useradd", "--create-home", "--shell", "/bin/bash", mallory)
	m.do("sh", "-c", "echo "+mallory+":"+secret+" | chpasswd")
	// The pair that the agent would put there: the key is group xrdp's.
	company := newCA("Company CA")
	cert, key, _ := company.issue(poolName)
	m.must(m.box.WriteFile(certDir+"/tls.crt", cert, 0o644))
	m.must(m.box.WriteFile(certDir+"/tls.key", key, 0o640))
	m.do("chgrp", "xrdp", certDir+"/tls.key")

	m.client, err = rdpkit.NewClient(ctx, roots, rdpkit.ClientOptions{BoxOptions: rdpkit.BoxOptions{
		Netns: userNet.Name, Hostname: "laptop", CAs: [][]byte{company.pem()}, Hosts: map[string]string{poolName: machineAddr.Addr().String()},
	}})
	m.must(err)
	t.Cleanup(func() { m.client.Close() })
	m.step("machines")
	return m
}

// build compiles a package of the module in dir, static.
func build(ctx context.Context, t *testing.T, dir, bin, pkg string, env ...string) {
	t.Helper()
	cmd := exec.CommandContext(ctx, "go", "-C", dir, "build", "-o", bin+"/", pkg)
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
}

func (m *machineTest) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

func (m *machineTest) step(name string) { m.Logf("%s  %s", time.Now().Format("15:04:05.0"), name) }

// do runs a command on the machine.
func (m *machineTest) do(argv ...string) string {
	m.Helper()
	out, err := m.box.Command(m.ctx, argv...).CombinedOutput()
	if err != nil {
		m.Fatalf("%s: %v\n%s\n%s", strings.Join(argv, " "), err, out, m.journal())
	}
	return string(out)
}

func (m *machineTest) journal() string {
	out, _ := m.box.Command(m.ctx, "journalctl", "--no-pager", "-n", "300", "-o", "cat").CombinedOutput()
	return string(out)
}

func (m *machineTest) pid(name string) string {
	m.Helper()
	return strings.TrimSpace(m.do("systemctl", "show", "-p", "MainPID", "--value", name))
}

func (m *machineTest) eventually(what string, f func() error) {
	m.Helper()
	if err := within(m.ctx, 20*time.Second, f); err != nil {
		m.Fatalf("%s: %v\n%s", what, err, m.journal())
	}
}

// reachable says whether a user of the machine may talk to a socket.
func (m *machineTest) reachable(want bool, socket string) {
	m.Helper()
	reach := func() error { return m.box.CommandAs(m.ctx, mallory, doorman, "reach", socket).Run() }
	err := reach()
	if want && err != nil { // systemd takes sesman for started before it listens
		err = within(m.ctx, 10*time.Second, reach)
	}
	if (err == nil) != want {
		m.Errorf("a user of the machine reaches %s: %t", socket, err == nil)
	}
}

// listeners are the TCP sockets that listen on the machine.
func (m *machineTest) listeners() []netip.AddrPort {
	m.Helper()
	all, err := m.box.Listeners()
	m.must(err)
	return all
}

// connect starts FreeRDP, in the place of the one before.
func (m *machineTest) connect(port int, user, password string) *rdpkit.Program {
	m.Helper()
	p, err := m.client.Start(rdpkit.FreeRDP(fmt.Sprintf("/v:%s:%d", poolName, port), "/u:"+user, "/p:"+password)...)
	m.must(err)
	m.Cleanup(p.Stop)
	return p
}

// typed types a command that writes a file into the terminal at the upper left until that file says want.
func (m *machineTest) typed(command, file, want string) {
	m.Helper()
	m.must(errors.Join(os.RemoveAll(m.box.Path(file))))
	err := within(m.ctx, 30*time.Second, func() error {
		for _, step := range [][]string{{"mousemove", "200", "150", "click", "1"}, {"type", "--delay", "15", "--", command}, {"key", "Return"}} {
			if out, err := m.client.Command(m.ctx, append([]string{"xdotool"}, step...)...).CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		return within(m.ctx, 1500*time.Millisecond, func() error {
			got, err := m.box.ReadFile(file)
			if err == nil && string(got) != want {
				err = fmt.Errorf("%s says %q, not %q", file, got, want)
			}
			return err
		})
	})
	if err != nil {
		shot, serr := m.client.Screenshot(m.ctx)
		if serr == nil {
			save(shot, filepath.Join(os.TempDir(), "machine-test.png"))
		}
		m.Fatalf("%v\n%s", err, m.journal())
	}
}

// refused connects, and expects sesman to refuse the login.
func (m *machineTest) refused(port int, user, password string) {
	m.Helper()
	failures := func() int {
		log, _ := m.box.ReadFile("/var/log/xrdp-sesman.log")
		return strings.Count(string(log), "AUTHFAIL: user="+user+" ")
	}
	before, sessions := failures(), m.sessionsOf(user)
	p := m.connect(port, user, password)
	m.eventually(fmt.Sprintf("a refusal of %s at port %d", user, port), func() error {
		if failures() == before {
			return errors.New("nobody was refused")
		}
		return nil
	})
	p.Stop()
	if now := m.sessionsOf(user); now != sessions {
		m.Errorf("%s has X servers %q, and had %q", user, now, sessions)
	}
}

// sessionsOf lists a user's X servers.
func (m *machineTest) sessionsOf(user string) string {
	out, _ := m.box.Command(m.ctx, "pgrep", "-u", user, "-x", "Xorg").Output()
	return strings.Join(strings.Fields(string(out)), " ")
}

// accounts are the lists of users, which change with each that is made, and what systemd itself keeps there.
var accounts = []string{"passwd", "shadow", "group", "gshadow", "subuid", "subgid", ".pwd.lock", ".updated", "machine-id"}

// displayOf is the number of a user's X display.
func (m *machineTest) displayOf(user string) string {
	m.Helper()
	for arg := range strings.SplitSeq(strings.ReplaceAll(m.do("sh", "-c", "cat /proc/$(pgrep -u "+user+" -x Xorg)/cmdline"), "\x00", " "), " ") {
		if n, ok := strings.CutPrefix(arg, ":"); ok {
			return n
		}
	}
	m.Fatalf("%s has no X display", user)
	return ""
}

// files describes everything in /etc.
func (m *machineTest) files() map[string]string {
	m.Helper()
	all := map[string]string{}
	root := m.box.Path("/etc")
	m.must(filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		text := ""
		switch fi.Mode().Type() {
		case 0:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text = fmt.Sprintf("%x", sha256.Sum256(data))
		case fs.ModeSymlink:
			if text, err = os.Readlink(path); err != nil {
				return err
			}
		}
		s := fi.Sys().(*syscall.Stat_t)
		if !slices.Contains(accounts, strings.TrimSuffix(d.Name(), "-")) {
			all[strings.TrimPrefix(path, root)] = fmt.Sprintf("%v %d:%d %s", fi.Mode(), s.Uid, s.Gid, text)
		}
		return nil
	}))
	return all
}

func (m *machineTest) same(want map[string]string) {
	m.Helper()
	got := m.files()
	for path, is := range got {
		if want[path] != is {
			m.Errorf("/etc%s is %q, want %q", path, is, want[path])
		}
	}
	for path := range want {
		if _, ok := got[path]; !ok {
			m.Errorf("/etc%s is gone", path)
		}
	}
}
