package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// v2 makes a header of version 2.
func v2(command, of byte, rest string) string {
	return string(append(binary.BigEndian.AppendUint16([]byte(signatureV2+string([]byte{0x20 | command, of})), uint16(len(rest))), rest...))
}

const (
	tcp4 = "\xcb\x00\x71\x07\xc6\x33\x64\x09\xc3\xcb\x01\xbb" // 203.0.113.7:50123 to 198.51.100.9:443
	tcp6 = "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x09\xc3\xcb\x01\xbb"
	tlv  = "\xea\x00\x04vpce" // AWS's, of a VPC endpoint
)

func TestParse(t *testing.T) {
	const client4, client6 = "203.0.113.7:50123", "[2001:db8::7]:50123"
	v1 := func(words string) string { return "PROXY " + words + "\r\n" }
	mapped := "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xcb\x00\x71\x07" + tcp6[16:]
	for name, c := range map[string]struct {
		header string
		source string // "" for none
		err    string // ErrNone and ErrShort by their texts
	}{
		"v1 IPv4":              {v1("TCP4 203.0.113.7 198.51.100.9 50123 443"), client4, ""},
		"v1 IPv6":              {v1("TCP6 2001:db8::7 2001:db8::9 50123 443"), client6, ""},
		"v1 IPv6, long":        {v1("TCP6 2001:0db8:0000:0000:0000:0000:0000:0007 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 50123 65535"), client6, ""},
		"v1 IPv4 in IPv6":      {v1("TCP6 ::ffff:203.0.113.7 ::ffff:198.51.100.9 50123 443"), client4, ""},
		"v1 unknown":           {v1("UNKNOWN"), "", ""},
		"v1 unknown, with":     {v1("UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535"), "", ""},
		"v1 port 0":            {v1("TCP4 203.0.113.7 198.51.100.9 0 443"), "203.0.113.7:0", ""},
		"v1 other protocol":    {v1("UDP4 203.0.113.7 198.51.100.9 50123 443"), "", "not TCP4, TCP6 or UNKNOWN"},
		"v1 no protocol":       {v1(""), "", "not TCP4, TCP6 or UNKNOWN"},
		"v1 words missing":     {v1("TCP4 203.0.113.7 198.51.100.9 50123"), "", "two addresses and two ports"},
		"v1 a word more":       {v1("TCP4 203.0.113.7 198.51.100.9 50123 443 x"), "", "two addresses and two ports"},
		"v1 two spaces":        {v1("TCP4  203.0.113.7 198.51.100.9 50123 443"), "", "two addresses and two ports"},
		"v1 other family":      {v1("TCP4 2001:db8::7 2001:db8::9 50123 443"), "", "not of TCP4"},
		"v1 other family, 6":   {v1("TCP6 203.0.113.7 198.51.100.9 50123 443"), "", "not of TCP6"},
		"v1 zone":              {v1("TCP6 fe80::1%eth0 2001:db8::9 50123 443"), "", "not of TCP6"},
		"v1 leading zero":      {v1("TCP4 203.0.113.07 198.51.100.9 50123 443"), "", "not of TCP4"},
		"v1 name":              {v1("TCP4 example.com 198.51.100.9 50123 443"), "", "not of TCP4"},
		"v1 port too large":    {v1("TCP4 203.0.113.7 198.51.100.9 65536 443"), "", "a port"},
		"v1 port negative":     {v1("TCP4 203.0.113.7 198.51.100.9 -1 443"), "", "a port"},
		"v1 port with sign":    {v1("TCP4 203.0.113.7 198.51.100.9 +1 443"), "", "a port"},
		"v1 port with zero":    {v1("TCP4 203.0.113.7 198.51.100.9 01 443"), "", "a port"},
		"v1 bad destination":   {v1("TCP4 203.0.113.7 x 50123 443"), "", "not of TCP4"},
		"v1 LF alone":          {"PROXY UNKNOWN\n", "", "without CR"},
		"v1 LF at once":        {"PROXY \n", "", "without CR"},
		"v1 too long":          {"PROXY UNKNOWN " + strings.Repeat("x", 107), "", "longer than 107"},
		"v1 end one too far":   {"PROXY UNKNOWN " + strings.Repeat("x", 107-14-1) + "\r\n", "", "longer than 107"},
		"v1 as long as may be": {"PROXY UNKNOWN " + strings.Repeat("x", 107-14-2) + "\r\n", "", ""},
		"v1 cut":               {"PROXY TCP4 203.0.113.7", "", ErrShort.Error()},
		"v1 cut early":         {"PRO", "", ErrShort.Error()},
		"v1 lower case":        {"proxy UNKNOWN\r\n", "", ErrNone.Error()},

		"v2 IPv4":              {v2(1, 0x11, tcp4), client4, ""},
		"v2 IPv6":              {v2(1, 0x21, tcp6), client6, ""},
		"v2 IPv4 in IPv6":      {v2(1, 0x21, mapped), client4, ""},
		"v2 TLVs":              {v2(1, 0x11, tcp4+tlv), client4, ""},
		"v2 TLVs, nonsense":    {v2(1, 0x11, tcp4+"\xff\xff\xff\xff"), client4, ""},
		"v2 local":             {v2(0, 0x00, ""), "", ""},
		"v2 local, with":       {v2(0, 0x11, tcp4), "", ""},
		"v2 local, odd family": {v2(0, 0xff, "x"), "", ""},
		"v2 unspecified":       {v2(1, 0x00, tlv), "", ""},
		"v2 UDP":               {v2(1, 0x12, tcp4), "", ""},
		"v2 Unix":              {v2(1, 0x31, strings.Repeat("x", 216)), "", ""},
		"v2 Unix, short":       {v2(1, 0x31, tcp4), "", "too few"},
		"v2 IPv4, short":       {v2(1, 0x11, tcp4[:11]), "", "too few"},
		"v2 IPv6, short":       {v2(1, 0x21, tcp6[:35]), "", "too few"},
		"v2 other family":      {v2(1, 0x41, tcp4), "", "0x41 are unknown"},
		"v2 other transport":   {v2(1, 0x13, tcp4), "", "0x13 are unknown"},
		"v2 other command":     {v2(2, 0x11, tcp4), "", "command 2 is unknown"},
		"v2 other version":     {signatureV2 + "\x31\x11\x00\x0c" + tcp4, "", "the version is 3"},
		"v2 as long as may be": {v2(1, 0x11, tcp4+strings.Repeat("x", MaxLength-fixedV2-len(tcp4))), client4, ""},
		"v2 too long":          {v2(1, 0x11, tcp4+strings.Repeat("x", MaxLength-fixedV2-len(tcp4)+1)), "", "more than 4096"},
		"v2 too long, to come": {signatureV2 + "\x21\x11\xff\xff", "", "more than 4096"},
		"v2 cut":               {v2(1, 0x11, tcp4)[:20], "", ErrShort.Error()},
		"v2 cut in TLVs":       {v2(1, 0x11, tcp4+tlv)[:30], "", ErrShort.Error()},
		"v2 cut early":         {"\r\n\r\n", "", ErrShort.Error()},

		"nothing":       {"", "", ErrShort.Error()},
		"ClientHello":   {"\x16\x03\x01\x02\x00\x01", "", ErrNone.Error()},
		"plain HTTP":    {"POST / HTTP/1.1\r\n\r\n", "", ErrNone.Error()},
		"SSH":           {"SSH-2.0-x\r\n", "", ErrNone.Error()},
		"an empty line": {"\r\nGET", "", ErrNone.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			source, n, err := Parse([]byte(c.header))
			switch {
			case c.err != "":
				if err == nil || !strings.Contains(err.Error(), c.err) || source.IsValid() || n != 0 {
					t.Fatalf("%v, %d, %v; want error %q", source, n, err, c.err)
				}
				return
			case err != nil:
				t.Fatal(err)
			case n != len(c.header):
				t.Errorf("%d bytes of %d", n, len(c.header))
			case c.source == "" && source.IsValid(), c.source != "" && source != netip.MustParseAddrPort(c.source):
				t.Errorf("%v, want %q", source, c.source)
			}
			// Whatever follows changes nothing, and any part of it is too short.
			if again, m, err := Parse([]byte(c.header + "\x16\x03\x01")); again != source || m != n || err != nil {
				t.Errorf("with a ClientHello: %v, %d, %v", again, m, err)
			}
			for i := range len(c.header) {
				if _, _, err := Parse([]byte(c.header[:i])); err != ErrShort {
					t.Fatalf("the first %d bytes: %v", i, err)
				}
			}
		})
	}
}

// marshal writes a source as version 1 or 2 would.
func marshal(v byte, source netip.AddrPort) []byte {
	a, port := source.Addr(), source.Port()
	if v == 1 {
		family := "TCP4"
		if a.Is6() {
			family = "TCP6"
		}
		return fmt.Appendf(nil, "PROXY %s %s %s %d 443\r\n", family, a, a, port)
	}
	of := byte(0x11)
	if a.Is6() {
		of = 0x21
	}
	return []byte(v2(1, of, string(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(append(a.AsSlice(), a.AsSlice()...), port), 443))))
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"PROXY TCP4 203.0.113.7 198.51.100.9 50123 443\r\n", "PROXY TCP6 2001:db8::7 2001:db8::9 50123 443\r\n", "PROXY UNKNOWN\r\n",
		v2(1, 0x11, tcp4+tlv), v2(1, 0x21, tcp6), v2(0, 0, ""), v2(1, 0x31, strings.Repeat("x", 216)), "\x16\x03\x01", ""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		source, n, err := Parse(b)
		if err != nil {
			if n != 0 || source.IsValid() || err == ErrShort && len(b) >= MaxLength {
				t.Fatalf("%v, %d, %v of %d bytes", source, n, err, len(b))
			}
			return
		}
		if n <= 0 || n > min(len(b), MaxLength) {
			t.Fatalf("%d of %d bytes", n, len(b))
		}
		if _, _, err := Parse(b[:n-1]); err != ErrShort {
			t.Fatalf("a byte less: %v", err)
		}
		if !source.IsValid() {
			return
		}
		for _, v := range []byte{1, 2} {
			header := marshal(v, source)
			if again, m, err := Parse(header); again != source || m != len(header) || err != nil {
				t.Fatalf("%v becomes %v, %v in version %d", source, again, err, v)
			}
		}
	})
}

func TestNetworks(t *testing.T) {
	n, err := ParseNetworks([]string{"10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"})
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]bool{"10.1.2.3": true, "::ffff:10.1.2.3": true, "11.0.0.1": false, "2001:db8::1": true, "2001:db8::1%eth0": true,
		"2001:db9::1": false, "192.0.2.7": true, "192.0.2.8": false} {
		if n.Believe(netip.MustParseAddr(addr)) != want {
			t.Errorf("%s: %v", addr, !want)
		}
	}
	if n.Believe(netip.Addr{}) || Networks(nil).Believe(netip.MustParseAddr("10.0.0.1")) {
		t.Error("nobody is believed")
	}
	for _, bad := range []string{"10.0.0.0", "10.0.0.0/33", "x/8", ""} {
		if _, err := ParseNetworks([]string{bad}); err == nil || !strings.Contains(err.Error(), "CIDR") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestWarnings(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	var w Warnings
	from := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 5}
	for range 100 {
		w.Refused(log, "spec.service.proxyProtocol.networks of Gateway x", from)
		w.Unreadable(log, from, errors.New("nonsense"))
	}
	if got := out.String(); strings.Count(got, "level=WARN") != 2 || !strings.Contains(got, `field="spec.service.proxyProtocol.networks of Gateway x"`) || !strings.Contains(got, "nonsense") {
		t.Errorf("logged:\n%s", got)
	}
	var r rare
	now := time.Now()
	for i, c := range []struct {
		after time.Duration
		want  int
	}{{0, 1}, {1, 0}, {warnEvery - 1, 0}, {warnEvery, 3}, {warnEvery + 1, 0}} {
		if n := r.due(now.Add(c.after)); n != c.want {
			t.Errorf("%d: %d, want %d", i, n, c.want)
		}
	}
}
