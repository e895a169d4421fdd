package agent

import (
	"bufio"
	"io"
	"regexp"
	"strconv"
	"strings"
)

// desktop names one session of the RDP server on this machine: it lives on when its user's connection ends.
type desktop struct {
	uid     string // of the user who logged in, empty where the server doesn't say
	display int
}

// xrdpSocket is a socket of one xrdp session, by the path it was bound to, in a folder that is root's: xrdp 0.10 has one for
// each user, earlier ones have one for all.
//
//	/run/xrdp/sockdir/1000/xrdp_chansrv_socket_10   xrdp connects here while a client is connected
//	/run/xrdp/sockdir/1000/xrdp_display_10          likewise, where Xorg serves the session
//	/run/xrdp/sockdir/1000/xrdpapi_10               there as long as the session
var xrdpSocket = regexp.MustCompile(`^(?:/var)?/run/xrdp/sockdir/(?:(\d+)/)?(xrdpapi|xrdp_[a-z_]+)_(\d+)$`)

// connected is the state of a Unix socket with a peer, in the kernel's table.
const connected = "03"

// parseDesktops finds xrdp's sessions in the kernel's table of Unix sockets (proc_pid_net(5)), and which of them a client
// is connected to. Anybody may read that table, and a pod's containers share it: so a sidecar that sees no process of
// the desktop sees its sessions all the same.
//
//	Num               RefCount Protocol Flags    Type St Inode Path
//	00000000927c2edb: 00000003 00000000 00000000 0001 03 13102 /run/xrdp/sockdir/1000/xrdp_chansrv_socket_10
func parseDesktops(table io.Reader) (attached map[desktop]bool, err error) {
	attached = map[desktop]bool{}
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) != 8 {
			continue
		}
		m := xrdpSocket.FindStringSubmatch(f[7])
		if m == nil {
			continue
		}
		n, err := strconv.Atoi(m[3])
		if err != nil {
			continue
		}
		d := desktop{uid: m[1], display: n}
		client := m[2] == "xrdp_chansrv_socket" || m[2] == "xrdp_display"
		attached[d] = attached[d] || client && f[5] == connected
	}
	return attached, lines.Err()
}
