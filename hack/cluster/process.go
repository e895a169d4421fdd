package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process identifies a process across pid reuse: a pid alone may by now be a
// stranger's.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks from the machine's boot, from /proc/PID/stat
}

// startDetached runs argv in a session of its own, so that it survives this
// program, with its output added to logFile, and notes it in pidFile.
func startDetached(argv []string, env []string, logFile, pidFile string) error {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	p := process{PID: cmd.Process.Pid}
	if p.Start, err = startTime(p.PID); err != nil {
		return err
	}
	go cmd.Wait() // else a dead one would stay a zombie while this program waits for its health
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return writeFile(pidFile, data, 0o644)
}

// running is the live process that pidFile names, if there is one.
func running(pidFile string) (process, bool) {
	var p process
	data, err := os.ReadFile(pidFile)
	if err != nil || json.Unmarshal(data, &p) != nil {
		return p, false
	}
	return p, p.alive()
}

func (p process) alive() bool {
	start, err := startTime(p.PID)
	return err == nil && start == p.Start
}

// stop ends p: politely first when grace is above zero, and by force after it.
func (p process) stop(grace time.Duration) error {
	if grace > 0 && p.alive() {
		_ = syscall.Kill(p.PID, syscall.SIGTERM)
		for deadline := time.Now().Add(grace); p.alive() && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
		}
	}
	if !p.alive() {
		return nil
	}
	_ = syscall.Kill(p.PID, syscall.SIGKILL)
	for range 500 {
		if !p.alive() {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("process %d does not end, even by SIGKILL", p.PID)
}

// startTime is field 22 of /proc/PID/stat; zombies count as gone.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses, and may hold spaces itself.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return 0, os.ErrProcessDone
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// commandLine is a process's arguments; empty for kernel threads and the gone.
func commandLine(pid int) []string {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil || len(data) == 0 {
		return nil
	}
	return strings.Split(strings.TrimRight(string(data), "\x00"), "\x00")
}

// findProcesses lists the processes whose executable and arguments match says belong.
func findProcesses(match func(exe string, args []string) bool) []process {
	entries, _ := os.ReadDir("/proc")
	var found []process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", entry.Name(), "exe"))
		if err != nil {
			continue
		}
		args := commandLine(pid)
		start, err := startTime(pid)
		if err == nil && len(args) > 0 && match(strings.TrimSuffix(exe, " (deleted)"), args) {
			found = append(found, process{pid, start})
		}
	}
	return found
}

// command runs a program to its end and returns what it wrote; its error has the
// end of that.
func command(ctx context.Context, name string, args ...string) (string, error) {
	return commandInput(ctx, nil, name, args...)
}

func commandInput(ctx context.Context, stdin io.Reader, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return string(out), fmt.Errorf("%s %s: %w\n%s", filepath.Base(name), strings.Join(args, " "), err, tail(out, 2000))
	}
	return string(out), nil
}

func tail(text []byte, n int) string {
	text = bytes.TrimSpace(text)
	if len(text) > n {
		text = append([]byte("…"), text[len(text)-n:]...)
	}
	return string(text)
}

// logTail is the end of a component's log, for error messages.
func logTail(file string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	return tail(data, 1500)
}

// writeFile writes data so that name has all of it or keeps what it had.
func writeFile(name string, data []byte, mode os.FileMode) error {
	temporary := name + ".new"
	if err := os.WriteFile(temporary, data, mode); err != nil {
		return err
	}
	return os.Rename(temporary, name)
}

// parallel runs all tasks at once and joins their errors. The first failure
// cancels the context of the others.
func parallel(ctx context.Context, tasks ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failures := make(chan error, len(tasks))
	for _, task := range tasks {
		go func() { failures <- task(ctx) }()
	}
	var all []error
	for range tasks {
		if err := <-failures; err != nil {
			if len(all) == 0 || !errors.Is(err, context.Canceled) { // the cancelled ones only echo the first
				all = append(all, err)
			}
			cancel()
		}
	}
	return errors.Join(all...)
}

// eventually calls check every interval until it succeeds or ctx ends; then the
// error is check's last.
func eventually(ctx context.Context, interval time.Duration, check func(context.Context) error) error {
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (last seen: %w)", ctx.Err(), err)
		case <-time.After(interval):
		}
	}
}
