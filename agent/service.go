package agent

import (
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
)

// ServiceName is the agent's name with the operating system's service manager.
const ServiceName = "rendezvous-agent"

// ServiceFlag of `agent run` says that Windows's service manager started it.
const ServiceFlag = "as-service"

// serviceDescription is shown there.
const serviceDescription = "Rendezvous session host agent"

// quoteUnit writes one argument of a systemd command line (systemd.service(5), "Command lines").
func quoteUnit(arg string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`, `$`, `$$`, "\n", `\n`).Replace(arg) + `"`
}

// unitOptions say what a unit may do beside its command.
type unitOptions struct {
	command      []string
	writable     []string // folders; empty ones don't count
	drainSeconds int
	// loginDir is where PAM asks. The agent makes accounts then, which takes more rights.
	loginDir string
}

// accountPaths is what useradd and mkhomedir_helper write: the lists of users with their locks, homes, and mail boxes where
// the machine has these made.
var accountPaths = []string{"/etc", "/home", "-/var/mail", "-/var/spool/mail"}

// systemdUnit is the unit file that runs a command at boot. It may write its state folder, the RDP certificate's and what
// making accounts needs, and nothing else.
func systemdUnit(o unitOptions) string {
	var exec, paths []string
	for _, arg := range o.command {
		exec = append(exec, quoteUnit(arg))
	}
	runtime := ""
	if dir, ok := strings.CutPrefix(o.loginDir, "/run/"); ok && path.Clean(dir) == dir {
		runtime = "RuntimeDirectory=" + quoteUnit(dir) + "\nRuntimeDirectoryMode=0755\n"
	} else {
		o.writable = append(o.writable, o.loginDir)
	}
	homes := "ProtectHome=read-only"
	if o.loginDir != "" {
		o.writable = append(o.writable, accountPaths...)
		homes = `ReadOnlyPaths="/root" "-/run/user"` // with ProtectHome, /home could not be taken out
	}
	for _, p := range o.writable {
		if p != "" {
			paths = append(paths, quoteUnit(p))
		}
	}
	return strings.NewReplacer("{description}", serviceDescription, "{exec}", strings.Join(exec, " "), "{runtime}", runtime, "{homes}", homes,
		"{paths}", strings.Join(paths, " "), "{stop}", strconv.Itoa(o.drainSeconds+15)).Replace(`[Unit]
Description={description}
Wants=network-online.target
After=network-online.target xrdp.service

[Service]
Type=notify
NotifyAccess=main
WatchdogSec=180
EnvironmentFile=-/etc/default/rendezvous-agent
ExecStart={exec}
Restart=always
RestartSec=5
TimeoutStopSec={stop}
{runtime}NoNewPrivileges=yes
ProtectSystem=strict
{homes}
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
ReadWritePaths={paths}

[Install]
WantedBy=multi-user.target
`)
}

// joinPatience is how long AwaitService waits for the host to be a member with a channel: an issuer may take a while.
const joinPatience = 10 * time.Second

// AwaitService tells on out what becomes of a service that has just been installed: that it is connected, or what keeps it from
// that as yet, which may well pass. The error says that the broker refuses this machine, and that it takes a person to change that.
func AwaitService(ctx context.Context, o Options, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, joinPatience)
	defer cancel()
	for {
		h, err := CheckHealth(ctx, o.StateDir)
		switch {
		case err == nil && h.Connected:
			fmt.Fprintf(out, "the service runs: session host %s is connected to its broker\n", h.Host)
			if _, err := os.Stat(o.TokenFile); err == nil {
				fmt.Fprintf(out, "the registration token has been used, and a pool's token can enrol more machines: delete %s\n", o.TokenFile)
			}
			return nil
		case err == nil && h.Refused:
			return fmt.Errorf("the service runs, but the broker refuses this machine: %s. The agent tries a new token within 15 seconds", h.Problem)
		}
		if sleep(ctx, 250*time.Millisecond) == nil {
			continue
		}
		if err != nil {
			fmt.Fprintf(out, "the service runs, but the agent did not say how it is: %v\n", err)
			return nil
		}
		fmt.Fprintf(out, "the service runs, and goes on trying. As yet: %s\n", h.Summary())
		return nil
	}
}

// indent sets text off from what is said about it.
func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ")
}
