//go:build !linux

package login

import (
	"errors"
	"net"
	"net/netip"
)

// errNotHere says that this system has neither PAM nor a table of sockets that we read.
var errNotHere = errors.New("login by connection is for Linux session hosts")

// Listeners is for Linux.
func Listeners(netip.AddrPort) (Listening, error) { return Listening{}, errNotHere }

func kernelSockets(...netip.Addr) ([]Socket, error) { return nil, errNotHere }

// PeerUID is known on Linux only.
func PeerUID(net.Conn) (uint32, error) { return ^uint32(0), errNotHere }
