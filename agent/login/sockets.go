package login

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// States of a TCP socket in the kernel's table (include/net/tcp_states.h).
const (
	stateEstablished = 0x01
	stateListen      = 0x0a
)

// Socket is one entry of the kernel's table of TCP sockets.
type Socket struct {
	Local, Remote netip.AddrPort
	State         uint8
	// UID owns the socket; 0 also where no process has it any more.
	UID uint32
}

// Listening is a look at who listens at an address.
type Listening struct {
	// Sockets are the inodes of the sockets that listen, in order: other ones after a restart.
	Sockets []uint32
	// Waiting is how many connections the server has not accepted yet.
	Waiting int
}

// parseSockets reads /proc/net/tcp or tcp6 (proc_pid_net(5)) and gives the sockets that have one of the addresses at either
// end. Other lines are not read further than that: a busy machine has thousands. A line that can't be read is an error,
// because a socket that isn't seen could be an attacker's.
//
//	sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
//	 0: 0706057F:B1C4 0100007F:0D3D 01 00000000:00000000 00:00000000 00000000     0        0 12345 …
func parseSockets(table io.Reader, addresses []netip.Addr) ([]Socket, error) {
	// An address in the table, IPv4 in IPv6 too, ends with this.
	var marks [][]byte
	for _, a := range addresses {
		b := a.As4()
		marks = append(marks, fmt.Appendf(nil, "%02X%02X%02X%02X:", b[3], b[2], b[1], b[0]))
	}
	var found []Socket
	lines := bufio.NewScanner(table)
	for n := 1; lines.Scan(); n++ {
		if !slices.ContainsFunc(marks, func(mark []byte) bool { return bytes.Contains(lines.Bytes(), mark) }) {
			continue
		}
		f := strings.Fields(lines.Text())
		if len(f) < 8 {
			return nil, fmt.Errorf("line %d of the table of sockets has %d fields", n, len(f))
		}
		local, err := parseAddress(f[1])
		if err != nil {
			return nil, err
		}
		remote, err := parseAddress(f[2])
		if err != nil {
			return nil, err
		}
		state, err := strconv.ParseUint(f[3], 16, 8)
		if err != nil {
			return nil, fmt.Errorf("state %q in the table of sockets", f[3])
		}
		uid, err := strconv.ParseUint(f[7], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("user %q in the table of sockets", f[7])
		}
		if slices.Contains(addresses, local.Addr()) || slices.Contains(addresses, remote.Addr()) {
			found = append(found, Socket{local, remote, uint8(state), uint32(uid)})
		}
	}
	return found, lines.Err()
}

// parseAddress reads ADDRESS:PORT, the address as 32-bit words in the machine's byte order (little-endian on every
// machine that agents are built for), the port in hexadecimal. IPv4 in IPv6 comes out as IPv4.
func parseAddress(text string) (netip.AddrPort, error) {
	address, port, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(address)
	n, perr := strconv.ParseUint(port, 16, 16)
	if err != nil || perr != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, fmt.Errorf("address %q in the table of sockets", text)
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word)
	}
	ip, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(ip.Unmap(), uint16(n)), nil
}
