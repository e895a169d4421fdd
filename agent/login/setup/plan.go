// Package setup makes a Linux machine with xrdp log people in by their connections, and takes that back.
//
//	plan.go     what the machine's files say now -> what they are to say; pure
//	ini.go      edits of xrdp's configuration by key
//	pam.go      the lines by which PAM asks the agent, and whether a file has them
//	diff.go     a change, as a person wants to see it
//	manifest.go what was changed, with the originals, in the agent's state folder
//	files.go    reading and replacing files that root alone may change
//	machine.go  what else a plan needs to know of the machine
//	setup.go    install, uninstall, status
//	check.go    what the running agent looks at before it takes sessions
//
// docs/security.md says why each of these changes is needed.
package setup

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Files that are changed. Those below sesmanFile are ours alone.
const (
	pamFile    = "/etc/pam.d/xrdp-sesman"
	xrdpFile   = "/etc/xrdp/xrdp.ini"
	sesmanFile = "/etc/xrdp/sesman.ini"
	// startFile begins a session, if its screen is the user's own.
	startFile = "/etc/xrdp/rendezvous-startwm.sh"
	// tmpfilesFile makes socketDir and socketLink at each boot.
	tmpfilesFile = "/etc/tmpfiles.d/rendezvous-login.conf"
	// dropInFile takes root's rights from xrdp, which reads what clients send.
	dropInFile = "/etc/systemd/system/xrdp.service.d/rendezvous-login.conf"
)

const (
	// socketDir keeps everybody but root and xrdp from sesman's socket, which sesman itself makes open to all.
	socketDir  = "/run/xrdp-sesman"
	socketPath = socketDir + "/sesman.socket"
	// socketLink is where xrdp 0.10 looks for sesman, whatever sesman.ini says.
	sockets    = "/run/xrdp/sockdir"
	socketLink = sockets + "/sesman.socket"
)

// Mode is who may log in over RDP.
type Mode string

// The modes.
const (
	// Connection lets in whoever the brokers sent, by their connections, and nobody else.
	Connection Mode = "connection"
	// Password also asks those for a password who connect to xrdp from other machines.
	Password Mode = "password"
)

// Options say what is to be set up.
type Options struct {
	Mode Mode `json:"mode"`
	// Program is the agent's, which PAM runs.
	Program string `json:"program"`
	// ProgramToCome says that Program is put there before the changes are made, so that a plan does without it.
	ProgramToCome bool `json:"-"`
	// LoginDir is the running agent's.
	LoginDir string `json:"loginDir"`
	// RDPAddr is where xrdp is to listen in mode Connection: a loopback address.
	RDPAddr string `json:"rdpAddr"`
	// CertDir is where the agent puts tls.crt and tls.key; empty leaves xrdp's certificate alone.
	CertDir string `json:"certDir,omitempty"`
	// Xvnc takes Xvnc sessions, where there is no Xorg for xrdp.
	Xvnc bool `json:"xvnc,omitempty"`
}

// machine is what a plan needs to know.
type machine struct {
	version string // of xrdp; empty where it isn't installed
	// group has xrdp in it; root where there is no group of that name.
	group             string
	xorg, xauth, xvnc bool
	// confine says that xrdp, as a service, can do without root's rights; keyGroup is the group that it needs then to read
	// its key.
	confine  bool
	keyGroup string
	texts    map[string]string // by path; what isn't there is absent
}

// change is one file's.
type change struct {
	path          string
	existed       bool
	before, after string
	program       bool // of a new file: it may be run
}

// refusal is why a machine can't be set up, and the way out.
func refusal(format string, args ...any) error { return fmt.Errorf(format, args...) }

var (
	plainPath = regexp.MustCompile(`^/[A-Za-z0-9._+/-]+$`)
	number    = regexp.MustCompile(`^(\d+)\.(\d+)`)
)

// plan says what each file is to be. Applied to its own result it changes nothing.
func plan(m machine, o Options) ([]change, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if err := m.check(o); err != nil {
		return nil, err
	}
	pam, err := planPAM(m, o)
	if err != nil {
		return nil, err
	}
	xrdp, err := planXrdp(m.texts[xrdpFile], o)
	if err != nil {
		return nil, err
	}
	sesman, start, err := planSesman(m, o)
	if err != nil {
		return nil, err
	}
	// The PAM file is the first: with it alone, nobody logs in who couldn't before.
	all := []change{
		{path: pamFile, after: pam},
		{path: startFile, after: start, program: true},
		{path: sesmanFile, after: sesman},
		{path: xrdpFile, after: xrdp},
		{path: tmpfilesFile, after: tmpfiles(m.group)},
	}
	if m.confine {
		all = append(all, change{path: dropInFile, after: dropIn(m)})
	}
	for i, c := range all {
		all[i].before, all[i].existed = m.texts[c.path], has(m.texts, c.path)
	}
	return all, nil
}

func has(texts map[string]string, path string) bool { _, ok := texts[path]; return ok }

func (o Options) check() error {
	if o.Mode != Connection && o.Mode != Password {
		return refusal("--login: %q is not one of connection, password and off", o.Mode)
	}
	for flag, p := range map[string]string{"the agent's program": o.Program, "--login-dir": o.LoginDir} {
		if !plainPath.MatchString(p) || path.Clean(p) != p {
			return refusal("%s: %q can't be written into a PAM file: use an absolute path of letters, digits and . _ + - /", flag, p)
		}
	}
	if o.CertDir != "" && (!path.IsAbs(o.CertDir) || strings.ContainsAny(o.CertDir, "\n\r")) {
		return refusal("--rdp-cert-dir: %q is not an absolute path", o.CertDir)
	}
	host, port, err := net.SplitHostPort(o.RDPAddr)
	address, aerr := netip.ParseAddr(host)
	n, perr := strconv.ParseUint(port, 10, 16)
	if errors.Join(err, aerr, perr) != nil || n == 0 || !address.Is4() || !address.IsLoopback() {
		return refusal("--rdp-addr: %q is not an IPv4 loopback address with a port, such as 127.0.0.1:3389", o.RDPAddr)
	}
	return nil
}

// check says why login by connection would not be safe, or not work, on this machine.
func (m machine) check(o Options) error {
	if m.version == "" {
		return refusal("xrdp is not installed on this machine: install it (on Debian: apt-get install xrdp xorgxrdp xauth) and run this again, or use --login=off, and the RDP server that you run asks people for credentials itself")
	}
	v := number.FindStringSubmatch(m.version)
	if v == nil {
		return refusal("xrdp says that its version is %q, and login by connection is known for 0.10 and later", m.version)
	}
	major, _ := strconv.Atoi(v[1])
	minor, _ := strconv.Atoi(v[2])
	if major == 0 && minor < 10 {
		return refusal("xrdp %s is too old for login by connection: before 0.10 its session manager listens on a TCP port, where every user of this machine could log in as anybody. Install 0.10 (Debian 13 has it), or use --login=off", m.version)
	}
	for _, f := range []string{pamFile, xrdpFile, sesmanFile} {
		if !has(m.texts, f) {
			return refusal("%s is missing: reinstall xrdp (on Debian: apt-get install --reinstall -o Dpkg::Options::=--force-confmiss xrdp)", f)
		}
	}
	switch {
	case !o.Xvnc && !m.xorg && m.xvnc:
		return refusal("xrdp has only Xvnc for its sessions here, and every user of this machine can dial the TCP port of another's Xvnc, which a password of 32 bits guards. Install Xorg's module and xauth (on Debian: apt-get install xorgxrdp xauth); or use --login-sessions=xvnc, if the users of this machine trust each other")
	case !o.Xvnc && !m.xorg:
		return refusal("xrdp has no X server for its sessions here: install one (on Debian: apt-get install xorgxrdp xauth)")
	case o.Xvnc && !m.xvnc:
		return refusal("--login-sessions=xvnc: there is no Xvnc on this machine")
	case !m.xauth:
		return refusal("xauth is not installed, and without it xrdp starts X servers that let in every user of this machine: install it (on Debian: apt-get install xauth)")
	}
	return nil
}

// planSesman closes what sesman leaves open, and has sessions begin with start.
func planSesman(m machine, o Options) (sesman, start string, err error) {
	f := parseINI(m.texts[sesmanFile])
	desktop := f.get("Globals", "DefaultWindowManager")
	if desktop == startFile { // ours, which somebody has edited since
		_, desktop, _ = strings.Cut(m.texts[startFile], " session ")
		desktop = strings.TrimSpace(desktop)
	}
	if desktop == "" {
		desktop = "startwm.sh"
	}
	if !path.IsAbs(desktop) {
		desktop = path.Join(path.Dir(sesmanFile), desktop)
	}
	if !plainPath.MatchString(desktop) || desktop == startFile {
		return "", "", refusal("%s: DefaultWindowManager=%s is not a path of letters, digits and . _ + - /", sesmanFile, desktop)
	}
	start = fmt.Sprintf("#!/bin/sh\n# %s\n# Another user of this machine could pose as the session's X server.\nexec %s session %s\n", mark, o.Program, desktop)
	f.set("Globals", "DefaultWindowManager", startFile)
	f.set("Globals", "ListenPort", socketPath)
	f.set("Security", "AllowRootLogin", "false")
	// A connection that dies at the wrong moment must not choose a program that runs as its victim.
	f.set("Security", "AllowAlternateShell", "false")
	if m.group != "root" {
		f.set("Security", "SessionSockdirGroup", m.group)
	}
	f.set("Sessions", "Policy", "U")
	return f.marked(), start, nil
}

// planXrdp has xrdp start the one kind of session, and in mode Connection listen to this machine alone.
func planXrdp(text string, o Options) (string, error) {
	f := parseINI(text)
	name, library := "Xorg", "libxup.so"
	if o.Xvnc {
		name, library = "Xvnc", "libvnc.so"
	}
	i := slices.IndexFunc(f.sections(), func(s string) bool { return strings.EqualFold(s, name) })
	if i < 0 || !strings.EqualFold(f.get(name, "lib"), library) {
		return "", refusal("%s has no section [%s] with lib=%s: add the one that xrdp's package has, or reinstall that package's file", xrdpFile, name, library)
	}
	f.set("Globals", "autorun", f.sections()[i])
	// A client of another colour depth would not get its session back.
	f.set(name, "xserverbpp", "24")
	f.set(name, "username", "ask")
	if o.Mode == Connection {
		f.set("Globals", "port", "tcp://"+o.RDPAddr)
		f.set("Globals", "use_vsock", "false")
		f.set("Globals", "security_layer", "tls")
		// xrdp shows its window to a client that sends no password, as files opened without rdv have it.
		f.set("Globals", "ls_title", "No password needed: press OK")
		f.set(name, "password", "none") // never the client's: who may log in is no question of one
		for _, s := range f.sections() {
			if !strings.EqualFold(s, name) && !slices.ContainsFunc(notSessions, func(n string) bool { return strings.EqualFold(s, n) }) {
				f.disable(s)
			}
		}
	}
	if o.CertDir != "" {
		f.set("Globals", "certificate", path.Join(o.CertDir, "tls.crt"))
		f.set("Globals", "key_file", path.Join(o.CertDir, "tls.key"))
	}
	return f.marked(), nil
}

// notSessions are xrdp.ini's sections that are no kind of session.
var notSessions = []string{"Globals", "Logging", "LoggingPerLogger", "Channels", "ChansrvLogging"}

func tmpfiles(group string) string {
	return fmt.Sprintf("# %s\nd %s 0750 root %s\nd /run/xrdp 0755 root root\nd %s 0755 root root\nL %s - - - - %s\n",
		mark, socketDir, group, sockets, socketLink, socketPath)
}

func dropIn(m machine) string {
	text := fmt.Sprintf("# %s\n# Whoever takes over the process that reads what clients send is not root by that.\n[Service]\nUser=xrdp\nGroup=%s\n", mark, m.group)
	if m.keyGroup != "" {
		text += "SupplementaryGroups=" + m.keyGroup + "\n"
	}
	return text
}

// mark is in each file that was changed, so that none is taken for the machine's own.
const mark = "Changed by rendezvous-agent: see `agent login status`, undo with `agent login uninstall`."

func marked(text string) bool { return strings.Contains(text, mark) }
