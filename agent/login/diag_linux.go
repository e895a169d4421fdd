package login

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Sizes of sock_diag(7)'s structures, which no package of ours names: struct inet_diag_req_v2, and struct inet_diag_msg
// with where its fields stand.
const (
	diagRequest = 56
	diagMessage = 72
	diagState   = 1
	diagPorts   = 4
	diagSource  = 8
	diagTarget  = 24
	diagQueue   = 56
	diagUID     = 64
	diagInode   = 68
)

// diagSockets asks the kernel for its TCP sockets by netlink, some times faster than the text in /proc/net, and gives those
// that have one of the addresses at either end.
func diagSockets(family uint8, addresses []netip.Addr) (found []Socket, err error) {
	err = dump(family, ^uint32(0), func(body []byte) {
		local, remote := diagAddress(body[0], body[diagSource:]), diagAddress(body[0], body[diagTarget:])
		if slices.Contains(addresses, local) || slices.Contains(addresses, remote) {
			found = append(found, Socket{
				Local:  netip.AddrPortFrom(local, binary.BigEndian.Uint16(body[diagPorts:])),
				Remote: netip.AddrPortFrom(remote, binary.BigEndian.Uint16(body[diagPorts+2:])),
				State:  body[diagState], UID: binary.NativeEndian.Uint32(body[diagUID:]),
			})
		}
	})
	return found, err
}

// Listeners looks at who listens at a TCP address, or at all addresses with its port, without connecting: a server logs
// each connection. The kernel keeps these sockets apart from all others, so that a look costs little.
func Listeners(at netip.AddrPort) (l Listening, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		err := dump(family, 1<<stateListen, func(body []byte) {
			local := diagAddress(body[0], body[diagSource:])
			if binary.BigEndian.Uint16(body[diagPorts:]) == at.Port() && (local == at.Addr().Unmap() || local.IsUnspecified()) {
				l.Sockets = append(l.Sockets, binary.NativeEndian.Uint32(body[diagInode:]))
				l.Waiting += int(binary.NativeEndian.Uint32(body[diagQueue:]))
			}
		})
		if err != nil {
			return l, err
		}
	}
	slices.Sort(l.Sockets)
	return l, nil
}

// dump asks for all sockets of a family that are in one of the states, a bit each, and gives take struct inet_diag_msg of each.
func dump(family uint8, states uint32, take func(body []byte)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		return err
	}
	var req [unix.SizeofNlMsghdr + diagRequest]byte
	binary.NativeEndian.PutUint32(req[0:], uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := req[unix.SizeofNlMsghdr:]
	body[0], body[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(body[4:], states)
	if err := unix.Sendto(fd, req[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, flags, _, err := unix.Recvmsg(fd, buf, nil, 0)
		if err != nil {
			return err
		}
		if flags&unix.MSG_TRUNC != 0 {
			return errors.New("an answer about sockets was cut short")
		}
		if done, err := parseDiag(buf[:n], take); done || err != nil {
			return err
		}
	}
}

// parseDiag reads one datagram of netlink messages. done says that it was the last.
func parseDiag(data []byte, take func(body []byte)) (done bool, err error) {
	for len(data) >= unix.SizeofNlMsghdr {
		size := binary.NativeEndian.Uint32(data)
		if size < unix.SizeofNlMsghdr || uint64(size) > uint64(len(data)) {
			return false, fmt.Errorf("a netlink message of %d bytes in %d", size, len(data))
		}
		body := data[unix.SizeofNlMsghdr:size]
		switch kind := binary.NativeEndian.Uint16(data[4:]); {
		case kind == unix.NLMSG_DONE:
			return true, nil
		case kind == unix.NLMSG_ERROR && len(body) >= 4:
			return false, unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
		case kind != unix.SOCK_DIAG_BY_FAMILY || len(body) < diagMessage:
			return false, fmt.Errorf("a netlink message of kind %d with %d bytes", kind, len(body))
		}
		take(body)
		next := (uint64(size) + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1)
		data = data[min(next, uint64(len(data))):]
	}
	return false, nil
}

func diagAddress(family byte, b []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16([16]byte(b[:16])).Unmap()
}
