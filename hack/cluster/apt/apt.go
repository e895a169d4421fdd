// Package apt installs Debian packages. The demo's parts install what they need at one time, on machines that may never
// have read a package list, so installs wait for each other and read the lists where need be.
package apt

import (
	"context"
	"fmt"
	"os"
	"os/exec"
)

// lock keeps our own runs apart; apt's own time-out waits for other people's.
const lock = "/run/lock/rendezvous-apt"

// Install installs packages. It needs root, and works without a terminal.
func Install(ctx context.Context, packages ...string) error {
	install := append([]string{"install", "-y", "-q", "--no-install-recommends"}, packages...)
	if run(ctx, install...) == nil {
		return nil
	}
	if err := run(ctx, "update", "-q"); err != nil {
		return err
	}
	return run(ctx, install...)
}

func run(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "flock", append([]string{lock, "apt-get", "-o", "DPkg::Lock::Timeout=300"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", args[0], err, out)
	}
	return nil
}
