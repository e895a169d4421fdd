package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a program that runs for the benchmark, and its children.
type process struct {
	name string
	log  string // file that its output goes to
	cmd  *exec.Cmd
	pids []int // itself and its children, set by settle
	done chan struct{}
}

// launch starts a program with its output in dir/name.log.
func launch(dir, name string, env []string, path string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd = exec.Command(path, args...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // should we be killed ourselves
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() {
		defer close(p.done)
		p.cmd.Wait()
	}()
	p.pids = []int{p.cmd.Process.Pid}
	return p, nil
}

// settle waits until ready, then finds the children (nginx's workers). It fails with the end of the log.
func (p *process) settle(ctx context.Context, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for !ready() {
		select {
		case <-p.done:
			return fmt.Errorf("%s ended:\n%s", p.name, p.lastWords())
		case <-ctx.Done():
			return fmt.Errorf("%s does not come up:\n%s", p.name, p.lastWords())
		case <-time.After(20 * time.Millisecond):
		}
	}
	kids, err := children(p.cmd.Process.Pid)
	if err != nil {
		return err
	}
	p.pids = append(p.pids[:1], kids...)
	return nil
}

// stop ends the process: politely, and after 3 s by force. Its children end with it, or by our hand.
func (p *process) stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(3 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
	for _, pid := range p.pids[1:] {
		for range 100 {
			if syscall.Kill(pid, 0) != nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// lastWords is the end of the log.
func (p *process) lastWords() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// cpu is the CPU time that the process and its children have used, all threads, those that have ended too.
func (p *process) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, pid := range p.pids {
		// The CPU clock of another process (clock_getcpuclockid(3)): what /proc/PID/stat shows, in nanoseconds, not ticks.
		var ts unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
			return 0, fmt.Errorf("%s: CPU clock of process %d: %w", p.name, pid, err)
		}
		sum += time.Duration(ts.Nano())
	}
	return sum, nil
}

// rss is the resident memory in bytes.
func (p *process) rss() (int64, error) {
	var sum int64
	for _, pid := range p.pids {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, fmt.Errorf("%s: %w", p.name, err)
		}
		n, err := parseRSS(status)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", p.name, err)
		}
		sum += n
	}
	return sum, nil
}

// parseRSS reads VmRSS, in bytes, from the text of /proc/PID/status.
func parseRSS(status []byte) (int64, error) {
	for line := range bytes.Lines(status) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmRSS:")); ok {
			text, ok := strings.CutSuffix(strings.TrimSpace(string(rest)), " kB")
			n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			if !ok || err != nil {
				return 0, fmt.Errorf("VmRSS reads %q", rest)
			}
			return n << 10, nil
		}
	}
	return 0, errors.New("no VmRSS in its status: the process has ended")
}

// children finds the processes whose parent is pid.
func children(pid int) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var kids []int
	for _, f := range files {
		stat, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		if kid, parent, ok := parseParent(string(stat)); ok && parent == pid {
			kids = append(kids, kid)
		}
	}
	return kids, nil
}

// parseParent reads the process and its parent from the text of /proc/PID/stat. The name in it may hold anything.
func parseParent(stat string) (pid, parent int, ok bool) {
	open, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return 0, 0, false
	}
	rest := strings.Fields(stat[end+1:])
	if len(rest) < 2 {
		return 0, 0, false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(stat[:open]))
	parent, err2 := strconv.Atoi(rest[1])
	return pid, parent, err == nil && err2 == nil
}

// descriptors raises the limit of open files as far as may be, for us and those that we start, and returns it.
func descriptors(want uint64) (uint64, error) {
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		return 0, err
	}
	try := syscall.Rlimit{Cur: max(want, lim.Cur), Max: max(want, lim.Max)}
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &try) == nil {
		return try.Cur, nil
	}
	try = syscall.Rlimit{Cur: lim.Max, Max: lim.Max} // raising the hard limit takes CAP_SYS_RESOURCE
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &try); err != nil {
		return 0, err
	}
	return try.Cur, nil
}

// freePort is a port of the loopback address that nobody listens on.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// listening says that something listens on a port.
func listening(port int) bool {
	c, err := net.DialTimeout("tcp", loopback(port), time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
