// Package metadata knows the addresses at which clouds hand machines their secrets. Pods have no business there, nor has
// whoever follows an address that somebody else wrote.
package metadata

import "net/netip"

// LinkLocal are the networks of the link (RFC 3927, RFC 4291), among them the metadata services of most clouds.
var LinkLocal = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}

// Services are those that are elsewhere.
var Services = []netip.Prefix{
	netip.MustParsePrefix("168.63.129.16/32"),       // Azure
	netip.MustParsePrefix("100.100.100.200/32"),     // Alibaba Cloud
	netip.MustParsePrefix("192.0.0.192/32"),         // Oracle Cloud
	netip.MustParsePrefix("fd00:c1::a9fe:a9fe/128"), // Oracle Cloud
	netip.MustParsePrefix("fd00:ec2::/32"),          // Amazon: metadata, DNS, credentials of pods
	netip.MustParsePrefix("fd20:ce::254/128"),       // Google Cloud
}
