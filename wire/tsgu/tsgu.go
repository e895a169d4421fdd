// Package tsgu is the packets of MS-TSGU over HTTP, the protocol in which RDP clients speak to a gateway.
//
// All numbers are little-endian, all text is UTF-16LE. Every packet opens with 8 bytes:
//
//	u16 type | u16 reserved | u32 length of the packet, these 8 bytes included
//
//	type                     body                                                                        from
//	 1 HANDSHAKE_REQUEST     u8 major=1, u8 minor=0, u16 clientVersion=0, u16 extAuth                     client
//	 2 HANDSHAKE_RESPONSE    u32 error, u8 major=1, u8 minor=0, u16 serverVersion=0, u16 extAuth          server
//	 4 TUNNEL_CREATE         u32 caps, u16 fields, u16 reserved, [2: u64 context], [1: u16 cb, PAA cookie] client
//	 5 TUNNEL_RESPONSE       u16 version, u32 status, u16 fields, u16 reserved, [1: u32 id], [2: u32 caps] server
//	 6 TUNNEL_AUTH           u16 fields, u16 cb, client name, [1: statement of health]                    client
//	 7 TUNNEL_AUTH_RESPONSE  u32 error, u16 fields, u16 reserved, [1: u32 redirection], [2: u32 idle]     server
//	 8 CHANNEL_CREATE        u8 names, u8 alternate names, u16 port, u16 protocol=3, (u16 cb, name)...    client
//	 9 CHANNEL_RESPONSE      u32 error, u16 fields, u16 reserved, [1: u32 channel id]                     server
//	 A DATA                  u16 cb, bytes                                                                both
//	 B SERVICE_MESSAGE       u16 cb, text                                                                 server
//	 D KEEPALIVE             nothing                                                                      both
//	10 CLOSE_CHANNEL         u32 status                                                                   both
//	11 CLOSE_CHANNEL_RESPONSE u32 status                                                                  both
//
// A number in brackets is the bit in fields (a bit mask, not a count) that says that the part is there.
//
// Flow: HANDSHAKE, TUNNEL_CREATE, TUNNEL_AUTH, CHANNEL_CREATE, each a request and its response; then DATA both ways until
// CLOSE_CHANNEL. KEEPALIVE only while the channel is open; it is never answered, for clients echo each one they get.
//
// Versions: major 1, minor 0. A higher major version is answered with an error, other differences are ignored. What a
// newer client appends to a known packet is kept as Rest and not looked at.
//
// Source: [MS-TSGU] 2.2.10 and 3.3.5, and what FreeRDP, mstsc and IronRDP are seen to send.
package tsgu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf16"
)

// Type says what a packet is.
type Type uint16

// The packet types. None stands in an Event that has nothing to tell.
const (
	None                     Type = 0
	TypeHandshakeRequest     Type = 0x01
	TypeHandshakeResponse    Type = 0x02
	TypeExtendedAuth         Type = 0x03
	TypeTunnelCreate         Type = 0x04
	TypeTunnelResponse       Type = 0x05
	TypeTunnelAuth           Type = 0x06
	TypeTunnelAuthResponse   Type = 0x07
	TypeChannelCreate        Type = 0x08
	TypeChannelResponse      Type = 0x09
	TypeData                 Type = 0x0a
	TypeServiceMessage       Type = 0x0b
	TypeReauth               Type = 0x0c
	TypeKeepAlive            Type = 0x0d
	TypeCloseChannel         Type = 0x10
	TypeCloseChannelResponse Type = 0x11
)

// Ways to authenticate beside HTTP's own (HANDSHAKE extAuth, a bit mask).
const (
	ExtAuthSmartCard uint16 = 1
	ExtAuthPAA       uint16 = 2 // a cookie in TUNNEL_CREATE: our ticket
	ExtAuthSSPINTLM  uint16 = 4
	ExtAuthBearer    uint16 = 8 // FreeRDP's own
)

// Capabilities of TUNNEL_CREATE and TUNNEL_RESPONSE.
const (
	CapQuarantine     uint32 = 0x01
	CapIdleTimeout    uint32 = 0x02
	CapConsentSign    uint32 = 0x04
	CapServiceMessage uint32 = 0x08
	CapReauth         uint32 = 0x10
	CapUDP            uint32 = 0x20
)

// Status codes. Responses carry HRESULTs, whose top bit says failure: FreeRDP takes one without it for success.
const (
	StatusOK                     uint32 = 0
	ErrInternal                  uint32 = 0x800759d8 // E_PROXY_INTERNALERROR
	ErrResourceAccessDenied      uint32 = 0x800759da // E_PROXY_RAP_ACCESSDENIED: not to this target
	ErrConnectFailed             uint32 = 0x800759dd // E_PROXY_TS_CONNECTFAILED: the target doesn't answer
	ErrMaxConnections            uint32 = 0x800759e6 // E_PROXY_MAXCONNECTIONSREACHED
	ErrNotSupported              uint32 = 0x800759e8 // E_PROXY_NOTSUPPORTED
	ErrCookieBadPacket           uint32 = 0x800759f7 // E_PROXY_COOKIE_BADPACKET
	ErrCookieDenied              uint32 = 0x800759f8 // E_PROXY_COOKIE_AUTHENTICATION_ACCESS_DENIED
	ErrUnsupportedAuthentication uint32 = 0x800759f9 // E_PROXY_UNSUPPORTED_AUTHENTICATION_METHOD

	// Reasons of CLOSE_CHANNEL are plain Windows errors.
	CloseSessionTimeout uint32 = 0x59f6 // E_PROXY_SESSIONTIMEOUT, to a client with CapIdleTimeout
	CloseAborted        uint32 = 0x04d4 // ERROR_CONNECTION_ABORTED: an administrator, a drain
	CloseGraceful       uint32 = 0x04ca // ERROR_GRACEFUL_DISCONNECT
	CloseUnpaired       uint32 = 0x03e3 // ERROR_OPERATION_ABORTED: an OUT channel whose IN channel did not come
)

const (
	// HeaderLen is the length of a packet's header, in bytes.
	HeaderLen = 8
	// DataHeaderLen is what stands before the bytes of a DATA packet.
	DataHeaderLen = HeaderLen + 2
	// MaxData bounds the bytes of one DATA packet.
	MaxData = 0xffff
	// MaxBody bounds the body of every other packet: TUNNEL_CREATE with the longest cookie that its u16 can tell needs 65,553.
	MaxBody = 66 << 10
	// maxNames is what CHANNEL_CREATE may list: 50 names, 3 alternates.
	maxNames, maxAlternates = 50, 3
)

// Error says which packet broke which rule.
type Error struct {
	Type   Type
	Reason string
}

func (e *Error) Error() string {
	return fmt.Sprintf("tsgu: packet type %#x: %s", uint16(e.Type), e.Reason)
}

var errShort = errors.New("it ends before its last field")

// Text is UTF-16LE as it stands in a packet, its closing NUL included.
type Text []byte

// NewText encodes s and closes it with a NUL.
func NewText(s string) Text {
	var t Text
	for _, u := range utf16.AppendRune(utf16.Encode([]rune(s)), 0) {
		t = binary.LittleEndian.AppendUint16(t, u)
	}
	return t
}

// String decodes up to the first NUL. A broken surrogate or an odd last byte becomes U+FFFD, or is dropped.
func (t Text) String() string {
	u := make([]uint16, 0, len(t)/2)
	for i := 0; i+1 < len(t); i += 2 {
		c := binary.LittleEndian.Uint16(t[i:])
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}

// HandshakeRequest opens the conversation.
type HandshakeRequest struct {
	Major, Minor  uint8
	ClientVersion uint16
	ExtAuth       uint16
	Rest          []byte
}

// HandshakeResponse answers it.
type HandshakeResponse struct {
	Error         uint32
	Major, Minor  uint8
	ServerVersion uint16
	ExtAuth       uint16
	Rest          []byte
}

// Field bits of TUNNEL_CREATE.
const (
	fieldCookie = 0x1
	fieldReauth = 0x2
)

// TunnelCreate asks for a tunnel and carries the cookie.
type TunnelCreate struct {
	Caps          uint32
	Fields        uint16
	Reserved      uint16
	ReauthContext uint64 // where Fields has 2
	Cookie        Text   // where Fields has 1
	Rest          []byte
}

// HasCookie says that a PAA cookie came along.
func (p *TunnelCreate) HasCookie() bool { return p.Fields&fieldCookie != 0 }

// SetCookie puts a ticket in.
func (p *TunnelCreate) SetCookie(ticket string) {
	p.Fields |= fieldCookie
	p.Cookie = NewText(ticket)
}

// TunnelResponse answers it. The fields that we send are the tunnel's id and our capabilities.
type TunnelResponse struct {
	ServerVersion uint16
	Status        uint32
	Fields        uint16
	Reserved      uint16
	TunnelID      uint32 // where Fields has 1
	Caps          uint32 // where Fields has 2
	Rest          []byte
}

// TunnelAuth names the client's machine.
type TunnelAuth struct {
	Fields     uint16
	ClientName Text
	Rest       []byte // with the statement of health, where Fields has 1: quarantine is not offered, so it isn't read
}

// TunnelAuthResponse answers it.
type TunnelAuthResponse struct {
	Error       uint32
	Fields      uint16
	Reserved    uint16
	Redirection uint32 // where Fields has 1
	IdleMinutes uint32 // where Fields has 2
	Rest        []byte
}

// ChannelCreate names the target, in order of preference.
type ChannelCreate struct {
	Port       uint16
	Protocol   uint16
	Names      []Text
	Alternates []Text
	Rest       []byte
}

// ChannelResponse answers it.
type ChannelResponse struct {
	Error     uint32
	Fields    uint16
	Reserved  uint16
	ChannelID uint32 // where Fields has 1
	Rest      []byte
}

// ServiceMessage is text for the user, while the channel is open.
type ServiceMessage struct{ Message Text }

// CloseChannel ends the channel; Response makes it the answer.
type CloseChannel struct {
	Response bool
	Status   uint32
	Rest     []byte
}

// reader takes fields off a body; after the first that isn't there, it stays failed.
type reader struct {
	b   []byte
	err error
}

func (r *reader) bytes(n int) []byte {
	if r.err != nil || len(r.b) < n {
		r.b, r.err = nil, errShort
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) u8() uint8 {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.bytes(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (r *reader) text() Text { return r.bytes(int(r.u16())) }

// end hands over what is left and the verdict.
func (r *reader) end(t Type, rest *[]byte) error {
	if r.err != nil {
		return &Error{Type: t, Reason: r.err.Error()}
	}
	*rest = r.b
	return nil
}

// ParseHandshakeRequest reads a body. Like every Parse function here, what it returns aliases the body.
func ParseHandshakeRequest(body []byte) (p HandshakeRequest, err error) {
	r := reader{b: body}
	p.Major, p.Minor, p.ClientVersion, p.ExtAuth = r.u8(), r.u8(), r.u16(), r.u16()
	return p, r.end(TypeHandshakeRequest, &p.Rest)
}

// ParseHandshakeResponse reads a body.
func ParseHandshakeResponse(body []byte) (p HandshakeResponse, err error) {
	r := reader{b: body}
	p.Error, p.Major, p.Minor, p.ServerVersion, p.ExtAuth = r.u32(), r.u8(), r.u8(), r.u16(), r.u16()
	return p, r.end(TypeHandshakeResponse, &p.Rest)
}

// ParseTunnelCreate reads a body.
func ParseTunnelCreate(body []byte) (p TunnelCreate, err error) {
	r := reader{b: body}
	p.Caps, p.Fields, p.Reserved = r.u32(), r.u16(), r.u16()
	if p.Fields&fieldReauth != 0 {
		p.ReauthContext = r.u64()
	}
	if p.Fields&fieldCookie != 0 {
		p.Cookie = r.text()
	}
	return p, r.end(TypeTunnelCreate, &p.Rest)
}

// ParseTunnelResponse reads a body.
func ParseTunnelResponse(body []byte) (p TunnelResponse, err error) {
	r := reader{b: body}
	p.ServerVersion, p.Status, p.Fields, p.Reserved = r.u16(), r.u32(), r.u16(), r.u16()
	if p.Fields&1 != 0 {
		p.TunnelID = r.u32()
	}
	if p.Fields&2 != 0 {
		p.Caps = r.u32()
	}
	return p, r.end(TypeTunnelResponse, &p.Rest)
}

// ParseTunnelAuth reads a body.
func ParseTunnelAuth(body []byte) (p TunnelAuth, err error) {
	r := reader{b: body}
	p.Fields, p.ClientName = r.u16(), r.text()
	return p, r.end(TypeTunnelAuth, &p.Rest)
}

// ParseTunnelAuthResponse reads a body.
func ParseTunnelAuthResponse(body []byte) (p TunnelAuthResponse, err error) {
	r := reader{b: body}
	p.Error, p.Fields, p.Reserved = r.u32(), r.u16(), r.u16()
	if p.Fields&1 != 0 {
		p.Redirection = r.u32()
	}
	if p.Fields&2 != 0 {
		p.IdleMinutes = r.u32()
	}
	return p, r.end(TypeTunnelAuthResponse, &p.Rest)
}

// ParseChannelCreate reads a body. It demands 1 to 50 names and at most 3 alternates.
func ParseChannelCreate(body []byte) (p ChannelCreate, err error) {
	r := reader{b: body}
	names, alternates := int(r.u8()), int(r.u8())
	p.Port, p.Protocol = r.u16(), r.u16()
	if r.err == nil && (names < 1 || names > maxNames || alternates > maxAlternates) {
		return p, &Error{TypeChannelCreate, fmt.Sprintf("it lists %d names and %d alternates; 1 to %d and at most %d are taken", names, alternates, maxNames, maxAlternates)}
	}
	for range names {
		p.Names = append(p.Names, r.text())
	}
	for range alternates {
		p.Alternates = append(p.Alternates, r.text())
	}
	return p, r.end(TypeChannelCreate, &p.Rest)
}

// ParseChannelResponse reads a body.
func ParseChannelResponse(body []byte) (p ChannelResponse, err error) {
	r := reader{b: body}
	p.Error, p.Fields, p.Reserved = r.u32(), r.u16(), r.u16()
	if p.Fields&1 != 0 {
		p.ChannelID = r.u32()
	}
	return p, r.end(TypeChannelResponse, &p.Rest)
}

// ParseServiceMessage reads a body.
func ParseServiceMessage(body []byte) (p ServiceMessage, err error) {
	r := reader{b: body}
	p.Message = r.text()
	var rest []byte
	return p, r.end(TypeServiceMessage, &rest)
}

// ParseCloseChannel reads the body of CLOSE_CHANNEL or, with response, of its answer.
func ParseCloseChannel(body []byte, response bool) (p CloseChannel, err error) {
	r := reader{b: body}
	p.Response, p.Status = response, r.u32()
	return p, r.end(p.packetType(), &p.Rest)
}

// begin appends a header whose length finish fills in.
func begin(dst []byte, t Type) []byte {
	dst = binary.LittleEndian.AppendUint16(dst, uint16(t))
	return append(dst, 0, 0, 0, 0, 0, 0)
}

func finish(dst []byte, start int) []byte {
	binary.LittleEndian.PutUint32(dst[start+4:], uint32(len(dst)-start))
	return dst
}

func appendText(dst []byte, t Text) []byte {
	return append(binary.LittleEndian.AppendUint16(dst, uint16(len(t))), t...)
}

var le = binary.LittleEndian

// Append appends the whole packet.
func (p *HandshakeRequest) Append(dst []byte) []byte {
	b := append(begin(dst, TypeHandshakeRequest), p.Major, p.Minor)
	b = le.AppendUint16(le.AppendUint16(b, p.ClientVersion), p.ExtAuth)
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *HandshakeResponse) Append(dst []byte) []byte {
	b := append(le.AppendUint32(begin(dst, TypeHandshakeResponse), p.Error), p.Major, p.Minor)
	b = le.AppendUint16(le.AppendUint16(b, p.ServerVersion), p.ExtAuth)
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *TunnelCreate) Append(dst []byte) []byte {
	b := le.AppendUint32(begin(dst, TypeTunnelCreate), p.Caps)
	b = le.AppendUint16(le.AppendUint16(b, p.Fields), p.Reserved)
	if p.Fields&fieldReauth != 0 {
		b = le.AppendUint64(b, p.ReauthContext)
	}
	if p.Fields&fieldCookie != 0 {
		b = appendText(b, p.Cookie)
	}
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *TunnelResponse) Append(dst []byte) []byte {
	b := le.AppendUint32(le.AppendUint16(begin(dst, TypeTunnelResponse), p.ServerVersion), p.Status)
	b = le.AppendUint16(le.AppendUint16(b, p.Fields), p.Reserved)
	if p.Fields&1 != 0 {
		b = le.AppendUint32(b, p.TunnelID)
	}
	if p.Fields&2 != 0 {
		b = le.AppendUint32(b, p.Caps)
	}
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *TunnelAuth) Append(dst []byte) []byte {
	b := appendText(le.AppendUint16(begin(dst, TypeTunnelAuth), p.Fields), p.ClientName)
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *TunnelAuthResponse) Append(dst []byte) []byte {
	b := le.AppendUint32(begin(dst, TypeTunnelAuthResponse), p.Error)
	b = le.AppendUint16(le.AppendUint16(b, p.Fields), p.Reserved)
	if p.Fields&1 != 0 {
		b = le.AppendUint32(b, p.Redirection)
	}
	if p.Fields&2 != 0 {
		b = le.AppendUint32(b, p.IdleMinutes)
	}
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *ChannelCreate) Append(dst []byte) []byte {
	b := append(begin(dst, TypeChannelCreate), byte(len(p.Names)), byte(len(p.Alternates)))
	b = le.AppendUint16(le.AppendUint16(b, p.Port), p.Protocol)
	for _, list := range [][]Text{p.Names, p.Alternates} {
		for _, name := range list {
			b = appendText(b, name)
		}
	}
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *ChannelResponse) Append(dst []byte) []byte {
	b := le.AppendUint32(begin(dst, TypeChannelResponse), p.Error)
	b = le.AppendUint16(le.AppendUint16(b, p.Fields), p.Reserved)
	if p.Fields&1 != 0 {
		b = le.AppendUint32(b, p.ChannelID)
	}
	return finish(append(b, p.Rest...), len(dst))
}

// Append appends the whole packet.
func (p *ServiceMessage) Append(dst []byte) []byte {
	return finish(appendText(begin(dst, TypeServiceMessage), p.Message), len(dst))
}

func (p *CloseChannel) packetType() Type {
	if p.Response {
		return TypeCloseChannelResponse
	}
	return TypeCloseChannel
}

// Append appends the whole packet.
func (p *CloseChannel) Append(dst []byte) []byte {
	b := le.AppendUint32(begin(dst, p.packetType()), p.Status)
	return finish(append(b, p.Rest...), len(dst))
}

// AppendKeepAlive appends a KEEPALIVE.
func AppendKeepAlive(dst []byte) []byte { return finish(begin(dst, TypeKeepAlive), len(dst)) }

// PutDataHeader writes what stands before n bytes of DATA to the front of b, DataHeaderLen bytes. n is at most MaxData.
func PutDataHeader(b []byte, n int) {
	_ = b[DataHeaderLen-1]
	le.PutUint32(b, uint32(TypeData))
	le.PutUint32(b[4:], uint32(DataHeaderLen+n))
	le.PutUint16(b[8:], uint16(n))
}

// AppendData appends a DATA packet. data is at most MaxData bytes.
func AppendData(dst, data []byte) []byte {
	var h [DataHeaderLen]byte
	PutDataHeader(h[:], len(data))
	return append(append(dst, h[:]...), data...)
}
