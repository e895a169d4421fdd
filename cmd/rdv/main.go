// Command rdv opens remote desktops: it signs in to a workspace, lists what one may use, and starts the user's own RDP
// client on it. Package client has the workings; here are its commands.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"rendezvous.dev/rendezvous/client"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/version"
)

// linked is the version, set by the linker; a plain build says what it knows.
var linked = ""

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "error:", client.Clean(err))
	var exit *client.ExitError
	if errors.As(err, &exit) && exit.Code > 0 {
		os.Exit(exit.Code)
	}
	if errors.Is(err, errLintNotDone) {
		os.Exit(2)
	}
	os.Exit(1)
}

func command() *cobra.Command {
	c := &client.Client{Out: os.Stdout, Err: os.Stderr, UserAgent: "rdv/" + version.String(linked)}
	root := &cobra.Command{
		Use:           "rdv",
		Short:         "Open your remote desktops",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) (err error) {
			c.Store, err = client.DefaultStore()
			return err
		},
	}
	root.PersistentFlags().StringVarP(&c.Workspace, "workspace", "w", "", "workspace to use, by name, host or URL (default: the one signed in to last)")
	root.AddCommand(loginCommand(c), logoutCommand(c), listCommand(c), whoAmICommand(c), gatewaysCommand(c), connectCommand(c), explainCommand(c), sessionsCommand(c), lintCommand(), versionCommand())
	return root
}

func loginCommand(c *client.Client) *cobra.Command {
	var o client.LoginOptions
	cmd := &cobra.Command{
		Use: "login https://WORKSPACE-HOST", Short: "Sign in to a workspace", Args: cobra.ExactArgs(1),
		Long: "Sign in at the workspace's identity provider, in a browser. The page to open is printed alone on one line of\nstandard output.",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.URL = args[0]
			if o.RedirectPort < 0 || o.RedirectPort > 65535 {
				return fmt.Errorf("--redirect-port %d: it is a port, 1 to 65535", o.RedirectPort)
			}
			return c.Login(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.CAFile, "ca-file", "", "PEM file of a CA to trust for this workspace, its gateways and desktops, besides the machine's own")
	cmd.Flags().BoolVar(&o.Device, "device", false, "sign in on another device")
	cmd.Flags().IntVar(&o.RedirectPort, "redirect-port", 0, "loopback port that the provider knows the redirect URI by, http://localhost:PORT/callback (default: any free one, or that of the last login)")
	cmd.Flags().StringVar(&o.SecretFile, "client-secret-file", "", "file with the client's secret, for providers that know no public clients; kept with the sign-in")
	cmd.Flags().BoolVar(&o.NoBrowser, "no-browser", false, "print the page's address and open nothing")
	return cmd
}

func logoutCommand(c *client.Client) *cobra.Command {
	return &cobra.Command{
		Use: "logout", Short: "Forget the sign-in to a workspace", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return c.Logout() },
	}
}

func listCommand(c *client.Client) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List what you may use", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			return c.List(cmd.Context(), asJSON)
		},
	}
	addOutput(cmd, &output)
	return cmd
}

func whoAmICommand(c *client.Client) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "whoami", Short: "Show who you are to the workspace: user, groups, accounts, and the claims they are read from", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			return c.WhoAmI(cmd.Context(), asJSON)
		},
	}
	addOutput(cmd, &output)
	return cmd
}

func gatewaysCommand(c *client.Client) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "gateways", Short: "Measure the gateways from here and show which one would be chosen", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			return c.Gateways(cmd.Context(), asJSON)
		},
	}
	addOutput(cmd, &output)
	return cmd
}

func connectCommand(c *client.Client) *cobra.Command {
	var o client.ConnectOptions
	cmd := &cobra.Command{
		Use: "connect NAME [-- ARGUMENTS OF THE RDP CLIENT]", Short: "Open a desktop or app", Args: cobra.MinimumNArgs(1),
		Long: "Open a desktop or app in your RDP client: measure the gateways, get a fresh signed connection file for the best one,\nand start the client on it. The exit code is the client's. The first line names the activity id, for `rdv explain`.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); at != 1 && len(args) > 1 {
				return fmt.Errorf("%q: one name only; put the RDP client's own arguments after --", args[1])
			}
			o.Resource, o.Args = args[0], args[1:]
			return c.Connect(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.Gateway, "gateway", "", "gateway to use (default: measure and choose)")
	cmd.Flags().StringVar(&o.Mode, "mode", client.ModeTSGU, "tsgu, which every RDP client speaks; for FreeRDP 3 also raw, or arm, where the gateway chooses the gateway")
	cmd.Flags().BoolVar(&o.Print, "print", false, "print the connection file (raw: FreeRDP's arguments) and start nothing; it holds a secret")
	cmd.Flags().StringVar(&o.RDPClient, "rdp-client", "", "RDP client to start (default: the first found of xfreerdp3, xfreerdp, wlfreerdp3, remmina; mstsc on Windows)")
	return cmd
}

func explainCommand(c *client.Client) *cobra.Command {
	var output string
	var last bool
	cmd := &cobra.Command{
		Use: "explain [ACTIVITY-ID]", Short: "Show what happened in a connect, step by step; without an id, list the latest ones", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			asJSON, err := isJSON(output)
			switch {
			case err != nil:
				return err
			case last && len(args) > 0:
				return fmt.Errorf("%q: an activity id or --last, not both", args[0])
			case last:
				return c.ExplainLast(cmd.Context(), asJSON)
			case len(args) == 0:
				return c.Recent(cmd.Context(), asJSON)
			}
			return c.Explain(cmd.Context(), args[0], asJSON)
		},
	}
	cmd.Flags().BoolVar(&last, "last", false, "the latest connect")
	addOutput(cmd, &output)
	return cmd
}

func sessionsCommand(c *client.Client) *cobra.Command {
	var output string
	var watch bool
	cmd := &cobra.Command{
		Use: "sessions", Aliases: []string{"session"}, Short: "List your sessions, or end or disconnect one", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			return c.Sessions(cmd.Context(), asJSON, watch)
		},
	}
	addOutput(cmd, &output)
	cmd.Flags().BoolVar(&watch, "watch", false, "print the list again each time that it changes")
	act := func(use, short, act string) *cobra.Command {
		return &cobra.Command{
			Use: use + " SESSION", Short: short, Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error { return c.Act(cmd.Context(), act, args[0]) },
		}
	}
	cmd.AddCommand(
		act("end", "Log off: the desktop and all that runs in it end", bus.ActEnd),
		act("disconnect", "End the connection; the desktop goes on, and connecting again leads back to it", bus.ActDisconnect),
	)
	return cmd
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print rdv's version, and the Go release that built it", Args: cobra.NoArgs,
		Run: func(c *cobra.Command, _ []string) { fmt.Fprintln(c.OutOrStdout(), version.Line(linked)) },
	}
}

func addOutput(cmd *cobra.Command, to *string) {
	cmd.Flags().StringVarP(to, "output", "o", "table", "table or json")
}

func isJSON(output string) (bool, error) {
	if output != "table" && output != "json" {
		return false, fmt.Errorf("--output %q: it is table or json", output)
	}
	return output == "json", nil
}
