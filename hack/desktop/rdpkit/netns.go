package rdpkit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Netns is a named network namespace. Its name carries the process that made it, so that one which outlived a kill is
// removed by the next NewNetns.
type Netns struct{ Name string }

const netnsPrefix = "rdvns-"

// NewNetns makes a network namespace with nothing but a loopback, up. The label makes it unique within this process.
func NewNetns(label string) (*Netns, error) {
	names, _ := os.ReadDir("/run/netns")
	for _, entry := range names {
		rest, ours := strings.CutPrefix(entry.Name(), netnsPrefix)
		pid, _, _ := strings.Cut(rest, "-")
		if n, err := strconv.Atoi(pid); ours && err == nil && !alive(n) {
			ip("netns", "delete", entry.Name())
		}
	}
	n := &Netns{Name: fmt.Sprintf("%s%d-%s", netnsPrefix, os.Getpid(), label)}
	if err := ip("netns", "add", n.Name); err != nil {
		return nil, err
	}
	if err := ip("-netns", n.Name, "link", "set", "lo", "up"); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Close removes the namespace; links into it go with it.
func (n *Netns) Close() error { return ip("netns", "delete", n.Name) }

// Join makes a cable between two namespaces, with an address on each end. There is no way further than the other end.
func Join(a *Netns, addressA netip.Prefix, b *Netns, addressB netip.Prefix) error {
	return errors.Join(
		ip("-netns", a.Name, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", b.Name),
		ip("-netns", a.Name, "address", "add", addressA.String(), "dev", "veth0"),
		ip("-netns", b.Name, "address", "add", addressB.String(), "dev", "veth0"),
		ip("-netns", a.Name, "link", "set", "veth0", "up"),
		ip("-netns", b.Name, "link", "set", "veth0", "up"),
	)
}

// Do calls f on a thread that is in the namespace.
func (n *Netns) Do(f func() error) error { return DoIn("/run/netns/"+n.Name, f) }

// DoIn calls f on a thread that is in the network namespace of a file (/proc/PID/ns/net, say): a socket that f opens belongs to
// it for good. Goroutines that f starts are not in the namespace.
func DoIn(file string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine, so nothing else runs in the wrong namespace.
		runtime.LockOSThread()
		ns, err := os.Open(file)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

func ip(args ...string) error {
	out, err := exec.CommandContext(context.Background(), "ip", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
