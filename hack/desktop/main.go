// Command desktop has the two real ends of an RDP connection at hand: a session host (xrdp) and a user's machine
// (FreeRDP 3), from Debian 13. See README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
)

const usage = `usage:
  desktop ensure          build the root file systems, unless cached, and print where they are
  desktop image OUT.tar   write the session host as a docker-archive, rendezvous/desktop:dev
  desktop selftest [PNG]  connect FreeRDP to xrdp between two network namespaces and check what is seen;
                          the picture goes to PNG
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "desktop:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	switch {
	case len(args) == 1 && args[0] == "ensure":
		roots, err := rdpkit.Ensure(ctx, log)
		if err != nil {
			return err
		}
		fmt.Printf("desktop %s\nclient  %s\n", roots.Desktop, roots.Client)
		return nil
	case len(args) == 2 && args[0] == "image":
		roots, err := rdpkit.Ensure(ctx, log)
		if err != nil {
			return err
		}
		image, err := rdpkit.Image(ctx, log, roots)
		if err != nil {
			return err
		}
		return copyFile(image, args[1])
	case len(args) >= 1 && len(args) <= 2 && args[0] == "selftest":
		picture := ""
		if len(args) == 2 {
			picture = args[1]
		}
		ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Minute, errors.New("the self-test took longer than ten minutes"))
		defer cancel()
		return selftest(ctx, log, picture)
	}
	fmt.Fprint(os.Stderr, usage)
	return errors.New("unknown command")
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
