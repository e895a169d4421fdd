package control

import (
	"errors"
	"fmt"
	"net/netip"
)

// terminal is one session of Windows's Remote Desktop Services, as the WTS API tells it (wtsapi32.h).
type terminal struct {
	id uint32
	// state is of WTS_CONNECTSTATE_CLASS.
	state uint32
	// rdp says that its client speaks RDP; a console's doesn't.
	rdp bool
	// client is the address that the RDP server saw, invalid where it doesn't say. The agent dials from a loopback address.
	client netip.Addr
	user   string
}

const (
	wtsActive = 0
	// addressFamilyINET and -INET6 are WTS_CLIENT_ADDRESS.AddressFamily: Windows's AF_INET and AF_INET6.
	addressFamilyINET, addressFamilyINET6 = 2, 23
)

// parseClientAddress reads a WTS_CLIENT_ADDRESS: an IPv4 address is at offset 2 of its 20 bytes, an IPv6 one at 0.
func parseClientAddress(family uint32, address [20]byte) netip.Addr {
	switch family {
	case addressFamilyINET:
		return netip.AddrFrom4([4]byte(address[2:6]))
	case addressFamilyINET6:
		return netip.AddrFrom16([16]byte(address[:16])).Unmap()
	}
	return netip.Addr{}
}

// onlyTerminal finds the one session that an RDP client on this machine, which the agent is, is connected to. Windows
// doesn't say by which of several connections a session is seen, so with several it is nobody's guess.
func onlyTerminal(all []terminal) (terminal, error) {
	var found []terminal
	for _, t := range all {
		if t.state == wtsActive && t.rdp && t.user != "" && (!t.client.IsValid() || t.client.IsLoopback() || t.client.IsUnspecified()) {
			found = append(found, t)
		}
	}
	switch len(found) {
	case 0:
		return terminal{}, ErrNoDesktop
	case 1:
		return found[0], nil
	}
	return terminal{}, fmt.Errorf("%d sessions are connected on this machine, and Windows does not tell which is whose: %w", len(found), errAmbiguous)
}

var errAmbiguous = errors.New("use quser and logoff or msg there")
