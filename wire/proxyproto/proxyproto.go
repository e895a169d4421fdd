// Package proxyproto reads the header with which a load balancer begins a connection to tell whose it is: the PROXY
// protocol, version 1 (a line of text) and 2 (binary), as HAProxy's doc/proxy-protocol.txt has it (revision of 2020/03/05).
//
//	v1  PROXY TCP4|TCP6 SOURCE DESTINATION SOURCE-PORT DESTINATION-PORT CR LF    at most 107 bytes
//	    PROXY UNKNOWN anything CR LF                                            no address: a health check
//	v2  signature (12)  version and command (1)  family and transport (1)  length (2)  addresses  TLVs
//	    command LOCAL: no address, a health check; PROXY: family IPv4, IPv6 or Unix, or none
//
// TLVs are skipped, whatever they hold. A header that names no TCP address leaves the connection its own.
package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

const (
	// MaxLength bounds a header, in bytes: version 2 could announce 64 KiB. Load balancers send some 200 bytes of TLVs, and
	// 2 KiB where they add a client's certificate.
	MaxLength = 4 << 10
	// maxV1 bounds a line of version 1, CR LF included (section 2.1).
	maxV1 = 107

	signatureV1 = "PROXY "
	signatureV2 = "\r\n\r\n\x00\r\nQUIT\n"
	// fixedV2 is the length of what comes before version 2's addresses.
	fixedV2 = 16
)

// ErrNone says that the bytes begin with no header; ErrShort, that they could, and more are needed to tell, or to read it.
var (
	ErrNone  = errors.New("proxyproto: no header")
	ErrShort = errors.New("proxyproto: the header is not complete")
)

// Parse reads the header that b begins with, n bytes long. The source is not valid where the header names none. The error is
// ErrNone, ErrShort, or says what is wrong with a header that b does begin with. No more than MaxLength bytes ever need be
// given, and where b is as long as that the error is not ErrShort.
func Parse(b []byte) (source netip.AddrPort, n int, err error) {
	switch {
	case begins(b, signatureV2):
		return parseV2(b)
	case begins(b, signatureV1):
		return parseV1(b)
	case begins([]byte(signatureV2), string(b)), begins([]byte(signatureV1), string(b)):
		return source, 0, ErrShort
	}
	return source, 0, ErrNone
}

func begins(b []byte, with string) bool { return len(b) >= len(with) && string(b[:len(with)]) == with }

func parseV1(b []byte) (source netip.AddrPort, n int, err error) {
	bad := func(what string) (netip.AddrPort, int, error) {
		return netip.AddrPort{}, 0, errors.New("proxyproto: version 1: " + what)
	}
	end := bytes.IndexByte(b[:min(len(b), maxV1)], '\n')
	switch {
	case end < 0 && len(b) < maxV1:
		return source, 0, ErrShort
	case end < 0:
		return bad(fmt.Sprintf("the line is longer than %d bytes", maxV1))
	case b[end-1] != '\r':
		return bad("the line ends without CR")
	}
	line := strings.Split(string(b[len(signatureV1):end-1]), " ")
	n = end + 1
	if line[0] == "UNKNOWN" {
		return source, n, nil
	}
	if line[0] != "TCP4" && line[0] != "TCP6" {
		return bad("the protocol is not TCP4, TCP6 or UNKNOWN")
	}
	if len(line) != 5 {
		return bad("the line has not two addresses and two ports")
	}
	var ends [2]netip.AddrPort
	for i := range ends {
		addr, err := netip.ParseAddr(line[1+i])
		if err != nil || addr.Zone() != "" || addr.Is4() != (line[0] == "TCP4") {
			return bad("an address is not of " + line[0])
		}
		port, err := strconv.ParseUint(line[3+i], 10, 16)
		if err != nil || len(line[3+i]) > 1 && line[3+i][0] == '0' {
			return bad("a port is not a number of 0 to 65535")
		}
		ends[i] = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	}
	return ends[0], n, nil
}

func parseV2(b []byte) (source netip.AddrPort, n int, err error) {
	bad := func(format string, args ...any) (netip.AddrPort, int, error) {
		return netip.AddrPort{}, 0, fmt.Errorf("proxyproto: version 2: "+format, args...)
	}
	if len(b) < fixedV2 {
		return source, 0, ErrShort
	}
	const (
		version              = 2
		local, proxy         = 0, 1
		none, ipv4, ipv6, un = 0, 1, 2, 3
		stream, datagram     = 1, 2
	)
	command, family, transport := b[12]&0xf, b[13]>>4, b[13]&0xf
	n = fixedV2 + int(binary.BigEndian.Uint16(b[14:]))
	switch {
	case b[12]>>4 != version:
		return bad("the version is %d", b[12]>>4)
	case command != local && command != proxy:
		return bad("command %d is unknown", command)
	case n > MaxLength:
		return bad("the header is %d bytes long, more than %d", n, MaxLength)
	case command == proxy && (family > un || transport > datagram):
		return bad("family and transport %#02x are unknown", b[13])
	}
	if length := [...]int{none: 0, ipv4: 12, ipv6: 36, un: 216}; command == proxy && n < fixedV2+length[family] {
		return bad("%d bytes are too few for its addresses", n)
	}
	if len(b) < n {
		return source, 0, ErrShort
	}
	if command == local || transport != stream {
		return source, n, nil
	}
	switch addresses := b[fixedV2:n]; family { // source, destination, source's port, destination's port
	case ipv4:
		source = netip.AddrPortFrom(netip.AddrFrom4([4]byte(addresses)), binary.BigEndian.Uint16(addresses[8:]))
	case ipv6:
		source = netip.AddrPortFrom(netip.AddrFrom16([16]byte(addresses)).Unmap(), binary.BigEndian.Uint16(addresses[32:]))
	}
	return source, n, nil
}
