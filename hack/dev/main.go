// Command dev is what the Makefile's demo and images targets run.
//
//	dev demo    the main job, start to picture
//	dev images  build the images and load them into the embedded cluster
//	dev fleet   200 live sessions while everything is rolled, scaled and killed: a table, fleet.json, fleet.svg in bin/
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"rendezvous.dev/rendezvous/hack/desktop/rdpkit"
	"rendezvous.dev/rendezvous/hack/fleet"
	"rendezvous.dev/rendezvous/hack/stage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root, err := filepath.Abs("..") // the Makefile runs us in hack/
	if err == nil {
		switch {
		case len(os.Args) == 2 && os.Args[1] == "demo":
			err = demo(ctx, root)
		case len(os.Args) == 2 && os.Args[1] == "images":
			err = stage.Images(ctx, root, stage.NewProgress(os.Stderr))
		case len(os.Args) >= 2 && os.Args[1] == "fleet":
			err = runFleet(ctx, root, os.Args[2:])
		default:
			err = fmt.Errorf("usage: dev demo|images|fleet")
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		stop()
		os.Exit(1)
	}
}

// demo brings the stage about, signs alice in, connects her RDP client and takes the picture.
func demo(ctx context.Context, root string) error {
	say := stage.NewProgress(os.Stderr)
	s, err := stage.Up(ctx, root, say)
	if err != nil {
		return err
	}
	roots, err := rdpkit.Ensure(ctx, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	say.Say("alice: a machine of her own, with FreeRDP and rdv")
	alice, err := s.NewUser(ctx, roots)
	if err != nil {
		return err
	}
	defer alice.Close()
	say.Say("alice: rdv login %s (the sign-in is Dex's)", stage.WorkspaceURL)
	if err := alice.Login(ctx, "alice@example.test", "alice-demo"); err != nil {
		return err
	}
	list, err := alice.Rdv(ctx, "list")
	if err != nil {
		return err
	}
	fmt.Print(list)
	pctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	d, err := connect(pctx, s, alice, say)
	if err != nil {
		return err
	}
	defer d.Stop()
	say.Say("the desktop is there; alice types")
	picture, err := typed(pctx, alice, "uname -n; id -un; echo reached with no inbound port\n")
	if err != nil {
		return err
	}
	file := filepath.Join(root, "demo.png")
	if err := picture.Save(file); err != nil {
		return err
	}
	say.Say("an administrator: kubectl rdv message")
	if _, err := s.KubectlRdv(ctx, "message", "--field-selector", "user=alice@example.test", "-n", stage.Namespace, "--text", "Good morning, Alice. We restart at 18:00."); err != nil {
		return err
	}
	told, err := alice.WaitForChange(pctx, picture)
	if err != nil {
		return fmt.Errorf("the message is not on the screen: %w", err)
	}
	if err := told.Save(filepath.Join(root, "demo-message.png")); err != nil {
		return err
	}
	explain, err := alice.Rdv(ctx, "explain", d.ActivityID)
	if err != nil {
		return err
	}
	fmt.Print(explain)
	all, err := s.Kubectl(ctx, "", "get", "rdv", "-n", stage.Namespace)
	if err != nil {
		return err
	}
	fmt.Printf("\n$ kubectl get rdv -n %s\n%s\n", stage.Namespace, all)
	sessions, err := s.Kubectl(ctx, "", "get", "sessions", "-n", stage.Namespace)
	if err != nil {
		return err
	}
	fmt.Printf("$ kubectl get sessions -n %s\n%s\n", stage.Namespace, sessions)
	fmt.Printf("The pictures are %s and demo-message.png. Look around with KUBECONFIG=%s; `make cluster-down` removes it all.\n", file, s.Kubeconfig)
	return nil
}

// connect connects alice and waits for her desktop. On a stage of before its host may be just being replaced: she is told
// so, and tries again.
func connect(ctx context.Context, s *stage.Stage, alice *stage.User, say *stage.Progress) (*stage.Desktop, error) {
	for {
		say.Say("alice: rdv connect linux-desktop")
		d, err := alice.Connect(ctx, "linux-desktop", "tsgu")
		if err != nil {
			return nil, err
		}
		want, err := s.DesktopColor(ctx, "linux")
		if err != nil {
			d.Stop()
			return nil, err
		}
		shown, stop := context.WithCancel(ctx)
		go func() {
			<-d.Done() // refused
			stop()
		}()
		_, err = alice.WaitForColor(shown, want, 0.3)
		stop()
		if err == nil {
			return d, nil
		}
		d.Stop()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("the desktop did not appear: %w\n%s\n`rdv explain %s` on the stage says how far it got", err, d.Output(), d.ActivityID)
		}
		fmt.Fprintln(os.Stderr, d.Output())
		time.Sleep(3 * time.Second)
	}
}

// runFleet brings the stage about and the fleet on it.
func runFleet(ctx context.Context, root string, args []string) error {
	var o fleet.Options
	fs := flag.NewFlagSet("dev fleet", flag.ContinueOnError)
	fs.IntVar(&o.Sessions, "sessions", 200, "live sessions")
	fs.IntVar(&o.Hosts, "hosts", 40, "machines, each with a real agent")
	fs.IntVar(&o.Gateways, "gateways", 3, "gateway pods")
	fs.IntVar(&o.Brokers, "brokers", 3, "broker pods")
	out := fs.String("out", filepath.Join(root, "bin"), "folder for fleet.md, fleet.json and fleet.svg")
	steps := fs.String("steps", "", "steps to take, separated by semicolons; all when empty: "+strings.Join(fleet.StepNames(), "; "))
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *steps != "" {
		o.Steps = strings.Split(*steps, ";")
	}
	say := stage.NewProgress(os.Stderr)
	o.Say = say.Say
	s, err := stage.Up(ctx, root, say)
	if err != nil {
		return err
	}
	r, err := fleet.Run(ctx, s, o)
	if r == nil {
		return err
	}
	fmt.Printf("\n%s\n", r.Markdown())
	for _, f := range r.Faults {
		fmt.Println("-", f)
	}
	text, jerr := json.MarshalIndent(r, "", "\t")
	return errors.Join(err, jerr, os.WriteFile(filepath.Join(*out, "fleet.md"), []byte(r.Markdown()), 0o644),
		os.WriteFile(filepath.Join(*out, "fleet.json"), text, 0o644), os.WriteFile(filepath.Join(*out, "fleet.svg"), r.Plot(), 0o644))
}

// typed waits for the session's terminal, types into it and takes the picture once the answer is there.
func typed(ctx context.Context, u *stage.User, line string) (rdpkit.Picture, error) {
	before, err := u.WaitForChange(ctx, rdpkit.Picture{})
	if err != nil {
		return before, err
	}
	if err := u.Type(ctx, line); err != nil {
		return before, err
	}
	return u.WaitForChange(ctx, before)
}
