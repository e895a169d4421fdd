package admission

import (
	"fmt"
	"net/netip"
	"strings"

	"rendezvous.dev/rendezvous/wire/identity"
)

// InstanceName is identity.InstanceName.
func InstanceName(addr netip.Addr) string { return identity.InstanceName(addr) }

// InstanceAddr reads the address back. What InstanceName would not have written is an error.
func InstanceAddr(instance string) (netip.Addr, error) {
	sep := "."
	if strings.Count(instance, "-") == 7 {
		sep = ":"
	}
	addr, err := netip.ParseAddr(strings.ReplaceAll(instance, "-", sep))
	if err != nil || InstanceName(addr) != instance {
		return netip.Addr{}, fmt.Errorf("admission: %q names no gateway instance", instance)
	}
	return addr, nil
}
