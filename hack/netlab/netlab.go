// Package netlab makes machines of their own out of network namespaces on this one: each has loopback and one cable
// (a veth pair) to this machine, which routes for it. Nothing leaves this machine.
package netlab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Host is one namespace with its cable.
type Host struct {
	// Name of the namespace, at most 10 characters, because its interfaces are named after it.
	Name string
	// Addr is its own address, Gateway this machine's end of the cable.
	Addr    string
	Gateway string
}

// New makes the namespace NAME, replacing one that an earlier run left behind. index (0 to 63) picks its addresses.
func New(ctx context.Context, name string, index int, dns string) (*Host, error) {
	if len(name) > 10 || index < 0 || index > 63 {
		return nil, fmt.Errorf("netlab: name %q or index %d out of bounds", name, index)
	}
	h := &Host{Name: name, Gateway: fmt.Sprintf("10.88.0.%d", index*4+1), Addr: fmt.Sprintf("10.88.0.%d", index*4+2)}
	h.Close()
	for _, line := range []string{
		"ip netns add " + name,
		"ip link add " + h.cable() + " type veth peer name eth0 netns " + name,
		"ip addr add " + h.Gateway + "/30 dev " + h.cable(),
		"ip link set " + h.cable() + " up",
		"ip -n " + name + " addr add " + h.Addr + "/30 dev eth0",
		"ip -n " + name + " link set lo up",
		"ip -n " + name + " link set eth0 up",
		"ip -n " + name + " route add default via " + h.Gateway,
		"sysctl -qw net.ipv4.ip_forward=1",
	} {
		if err := run(ctx, line); err != nil {
			h.Close()
			return nil, err
		}
	}
	if dns != "" {
		dir := filepath.Join("/etc/netns", name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("netlab: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte("nameserver "+dns+"\n"), 0o644); err != nil {
			return nil, fmt.Errorf("netlab: %w", err)
		}
	}
	return h, nil
}

// NoInbound has the machine drop every connection that comes to it over its cable, as behind a NAT or a firewall.
func (h *Host) NoInbound(ctx context.Context) error {
	rules := "table inet noinbound { chain input { type filter hook input priority 0; policy drop; iif lo accept; ct state established,related accept; } }"
	cmd := exec.CommandContext(ctx, "ip", "netns", "exec", h.Name, "nft", rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("netlab: %s: nft: %w: %s", h.Name, err, out)
	}
	return nil
}

// Delay adds a one-way delay in milliseconds to what leaves the machine; 0 takes it away.
func (h *Host) Delay(ctx context.Context, ms int) error {
	if ms == 0 {
		return run(ctx, "tc -n "+h.Name+" qdisc del dev eth0 root")
	}
	return run(ctx, fmt.Sprintf("tc -n %s qdisc replace dev eth0 root netem delay %dms", h.Name, ms))
}

// Command runs in the namespace.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", h.Name, name}, args...)...)
}

// Close removes the namespace and its cable. Removing what is not there is no error.
func (h *Host) Close() {
	ctx := context.Background()
	run(ctx, "ip link del "+h.cable())
	run(ctx, "ip netns del "+h.Name)
	os.RemoveAll(filepath.Join("/etc/netns", h.Name))
}

func (h *Host) cable() string { return "v-" + h.Name }

func run(ctx context.Context, line string) error {
	f := strings.Fields(line)
	out, err := exec.CommandContext(ctx, f[0], f[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("netlab: %s: %w: %s", line, err, strings.TrimSpace(string(out)))
	}
	return nil
}
