package rdpkit

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Program is a command that was started in a [Box] and runs on.
type Program struct {
	name string
	cmd  *exec.Cmd
	out  lockedBuffer
	done chan struct{}
	stop context.CancelFunc
	err  error // set before done closes
}

// Start runs argv in the box until it ends, Stop is called or the box closes. Both its outputs are collected.
func (b *Box) Start(argv ...string) (*Program, error) {
	ctx, stop := context.WithCancel(context.Background())
	p := &Program{name: argv[0], cmd: b.Command(ctx, argv...), done: make(chan struct{}), stop: stop}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		stop()
		return nil, fmt.Errorf("starting %s: %w", argv[0], err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Output is what the program wrote so far to its standard output and error.
func (p *Program) Output() string { return p.out.String() }

// Done closes when the program has ended.
func (p *Program) Done() <-chan struct{} { return p.done }

// ExitCode waits for the end and gives the exit status; -1 after a signal. The error is ctx's, or that of a program
// that could not be waited for.
func (p *Program) ExitCode(ctx context.Context) (int, error) {
	select {
	case <-ctx.Done():
		return -1, fmt.Errorf("%s still runs: %w\n%s", p.name, context.Cause(ctx), lastLines([]byte(p.Output()), 20))
	case <-p.done:
	}
	if p.cmd.ProcessState == nil {
		return -1, p.err
	}
	return p.cmd.ProcessState.ExitCode(), nil
}

// Signal sends sig to the program.
func (p *Program) Signal(sig syscall.Signal) error {
	// The process that this one started is nsenter, which waits for the program and hands its exit status on.
	pid := p.cmd.Process.Pid
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return fmt.Errorf("signalling %s: %w", p.name, err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		return fmt.Errorf("signalling %s: it doesn't run", p.name)
	}
	return syscall.Kill(child, sig)
}

// Stop kills the program, if it still runs, and waits for its end.
func (p *Program) Stop() {
	p.stop()
	<-p.done
}

// poll calls check every so often until it says true; the error of the last look is in the result when ctx ends first.
func poll(ctx context.Context, every time.Duration, check func() (bool, error)) error {
	for {
		ok, err := check()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			if err != nil {
				return fmt.Errorf("%w: %w", context.Cause(ctx), err)
			}
			return context.Cause(ctx)
		case <-time.After(every):
		}
	}
}
