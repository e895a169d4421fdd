// Command agent makes the machine that it runs on a session host. Package agent has the workings; here are its flags.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"rendezvous.dev/rendezvous/agent"
	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/agent/login/setup"
	"rendezvous.dev/rendezvous/wire/terminal"
	"rendezvous.dev/rendezvous/wire/version"
)

// linked is the version, set by the linker; a plain build says what it knows.
var linked = ""

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(terminal.Writer(os.Stderr), "error:", err) // a broker may have had a hand in it
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "agent",
		Short:         "Make this machine a Rendezvous session host",
		Long:          "The agent enrols this machine in a host pool, keeps a control channel to the workspace's brokers, and dials a gateway\nfor each session. It listens on no network address. Each flag may also be given as RDV_AGENT_<FLAG>, in capitals with\nunderscores.",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetOut(terminal.Writer(os.Stdout))
	root.AddCommand(runCommand(), enrollCommand(), healthcheckCommand(), serviceCommand(), loginCommand(), pamCommand(), sessionCommand(), sessionHelperCommand(), versionCommand())
	return root
}

// flags are those of `run`, which `enroll` and `service install` share.
type flags struct {
	agent.Options
	drainSeconds int
	logLevel     string
	logFile      string
}

func (f *flags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.Broker, "broker", "", "https URL of the workspace's broker")
	fs.StringVar(&f.CAFile, "ca-file", "", "PEM file that verifies the broker; an empty file or none means the machine's own roots")
	fs.StringVar(&f.TokenFile, "token-file", "", "file with the registration token")
	fs.StringVar(&f.Proxy, "proxy", "", "http or https URL of an HTTP proxy, by CONNECT, in place of HTTPS_PROXY; NO_PROXY names what is dialled directly")
	fs.StringVar(&f.ProxyAuthFile, "proxy-auth-file", "", "file with USER:PASSWORD for --proxy")
	fs.StringVar(&f.Host, "host", "", "session host's name (default: the machine's name)")
	fs.StringVar(&f.StateDir, "state-dir", defaultStateDir(), "folder for keys and certificates")
	fs.StringVar(&f.RDPAddr, "rdp-addr", "127.0.0.1:3389", "RDP server's loopback address")
	fs.StringVar(&f.RDPCertDir, "rdp-cert-dir", "", "folder that gets tls.crt and tls.key for the RDP server (default: on Windows the RDP listener is set, elsewhere none)")
	fs.StringVar(&f.LoginDir, "login-dir", "", "folder with the socket by which PAM asks whose a connection is; without, the RDP server asks people for credentials")
	fs.BoolVar(&f.LoginShared, "login-shared", false, "the desktops are in a container beside this one, which shares --login-dir: put PAM's helper and the accounts there")
	fs.IntVar(&f.drainSeconds, "drain-seconds", 30, "how long a stopping agent waits for its sessions to end")
	fs.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&f.logFile, "log-file", "", "file to append the log to, for services whose standard error is lost (default: standard error)")
	c.PreRunE = func(*cobra.Command, []string) error { return fromEnv(fs) }
}

// fromEnv sets each flag that the command line left alone from its environment variable.
func fromEnv(fs *pflag.FlagSet) error {
	var errs []error
	fs.VisitAll(func(f *pflag.Flag) {
		name := "RDV_AGENT_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v, ok := os.LookupEnv(name); ok && !f.Changed {
			if err := fs.Set(f.Name, v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
		}
	})
	return errors.Join(errs...)
}

// options finishes the options and starts the log.
func (f *flags) options() (agent.Options, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return agent.Options{}, fmt.Errorf("--log-level: %w", err)
	}
	out := os.Stderr
	if f.logFile != "" {
		var err error
		if out, err = os.OpenFile(f.logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
			return agent.Options{}, fmt.Errorf("--log-file: %w", err)
		}
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{Level: level})))
	o := f.Options
	o.Drain, o.Version, o.Log = time.Duration(f.drainSeconds)*time.Second, version.String(linked), slog.Default()
	return o, nil
}

func runCommand() *cobra.Command {
	f := &flags{}
	asService := false
	c := &cobra.Command{
		Use: "run", Short: "Serve as a session host until stopped; SIGHUP renews its certificates at once", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			a, err := agent.New(o)
			if err != nil {
				if f.logFile != "" { // nobody reads standard error
					slog.Error("the agent does not run", "error", err)
				}
				return err
			}
			if handled, err := agent.RunAsService(asService, a.Run, a.Ready()); handled || err != nil {
				if err != nil {
					slog.Error("the agent does not run", "error", err)
				}
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			// A second signal ends the drain at once.
			context.AfterFunc(ctx, stop)
			renew := make(chan os.Signal, 1)
			signal.Notify(renew, syscall.SIGHUP)
			defer signal.Stop(renew)
			go func() {
				for {
					select {
					case <-ctx.Done():
						return
					case <-renew:
						a.RenewNow()
					}
				}
			}()
			return a.Run(ctx)
		},
	}
	f.add(c)
	c.Flags().BoolVar(&asService, agent.ServiceFlag, false, "Windows's service manager started this")
	c.Flags().MarkHidden(agent.ServiceFlag)
	return c
}

func enrollCommand() *cobra.Command {
	f := &flags{}
	c := &cobra.Command{
		Use: "enroll", Short: "Enrol this machine once and exit; does nothing where it is enrolled", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			a, err := agent.New(o)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			pool, err := a.Enroll(ctx)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "enrolled in host pool %s\n", pool)
			return nil
		},
	}
	f.add(c)
	return c
}

func healthcheckCommand() *cobra.Command {
	var stateDir string
	var ready bool
	c := &cobra.Command{
		Use: "healthcheck", Short: "Ask the running agent how it is; fails where none answers", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			h, err := agent.CheckHealth(c.Context(), stateDir)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "host=%s enrolled=%t connected=%t rdpReady=%t sessions=%d stopping=%t %s\n",
				h.Host, h.Enrolled, h.Connected, h.RDPReady, h.Sessions, h.Stopping, h.Summary())
			if ready && !h.Ready() {
				return fmt.Errorf("session host %s can't take sessions now", h.Host)
			}
			return nil
		},
	}
	c.Flags().StringVar(&stateDir, "state-dir", defaultStateDir(), "state folder of the running agent")
	c.Flags().BoolVar(&ready, "ready", false, "also fail where the host can't take sessions now")
	c.PreRunE = func(*cobra.Command, []string) error { return fromEnv(c.Flags()) }
	return c
}

func serviceCommand() *cobra.Command {
	c := &cobra.Command{Use: "service", Short: "Install or remove the agent as a service of this machine"}
	f := &flags{}
	l := &loginFlags{}
	dryRun := false
	install := &cobra.Command{
		Use: "install", Short: "Start the agent now and at each boot, with the flags given here", Args: cobra.NoArgs,
		Long: "Start the agent now and at each boot, with the flags given here. Its program is copied to where the system keeps programs, unless it\nstands there. On Linux, xrdp is set up to log people in by their connections; see `agent login install --help`. What doesn't start is taken back.",
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			if _, err := agent.New(o); err != nil { // the flags are checked here, not in a log
				return err
			}
			if runtime.GOOS == "windows" {
				// A service's environment need not be this one's, which the folder's default comes from; its standard error is lost.
				if f.logFile == "" {
					f.logFile = filepath.Join(o.StateDir, "agent.log")
				}
				if err := errors.Join(c.Flags().Set("state-dir", o.StateDir), c.Flags().Set("log-file", f.logFile)); err != nil {
					return err
				}
			}
			if err := agent.CheckService(); err != nil {
				return err
			}
			program, missing, err := agent.ServiceProgram()
			if err != nil {
				return err
			}
			s := setup.New(o.StateDir, c.OutOrStdout())
			_, wasSetUp, err := s.Installed()
			if err != nil {
				return err
			}
			var so setup.Options
			if l.off() {
				if wasSetUp {
					return errors.New("--login=off: login by connection is set up on this machine, and without it nobody could log in: run `agent login uninstall` first")
				}
			} else {
				if o.LoginShared {
					return errors.New("--login-shared is for an agent in a container: a service on a machine makes accounts itself")
				}
				if o.LoginDir == "" {
					o.LoginDir = login.DefaultDir
				}
				if err := c.Flags().Set("login-dir", o.LoginDir); err != nil {
					return err
				}
				if so, err = l.options(o, program); err != nil {
					return err
				}
				o.LoginDir, o.RDPCertDir = so.LoginDir, so.CertDir
			}
			if dryRun {
				if missing {
					fmt.Fprintf(c.OutOrStdout(), "--- %s: a copy of this program\n", program)
				}
				if l.off() {
					return nil
				}
				so.ProgramToCome = missing
				_, err := s.Plan(c.Context(), so)
				return err
			}
			if err := agent.InstallProgram(c.Context()); err != nil {
				return err
			}
			if !l.off() {
				if err := s.Install(c.Context(), so); err != nil {
					return err
				}
			}
			if err := agent.InstallService(c.Context(), serviceCommandLine(program, c.Flags()), o); err != nil {
				if !l.off() && !wasSetUp { // nobody could log in without the agent
					err = errors.Join(err, s.Uninstall(c.Context()))
				}
				return err
			}
			return agent.AwaitService(c.Context(), o, c.OutOrStdout())
		},
	}
	f.add(install)
	l.add(install)
	install.Flags().BoolVar(&dryRun, "dry-run", false, "show what would change in this machine's own files, and change nothing")
	var stateDir string
	uninstall := &cobra.Command{
		Use: "uninstall", Short: "Stop the agent and remove the service; xrdp's files are restored, the state folder stays", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			// Also where there is no service any more: files must not stay changed for that.
			return errors.Join(agent.UninstallService(c.Context()), setup.New(stateDir, c.OutOrStdout()).Uninstall(c.Context()))
		},
	}
	uninstall.Flags().StringVar(&stateDir, "state-dir", defaultStateDir(), "the agent's state folder, which has the originals of the files that were changed")
	c.AddCommand(install, uninstall)
	return c
}

func pamCommand() *cobra.Command {
	var dir string
	var elsewhere bool
	c := &cobra.Command{
		Use: "pam", Short: "What PAM runs to ask the agent whose a connection is (pam_exec)", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if elsewhere {
				return login.Elsewhere(os.Getenv("PAM_RHOST"))
			}
			return login.Help(c.Context(), filepath.Join(dir, login.SocketName), os.Getenv)
		},
	}
	c.Flags().StringVar(&dir, "login-dir", login.DefaultDir, "the running agent's login folder")
	c.Flags().BoolVar(&elsewhere, "elsewhere", false, "say only whether the connection comes from another machine, so that it can't be the agent's")
	return c
}

func sessionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "session PROGRAM", Short: "What xrdp starts for a user: make sure that the X display is the user's own, then become PROGRAM", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return login.BeginSession(args[0]) },
	}
}

func sessionHelperCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use: "session-helper", Short: "What a desktop's container runs as root, so that the agent beside it can log sessions off and show messages", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return agent.HelpSessions(c.Context(), dir, slog.Default()) },
	}
	c.Flags().StringVar(&dir, "login-dir", login.DefaultDir, "the agent's login folder")
	return c
}

// pathFlags are files and folders: a service starts elsewhere, so they are made absolute.
var pathFlags = map[string]bool{"ca-file": true, "token-file": true, "proxy-auth-file": true, "state-dir": true, "rdp-cert-dir": true, "login-dir": true, "log-file": true}

// installFlags say how to install, and mean nothing to `agent run`.
var installFlags = map[string]bool{"login": true, "login-sessions": true, "dry-run": true}

// serviceCommandLine is program's `run` with the flags that were given.
func serviceCommandLine(program string, fs *pflag.FlagSet) []string {
	command := []string{program, "run"}
	fs.Visit(func(f *pflag.Flag) {
		if installFlags[f.Name] {
			return
		}
		value := f.Value.String()
		if pathFlags[f.Name] && value != "" {
			if abs, absErr := filepath.Abs(value); absErr == nil {
				value = abs
			}
		}
		command = append(command, "--"+f.Name+"="+value)
	})
	return command
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the agent's version, and the Go release that built it", Args: cobra.NoArgs,
		Run: func(c *cobra.Command, _ []string) { fmt.Fprintln(c.OutOrStdout(), version.Line(linked)) },
	}
}

func defaultStateDir() string {
	if runtime.GOOS == "windows" {
		return filepath.Join(os.Getenv("ProgramData"), "rendezvous-agent")
	}
	return "/var/lib/rendezvous-agent"
}
