// Package feed makes the documents that users' clients read: connection files (.rdp), signed as Windows' rdpsign signs
// them, and the list of resources as MS-TSWP XML. It is pure: the same input gives the same lines.
//
// Connection files are UTF-16LE with a byte-order mark and CRLF, as mstsc writes them itself; FreeRDP and Remmina read
// that too.
package feed

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// File says what goes into one connection file.
type File struct {
	Resource *model.Resource
	Gateway  *model.Gateway
	// Address is the name that the client asks the gateway for, and that the host's certificate carries.
	Address string
	// Account is what the session logs in to on the host; empty where the host asks for it.
	Account string
	// Verified says that the host's certificate is of an issuer that the pool names, so that a client may insist on it.
	Verified bool
	// Ticket is the secret that the client shows to the gateway. It is not covered by the signature.
	Ticket string
	// ARM makes a file for clients that ask the gateway first which gateway is to serve them (FreeRDP 3's type:arm). They
	// need the ticket as bearer token, too, which no line of a file can say.
	ARM bool
	// Properties are the pool's own lines; they replace those of the same name that they may replace.
	Properties []string
}

// reserved are the names that no property may set, beside all that begin with "gateway" and "remoteapplication": the
// address, what is secret or signed, the redirections, which are the resource's policy, what has the client verify the host
// and keep credentials from others, and what a session starts. The API refuses them; a pool of before that is served
// without.
var reserved = []string{
	"full address", "alternate full address", "server port", "signature", "signscope", "password 51", "pcb", "loadbalanceinfo",
	"audiomode", "audiocapturemode", "redirectclipboard", "redirectdrives", "redirectprinters", "redirectsmartcards", "redirectcomports",
	"redirectposdevices", "drivestoredirect", "devicestoredirect", "usbdevicestoredirect",
	"authentication level", "enablecredsspsupport", "negotiate security layer", "enablerdsaadauth", "kdcproxyname", "rdgiskdcproxy",
	"resourceprovider", "alternate shell", "shell working directory", "disableremoteappcapscheck",
}

// Lines gives the file's lines, in an order that is always the same.
func Lines(f File) []string {
	r := f.Resource
	var lines []string
	text := func(name, value string) { lines = append(lines, name+":s:"+printable(value)) }
	number := func(name string, value int) { lines = append(lines, fmt.Sprintf("%s:i:%d", name, value)) }
	flag := func(name string, on bool) { number(name, map[bool]int{true: 1}[on]) }

	text("full address", f.Address)
	// Always there, because clients prefer it: a file without could have one added, signature and all.
	text("alternate full address", f.Address)
	number("server port", 3389)
	text("gatewayhostname", net.JoinHostPort(f.Gateway.Hostname, strconv.Itoa(int(f.Gateway.Port))))
	number("gatewayusagemethod", 1)        // always, never try a direct connection
	number("gatewayprofileusagemethod", 1) // by these lines, not by the client's defaults
	number("gatewaycredentialssource", 5)  // by the access token
	if f.ARM {
		text("resourceprovider", "arm")
		// The client insists on both, and reads neither: the ticket says what it is about.
		text("loadbalanceinfo", "rdv:"+r.Name)
		if r.Type != model.RemoteApp {
			text("remoteapplicationprogram", "||"+r.Name)
		}
		// Without, newer ones want to be told the host's key for a password. The gateway has them fall back to TLS.
		number("enablerdsaadauth", 1)
	}
	// Where the pool's issuer gives its hosts certificates, a wrong one ends the connect; elsewhere the user is warned.
	number("authentication level", map[bool]int{true: 1, false: 2}[f.Verified])
	number("enablecredsspsupport", 1)
	number("negotiate security layer", 1)
	number("autoreconnection enabled", 1)
	if r.Type == model.RemoteApp {
		number("remoteapplicationmode", 1)
		text("remoteapplicationname", r.DisplayName)
		text("remoteapplicationprogram", r.Program)
		text("remoteapplicationcmdline", r.Arguments)
		number("disableremoteappcapscheck", 1)
	}
	number("audiomode", map[bool]int{true: 0, false: 2}[r.Redirection.Audio]) // here, or not at all
	flag("audiocapturemode", r.Redirection.Microphone)
	flag("redirectclipboard", r.Redirection.Clipboard)
	flag("redirectdrives", r.Redirection.Drives)
	text("drivestoredirect", map[bool]string{true: "*"}[r.Redirection.Drives])
	text("devicestoredirect", "")
	flag("redirectprinters", r.Redirection.Printers)
	flag("redirectsmartcards", r.Redirection.SmartCards)
	flag("redirectcomports", r.Redirection.Ports)
	for _, p := range f.Properties {
		lines = set(lines, printable(p))
	}
	if f.Account != "" { // whatever the pool's properties say: the host lets in nobody else
		lines = set(lines, "username:s:"+printable(f.Account))
		lines = set(lines, "prompt for credentials:i:0")
		// FreeRDP and Remmina read this line, and would ask for a password without it; mstsc knows none of that name.
		lines = set(lines, "password:s:"+brokerapi.NotAPassword)
	}
	text("gatewayaccesstoken", f.Ticket)
	return lines
}

// Reserved says whether a pool's property is one that Rendezvous sets.
func Reserved(property string) bool {
	name := nameOf(property)
	return strings.HasPrefix(name, "gateway") || strings.HasPrefix(name, "remoteapplication") || slices.Contains(reserved, name)
}

// set replaces the line of the same name, or adds one. Blanks in the name are one each, as clients write them.
func set(lines []string, line string) []string {
	name, value, ok := strings.Cut(line, ":")
	if !ok || Reserved(line) {
		return lines
	}
	line = strings.Join(strings.Fields(name), " ") + ":" + value
	name = nameOf(line)
	if i := slices.IndexFunc(lines, func(l string) bool { return nameOf(l) == name }); i >= 0 {
		lines[i] = line
		return lines
	}
	return append(lines, line)
}

// nameOf is a line's name as it is compared.
func nameOf(line string) string {
	name, _, _ := strings.Cut(line, ":")
	return strings.ToLower(strings.Join(strings.Fields(name), " "))
}

// printable keeps a value on its line, and read in the direction that it has.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control) {
			return -1
		}
		return r
	}, s)
}

// Bits of TUNNEL_AUTH_RESPONSE's redirection flags (MS-TSGU 2.2.5.3.8): what the gateway tells the client not to share.
const (
	disableDrives    = 0x01
	disablePrinters  = 0x02
	disablePorts     = 0x04
	disableClipboard = 0x08
	disablePnP       = 0x10
)

// RedirectFlags is a resource's policy as the gateway tells it to clients. FreeRDP 3 goes by them, whatever an edited
// file says (mstsc should, and was not tried). Others don't: FreeRDP 2 (and so Remmina of Debian 12) looks at its own switches alone, and no client is told so
// in raw and ARM mode. What must not be shared the host has to refuse. Flags say nothing of audio, microphone and smart cards.
// Plug-and-play devices have no policy, and are never shared.
func RedirectFlags(r model.Redirection) uint32 {
	flags := uint32(disablePnP)
	for _, p := range []struct {
		on  bool
		bit uint32
	}{{r.Drives, disableDrives}, {r.Printers, disablePrinters}, {r.Ports, disablePorts}, {r.Clipboard, disableClipboard}} {
		if !p.on {
			flags |= p.bit
		}
	}
	return flags
}

// Encode turns lines into the file's bytes.
func Encode(lines []string) []byte {
	return append([]byte{0xff, 0xfe}, utf16le(strings.Join(lines, "\r\n")+"\r\n")...)
}

func utf16le(s string) []byte {
	units := utf16.Encode([]rune(s))
	b := make([]byte, 0, 2*len(units))
	for _, u := range units {
		b = append(b, byte(u), byte(u>>8))
	}
	return b
}
