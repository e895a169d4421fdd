package rdpkit

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
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

//go:embed box.sh
var boxScript string

// BoxOptions say what a [Box] looks like from the inside.
type BoxOptions struct {
	// Netns is the name of a network namespace (as of `ip netns`) to live in; the caller's own when empty.
	// Its loopback is brought up.
	Netns string
	// Hostname of the box; "box" when empty.
	Hostname string
	// DNS servers for /etc/resolv.conf, by address. None: the host's file is copied.
	DNS []string
	// Search is the search list of /etc/resolv.conf; used with DNS only.
	Search []string
	// Hosts are further lines of /etc/hosts: address by name.
	Hosts map[string]string
	// CAs are PEM certificates that OpenSSL, FreeRDP and Go programs in the box trust, beside Debian's own list.
	CAs [][]byte
	// Binds are files and directories of the host that appear in the box.
	Binds []Bind
	// Env are further KEY=value settings for every command.
	Env []string
	// Systemd starts systemd as the box's first process, where the root has it, and waits until it has started the units.
	Systemd bool
}

// Bind shows one file or directory of the host in a box.
type Bind struct {
	// Host is the path on the host; it must exist.
	Host string
	// Box is the absolute path in the box; made when missing.
	Box string
	// ReadOnly keeps the box from writing to it.
	ReadOnly bool
}

// Box is a machine of its own as far as its programs can tell: an overlay over a root file system, in fresh mount, PID,
// UTS and IPC namespaces. Its first process dies with the process that made the box, and takes all the others with it;
// the mounts exist only in there. What remains on disk after a kill is removed by the next NewBox.
type Box struct {
	dir   string
	group string // control group, of a box with systemd
	pid   int
	env   []string
	init  *exec.Cmd
	ended <-chan error

	closeOnce sync.Once
	closeErr  error
}

const boxPrefix = "rdv-box-"

// NewBox starts a box over root, one of [Roots], with no program in it yet.
func NewBox(ctx context.Context, root string, opts BoxOptions) (*Box, error) {
	removeStaleBoxes()
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", boxPrefix, os.Getpid()))
	if err != nil {
		return nil, err
	}
	b := &Box{dir: dir, env: append([]string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "TERM=xterm",
	}, opts.Env...)}
	if err := b.start(ctx, root, opts); err != nil {
		b.Close()
		return nil, fmt.Errorf("starting a box over %s: %w", root, err)
	}
	if len(opts.CAs) > 0 {
		if out, err := b.Command(ctx, "update-ca-certificates").CombinedOutput(); err != nil {
			b.Close()
			return nil, fmt.Errorf("trusting the given certificates: %w\n%s", err, lastLines(out, 10))
		}
	}
	return b, nil
}

func (b *Box) start(ctx context.Context, root string, opts BoxOptions) (err error) {
	if err := b.prepare(opts); err != nil {
		return err
	}
	hostname := opts.Hostname
	if hostname == "" {
		hostname = "box"
	}
	args := []string{"unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"}
	first := "sleep"
	if opts.Systemd {
		// systemd wants a control group of its own, and sees it as the root of all.
		if b.group, err = makeGroup(b.dir); err != nil {
			return err
		}
		args = append([]string{"/bin/sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, b.group}, append(args, "--cgroup")...)
		first = "systemd"
	}
	args = append(args, "/bin/sh", "-c", boxScript, "box", root, b.dir, hostname, opts.Netns, first)
	if opts.Netns != "" {
		args = append([]string{"nsenter", "--net=/run/netns/" + opts.Netns}, args...)
	}
	for _, bind := range opts.Binds {
		mode := "rw"
		if bind.ReadOnly {
			mode = "ro"
		}
		args = append(args, mode, bind.Host, bind.Box)
	}
	b.init = exec.Command(args[0], args[1:]...)
	var problems bytes.Buffer
	b.init.Stderr = &problems
	stdout, err := b.init.StdoutPipe()
	if err != nil {
		return err
	}
	if b.ended, err = startBound(b.init); err != nil {
		return err
	}
	// Reading ends at "ready", or when the script fails and its end of the pipe closes.
	stop := context.AfterFunc(ctx, func() { b.init.Process.Kill() })
	defer stop()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		b.init.Process.Kill()
		<-b.ended
		b.ended = nil
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%s", strings.TrimSpace(problems.String()))
	}
	if b.pid, err = strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "ready "))); err != nil || !opts.Systemd {
		return err
	}
	return b.waitForSystemd(ctx)
}

// waitForSystemd returns when the units are started, or have failed.
func (b *Box) waitForSystemd(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 60*time.Second, errors.New("systemd was not ready in a minute"))
	defer cancel()
	state := ""
	err := poll(ctx, 100*time.Millisecond, func() (bool, error) {
		out, _ := b.Command(ctx, "systemctl", "is-system-running").CombinedOutput()
		state = strings.TrimSpace(string(out))
		return state == "running" || state == "degraded", nil
	})
	if err != nil {
		err = fmt.Errorf("%w: %s", err, state)
	}
	return err
}

// makeGroup makes a control group that is named as the box is, in the unified hierarchy.
func makeGroup(dir string) (string, error) {
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if exists(filepath.Join(root, "cgroup.procs")) {
			group := filepath.Join(root, filepath.Base(dir))
			return group, os.Mkdir(group, 0o755)
		}
	}
	return "", errors.New("this machine has no control groups of version 2, which systemd needs")
}

// removeGroup removes an empty control group with those in it.
func removeGroup(group string) {
	var all []string
	filepath.WalkDir(group, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			all = append(all, path)
		}
		return nil
	})
	for _, dir := range slices.Backward(all) {
		os.Remove(dir)
	}
}

// prepare writes the files that make this box different from others of the same root.
func (b *Box) prepare(opts BoxOptions) error {
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if len(opts.DNS) > 0 {
		resolv, err = nil, nil
		for _, server := range opts.DNS {
			resolv = fmt.Appendf(resolv, "nameserver %s\n", server)
		}
		if len(opts.Search) > 0 {
			resolv = fmt.Appendf(resolv, "search %s\n", strings.Join(opts.Search, " "))
		}
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	hosts := []byte("127.0.0.1\tlocalhost\n")
	for name, address := range opts.Hosts {
		hosts = fmt.Appendf(hosts, "%s\t%s\n", address, name)
	}
	files := map[string][]byte{"etc/resolv.conf": resolv, "etc/hosts": hosts}
	for i, ca := range opts.CAs {
		files[fmt.Sprintf("usr/local/share/ca-certificates/rdv-%d.crt", i)] = ca
	}
	for _, dir := range []string{"work", "root"} {
		if err := os.Mkdir(filepath.Join(b.dir, dir), 0o755); err != nil {
			return err
		}
	}
	for path, data := range files {
		path = filepath.Join(b.dir, "upper", path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			return err
		}
	}
	return os.Chmod(filepath.Join(b.dir, "upper"), 0o755)
}

// Command prepares a command that runs in the box as root, with the box's environment. It is killed, with the
// processes of its group, when ctx ends; and with the box.
func (b *Box) Command(ctx context.Context, argv ...string) *exec.Cmd {
	args := append([]string{"--target", strconv.Itoa(b.pid), "--mount", "--pid", "--uts", "--ipc", "--net", "--root", "--wd", "--"}, argv...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.Env = append([]string(nil), b.env...)
	// nsenter forks and waits, so the program itself is in its group, not in its place.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Path is where the host sees a path of the box, for as long as the box lives.
func (b *Box) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(b.pid), "root", path)
}

// WriteFile replaces a file in the box, whole or not at all, making its directory when missing.
func (b *Box) WriteFile(path string, data []byte, mode os.FileMode) error {
	path = b.Path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// ReadFile reads a file of the box.
func (b *Box) ReadFile(path string) ([]byte, error) { return os.ReadFile(b.Path(path)) }

// Close kills every process in the box and removes what it wrote. It may be called more than once.
func (b *Box) Close() error {
	b.closeOnce.Do(func() {
		if b.ended != nil {
			b.init.Process.Kill()
			<-b.ended
			// The first process of a PID namespace is the last to die; then nobody writes here any more.
			for b.pid != 0 && running(b.pid) {
				time.Sleep(5 * time.Millisecond)
			}
		}
		if b.group != "" {
			removeGroup(b.group)
		}
		b.closeErr = os.RemoveAll(b.dir)
	})
	return b.closeErr
}

// removeStaleBoxes removes what boxes of killed processes left in the directory of temporary files.
func removeStaleBoxes() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), boxPrefix+"*"))
	for _, dir := range dirs {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), boxPrefix), "-")
		if n, err := strconv.Atoi(pid); err == nil && !alive(n) {
			for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
				removeGroup(filepath.Join(root, filepath.Base(dir)))
			}
			os.RemoveAll(dir)
		}
	}
}

// running tells whether a process is more than an entry that its parent has yet to collect.
func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// "PID (NAME) STATE …", and a name may contain anything.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')'):]), " ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

func alive(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

// lockedBuffer is a log that many processes write and a test reads meanwhile.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

var _ io.Writer = (*lockedBuffer)(nil)

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
