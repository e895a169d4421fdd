package admission

import (
	"fmt"
	"net/netip"
	"strings"
)

// InstanceName names a gateway pod by its address: one DNS label that fits a bus subject and a TLS server name, from which
// any peer finds the pod without a directory. 10.244.0.7 is "10-244-0-7"; an IPv6 address stands in full.
func InstanceName(addr netip.Addr) string {
	return strings.NewReplacer(".", "-", ":", "-").Replace(addr.Unmap().WithZone("").StringExpanded())
}

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
