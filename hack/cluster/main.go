// Command cluster runs a real single-node Kubernetes on one bare Linux machine,
// from Go modules and Debian packages alone: no container engine, no image
// registry, no downloaded binary. See README.md.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

const usage = `usage: cluster COMMAND

  up            boot the cluster, or repair it, or return at once if it is well
  down          remove it with everything it made
  status        say how each part is
  kubeconfig    print the kubeconfig's path
  env           print shell exports: eval "$(go -C hack/cluster run . env)"
  load TAR...   import docker-archive images into the node
  assets DIR    put kube-apiserver, etcd and kubectl into DIR, for envtest

The state directory is $RDV_CLUSTER_DIR, or /var/lib/rendezvous-cluster.
`

var began = time.Now()

// say prints one line of progress.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	c := &cluster{layout: stateLayout()}
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return fmt.Errorf("name a command")
	}
	name, args := args[0], args[1:]
	switch {
	case name == "up" && len(args) == 0:
		return exclusively(ctx, func() error {
			if err := c.up(ctx); err != nil {
				return fmt.Errorf("%w\nThe logs are in %s; \"up\" again starts afresh where needed", err, c.path("log"))
			}
			say("the cluster is ready")
			fmt.Println(c.adminKubeconfig())
			return nil
		})
	case name == "down" && len(args) == 0:
		return exclusively(ctx, func() error {
			if err := claim(c.dir); err != nil { // the addresses to remove would be the other's
				return err
			}
			if err := c.teardown(ctx); err != nil {
				return err
			}
			say("the cluster is gone")
			return nil
		})
	case name == "status" && len(args) == 0:
		return c.status(ctx)
	case name == "kubeconfig" && len(args) == 0:
		fmt.Println(c.adminKubeconfig())
		return nil
	case name == "env" && len(args) == 0:
		fmt.Printf("export KUBECONFIG=%s PATH=%s:\"$PATH\" CONTAINERD_ADDRESS=%s CONTAINERD_NAMESPACE=k8s.io\n",
			c.adminKubeconfig(), c.path("bin"), c.containerdSocket())
		return nil
	case name == "load" && len(args) > 0:
		for _, tar := range args {
			if _, err := c.ctr(ctx, "images", "import", tar); err != nil {
				return err
			}
			say("loaded %s", filepath.Base(tar))
		}
		return nil
	case name == "assets" && len(args) == 1:
		return assets(ctx, args[0])
	}
	fmt.Fprint(os.Stderr, usage)
	return fmt.Errorf("%s %q: no such command", name, args)
}

// exclusively runs work while no other run of up or down does.
func exclusively(ctx context.Context, work func() error) error {
	if os.Getuid() != 0 {
		return fmt.Errorf("a cluster needs root: it makes network devices, mounts and containers")
	}
	unlock, err := lock(ctx, lockFile)
	if err != nil {
		return err
	}
	defer unlock()
	return work()
}

// assets makes a directory that envtest's KUBEBUILDER_ASSETS may name.
func assets(ctx context.Context, dir string) error {
	kube, err := kubeArtifact.ensure(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, program := range []string{"kube-apiserver", "etcd", "kubectl"} {
		if err := linkOrCopy(filepath.Join(kube, "kube"), filepath.Join(dir, program)); err != nil {
			return err
		}
	}
	return nil
}
