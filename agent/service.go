package agent

import (
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

// systemdUnit is the unit file that runs command at boot. It may write its state folder and the RDP certificate's,
// and nothing else.
func systemdUnit(command []string, writable []string, drainSeconds int) string {
	var exec, paths []string
	for _, arg := range command {
		exec = append(exec, quoteUnit(arg))
	}
	for _, p := range writable {
		if p != "" {
			paths = append(paths, quoteUnit(p))
		}
	}
	return strings.NewReplacer("{description}", serviceDescription, "{exec}", strings.Join(exec, " "),
		"{paths}", strings.Join(paths, " "), "{stop}", strconv.Itoa(drainSeconds+15)).Replace(`[Unit]
Description={description}
Wants=network-online.target
After=network-online.target xrdp.service

[Service]
ExecStart={exec}
Restart=always
RestartSec=5
TimeoutStopSec={stop}
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
ReadWritePaths={paths}

[Install]
WantedBy=multi-user.target
`)
}
