//go:build linux

package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

type recorder struct {
	mu   sync.Mutex
	said []string
}

func (r *recorder) LogOff(_ context.Context, d Desktop) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if d.Display == 99 {
		return ErrNoDesktop
	}
	r.said = append(r.said, "log off "+d.String())
	return nil
}

func (r *recorder) Message(_ context.Context, d Desktop, text string) error {
	if text == "bad" {
		return errors.New("no window")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = append(r.said, "tell "+d.String()+" "+text)
	return nil
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 500 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not seen: %s", what)
}

// Agent and helper speak over a socket; the helper comes back after the agent was away, and a stranger is no helper.
func TestHelper(t *testing.T) {
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, SocketName)
	me := uint32(os.Geteuid())
	peer := func(net.Conn) (uint32, error) { return me, nil }
	does := &recorder{}
	ctx, stop := context.WithCancel(t.Context())
	helper := make(chan error, 1)
	go func() { helper <- Help(ctx, socket, does, peer, slog.New(slog.DiscardHandler)) }()

	serve := func(caller uint32) (*Remote, func()) {
		os.Remove(socket)
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		r := &Remote{Caller: func(net.Conn) (uint32, error) { return caller, nil }, Log: slog.New(slog.DiscardHandler)}
		go r.Serve(l)
		return r, func() {
			l.Close()
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.conn != nil {
				r.conn.Close()
			}
		}
	}
	for range 2 {
		r, closeIt := serve(0)
		eventually(t, "helper", func() bool { return r.LogOff(ctx, Desktop{7, 10}) == nil })
		if err := r.Message(ctx, Desktop{7, 10}, strings.Repeat("<", 2048)); err != nil {
			t.Error(err)
		}
		if err := r.Message(ctx, Desktop{7, 10}, "bad"); err == nil || err.Error() != "no window" {
			t.Errorf("a failure comes back as %v", err)
		}
		if err := r.LogOff(ctx, Desktop{7, 99}); !errors.Is(err, ErrNoDesktop) {
			t.Errorf("a desktop that isn't there: %v", err)
		}
		closeIt()
	}
	r, closeIt := serve(1000)
	defer closeIt()
	time.Sleep(1500 * time.Millisecond) // a helper that isn't root tries
	if err := r.LogOff(ctx, Desktop{7, 10}); !errors.Is(err, ErrNoHelper) {
		t.Errorf("told a helper that isn't root: %v", err)
	}
	stop()
	if err := <-helper; err != nil {
		t.Error(err)
	}
}

// The helper obeys the socket's owner alone.
func TestHelperObeysTheOwner(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = helpOnce(t.Context(), socket, &recorder{}, func(net.Conn) (uint32, error) { return uint32(os.Geteuid()) + 1, nil }, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "not its owner") {
		t.Errorf("got %v", err)
	}
}

func fakeProcess(t *testing.T, root string, pid, parent int, uid uint32, name, cmdline string) {
	t.Helper()
	dir := filepath.Join(root, strconv.Itoa(pid))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		"status":  fmt.Sprintf("Name:\t%s\nPPid:\t%d\nUid:\t%d\t%d\t%d\t%d\n", name, parent, uid, uid, uid, uid),
		"cmdline": strings.ReplaceAll(cmdline, " ", "\x00") + "\x00",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Only the session's own manager, root's, gets the signal; a process that a user gave such a name doesn't.
func TestLogOffFindsTheSession(t *testing.T) {
	root := t.TempDir()
	fakeProcess(t, root, 10, 1, 0, "xrdp-sesman", "xrdp-sesman")
	fakeProcess(t, root, 20, 10, 0, "xrdp-sesexec", "xrdp-sesexec")
	fakeProcess(t, root, 21, 20, 10001, "Xorg", "/usr/lib/xorg/Xorg :10 -auth .Xauthority")
	fakeProcess(t, root, 30, 10, 0, "xrdp-sesexec", "xrdp-sesexec")
	fakeProcess(t, root, 31, 30, 10002, "Xorg", "/usr/lib/xorg/Xorg :11 -auth .Xauthority")
	fakeProcess(t, root, 40, 1, 10003, "Xorg", "/usr/lib/xorg/Xorg :12 -auth .Xauthority") // lost its manager
	fakeProcess(t, root, 50, 1, 10002, "xrdp-sesexec", "fake")
	fakeProcess(t, root, 51, 50, 10002, "Xorg", "Xorg :10 :11")
	fakeProcess(t, root, 60, 1, 10004, "Xorg", "Xorg :13")
	status := filepath.Join(root, "60", "status")
	if err := os.WriteFile(status, []byte("Name:\tXorg\nState:\tZ (zombie)\nPPid:\t1\nUid:\t10004\t10004\t10004\t10004\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var told []string
	l := &Local{proc: root, signal: func(pid int, s syscall.Signal) error {
		told = append(told, fmt.Sprintf("%d %v", pid, s))
		for _, child := range map[int][]string{20: {"21"}, 30: {"31"}, 40: {"40"}}[pid] {
			os.RemoveAll(filepath.Join(root, child))
		}
		return nil
	}}
	for _, c := range []struct {
		d    Desktop
		want string
	}{
		{Desktop{10001, 10}, "20 terminated"},
		{Desktop{10002, 11}, "30 terminated"},
		{Desktop{10003, 12}, "40 terminated"},
	} {
		told = nil
		if err := l.LogOff(t.Context(), c.d); err != nil || !slices.Equal(told, []string{c.want}) {
			t.Errorf("%s: %v, %q", c.d, err, told)
		}
	}
	for _, d := range []Desktop{{10001, 10}, {10001, 11}, {10009, 10}, {10004, 13}} {
		if err := l.LogOff(t.Context(), d); !errors.Is(err, ErrNoDesktop) {
			t.Errorf("%s: %v, want that there is none", d, err)
		}
	}
	if err := l.Message(t.Context(), Desktop{10009, 10}, "x"); !errors.Is(err, ErrNoDesktop) {
		t.Errorf("message: %v", err)
	}
}

// The text goes to standard input: nothing reads it as an option or as markup.
func TestMessageIsPlainText(t *testing.T) {
	for _, v := range viewers {
		if !slices.Equal(v[len(v)-2:], []string{"-file", "-"}) {
			t.Errorf("%s does not read its text from standard input", v[0])
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to become the desktop's user")
	}
	root, bin := t.TempDir(), t.TempDir()
	out, err := os.CreateTemp("", "message")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(out.Name())
	for _, d := range []string{bin, filepath.Dir(bin)} {
		os.Chmod(d, 0o755)
	}
	out.Chmod(0o666)
	script := "#!/bin/sh\n{ /usr/bin/id -u; echo \"$DISPLAY $XAUTHORITY\"; /bin/cat; } >" + out.Name() + "\n"
	if err := os.WriteFile(filepath.Join(bin, "gxmessage"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	fakeProcess(t, root, 21, 1, 10001, "Xorg", "Xorg :10")
	l := &Local{proc: root, passwd: func(context.Context, uint32) (user, error) { return user{"alice", "/home/alice", 10001}, nil }}
	if err := l.Message(t.Context(), Desktop{10001, 10}, "--help <b>\n$(id)"); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(out.Name()); string(got) != "10001\n:10 /home/alice/.Xauthority\n--help <b>\n$(id)" {
		t.Errorf("the viewer saw %q", got)
	}
	os.WriteFile(filepath.Join(bin, "gxmessage"), []byte("#!/bin/sh\necho no such display >&2; exit 1\n"), 0o755)
	if err := l.Message(t.Context(), Desktop{10001, 10}, "x"); err == nil || !strings.Contains(err.Error(), "no such display") {
		t.Errorf("a viewer that fails: %v", err)
	}
}
