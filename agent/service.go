package agent

import (
	"path"
	"strconv"
	"strings"
)

// ServiceName is the agent's name with the operating system's service manager.
const ServiceName = "rendezvous-agent"

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
