package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// killAfter is how long a session manager that was told to end a session has before its X server is killed.
	killAfter = 8 * time.Second
	// sessionManager is the process, root's, that holds one session of xrdp: the parent of its X server.
	sessionManager = "xrdp-sesexec"
	// maxWindows bounds the messages that are open on one desktop; the oldest makes room.
	maxWindows = 5
)

// Local acts on the desktops of xrdp on this machine, as root. The zero value works. Safe for concurrent use.
type Local struct {
	proc    string                                      // /proc, but for tests
	signal  func(pid int, s syscall.Signal) error       // for tests
	passwd  func(context.Context, uint32) (user, error) // for tests
	running sync.Mutex
	windows map[Desktop][]*exec.Cmd // guarded by running
}

// process is what /proc says of one.
type process struct {
	pid, parent int
	uid         uint32
	name        string
	args        []string
}

func (l *Local) process(pid int) (p process, err error) {
	dir := filepath.Join(l.root(), strconv.Itoa(pid))
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return p, err
	}
	p.pid = pid
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		f := strings.Fields(value)
		if len(f) == 0 {
			continue
		}
		switch key {
		case "Name":
			p.name = f[0]
		case "State":
			if f[0] == "Z" { // it has ended, and its parent has yet to take note
				return p, os.ErrNotExist
			}
		case "PPid":
			p.parent, err = strconv.Atoi(f[0])
		case "Uid":
			var n uint64
			n, err = strconv.ParseUint(f[0], 10, 32)
			p.uid = uint32(n)
		}
		if err != nil {
			return p, err
		}
	}
	args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	p.args = strings.Split(strings.TrimRight(string(args), "\x00"), "\x00")
	return p, err
}

func (l *Local) root() string {
	if l.proc == "" {
		return "/proc"
	}
	return l.proc
}

// server finds a desktop's X server and, where it still has one, its session manager.
func (l *Local) server(d Desktop) (x process, manager *process, err error) {
	dirs, err := os.ReadDir(l.root())
	if err != nil {
		return x, nil, err
	}
	found := false
	for _, e := range dirs {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := l.process(pid)
		if err != nil || p.uid != d.UID || p.name != "Xorg" && p.name != "Xvnc" || !slices.Contains(p.args, ":"+strconv.Itoa(d.Display)) {
			continue
		}
		parent, err := l.process(p.parent)
		if err == nil && parent.name == sessionManager && parent.uid == 0 {
			return p, &parent, nil
		}
		x, found = p, true
	}
	if !found {
		return x, nil, ErrNoDesktop
	}
	return x, nil, nil
}

// tell sends a signal to a process if it is still the one that was found.
func (l *Local) tell(p process, s syscall.Signal) error {
	if l.signal != nil {
		return l.signal(p.pid, s)
	}
	handle, err := os.FindProcess(p.pid) // by pidfd, so that what is looked at now is what gets the signal
	if err != nil {
		return err
	}
	defer handle.Release()
	if now, err := l.process(p.pid); err != nil || now.name != p.name || now.uid != p.uid || now.parent != p.parent {
		return nil // it is gone
	}
	if err := handle.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// LogOff implements Control: it tells the session manager, which tells the client that it was logged off. A session that
// lost its manager, as after xrdp's restart, ends with its X server.
func (l *Local) LogOff(ctx context.Context, d Desktop) error {
	x, manager, err := l.server(d)
	if err != nil {
		return err
	}
	first := x
	if manager != nil {
		first = *manager
	}
	if err := l.tell(first, syscall.SIGTERM); err != nil {
		return fmt.Errorf("%s can't be ended: %s (process %d): %w", d, first.name, first.pid, err)
	}
	kill := time.After(killAfter)
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s was told to end, and its X server (process %d) is still there", d, x.pid)
		case <-kill:
			if err := l.tell(x, syscall.SIGKILL); err != nil {
				return fmt.Errorf("%s: its X server (process %d) can't be killed: %w", d, x.pid, err)
			}
		case <-time.After(100 * time.Millisecond):
		}
		if now, err := l.process(x.pid); err != nil || now.name != x.name || now.uid != x.uid {
			return nil
		}
	}
}

// user is an entry of the list of users.
type user struct {
	name, home string
	gid        uint32
}

// lookUp asks the host's name service, which may be a directory.
func lookUp(ctx context.Context, uid uint32) (u user, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "getent", "passwd", strconv.FormatUint(uint64(uid), 10)).Output()
	f := strings.Split(strings.TrimSpace(string(out)), ":")
	if err != nil || len(f) < 7 {
		return u, fmt.Errorf("this host knows no user %d (getent passwd: %v)", uid, err)
	}
	gid, err := strconv.ParseUint(f[3], 10, 32)
	return user{name: f[0], home: f[5], gid: uint32(gid)}, err
}

// viewers show the plain text that they read from standard input; the first that is installed does.
var viewers = [][]string{
	{"gxmessage", "-title", title, "-center", "-ontop", "-sticky", "-wrap", "-geometry", "520x220", "-buttons", "OK:0", "-default", "OK", "-file", "-"},
	{"xmessage", "-title", title, "-center", "-buttons", "OK:0", "-default", "OK", "-file", "-"},
}

// Message implements Control. The window belongs to the desktop's own user.
func (l *Local) Message(ctx context.Context, d Desktop, text string) error {
	if _, _, err := l.server(d); err != nil {
		return err
	}
	if d.UID == 0 {
		return errors.New("a message is never shown as root")
	}
	find := l.passwd
	if find == nil {
		find = lookUp
	}
	u, err := find(ctx, d.UID)
	if err != nil {
		return err
	}
	for _, v := range viewers {
		program, err := exec.LookPath(v[0])
		if err != nil {
			continue
		}
		cmd := exec.Command(program, v[1:]...)
		cmd.Dir = "/"
		cmd.Env = []string{
			"DISPLAY=:" + strconv.Itoa(d.Display), "XAUTHORITY=" + filepath.Join(u.home, ".Xauthority"), "HOME=" + u.home, "USER=" + u.name, "LOGNAME=" + u.name,
			"PATH=/usr/bin:/bin", "LANG=C.UTF-8", "GDK_BACKEND=x11", "NO_AT_BRIDGE=1",
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: d.UID, Gid: u.gid}}
		return l.show(d, cmd, text)
	}
	return errors.New("this host has no program that shows messages: install gxmessage (or x11-utils, for xmessage)")
}

// show starts a viewer. One that ends at once has failed.
func (l *Local) show(d Desktop, cmd *exec.Cmd, text string) error {
	cmd.Stdin = strings.NewReader(text)
	said := &bound{most: 512}
	cmd.Stdout, cmd.Stderr = io.Discard, said
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s: %w", cmd.Path, err)
	}
	l.running.Lock()
	if l.windows == nil {
		l.windows = map[Desktop][]*exec.Cmd{}
	}
	if open := l.windows[d]; len(open) >= maxWindows {
		open[0].Process.Kill()
	}
	l.windows[d] = append(l.windows[d], cmd)
	l.running.Unlock()
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		l.running.Lock()
		l.windows[d] = slices.DeleteFunc(l.windows[d], func(c *exec.Cmd) bool { return c == cmd })
		if len(l.windows[d]) == 0 {
			delete(l.windows, d)
		}
		l.running.Unlock()
		ended <- err
	}()
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("%s on display :%d: %w: %s", filepath.Base(cmd.Path), d.Display, err, said)
		}
	case <-time.After(time.Second):
	}
	return nil
}

// bound keeps the first bytes that are written.
type bound struct {
	mu   sync.Mutex
	b    bytes.Buffer
	most int
}

func (b *bound) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.Write(p[:min(len(p), b.most-b.b.Len())])
	return len(p), nil
}

func (b *bound) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.TrimSpace(b.b.String())
}
