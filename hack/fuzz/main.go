// Command fuzz runs every fuzz target of the product in turn, and keeps what widens the tests' view.
//
//	fuzz -time 1m             every target for a minute each
//	fuzz -run 'CSR|Bus'       those whose PACKAGE.Name matches
//	fuzz -keep 8              afterwards copy up to 8 of a target's new inputs to testdata/fuzz: those that reach statements
//	                          of its package that no input there reaches, the shortest first
//
// Go keeps the inputs that it finds interesting in its build cache ($(go env GOCACHE)/fuzz), where the next run goes on from
// them; an input that fails a target lands in that package's testdata/fuzz, and stops the target, not the others.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

type target struct {
	folder string // from the module's root
	name   string
}

func (t target) String() string { return t.folder + "." + t.name }

// corpus is where go test looks for a target's inputs and puts those that fail it.
func (t target) corpus(root string) string {
	return filepath.Join(root, t.folder, "testdata", "fuzz", t.name)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := flag.String("root", "..", "the product's module") // the Makefile runs us in hack/
	each := flag.String("time", "1m", "how long each target runs, as go test's -fuzztime has it")
	run := flag.String("run", "", "only targets that this regular expression matches")
	keep := flag.Int("keep", 0, "how many new inputs of each target to copy to testdata/fuzz")
	parallel := flag.Int("parallel", 1, "how many inputs are tried at once")
	flag.Parse()
	if err := fuzz(ctx, *root, *run, *each, *keep, *parallel); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		stop()
		os.Exit(1)
	}
}

func fuzz(ctx context.Context, root, run string, each string, keep, parallel int) error {
	wanted, err := regexp.Compile(run)
	if err != nil {
		return err
	}
	targets, err := find(ctx, root)
	if err != nil {
		return err
	}
	targets = slices.DeleteFunc(targets, func(t target) bool { return !wanted.MatchString(t.String()) })
	if len(targets) == 0 {
		return fmt.Errorf("no fuzz target matches %q", run)
	}
	cache, err := output(ctx, root, "go", "env", "GOCACHE")
	if err != nil {
		return err
	}
	module, err := output(ctx, root, "go", "list", "-m")
	if err != nil {
		return err
	}
	var failed []error
	for i, t := range targets {
		fmt.Printf("== %d/%d %s, %s\n", i+1, len(targets), t, each)
		cmd := exec.CommandContext(ctx, "go", "test", "./"+t.folder, "-run", "^"+t.name+"$", "-fuzz", "^"+t.name+"$", "-fuzztime", each,
			"-fuzzminimizetime", "1s", // of 60, which one input after the other may take, and nothing new is tried meanwhile
			"-parallel", fmt.Sprint(parallel))
		cmd.Dir, cmd.Stdout, cmd.Stderr = root, os.Stdout, os.Stderr
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // lets go test write down what it has
		cmd.WaitDelay = time.Minute
		if err := cmd.Run(); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			failed = append(failed, fmt.Errorf("%s: %w", t, err))
			continue
		}
		if keep > 0 {
			if err := keepNew(ctx, root, t, filepath.Join(cache, "fuzz", module, t.folder, t.name), keep); err != nil {
				return fmt.Errorf("keep inputs of %s: %w", t, err)
			}
		}
	}
	return errors.Join(failed...)
}

// find lists the fuzz targets in the module's committed and new files.
func find(ctx context.Context, root string) ([]target, error) {
	lines, err := output(ctx, root, "git", "grep", "--untracked", "-E", "^func Fuzz[A-Za-z0-9_]*\\(", "--", "*_test.go", ":!hack/")
	if err != nil {
		return nil, err
	}
	var targets []target
	for line := range strings.Lines(lines) {
		file, text, _ := strings.Cut(line, ":")
		name, _, _ := strings.Cut(strings.TrimPrefix(text, "func "), "(")
		targets = append(targets, target{filepath.Dir(file), name})
	}
	return targets, nil
}

// keepNew copies inputs from Go's cache to a target's testdata/fuzz, by what each adds to the statements reached.
func keepNew(ctx context.Context, root string, t target, cache string, most int) error {
	entries, err := os.ReadDir(cache)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "fuzz")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	binary := filepath.Join(work, "target.test")
	if _, err := output(ctx, root, "go", "test", "-c", "-cover", "-o", binary, "./"+t.folder); err != nil {
		return err
	}
	// The target runs in its package's folder, where it finds its other test data, and with it what is kept already.
	reached := func() (map[string]bool, error) {
		profile := filepath.Join(work, "profile")
		cmd := exec.CommandContext(ctx, binary, "-test.run", "^"+t.name+"$", "-test.coverprofile", profile)
		cmd.Dir = filepath.Join(root, t.folder)
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
		return statements(profile)
	}
	seen, err := reached()
	if err != nil {
		return err
	}
	type input struct {
		name string
		data []byte
	}
	var inputs []input
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(cache, e.Name()))
		if err != nil {
			return err
		}
		inputs = append(inputs, input{e.Name(), data})
	}
	slices.SortFunc(inputs, func(a, b input) int { return len(a.data) - len(b.data) })
	folder := t.corpus(root)
	kept := 0
	for _, in := range inputs {
		path := filepath.Join(folder, in.name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if kept == most {
			break
		}
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, in.data, 0o644); err != nil {
			return err
		}
		now, err := reached()
		if err == nil && !more(now, seen) {
			err = os.Remove(path)
		} else if err == nil {
			seen = now
			kept++
		}
		if err != nil {
			return err
		}
	}
	_ = os.Remove(folder) // where it stayed empty
	fmt.Printf("   kept %d of %d inputs from %s\n", kept, len(inputs), cache)
	return nil
}

// statements reads which blocks a cover profile says were run.
func statements(profile string) (map[string]bool, error) {
	data, err := os.ReadFile(profile)
	if err != nil {
		return nil, err
	}
	run := map[string]bool{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		block, count, ok := cutLast(lines.Text())
		if ok && count != "0" {
			run[block] = true
		}
	}
	return run, nil
}

func cutLast(line string) (before, after string, ok bool) {
	i := strings.LastIndexByte(line, ' ')
	if i < 0 || strings.HasPrefix(line, "mode:") {
		return "", "", false
	}
	return line[:i], line[i+1:], true
}

func more(now, seen map[string]bool) bool {
	for block := range now {
		if !seen[block] {
			return true
		}
	}
	return false
}

// output is what a command prints, without the line's end; its error says what went wrong.
func output(ctx context.Context, folder, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = folder
	var wrong bytes.Buffer
	cmd.Stderr = &wrong
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(wrong.Bytes()))
	}
	return strings.TrimSuffix(string(out), "\n"), nil
}
