// Package netlab puts a machine's network namespace on a cable to this machine, which routes for it: so a test's user and
// session host reach the embedded cluster as they would over the Internet. Nothing leaves this machine.
package netlab

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

// Host is one namespace with its cable.
type Host struct {
	*rdpkit.Netns
	// Addr is its own address, Gateway this machine's end of the cable.
	Addr    string
	Gateway string
}

// New makes a namespace. index (0 to 63) picks its addresses, out of 10.88.0.0/24.
func New(ctx context.Context, label string, index int) (*Host, error) {
	if index < 0 || index > 63 {
		return nil, fmt.Errorf("netlab: index %d is not between 0 and 63", index)
	}
	ns, err := rdpkit.NewNetns(label)
	if err != nil {
		return nil, err
	}
	h := &Host{Netns: ns, Gateway: fmt.Sprintf("10.88.0.%d", index*4+1), Addr: fmt.Sprintf("10.88.0.%d", index*4+2)}
	cable := fmt.Sprintf("rdvlab%d", index)
	run(ctx, "ip link del "+cable) // one that outlived its namespace's maker
	for _, line := range []string{
		"ip link add " + cable + " type veth peer name eth0 netns " + ns.Name,
		"ip addr add " + h.Gateway + "/30 dev " + cable,
		"ip link set " + cable + " up",
		"ip -n " + ns.Name + " addr add " + h.Addr + "/30 dev eth0",
		"ip -n " + ns.Name + " link set eth0 up",
		"ip -n " + ns.Name + " route add default via " + h.Gateway,
		"sysctl -qw net.ipv4.ip_forward=1",
	} {
		if err := run(ctx, line); err != nil {
			h.Close()
			return nil, err
		}
	}
	return h, nil
}

// NoInbound has the machine drop every connection that comes to it over its cable, as behind a NAT or a firewall.
func (h *Host) NoInbound(ctx context.Context) error {
	rules := "table inet noinbound { chain input { type filter hook input priority 0; policy drop; iif lo accept; ct state established,related accept; }; }"
	out, err := exec.CommandContext(ctx, "ip", "netns", "exec", h.Name, "nft", rules).CombinedOutput()
	if err != nil {
		return fmt.Errorf("netlab: %s: nft: %w: %s", h.Name, err, out)
	}
	return nil
}

func run(ctx context.Context, line string) error {
	f := strings.Fields(line)
	out, err := exec.CommandContext(ctx, f[0], f[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("netlab: %s: %w: %s", line, err, strings.TrimSpace(string(out)))
	}
	return nil
}
