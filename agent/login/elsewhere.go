package login

import (
	"fmt"
	"net/netip"
)

// Elsewhere says why a connection may be one of the agent's, which dials from loopback addresses: nil is for those of
// other machines alone, which may log in as the machine's administrator has it.
func Elsewhere(remote string) error {
	a, err := netip.ParseAddr(remote)
	if err != nil {
		return fmt.Errorf("%q is no address", clip(remote))
	}
	if a = a.Unmap(); a.IsLoopback() || a.IsUnspecified() {
		return fmt.Errorf("%s is an address of this machine", a)
	}
	return nil
}
