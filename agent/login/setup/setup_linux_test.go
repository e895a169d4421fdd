package setup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// box is a machine in a folder.
type box struct {
	*Setup
	t        *testing.T
	o        Options
	out      bytes.Buffer
	restarts int
}

func newBox(t *testing.T) *box {
	_, o := shipped()
	b := &box{t: t, o: o}
	root := t.TempDir()
	b.Setup = &Setup{
		tree: tree{root: root, owner: uint32(os.Geteuid())}, store: store{dir: filepath.Join(t.TempDir(), Folder)}, out: &b.out,
		version: func(context.Context) (string, error) { return "0.10.1", nil },
		restart: func(context.Context) error { b.restarts++; return nil },
	}
	for path, text := range map[string]string{
		pamFile: pamShipped, xrdpFile: xrdpShipped, sesmanFile: sesmanShipped,
		"/etc/pam.d/common-auth": "auth required pam_unix.so\n", "/etc/pam.d/common-account": "", "/etc/pam.d/common-session": "",
		"/etc/group": "root:x:0:\nxrdp:x:102:\n", "/etc/passwd": "xrdp:x:100:102::/:/bin/false\n", "/etc/xrdp/key.pem": "",
		"/usr/sbin/xrdp": "", "/usr/bin/xauth": "", "/usr/lib/xorg/modules/libxorgxrdp.so": "", "/usr/lib/systemd/system/xrdp.service": "",
		o.Program: "", "/run/systemd/system/x": "", "/etc/systemd/system/x": "",
	} {
		b.put(path, text)
	}
	b.must(os.Chmod(b.tree.at(o.Program), 0o755))
	return b
}

func (b *box) put(path, text string) {
	b.t.Helper()
	if err := os.MkdirAll(filepath.Dir(b.tree.at(path)), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(b.tree.at(path), []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) text(path string) string {
	data, _ := os.ReadFile(b.tree.at(path))
	return string(data)
}

func (b *box) install() error   { return b.Install(b.t.Context(), b.o) }
func (b *box) uninstall() error { return b.Uninstall(b.t.Context()) }

func (b *box) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// files gives everything of the machine, with modes.
func (b *box) files() map[string]string {
	all := map[string]string{}
	b.must(filepath.WalkDir(b.tree.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		text := ""
		if fi.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text = string(data)
		}
		if !strings.HasPrefix(path, b.tree.at("/run")) {
			all[path] = fmt.Sprintf("%v %s", fi.Mode(), text)
		}
		return nil
	}))
	return all
}

func (b *box) same(want map[string]string) {
	b.t.Helper()
	got := b.files()
	if !maps.Equal(got, want) {
		for path, text := range want {
			if got[path] != text {
				b.t.Errorf("%s: %q, want %q", path, got[path], text)
			}
		}
		for path := range got {
			if _, ok := want[path]; !ok {
				b.t.Errorf("%s is new", path)
			}
		}
	}
}

func TestInstallTwiceAndUndo(t *testing.T) {
	b := newBox(t)
	before := b.files()
	changes, err := b.Plan(t.Context(), b.o)
	if err != nil || !changes || !strings.Contains(b.out.String(), "-@include common-auth\n") {
		t.Errorf("plan: %t, %v\n%s", changes, err, b.out.String())
	}
	b.same(before)
	b.must(b.install())
	installed := b.files()
	if b.restarts != 1 || maps.Equal(before, installed) {
		t.Errorf("%d restarts", b.restarts)
	}
	b.must(b.install())
	b.same(installed)
	if changes, err := b.Plan(t.Context(), b.o); changes || err != nil || b.restarts != 1 {
		t.Errorf("the second time: %t, %v, %d restarts", changes, err, b.restarts)
	}
	// Another mode begins with the originals again.
	b.o.Mode = Password
	b.must(b.install())
	if !strings.Contains(b.text(pamFile), "\n@include common-auth\n") || b.restarts != 2 {
		t.Errorf("with passwords, %d restarts:\n%s", b.restarts, b.text(pamFile))
	}
	b.o.Mode = Connection
	b.must(b.install())
	b.same(installed)
	b.must(b.uninstall())
	b.same(before)
	if _, err := os.Stat(b.store.dir); !errors.Is(err, fs.ErrNotExist) || b.restarts != 4 {
		t.Errorf("the originals are left: %v; %d restarts", err, b.restarts)
	}
	b.must(b.uninstall())
	b.must(b.install())
	b.same(installed)
}

// After a crash at any write, installing goes on, and undoing gives the originals.
func TestCrash(t *testing.T) {
	for n := 1; ; n++ {
		for _, then := range []string{"install", "uninstall", "both"} {
			b := newBox(t)
			before := b.files()
			left := n
			crash := func() error {
				if left--; left == 0 {
					return errors.New("crashed")
				}
				return nil
			}
			run := func(do func() error) (crashed bool) {
				b.tree.fault, b.store.fault, left = crash, crash, n
				err := do()
				b.tree.fault, b.store.fault = nil, nil
				return err != nil
			}
			if then == "uninstall" {
				b.must(b.install())
				if !run(b.uninstall) {
					return
				}
			} else {
				run(b.install)
			}
			if then == "both" {
				b.o.Mode = Password
				run(b.install)
			}
			restarts := b.restarts
			if then == "install" {
				b.must(b.install())
				if err := b.tree.checkRuntime("xrdp"); err != nil {
					t.Errorf("write %d: %v", n, err)
				}
				if _, err := guarded(b.text(pamFile), b.o.LoginDir, defaultLogin); err != nil {
					t.Errorf("write %d: %v", n, err)
				}
			}
			b.must(b.uninstall())
			if _, ok, err := b.Installed(); ok || err != nil {
				t.Errorf("write %d, %s: installed %t, %v", n, then, ok, err)
			}
			b.same(before)
			if then != "both" && n > 3 && b.restarts == restarts {
				t.Errorf("write %d, %s: xrdp was not restarted", n, then)
			}
		}
		if n > 50 {
			t.Fatal("no end")
		}
	}
}

func TestForeignChanges(t *testing.T) {
	b := newBox(t)
	b.must(b.install())
	// The administrator's change of our text stays, and is reported.
	ours := b.text(sesmanFile)
	b.put(sesmanFile, ours+"MaxSessions=7\n")
	b.put(xrdpFile, strings.Replace(b.text(xrdpFile), "security_layer=tls", "security_layer=rdp", 1)+"# mine\n")
	b.must(b.install())
	if b.text(sesmanFile) != ours+"MaxSessions=7\n" || !strings.Contains(b.text(xrdpFile), "security_layer=tls") {
		t.Errorf("%s\n%s", b.text(sesmanFile), b.text(xrdpFile))
	}
	// An upgrade brought a new file of the package: that is the original from now on.
	upgraded := pamShipped + "session optional pam_new.so\n"
	b.put(pamFile, upgraded)
	if err := b.Status(t.Context()); err == nil || !strings.Contains(err.Error(), pamFile) {
		t.Errorf("status: %v", err)
	}
	b.must(b.install())
	if !strings.Contains(b.text(pamFile), "pam_new.so") {
		t.Errorf("%s", b.text(pamFile))
	}
	err := b.uninstall()
	for _, f := range []string{sesmanFile, xrdpFile} {
		if err == nil || !strings.Contains(err.Error(), f+" was changed since") || !strings.Contains(err.Error(), filepath.Join(b.store.dir, filepath.Base(f))) {
			t.Errorf("uninstall: %v", err)
		}
	}
	if b.text(pamFile) != upgraded || !strings.Contains(b.text(sesmanFile), "MaxSessions=7") {
		t.Errorf("%s\n%s", b.text(pamFile), b.text(sesmanFile))
	}
	b.put(sesmanFile, sesmanShipped)
	b.put(xrdpFile, xrdpShipped+"# mine\n")
	b.must(b.uninstall())
	if b.text(xrdpFile) != xrdpShipped+"# mine\n" {
		t.Error(b.text(xrdpFile))
	}
}

func TestLostState(t *testing.T) {
	b := newBox(t)
	b.must(b.install())
	b.must(os.RemoveAll(b.store.dir))
	if err := b.install(); err == nil || !strings.Contains(err.Error(), "state folder") {
		t.Errorf("our text was taken for the machine's: %v", err)
	}
}

func TestUntouchable(t *testing.T) {
	for name, c := range map[string]struct {
		change func(b *box)
		want   string
	}{
		"a link":               {func(b *box) { b.link(pamFile, "/etc/passwd") }, "not a plain file"},
		"a folder that is one": {func(b *box) { b.link("/etc/xrdp", b.t.TempDir()) }, "not a folder"},
		"open to others":       {func(b *box) { b.must(os.Chmod(b.tree.at(sesmanFile), 0o666)) }, "may be written by others"},
		"in an open folder":    {func(b *box) { b.must(os.Chmod(b.tree.at("/etc/pam.d"), 0o777)) }, "may be written by others"},
		"an open program":      {func(b *box) { b.must(os.Chmod(b.tree.at(b.o.Program), 0o775)) }, "PAM is to run"},
		"its folder":           {func(b *box) { b.must(os.Chmod(b.tree.at("/usr/local"), 0o1777)) }, "PAM is to run"},
		"no program":           {func(b *box) { b.o.Program = "/usr/local/sbin/other" }, "no such file"},
		"somebody else's": {func(b *box) {
			b.tree.owner++
		}, "not to root"},
	} {
		b := newBox(t)
		c.change(b)
		before := b.files()
		if err := b.install(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		b.same(before)
	}
}

func (b *box) link(path, target string) {
	b.must(os.RemoveAll(b.tree.at(path)))
	b.must(os.Symlink(target, b.tree.at(path)))
}

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		change func(b *box)
		want   string
	}{
		"as set up":         {func(*box) {}, ""},
		"another folder":    {func(b *box) { b.o.LoginDir = "/run/other" }, "--login-dir"},
		"PAM as shipped":    {func(b *box) { b.put(pamFile, pamShipped) }, "does not ask the agent"},
		"an open folder":    {func(b *box) { b.must(os.Chmod(b.tree.at(socketDir), 0o755)) }, "every user of this machine"},
		"a writable one":    {func(b *box) { b.must(os.Chmod(b.tree.at(socketDir), 0o770)) }, "may be written by others"},
		"a writable parent": {func(b *box) { b.must(os.Chmod(b.tree.at(sockets), 0o777)) }, "may be written by others"},
		"no sesman":         {func(b *box) { b.must(os.Remove(b.tree.at(socketPath))) }, "does not run"},
		"no socket":         {func(b *box) { b.must(os.Remove(b.tree.at(socketPath))); b.put(socketPath, "") }, "not a socket"},
		"closed by itself": {func(b *box) {
			b.must(os.Chmod(b.tree.at(socketDir), 0o755))
			b.must(os.Chmod(b.tree.at(socketPath), 0o600))
		}, ""},
		"the agent is anybody's": {func(b *box) { b.must(os.Chmod(b.tree.at(b.o.Program), 0o777)) }, "PAM runs"},
	} {
		b := newBox(t)
		b.must(b.install())
		l, err := net.Listen("unix", b.tree.at(socketPath))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		b.must(os.Chmod(b.tree.at(socketPath), 0o666))
		c.change(b)
		err = b.tree.check(b.o.LoginDir)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// A machine on which the agent gives xrdp no certificate keeps xrdp's rights, if xrdp could not read its key without.
func TestConfine(t *testing.T) {
	b := newBox(t)
	b.put("/etc/xrdp/key.pem", "")
	b.must(os.Chmod(b.tree.at("/etc/xrdp/key.pem"), 0o600))
	b.must(b.install())
	if b.text(dropInFile) != "" {
		t.Error("xrdp can't read its key as user xrdp")
	}
	b.o.CertDir = "/run/cert"
	b.must(b.install())
	if !strings.Contains(b.text(dropInFile), "User=xrdp\n") {
		t.Errorf("%q", b.text(dropInFile))
	}
	b.o.CertDir = ""
	b.must(b.install())
	if b.text(dropInFile) != "" {
		t.Error("the drop-in outlives its reason")
	}
	paths := []string{}
	m, err := b.store.load()
	b.must(err)
	for _, e := range m.Files {
		paths = append(paths, e.Path)
	}
	if slices.Contains(paths, dropInFile) {
		t.Errorf("%v", paths)
	}
}
