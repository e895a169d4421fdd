package client

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// rdpFile is a connection file's lines, in order.
type rdpFile struct{ lines []string }

// parseRDP reads a file in UTF-8 or, with its byte order mark, UTF-16.
func parseRDP(data []byte) (rdpFile, error) {
	text := string(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")))
	if rest, ok := bytes.CutPrefix(data, []byte{0xff, 0xfe}); ok {
		if len(rest)%2 != 0 {
			return rdpFile{}, errors.New("the connection file ends within a character")
		}
		units := make([]uint16, len(rest)/2)
		for i := range units {
			units[i] = binary.LittleEndian.Uint16(rest[2*i:])
		}
		text = string(utf16.Decode(units))
	}
	if !utf8.ValidString(text) {
		return rdpFile{}, errors.New("the connection file is neither UTF-8 nor UTF-16")
	}
	var f rdpFile
	for line := range strings.Lines(text) {
		if line = strings.TrimRight(line, "\r\n\x00"); line != "" {
			f.lines = append(f.lines, line)
		}
	}
	return f, nil
}

// splitLine takes name:type:value apart; names don't depend on case.
func splitLine(line string) (name, value string) {
	name, rest, _ := strings.Cut(line, ":")
	_, value, _ = strings.Cut(rest, ":")
	return strings.ToLower(strings.TrimSpace(name)), value
}

func (f rdpFile) get(name string) string {
	for _, l := range f.lines {
		if n, v := splitLine(l); n == name {
			return v
		}
	}
	return ""
}

// withoutGateway is the file for raw mode, where the gateway stands on the command line. Its signature would no longer
// fit, so that goes as well.
func (f rdpFile) withoutGateway() []byte {
	var b bytes.Buffer
	for _, l := range f.lines {
		name, _ := splitLine(l)
		if strings.HasPrefix(name, "gateway") || name == "signature" || name == "signscope" {
			continue
		}
		b.WriteString(l + "\r\n")
	}
	return b.Bytes()
}

// gatewayOptions are the options that FreeRDP 3 takes beside the file: none in TSGU mode. In the others the ticket is a
// bearer token, which no line of a file can say.
func (f rdpFile) gatewayOptions(mode, workspaceURL string) ([]string, error) {
	if mode == ModeTSGU {
		return nil, nil
	}
	host, ticket := f.get("gatewayhostname"), f.get("gatewayaccesstoken")
	if host == "" || ticket == "" {
		return nil, fmt.Errorf("the connection file names no gateway or carries no ticket, so there is no mode %s", mode)
	}
	if strings.ContainsAny(host+ticket, ", \t\"") {
		return nil, fmt.Errorf("gateway %q or its ticket can't stand in FreeRDP's command line", host)
	}
	if mode == ModeARM {
		if f.get("resourceprovider") != brokerapi.FormARM {
			return nil, errors.New("the workspace's broker makes no files for --mode arm: it is older than this rdv")
		}
		// It insists on reading a discovery document, from Microsoft unless told otherwise. Without a port it asks the
		// machine's /etc/services for one, which not every machine has.
		return []string{"/gateway:type:arm,bearer:" + ticket, "/azure:ad:" + withPort(strings.TrimPrefix(workspaceURL, "https://"))}, nil
	}
	return []string{"/gateway:url:wss://" + withPort(host) + pathRaw + ",bearer:" + ticket}, nil
}

// withPort adds HTTPS's port where none is given.
func withPort(host string) string {
	if _, _, err := net.SplitHostPort(host); err != nil {
		return net.JoinHostPort(host, "443")
	}
	return host
}

// pathRaw is where a gateway takes raw RDP in a WebSocket.
const pathRaw = "/rendezvous/v1/connect"

// isPathOf guards against a feed that would send us elsewhere.
func isPathOf(r brokerapi.Resource) bool {
	return strings.HasPrefix(r.RDPFile, brokerapi.PathResources+"/") && !strings.Contains(r.RDPFile, "..")
}
