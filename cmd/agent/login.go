package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"

	"github.com/spf13/cobra"

	"rendezvous.dev/rendezvous/agent"
	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/agent/login/setup"
)

// loginFlags say how people log in on this machine.
type loginFlags struct {
	mode, sessions string
}

func (l *loginFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&l.mode, "login", defaultLogin(), "who logs in over RDP: connection (those whom the brokers send, without a password, and nobody else), password (those, and from other machines whoever has a password), off (the RDP server is left as it is, and asks)")
	c.Flags().StringVar(&l.sessions, "login-sessions", "xorg", "what xrdp starts: xorg, or xvnc, which is for machines whose users trust each other")
}

func defaultLogin() string {
	if runtime.GOOS == "linux" {
		return string(setup.Connection)
	}
	return "off"
}

func (l *loginFlags) off() bool { return l.mode == "off" }

// options are those of the setup that goes with an agent's, and has PAM run program.
func (l *loginFlags) options(o agent.Options, program string) (setup.Options, error) {
	so := setup.Options{Program: program, Mode: setup.Mode(l.mode), LoginDir: o.LoginDir, RDPAddr: o.RDPAddr, CertDir: o.RDPCertDir, Xvnc: l.sessions == "xvnc"}
	if l.sessions != "xorg" && l.sessions != "xvnc" {
		return so, fmt.Errorf("--login-sessions: %q is not one of xorg and xvnc", l.sessions)
	}
	var err error
	for _, dir := range []*string{&so.LoginDir, &so.CertDir} {
		if *dir != "" {
			abs, absErr := filepath.Abs(*dir)
			*dir, err = abs, errors.Join(err, absErr)
		}
	}
	return so, err
}

func loginCommand() *cobra.Command {
	c := &cobra.Command{Use: "login", Short: "Set login by connection up on this machine, or look at it, or take it back"}
	l := &loginFlags{}
	var o agent.Options
	withOptions := func(c *cobra.Command, run func(*cobra.Command, *setup.Setup, setup.Options) error) *cobra.Command {
		fs := c.Flags()
		fs.StringVar(&o.StateDir, "state-dir", defaultStateDir(), "the agent's state folder, where the originals are kept")
		fs.StringVar(&o.LoginDir, "login-dir", login.DefaultDir, "the running agent's login folder")
		fs.StringVar(&o.RDPAddr, "rdp-addr", "127.0.0.1:3389", "loopback address at which xrdp is to listen")
		fs.StringVar(&o.RDPCertDir, "rdp-cert-dir", "", "folder in which the agent puts tls.crt and tls.key (default: xrdp keeps its own)")
		l.add(c)
		c.Args = cobra.NoArgs
		c.PreRunE = func(*cobra.Command, []string) error { return fromEnv(fs) }
		c.RunE = func(c *cobra.Command, _ []string) error {
			if l.off() {
				return errors.New("--login=off leaves this machine alone: use `agent login uninstall` to take the setup back")
			}
			program, err := setup.Program()
			if err != nil {
				return err
			}
			so, err := l.options(o, program)
			if err != nil {
				return err
			}
			return run(c, setup.New(o.StateDir, c.OutOrStdout()), so)
		}
		return c
	}
	withState := func(c *cobra.Command, run func(*cobra.Command, *setup.Setup) error) *cobra.Command {
		c.Flags().StringVar(&o.StateDir, "state-dir", defaultStateDir(), "the agent's state folder, where the originals are kept")
		c.Args = cobra.NoArgs
		c.PreRunE = func(*cobra.Command, []string) error { return fromEnv(c.Flags()) }
		c.RunE = func(c *cobra.Command, _ []string) error { return run(c, setup.New(o.StateDir, c.OutOrStdout())) }
		return c
	}
	c.AddCommand(
		withOptions(&cobra.Command{
			Use: "install", Short: "Change xrdp's and PAM's files, show the changes and keep the originals; changes nothing the second time",
			Long: "Changes the files of xrdp and PAM so that people are logged in by their connections, shows the changes, keeps the originals\nand restarts xrdp. `agent service install` does it too.",
		}, func(c *cobra.Command, s *setup.Setup, so setup.Options) error { return s.Install(c.Context(), so) }),
		withOptions(&cobra.Command{Use: "plan", Short: "Show what install would change, and change nothing"},
			func(c *cobra.Command, s *setup.Setup, so setup.Options) error {
				changes, err := s.Plan(c.Context(), so)
				if err == nil && !changes {
					fmt.Fprintln(c.OutOrStdout(), "nothing to change")
				}
				return err
			}),
		withState(&cobra.Command{Use: "uninstall", Short: "Restore the files as they were"},
			func(c *cobra.Command, s *setup.Setup) error { return s.Uninstall(c.Context()) }),
		withState(&cobra.Command{Use: "status", Short: "Say whether this machine is as it was set up; fails where it isn't"},
			func(c *cobra.Command, s *setup.Setup) error { return s.Status(c.Context()) }),
	)
	return c
}
