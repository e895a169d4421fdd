package main

import (
	"context"
	"os"
	"os/exec"

	"rendezvous.dev/rendezvous/hack/cluster/apt"
)

// packages are the Debian packages that the node needs, by a file that each brings.
var packages = map[string]string{
	"/usr/bin/containerd": "containerd",
	"/usr/sbin/runc":      "runc",
	"/usr/lib/cni/bridge": "containernetworking-plugins",
	"/usr/sbin/nft":       "nftables",
	"/usr/sbin/iptables":  "iptables",
	"/usr/sbin/ipset":     "ipset",
	"/usr/sbin/conntrack": "conntrack",
	"/usr/bin/nsenter":    "util-linux",
	"/sbin/ip":            "iproute2",
	"/usr/bin/mount":      "mount",
}

// installPackages installs those that are missing.
func installPackages(ctx context.Context) error {
	var missing []string
	for file, name := range packages {
		if _, err := os.Stat(file); err != nil {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	say("installing Debian packages: %v", missing)
	hadContainerd := exec.Command("dpkg", "-s", "containerd").Run() == nil
	if err := apt.Install(ctx, missing...); err != nil {
		return err
	}
	if !hadContainerd && isDir("/run/systemd/system") {
		// The package starts its service; the cluster runs a containerd of its own.
		_, err := command(ctx, "systemctl", "disable", "--now", "containerd")
		return err
	}
	return nil
}
