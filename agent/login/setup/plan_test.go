package setup

import (
	"slices"
	"strings"
	"testing"
)

// A Debian-like machine, in few lines.
const (
	pamShipped = `auth     required  pam_env.so readenv=1
@include common-auth
-auth    optional  pam_gnome_keyring.so

@include common-account
@include common-session
`
	xrdpShipped = `[Globals]
; the port
port=3389
security_layer=negotiate
Autorun=

[Logging]
LogLevel=INFO

[Xorg]
name=Xorg
lib=libxup.so
username=ask
password=ask
#password=commented

[Xvnc]
name=Xvnc
lib=libvnc.so
; why not
password=ask
`
	sesmanShipped = `[Globals]
#ListenPort=sesman.socket
EnableUserWindowManager=true
[Security]
AllowRootLogin=true
allowrootlogin=yes
[Sessions]
Policy=Default
`
)

func shipped() (machine, Options) {
	return machine{
			version: "0.10.1", group: "xrdp", xorg: true, xauth: true, confine: true, keyGroup: "ssl-cert",
			texts: map[string]string{
				pamFile: pamShipped, xrdpFile: xrdpShipped, sesmanFile: sesmanShipped,
				"/etc/pam.d/common-account": "account required pam_unix.so\n",
				"/etc/pam.d/common-session": "session required pam_unix.so\n@include common-account\n",
				"/etc/pam.d/common-auth":    "auth required pam_unix.so\n",
			},
		}, Options{
			Mode: Connection, Program: "/usr/local/sbin/rdv-agent", LoginDir: "/run/rendezvous-login", RDPAddr: "127.0.0.1:3389",
		}
}

func after(t *testing.T, changes []change, path string) string {
	t.Helper()
	for _, c := range changes {
		if c.path == path {
			return c.after
		}
	}
	t.Fatalf("no change of %s", path)
	return ""
}

// expect compares the lines that are no comments.
func expect(t *testing.T, text string, want ...string) {
	t.Helper()
	var got []string
	for _, l := range strings.Split(text, "\n") {
		if l != "" && !strings.ContainsRune("#;", rune(l[0])) {
			got = append(got, strings.Join(strings.Fields(l), " "))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func TestPlanConnection(t *testing.T) {
	m, o := shipped()
	changes, err := plan(m, o)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, after(t, changes, pamFile),
		"auth required pam_env.so readenv=1",
		"auth [success=ignore default=die] pam_exec.so quiet /usr/local/sbin/rdv-agent pam --login-dir=/run/rendezvous-login",
		"auth required pam_permit.so",
		"@include common-account", "@include common-session")
	expect(t, after(t, changes, xrdpFile),
		"[Globals]", "ls_title=No password needed: press OK", "use_vsock=false", "port=tcp://127.0.0.1:3389", "security_layer=tls", "autorun=Xorg", "[Logging]", "LogLevel=INFO",
		"[Xorg]", "xserverbpp=24", "name=Xorg", "lib=libxup.so", "username=ask", "password=none")
	expect(t, after(t, changes, sesmanFile),
		"[Globals]", "ListenPort=/run/xrdp-sesman/sesman.socket", "DefaultWindowManager=/etc/xrdp/rendezvous-startwm.sh", "EnableUserWindowManager=true",
		"[Security]", "SessionSockdirGroup=xrdp", "AllowAlternateShell=false", "AllowRootLogin=false", "[Sessions]", "Policy=U")
	expect(t, after(t, changes, startFile), "exec /usr/local/sbin/rdv-agent session /etc/xrdp/startwm.sh")
	expect(t, after(t, changes, tmpfilesFile),
		"d /run/xrdp-sesman 0750 root xrdp", "d /run/xrdp 0755 root root", "d /run/xrdp/sockdir 0755 root root",
		"L /run/xrdp/sockdir/sesman.socket - - - - /run/xrdp-sesman/sesman.socket")
	expect(t, after(t, changes, dropInFile), "[Service]", "User=xrdp", "Group=xrdp", "SupplementaryGroups=ssl-cert")
	if text := after(t, changes, xrdpFile); !strings.Contains(text, "; the port\n") || !strings.Contains(text, "#password=commented\n") {
		t.Errorf("the administrator's comments are gone:\n%s", text)
	}
}

func TestPlanPassword(t *testing.T) {
	m, o := shipped()
	o.Mode, o.CertDir = Password, "/var/lib/xrdp-cert"
	changes, err := plan(m, o)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, after(t, changes, pamFile),
		"auth required pam_env.so readenv=1",
		"auth [success=2 default=ignore] pam_exec.so quiet /usr/local/sbin/rdv-agent pam --elsewhere",
		"auth [success=ignore default=die] pam_exec.so quiet /usr/local/sbin/rdv-agent pam --login-dir=/run/rendezvous-login",
		"auth [success=done default=die] pam_permit.so",
		"@include common-auth", "-auth optional pam_gnome_keyring.so",
		"@include common-account", "@include common-session")
	expect(t, after(t, changes, xrdpFile),
		"[Globals]", "key_file=/var/lib/xrdp-cert/tls.key", "certificate=/var/lib/xrdp-cert/tls.crt", "port=3389", "security_layer=negotiate", "autorun=Xorg",
		"[Logging]", "LogLevel=INFO", "[Xorg]", "xserverbpp=24", "name=Xorg", "lib=libxup.so", "username=ask", "password=ask",
		"[Xvnc]", "name=Xvnc", "lib=libvnc.so", "password=ask")
}

// Planned again over its own result, nothing changes, whatever the mode was before.
func TestPlanTwice(t *testing.T) {
	for _, mode := range []Mode{Connection, Password} {
		m, o := shipped()
		o.Mode = mode
		for round := range 3 {
			changes, err := plan(m, o)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range changes {
				if round > 0 && c.before != c.after {
					t.Errorf("%s, round %d, %s:\n%s\nbecomes\n%s", mode, round, c.path, c.before, c.after)
				}
				m.texts[c.path] = c.after
			}
		}
		if _, err := guarded(m.texts[pamFile], o.LoginDir, defaultLogin); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
	}
}

const defaultLogin = "/run/rendezvous-login"

func TestPlanRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*machine, *Options)
		want   string
	}{
		"no xrdp":            {func(m *machine, _ *Options) { m.version = "" }, "xrdp is not installed"},
		"an old one":         {func(m *machine, _ *Options) { m.version = "0.9.21.1" }, "too old"},
		"a strange one":      {func(m *machine, _ *Options) { m.version = "git" }, "0.10 and later"},
		"a newer one":        {func(m *machine, _ *Options) { m.version = "1.0" }, ""},
		"no PAM file":        {func(m *machine, _ *Options) { delete(m.texts, pamFile) }, "reinstall xrdp"},
		"no xauth":           {func(m *machine, _ *Options) { m.xauth = false }, "apt-get install xauth"},
		"Xvnc alone":         {func(m *machine, _ *Options) { m.xorg, m.xvnc = false, true }, "apt-get install xorgxrdp xauth"},
		"neither":            {func(m *machine, _ *Options) { m.xorg = false }, "no X server"},
		"Xvnc, as said":      {func(m *machine, o *Options) { m.xorg, m.xvnc, o.Xvnc = false, true, true }, ""},
		"Xvnc that isn't":    {func(_ *machine, o *Options) { o.Xvnc = true }, "there is no Xvnc"},
		"no section":         {func(m *machine, _ *Options) { m.texts[xrdpFile] = "[Globals]\n" }, "no section [Xorg]"},
		"a PAM include":      {func(m *machine, _ *Options) { m.texts[pamFile] += "@include mine\n" }, "includes mine"},
		"one through others": {func(m *machine, _ *Options) { m.texts["/etc/pam.d/common-session"] += "@include common-auth\n" }, "includes common-session"},
		"half a block":       {func(m *machine, _ *Options) { m.texts[pamFile] += blockBegin + "\n" }, "restore that line"},
		"a strange desktop":  {func(m *machine, _ *Options) { m.texts[sesmanFile] = "[Globals]\nDefaultWindowManager=/opt/my wm\n" }, "DefaultWindowManager"},
		"a lost desktop": {func(m *machine, _ *Options) {
			m.texts[sesmanFile] = "[Globals]\nDefaultWindowManager=" + startFile + "\n"
		}, ""},
		"no mode":           {func(_ *machine, o *Options) { o.Mode = "maybe" }, "--login"},
		"a blank in a path": {func(_ *machine, o *Options) { o.Program = "/opt/my agent" }, "can't be written into a PAM file"},
		"a bracket":         {func(_ *machine, o *Options) { o.LoginDir = "/run/[x" }, "--login-dir"},
		"a way up":          {func(_ *machine, o *Options) { o.Program = "/opt/../agent" }, "can't be written"},
		"an outer address":  {func(_ *machine, o *Options) { o.RDPAddr = "10.0.0.1:3389" }, "--rdp-addr"},
		"IPv6":              {func(_ *machine, o *Options) { o.RDPAddr = "[::1]:3389" }, "--rdp-addr"},
	} {
		m, o := shipped()
		c.change(&m, &o)
		_, err := plan(m, o)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestGuarded(t *testing.T) {
	const ask = "auth [success=ignore default=die] pam_exec.so quiet /a/agent pam --login-dir=/run/rendezvous-login\n"
	const permit = "auth required pam_permit.so\n"
	const elsewhere = "auth [success=2 default=ignore] pam_exec.so quiet /a/agent pam --elsewhere\n"
	const done = "auth [success=done default=die] pam_permit.so\n"
	for name, c := range map[string]struct {
		text string
		ok   bool
	}{
		"ours":                     {ask + permit, true},
		"as in the desktop image":  {"auth [success=ignore  default=die] pam_exec.so quiet /run/rendezvous-login/login pam\n" + permit, true},
		"the environment first":    {"auth required pam_env.so\n" + ask + permit + "@include common-auth\n", true},
		"in two lines":             {strings.Replace(ask, " pam_exec", " \\\n pam_exec", 1) + permit, true},
		"with passwords":           {elsewhere + ask + done + "@include common-auth\n", true},
		"an include first":         {"@include common-auth\n" + ask + permit, false},
		"something else first":     {"auth sufficient pam_unix.so\n" + ask + permit, false},
		"a sufficient environment": {"auth sufficient pam_env.so\n" + ask + permit, false},
		"as shipped":               {pamShipped, false},
		"empty":                    {"", false},
		"commented out":            {"#" + ask + permit, false},
		"refused and let in":       {strings.Replace(ask, "die", "ignore", 1) + permit, false},
		"a module may be missing":  {"-" + ask + permit, false},
		"another folder":           {strings.Replace(ask, "rendezvous-login", "x", 1) + permit, false},
		"no permit":                {ask, false},
		"passwords, one line off":  {elsewhere + ask + permit, false},
		"passwords, and no ask":    {elsewhere + done, false},
		"two programs":             {strings.Replace(elsewhere, "/a/", "/b/", 1) + ask + done, false},
		"jumps too far":            {strings.Replace(elsewhere, "2", "3", 1) + ask + done, false},
	} {
		_, err := guarded(c.text, defaultLogin, defaultLogin)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
