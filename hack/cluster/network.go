package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// nftTable holds this cluster's own packet rules; kube-proxy has tables of its own.
const nftTable = "rendezvous-cluster"

// sysctls are the kernel's settings that must be at least so high; their former
// values are kept, and put back by down.
var sysctls = map[string]int{
	"/proc/sys/net/ipv4/ip_forward": 1,
	// Pods on one bridge that meet through a Service's address: the answers must
	// pass the address rewriting too.
	"/proc/sys/net/bridge/bridge-nf-call-iptables": 1,
	// Programs that watch their certificates take one each; the default of 128 is soon used up.
	"/proc/sys/fs/inotify/max_user_instances": 1024,
}

// networkUp makes the node's device and address, the route to Services, and the
// packet rules. It may be called again on a network that is up.
func (c *cluster) networkUp(ctx context.Context) error {
	if err := c.setSysctls(); err != nil {
		return err
	}
	if !isDir("/sys/class/net/" + nodeDevice) {
		if _, err := command(ctx, "ip", "link", "add", nodeDevice, "type", "bridge"); err != nil {
			return err
		}
	}
	for _, args := range [][]string{
		{"link", "set", nodeDevice, "up"},
		{"addr", "replace", nodeIP + "/32", "dev", nodeDevice},
		// kube-proxy rewrites the destination before the packet leaves; the route
		// only makes the kernel accept it, on a machine without a default route too.
		{"route", "replace", serviceCIDR, "dev", nodeDevice, "src", nodeIP},
	} {
		if _, err := command(ctx, "ip", args...); err != nil {
			return err
		}
	}
	routes, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return err
	}
	_, err = commandInput(ctx, strings.NewReader(nftRules(outsideDevices(string(routes)))), "nft", "-f", "-")
	return err
}

// nftRules is the cluster's table: what pods send off this machine takes the
// machine's address, and nothing from outside reaches the cluster's addresses.
func nftRules(outside []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "table ip %[1]s\ndelete table ip %[1]s\ntable ip %[1]s {\n", nftTable)
	if len(outside) > 0 {
		fmt.Fprintf(&b, `	chain outside {
		type filter hook prerouting priority raw; policy accept;
		iifname { "%s" } ip daddr { %s, %s, %s } drop
	}
`, strings.Join(outside, `", "`), nodeIP, podCIDR, serviceCIDR)
		fmt.Fprintf(&b, `	chain leaving {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr %s oifname { "%s" } masquerade
	}
`, podCIDR, strings.Join(outside, `", "`))
	}
	b.WriteString("}\n")
	return b.String()
}

// outsideDevices lists the network devices that lead off this machine: those with
// hardware behind them, and those of default routes (in a container, a cable).
func outsideDevices(routes string) []string {
	var names []string
	for line := range strings.Lines(routes) { // of /proc/net/route: device, destination, …
		if fields := strings.Fields(line); len(fields) > 1 && fields[1] == "00000000" {
			names = append(names, fields[0])
		}
	}
	devices, _ := filepath.Glob("/sys/class/net/*/device")
	for _, device := range devices {
		names = append(names, filepath.Base(filepath.Dir(device)))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (c *cluster) setSysctls() error {
	former := map[string]string{}
	file := c.path("sysctls.json")
	if data, err := os.ReadFile(file); err == nil {
		if err := json.Unmarshal(data, &former); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	raise := map[string]int{}
	for name, want := range sysctls {
		value, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // this kernel has no such setting
		}
		if err != nil {
			return err
		}
		text := strings.TrimSpace(string(value))
		now, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if now >= want {
			continue
		}
		raise[name] = want
		if _, noted := former[name]; !noted {
			former[name] = text
		}
	}
	data, err := json.Marshal(former)
	if err != nil {
		return err
	}
	if err := writeFile(file, data, 0o644); err != nil { // before the change, so that a crash can't lose it
		return err
	}
	for name, want := range raise {
		if err := os.WriteFile(name, []byte(strconv.Itoa(want)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) restoreSysctls() {
	former := map[string]string{}
	data, err := os.ReadFile(c.path("sysctls.json"))
	if err != nil || json.Unmarshal(data, &former) != nil {
		return
	}
	for name, value := range former {
		_ = os.WriteFile(name, []byte(value), 0o644)
	}
}

// upstreams are the machine's name servers that a pod can reach too.
func upstreams(resolvConf string) []string {
	var servers []string
	for line := range strings.Lines(resolvConf) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "nameserver" && !strings.HasPrefix(fields[1], "127.") && fields[1] != "::1" {
			servers = append(servers, fields[1])
		}
	}
	return servers
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}
