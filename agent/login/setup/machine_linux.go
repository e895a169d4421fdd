package setup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// gather looks at the machine. originals gives the text that a plan begins with, where that is not the file's own.
func (s *Setup) gather(ctx context.Context, o Options, originals func(path, text string, exists bool) (string, bool, error)) (machine, error) {
	t := s.tree
	m := machine{texts: map[string]string{}, group: "root", xauth: t.exists("/usr/bin/xauth"), xvnc: t.exists("/usr/bin/Xvnc")}
	for _, dir := range []string{"/usr/lib/xorg", "/usr/lib64/xorg"} {
		m.xorg = m.xorg || t.exists(dir+"/modules/libxorgxrdp.so")
	}
	if t.exists("/usr/sbin/xrdp") {
		v, err := s.version(ctx)
		if err != nil {
			return m, err
		}
		m.version = v
	}
	files, _ := filepath.Glob(t.at("/etc/pam.d/*"))
	for _, f := range files { // what the PAM file may include
		if data, err := os.ReadFile(f); err == nil {
			m.texts["/etc/pam.d/"+filepath.Base(f)] = string(data)
		}
	}
	for _, p := range []string{pamFile, startFile, sesmanFile, xrdpFile, tmpfilesFile, dropInFile} {
		delete(m.texts, p)
		text, fi, err := t.read(p)
		if err != nil {
			return m, err
		}
		text, exists, err := originals(p, text, fi != nil)
		if err != nil {
			return m, err
		}
		if exists {
			m.texts[p] = text
		}
	}
	groups := t.named("/etc/group")
	if groups["xrdp"] != "" {
		m.group = "xrdp"
	}
	_, user := t.named("/etc/passwd")["xrdp"]
	unit := t.exists("/usr/lib/systemd/system/xrdp.service") || t.exists("/lib/systemd/system/xrdp.service")
	if user && m.group == "xrdp" && unit {
		m.confine, m.keyGroup = t.confinable(m.texts[xrdpFile], o, groups)
	}
	return m, nil
}

// confinable says whether xrdp as a user of its own could read its keys, and the further group that it needs for that.
func (t tree) confinable(ini string, o Options, groups map[string]string) (ok bool, group string) {
	if o.CertDir != "" { // the agent gives that key to group xrdp
		return true, ""
	}
	key := parseINI(ini).get("Globals", "key_file")
	if key == "" {
		key = "/etc/xrdp/key.pem"
	}
	if link, err := os.Readlink(t.at(key)); err == nil && path.IsAbs(link) {
		key = link // Debian's own is a link to /etc/ssl/private, which is group ssl-cert's too
	}
	fi, err := os.Stat(t.at(key))
	if err != nil {
		return false, ""
	}
	s := fi.Sys().(*syscall.Stat_t)
	for name, id := range groups {
		if id == strconv.Itoa(int(s.Gid)) && name != "root" && fi.Mode().Perm()&0o040 != 0 {
			if name == "xrdp" {
				name = ""
			}
			return true, name
		}
	}
	return false, ""
}

// named reads /etc/passwd or /etc/group: names and numbers.
func (t tree) named(file string) map[string]string {
	all := map[string]string{}
	for _, l := range t.lines(file) {
		if f := strings.Split(l, ":"); len(f) >= 3 {
			all[f[0]] = f[2]
		}
	}
	return all
}

func (t tree) gid(group string) int {
	n, err := strconv.Atoi(t.named("/etc/group")[group])
	if err != nil {
		return 0
	}
	return n
}

// xrdpVersion asks the program.
func xrdpVersion(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "/usr/sbin/xrdp", "--version").Output()
	first, _, _ := strings.Cut(string(out), "\n")
	version, ok := strings.CutPrefix(strings.TrimSpace(first), "xrdp ")
	if !ok {
		return "", fmt.Errorf("`xrdp --version` says %q (%v)", first, err)
	}
	return version, nil
}

// desktops counts xrdp's sessions: each has a process of the session manager's.
func (t tree) desktops() (n int) {
	comms, _ := filepath.Glob(t.at("/proc/[0-9]*/comm"))
	for _, c := range comms {
		if name, err := os.ReadFile(c); err == nil && string(name) == "xrdp-sesexec\n" {
			n++
		}
	}
	return n
}

// systemd says that it runs this machine's services.
func (t tree) systemd() bool { return t.exists("/run/systemd/system") }

// restart has xrdp and its session manager read their configuration, if they run.
func restart(ctx context.Context) error {
	for _, args := range [][]string{{"daemon-reload"}, {"try-restart", "xrdp-sesman.service", "xrdp.service"}} {
		if out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}
