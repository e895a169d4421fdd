package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Kinds of RDP clients, by how they take a connection file.
const (
	kindFreeRDP = "freerdp"
	kindRemmina = "remmina"
	kindOther   = "other" // takes the file as its one argument, as mstsc does
)

// rdpClient is a program that opens .rdp files.
type rdpClient struct {
	path string
	kind string
}

// preferred are the clients that we look for, best first.
func preferred() []string {
	if runtime.GOOS == "windows" {
		return []string{"mstsc", "xfreerdp3", "sdl-freerdp3", "wfreerdp"}
	}
	return []string{"xfreerdp3", "xfreerdp", "wlfreerdp3", "sdl-freerdp3", "wlfreerdp", "remmina"}
}

// findRDPClient takes the one that the user names, or the first that is there. All modes but TSGU need FreeRDP 3.
func findRDPClient(named, mode string) (rdpClient, error) {
	raw := mode != ModeTSGU
	candidates, found := preferred(), ""
	if named != "" {
		candidates = []string{named}
	}
	for _, name := range candidates {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		c := rdpClient{path: path, kind: kindOf(path)}
		// Another would take /args-from:fd:3 for the host's name.
		if raw && (c.kind != kindFreeRDP || !isFreeRDP3(path)) {
			found = path
			continue
		}
		return c, nil
	}
	switch {
	case found != "" && named != "":
		return rdpClient{}, fmt.Errorf("--rdp-client %s is not FreeRDP 3, which --mode %s needs: name another (xfreerdp3), or leave --mode out", named, mode)
	case named != "":
		return rdpClient{}, fmt.Errorf("--rdp-client %s: not found", named)
	case raw:
		return rdpClient{}, fmt.Errorf("--mode %s needs FreeRDP 3 (xfreerdp3): install it, name it with --rdp-client, or leave --mode out", mode)
	}
	return rdpClient{}, fmt.Errorf("no RDP client found (looked for %s): install one, name it with --rdp-client, or get the file with --print", strings.Join(candidates, ", "))
}

func kindOf(path string) string {
	name := strings.ToLower(filepath.Base(path))
	switch {
	case strings.Contains(name, "freerdp"):
		return kindFreeRDP
	case strings.Contains(name, "remmina"):
		return kindRemmina
	}
	return kindOther
}

// isFreeRDP3 goes by the name that packages give version 3 beside version 2, and else asks.
func isFreeRDP3(path string) bool {
	if name := strings.TrimSuffix(strings.ToLower(filepath.Base(path)), ".exe"); strings.HasSuffix(name, "freerdp3") {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, _ := exec.CommandContext(ctx, path, "--version").CombinedOutput() // FreeRDP's exit code for it is not 0
	return strings.Contains(string(out), "version 3.")
}

// ExitError is the RDP client's own failure, to be passed on.
type ExitError struct {
	Client string
	// Code is the client's, or, as shells have it, 128 and the number of the signal that ended it.
	Code int
	// Signal ended the client; empty where it ended by itself.
	Signal   string
	Activity string
}

// exitError tells of a client that failed.
func exitError(client, activity string, exit *exec.ExitError) *ExitError {
	e := &ExitError{Client: client, Code: exit.ExitCode(), Activity: activity}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		e.Code, e.Signal = 128+int(status.Signal()), status.Signal().String()
	}
	return e
}

func (e *ExitError) Error() string {
	if e.Signal != "" {
		return fmt.Sprintf("%s was ended by a signal (%s): see its messages above, and `rdv explain %s`", e.Client, e.Signal, e.Activity)
	}
	return fmt.Sprintf("%s ended with code %d: see its messages above, and `rdv explain %s`", e.Client, e.Code, e.Activity)
}

// launch starts the client on file with the user's own arguments and waits for its end. secrets, where there are any, are
// arguments that the process list must not show.
func (c *Client) launch(ctx context.Context, r rdpClient, file string, secrets, extra []string, ca string) error {
	cmd := exec.CommandContext(ctx, r.path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stderr, os.Stderr
	cmd.Env = clientEnv(os.Environ(), filepath.Dir(file), ca)
	// A client that is asked to stop closes its session first.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second

	feed := func() error { return nil }
	switch {
	case len(secrets) > 0:
		var err error
		if feed, err = argsFrom(cmd, filepath.Dir(file), slices.Concat([]string{file}, secrets, extra)); err != nil {
			return err
		}
	case r.kind == kindRemmina:
		cmd.Args = append(cmd.Args, append([]string{"-c", file}, extra...)...)
	default:
		cmd.Args = append(cmd.Args, append([]string{file}, extra...)...)
	}
	read, stop, _ := watchReads(file)
	defer stop()
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s: %w", r.path, err)
	}
	if err := feed(); err != nil {
		fmt.Fprintf(c.Err, "%s did not read its arguments: %v\n", r.path, err)
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	if r.kind != kindFreeRDP && time.Since(began) < handsOverWithin {
		c.handOver(ctx, r.path, read)
	}
	return nil
}

// argsFrom gives FreeRDP 3 its arguments by /args-from, one per line and none empty, so that the process list shows
// none of them. feed hands them over once the process runs. Standard input stays the user's.
func argsFrom(cmd *exec.Cmd, dir string, args []string) (feed func() error, err error) {
	for _, a := range args {
		if a == "" || strings.ContainsAny(a, "\r\n") {
			return nil, fmt.Errorf("argument %q can't be passed to FreeRDP in this mode: it is empty or has a line break", a)
		}
	}
	list := strings.Join(args, "\n") + "\n"
	if runtime.GOOS == "windows" { // no file descriptors to pass on
		file := filepath.Join(dir, "arguments")
		cmd.Args = append(cmd.Args, "/args-from:"+file)
		return func() error { return nil }, os.WriteFile(file, []byte(list), 0o600)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{r} // becomes descriptor 3
	cmd.Args = append(cmd.Args, "/args-from:fd:3")
	return func() error {
		r.Close()
		_, err := io.WriteString(w, list)
		return errors.Join(err, w.Close())
	}, nil
}

// clientEnv lets the RDP client trust the CA that the user gave at login: OpenSSL, which FreeRDP uses, reads
// SSL_CERT_FILE besides the machine's own folder of CAs. What the variable names already stays trusted.
func clientEnv(env []string, dir, ca string) []string {
	if ca == "" {
		return env
	}
	const name = "SSL_CERT_FILE="
	for _, v := range env {
		if old, ok := strings.CutPrefix(v, name); ok {
			data, _ := os.ReadFile(old)
			ca = string(data) + "\n" + ca
		}
	}
	file := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(file, []byte(ca), 0o600); err != nil {
		return env
	}
	return append(env, name+file) // the last one counts
}
