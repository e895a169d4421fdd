package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	lockInterval     = 200 * time.Millisecond
	componentTimeout = 2 * time.Minute // for one program to become healthy
	addonTimeout     = 4 * time.Minute // for all addons to become available
	repairTimeout    = time.Minute     // for addons that were available once; a fresh boot is quicker than more patience
)

// programs are the names that the heavy binary goes by in the state directory.
var programs = []string{
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl",
}

// policyProgram enforces NetworkPolicies; it is a binary of its own.
const policyProgram = "netpol"

// cluster is the one development cluster of this machine.
type cluster struct {
	layout
	built artifacts
}

// record is what is known of a cluster from one run to the next.
type record struct {
	BootID string `json:"bootID"` // of the machine: after its restart nothing of a cluster is left
	Node   string `json:"node"`   // fingerprint of programs and configuration
	Addons string `json:"addons"` // fingerprint of the addons in place
	Booted bool   `json:"booted"` // the boot went through once
}

// up brings the cluster to health from any state it may be in.
func (c *cluster) up(ctx context.Context) error {
	if err := claim(c.dir); err != nil {
		return err
	}
	if err := parallel(ctx, installPackages, func(ctx context.Context) (err error) {
		c.built, err = buildAll(ctx)
		return err
	}); err != nil {
		return err
	}
	addons, err := c.loadAddons()
	if err != nil {
		return err
	}
	want, err := c.wantedRecord(addons)
	if err != nil {
		return err
	}

	have := c.readRecord()
	if have.Booted && have.BootID == want.BootID && have.Node == want.Node {
		if err := c.repair(ctx, addons, have.Addons == want.Addons); err == nil {
			return c.writeRecord(want)
		} else if ctx.Err() != nil {
			return err
		} else {
			say("it can't be repaired in place (%v): starting afresh", err)
		}
	}
	if err := c.teardown(ctx); err != nil {
		return err
	}
	if err := c.boot(ctx, addons); err != nil {
		return err
	}
	return c.writeRecord(want)
}

// boot starts a new cluster where none is.
func (c *cluster) boot(ctx context.Context, addons addons) error {
	if err := c.prepare(ctx); err != nil {
		return err
	}
	comps := map[string]component{}
	for _, comp := range c.components() {
		comps[comp.name] = comp
	}
	start := func(ctx context.Context, name string) error { return c.start(ctx, comps[name]) }

	return parallel(ctx,
		func(ctx context.Context) error { // the control plane, then what lives in it
			if err := start(ctx, "etcd"); err != nil {
				return err
			}
			if err := start(ctx, "kube-apiserver"); err != nil {
				return err
			}
			return parallel(ctx,
				func(ctx context.Context) error { return start(ctx, "kube-controller-manager") },
				func(ctx context.Context) error { return start(ctx, "kube-scheduler") },
				func(ctx context.Context) error { return start(ctx, "kube-proxy") },
				func(ctx context.Context) error { return start(ctx, policyProgram) }, // it waits for its rights and its node
				func(ctx context.Context) error { return c.applyAddons(ctx, addons) },
			)
		},
		func(ctx context.Context) error { // the node; its images first, as they can't be pulled
			if err := start(ctx, "containerd"); err != nil {
				return err
			}
			if err := c.importImages(ctx, addons); err != nil {
				return err
			}
			return start(ctx, "kubelet")
		},
	)
}

// repair starts what has died and applies addons that have changed.
func (c *cluster) repair(ctx context.Context, addons addons, sameAddons bool) error {
	if !isDir("/sys/class/net/" + podDevice) {
		return fmt.Errorf("the pods' bridge %s is gone", podDevice)
	}
	if err := c.networkUp(ctx); err != nil {
		return err
	}
	for _, comp := range c.components() {
		if p, up := running(c.pidFile(comp.name)); up && comp.health(ctx) != nil {
			// Alive but not well. A moment may be all it needs; a hung one is replaced.
			if c.await(ctx, comp) != nil {
				say("%s hangs: restarting it", comp.name)
				if err := p.stop(0); err != nil {
					return err
				}
			}
		} else if up {
			continue
		}
		if err := c.start(ctx, comp); err != nil {
			return err
		}
	}
	if !sameAddons {
		say("the addons have changed: applying them")
		if err := c.importImages(ctx, addons); err != nil {
			return err
		}
		return c.applyAddons(ctx, addons)
	}
	ctx, cancel := context.WithTimeout(ctx, repairTimeout)
	defer cancel()
	return c.awaitAddons(ctx)
}

// prepare makes the state directory, certificates, configuration and network.
func (c *cluster) prepare(ctx context.Context) error {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return err
	}
	// First of all, so that a teardown knows the directory as a cluster's.
	if err := c.writeRecord(record{}); err != nil {
		return err
	}
	for _, dir := range []string{"bin", "log", "pid", "pki", "config/cni", "run", "etcd", "kubelet", "pod-logs"} {
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(c.path("etcd"), 0o700); err != nil {
		return err
	}
	for _, program := range programs {
		if err := linkOrCopy(filepath.Join(c.built.kube, "kube"), c.bin(program)); err != nil {
			return err
		}
	}
	if err := linkOrCopy(filepath.Join(c.built.netpol, policyProgram), c.bin(policyProgram)); err != nil {
		return err
	}
	if err := c.writePKI(); err != nil {
		return err
	}
	pause, err := programImage(c.built.pause, "pause")
	if err != nil {
		return err
	}
	files, err := c.nodeConfigs(pause.ref)
	if err != nil {
		return err
	}
	files["resolv.conf"] = ""
	for _, server := range upstreams(hostResolvConf()) {
		files["resolv.conf"] += "nameserver " + server + "\n"
	}
	for name, text := range files {
		if err := writeFile(c.config(name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return c.networkUp(ctx)
}

func hostResolvConf() string {
	data, _ := os.ReadFile("/etc/resolv.conf")
	return string(data)
}

// wantedRecord is what a cluster from this clone looks like on this machine.
func (c *cluster) wantedRecord(a addons) (record, error) {
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return record{}, err
	}
	files, err := c.nodeConfigs(filepath.Base(c.built.pause))
	if err != nil {
		return record{}, err
	}
	var argv [][]string
	for _, comp := range c.components() {
		argv = append(argv, comp.argv)
	}
	return record{
		BootID: strings.TrimSpace(string(bootID)),
		Node:   fingerprint(filepath.Base(c.built.kube), filepath.Base(c.built.netpol), files, argv, clients, leaves),
		Addons: fingerprint(a),
		Booted: true,
	}, nil
}

// fingerprint hashes values by their JSON, in which maps are sorted.
func fingerprint(values ...any) string {
	data, err := json.Marshal(values)
	if err != nil {
		panic(err) // only our own plain types come here
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

func (c *cluster) readRecord() record {
	var r record
	if data, err := os.ReadFile(c.recordFile()); err == nil {
		_ = json.Unmarshal(data, &r) // a damaged record reads as none: a fresh start
	}
	return r
}

func (c *cluster) writeRecord(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(c.recordFile(), append(data, '\n'), 0o644)
}

// claim refuses a second cluster on this machine: its addresses and devices are
// fixed. The lock file, which the caller holds, has the directory of the first.
func claim(dir string) error {
	data, err := os.ReadFile(lockFile)
	if err != nil {
		return err
	}
	other := strings.TrimSpace(string(data))
	if other != "" && other != dir {
		if _, err := os.Stat(layout{other}.recordFile()); err == nil {
			return fmt.Errorf("this machine has a cluster in %[1]s: use it (RDV_CLUSTER_DIR=%[1]s), or end it with \"RDV_CLUSTER_DIR=%[1]s go -C hack/cluster run . down\"", other)
		}
	}
	return os.WriteFile(lockFile, []byte(dir+"\n"), 0o644)
}

// status reports each component; the error says that something is not well.
func (c *cluster) status(ctx context.Context) error {
	if _, err := os.Stat(c.recordFile()); err != nil {
		return fmt.Errorf("no cluster in %s; \"go -C hack/cluster run . up\" makes one", c.dir)
	}
	var sick []error
	for _, comp := range c.components() {
		p, up := running(c.pidFile(comp.name))
		switch err := comp.health(ctx); {
		case !up:
			sick = append(sick, fmt.Errorf("%s is not running", comp.name))
			fmt.Printf("%-24s dead\n", comp.name)
		case err != nil:
			sick = append(sick, fmt.Errorf("%s: %w", comp.name, err))
			fmt.Printf("%-24s pid %-8d unhealthy: %v\n", comp.name, p.PID, err)
		default:
			fmt.Printf("%-24s pid %-8d healthy\n", comp.name, p.PID)
		}
	}
	out, err := c.kubectl(ctx, "", "get", "nodes,pods", "--all-namespaces", "--output=wide", "--request-timeout=5s")
	fmt.Print(out)
	return errors.Join(append(sick, err)...)
}
