package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// teardown removes everything that a cluster in this state directory has made,
// however far its boot came and whatever of it is still alive. Nothing here
// relies on what an earlier run wrote down: what belongs to the cluster is found
// by the state directory's path, the cgroup and the device names.
func (c *cluster) teardown(ctx context.Context) error {
	if err := c.checkOurs(); err != nil {
		return err
	}
	// The kubelet and containerd first, or they would restart what goes next.
	if err := stopAll(findProcesses(c.isComponent)); err != nil {
		return err
	}
	if err := stopAll(findProcesses(c.isShim)); err != nil {
		return err
	}
	if err := c.killPods(); err != nil {
		return err
	}
	c.removeShimSockets()
	if err := c.unmountAll(); err != nil {
		return err
	}
	removeCgroups()
	if err := c.networkDown(ctx); err != nil {
		return err
	}
	removeLogLinks(c.path("pod-logs"))
	for _, dir := range strays {
		os.Remove(dir) // only if empty
	}
	return c.removeState()
}

// strays are files and directories outside the state directory that programs make whatever
// they are told.
var strays = []string{
	"/var/lib/kubelet/device-plugins/kubelet.sock", "/var/lib/kubelet/device-plugins", "/var/lib/kubelet", "/var/log/containers",
	"/var/lib/cni/results", "/var/lib/cni", "/run/containerd/s", "/run/containerd",
}

// checkOurs guards the removal of the state directory against a wrong RDV_CLUSTER_DIR.
func (c *cluster) checkOurs() error {
	entries, err := os.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := os.Stat(c.recordFile()); err != nil {
		return fmt.Errorf("%s has files but is no cluster's directory (no %s in it): set RDV_CLUSTER_DIR to another, or empty it", c.dir, filepath.Base(c.recordFile()))
	}
	return nil
}

// removeState removes the state directory, and last the file that marks it as a
// cluster's, so that a removal cut short can be taken up again.
func (c *cluster) removeState() error {
	entries, err := os.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if file := c.path(entry.Name()); file != c.recordFile() {
			if err := os.RemoveAll(file); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(c.dir)
}

// isComponent knows this cluster's own programs: by their file, or for
// containerd, which is the machine's, by their configuration. A kubectl in
// somebody's terminal is not ours to end.
func (c *cluster) isComponent(exe string, args []string) bool {
	if filepath.Base(exe) == "containerd" {
		return slices.Contains(args, c.config("containerd.toml"))
	}
	program := filepath.Base(args[0])
	return filepath.Dir(exe) == c.path("bin") && (program == policyProgram || program != "kubectl" && slices.Contains(programs, program))
}

// isShim knows the keepers of this cluster's containers by the socket they report to.
func (c *cluster) isShim(exe string, args []string) bool {
	return strings.HasPrefix(filepath.Base(exe), "containerd-shim") && slices.Contains(args, c.containerdSocket())
}

func stopAll(processes []process) error {
	var failed []error
	for _, p := range processes {
		failed = append(failed, p.stop(0))
	}
	return errors.Join(failed...)
}

// podCgroups are the kubelet's directories: one, or one for each controller
// where cgroups are still version 1.
func podCgroups() []string {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/kubepods")
	return append(dirs, "/sys/fs/cgroup/kubepods")
}

// killPods ends what runs in containers, whoever its parent is by now. Only the
// cluster's kubelet makes this cgroup, and one machine has one cluster.
func (c *cluster) killPods() error {
	for range 100 {
		left := map[int]bool{}
		for _, root := range podCgroups() {
			_ = filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
				if err == nil && entry.Name() == "cgroup.procs" {
					data, _ := os.ReadFile(file)
					for _, field := range strings.Fields(string(data)) {
						if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
							left[pid] = true
						}
					}
				}
				return nil
			})
		}
		for pid := range left {
			if _, err := startTime(pid); err != nil {
				delete(left, pid) // a zombie
				continue
			}
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if len(left) == 0 {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return errors.New("processes of pods do not end, even by SIGKILL; see cgroup.procs below /sys/fs/cgroup/*/kubepods")
}

// removeShimSockets takes away the sockets of the shims, which lie outside the
// state directory; each container's bundle names its own.
func (c *cluster) removeShimSockets() {
	files, _ := filepath.Glob(c.path("run", "containerd", "io.containerd.runtime.v2.task", "k8s.io", "*", "address"))
	for _, file := range files {
		data, err := os.ReadFile(file)
		if socket, ok := strings.CutPrefix(strings.TrimSpace(string(data)), "unix://"); err == nil && ok && strings.HasPrefix(socket, "/run/containerd/s/") {
			os.Remove(socket)
		}
	}
}

// unmountAll unmounts what is mounted below the state directory, the deepest first.
func (c *cluster) unmountAll() error {
	for range 10 { // a mount may lie over another
		data, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return err
		}
		points := mountPoints(string(data), c.dir)
		if len(points) == 0 {
			return nil
		}
		for _, point := range points {
			_ = syscall.Unmount(point, syscall.MNT_DETACH)
		}
	}
	return fmt.Errorf("mounts below %s do not go away; see /proc/self/mountinfo", c.dir)
}

// mountPoints are the mount points below dir, the latest mounted first.
func mountPoints(mountinfo, dir string) []string {
	var points []string
	for line := range strings.Lines(mountinfo) {
		if fields := strings.Fields(line); len(fields) > 4 {
			point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(fields[4])
			if strings.HasPrefix(point, dir+"/") {
				points = append(points, point)
			}
		}
	}
	slices.Reverse(points)
	return points
}

// removeCgroups removes the pods' empty cgroups, children before parents.
func removeCgroups() {
	for _, root := range podCgroups() {
		var dirs []string
		_ = filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				dirs = append(dirs, file)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, dir := range dirs {
			_ = syscall.Rmdir(dir)
		}
	}
}

// networkDown removes devices, packet rules and connection tracking entries, and
// puts the kernel's switches back.
func (c *cluster) networkDown(ctx context.Context) error {
	var failed []error
	links, _ := filepath.Glob("/sys/class/net/" + podDevice + "/brif/*")
	for _, link := range links { // one end of each pod's cable, should its namespace have survived
		_, _ = command(ctx, "ip", "link", "del", filepath.Base(link))
	}
	for _, device := range []string{podDevice, nodeDevice} {
		if isDir("/sys/class/net/" + device) {
			_, err := command(ctx, "ip", "link", "del", device)
			failed = append(failed, err)
		}
	}
	if tables, err := command(ctx, "nft", "list", "tables"); err == nil {
		for _, table := range []string{"ip " + nftTable, "ip kube-proxy", "ip6 kube-proxy"} {
			if strings.Contains(tables, "table "+table+"\n") {
				_, err := command(ctx, "nft", "delete", "table", table)
				failed = append(failed, err)
			}
		}
	}
	c.removeHostPortRules(ctx)
	removePolicyRules(ctx)
	for _, match := range [][]string{{"-s", podCIDR}, {"-d", podCIDR}, {"-d", serviceCIDR}} {
		_, _ = command(ctx, "conntrack", append([]string{"-D"}, match...)...) // it fails when nothing matches
	}
	// The network plugins' cache; each file names its namespace's mount, which is below the state directory.
	cached, _ := filepath.Glob("/var/lib/cni/results/*")
	for _, file := range cached {
		if data, err := os.ReadFile(file); err == nil && strings.Contains(string(data), c.dir+"/") {
			os.Remove(file)
		}
	}
	c.restoreSysctls()
	return errors.Join(failed...)
}

// removeHostPortRules removes the iptables chains of the CNI plugin for host
// ports, which exist once any pod has asked for one.
func (c *cluster) removeHostPortRules(ctx context.Context) {
	saved, err := command(ctx, "iptables-save", "-t", "nat")
	if err != nil || !strings.Contains(saved, "CNI-HOSTPORT") {
		return
	}
	var kept strings.Builder
	for line := range strings.Lines(saved) {
		if !strings.Contains(line, "CNI-") {
			kept.WriteString(line)
		}
	}
	_, _ = commandInput(ctx, strings.NewReader(kept.String()), "iptables-restore", "-T", "nat")
}

// removePolicyRules removes the iptables chains and the ipsets of what enforces NetworkPolicies.
func removePolicyRules(ctx context.Context) {
	saved, err := command(ctx, "iptables-save", "-t", "filter")
	if err != nil {
		return
	}
	if kept := withoutPolicyRules(saved); kept != saved {
		_, _ = commandInput(ctx, strings.NewReader(kept), "iptables-restore", "-T", "filter")
	}
	names, _ := command(ctx, "ipset", "list", "-name")
	for name := range strings.FieldsSeq(names) {
		if strings.HasPrefix(name, "KUBE-") || strings.HasPrefix(name, "kube-router-") {
			_, _ = command(ctx, "ipset", "destroy", name)
		}
	}
}

// withoutPolicyRules is what iptables-save printed, without the chains of kube-router and the rules that lead to them.
func withoutPolicyRules(saved string) string {
	var kept strings.Builder
	for line := range strings.Lines(saved) {
		ours := false
		for _, chain := range []string{"KUBE-ROUTER-", "KUBE-POD-FW-", "KUBE-NWPLCY-"} {
			ours = ours || strings.Contains(line, chain)
		}
		if !ours {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

// removeLogLinks removes the links to pods' logs that the kubelet puts into a
// directory that it does not let one choose.
func removeLogLinks(target string) {
	links, _ := filepath.Glob("/var/log/containers/*.log")
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, target+"/") {
			os.Remove(link)
		}
	}
}
