package identity

import (
	"net/netip"
	"strings"
)

// InstanceName names a gateway pod by its address: one DNS label that fits a bus subject and a TLS server name, from which
// any peer finds the pod without a directory. 10.244.0.7 is "10-244-0-7"; an IPv6 address stands in full.
func InstanceName(addr netip.Addr) string {
	return strings.NewReplacer(".", "-", ":", "-").Replace(addr.Unmap().WithZone("").StringExpanded())
}
