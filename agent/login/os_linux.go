package login

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// kernelSockets reads the kernel's tables, in which a pod's containers see each other's sockets: by netlink, or where that
// is not to be had, from /proc/net.
func kernelSockets(addresses ...netip.Addr) ([]Socket, error) {
	all, err := diagSockets(unix.AF_INET, addresses)
	if err == nil {
		var six []Socket
		if six, err = diagSockets(unix.AF_INET6, addresses); err == nil {
			return append(all, six...), nil
		}
	}
	return procSockets(addresses)
}

func procSockets(addresses []netip.Addr) ([]Socket, error) {
	var all []Socket
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if os.IsNotExist(err) && table == "/proc/net/tcp6" {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		some, err := parseSockets(f, addresses)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", table, err)
		}
		all = append(all, some...)
	}
	return all, nil
}

// PeerUID gives the user at the other end of a Unix socket, by the kernel's word (SO_PEERCRED).
func PeerUID(conn net.Conn) (uint32, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return ^uint32(0), fmt.Errorf("a %T has no peer credentials", conn)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ^uint32(0), err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return ^uint32(0), err
	}
	if credErr != nil {
		return ^uint32(0), credErr
	}
	return cred.Uid, nil
}
