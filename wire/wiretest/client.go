// Package wiretest is what tests of several packages need. Client is an RDP client's end of a session through a gateway, for
// benchmarks and fleet tests that need many: as trusting as tests may be, it may let pass what a real client refuses. Log is a
// log that is read while it is written.
package wiretest

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"strings"
	"sync"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// Client carries a session's bytes in WebSocket frames, and in MS-TSGU's packets where OpenTSGU made it. One goroutine may
// read and one may write.
type Client struct {
	*tls.Conn
	// Activity is the id that the gateway gave this connect.
	Activity string

	tsgu bool

	// The reader's.
	in   []byte // read, not decoded
	data []byte // decoded, not read; aliases buf
	buf  []byte
	ws   wsframe.Decoder
	ts   tsgu.Decoder
	msg  []byte // of a WebSocket message, not decoded

	writing sync.Mutex
}

const (
	// maxHead bounds an HTTP answer's head.
	maxHead = 8 << 10
	// clientPacket is the bytes in one frame: what fills a TLS record, about.
	clientPacket = 16 << 10
)

// maskKey need not be random here: the relay can't tell.
var maskKey = [4]byte{0x5a, 0xc3, 0x17, 0x88}

const upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// OpenRaw asks the gateway named host for a raw session.
func OpenRaw(c *tls.Conn, host, ticket string) (*Client, error) {
	fmt.Fprintf(c, "GET /rendezvous/v1/connect HTTP/1.1\r\nHost: %s\r\n%sAuthorization: Bearer %s\r\n\r\n", host, upgrade, ticket)
	rest, activity, err := Switched(c)
	if err != nil {
		return nil, err
	}
	return &Client{Conn: c, Activity: activity, in: rest}, nil
}

// OpenTSGU goes through MS-TSGU's handshake with the gateway named host. target is the pool's name.
func OpenTSGU(tc *tls.Conn, host, ticket, target string) (*Client, error) {
	fmt.Fprintf(tc, "RDG_OUT_DATA /remoteDesktopGateway/ HTTP/1.1\r\nHost: %s\r\n%s\r\n", host, upgrade)
	rest, activity, err := Switched(tc)
	if err != nil {
		return nil, err
	}
	c := &Client{Conn: tc, Activity: activity, in: rest, tsgu: true}
	create := &tsgu.TunnelCreate{Caps: tsgu.CapIdleTimeout | tsgu.CapServiceMessage}
	create.SetCookie(ticket)
	for _, step := range []struct {
		request interface{ Append([]byte) []byte }
		answer  tsgu.Type
		status  func(body []byte) (uint32, error)
	}{
		{&tsgu.HandshakeRequest{Major: 1, ExtAuth: tsgu.ExtAuthPAA}, tsgu.TypeHandshakeResponse, func(b []byte) (uint32, error) {
			p, err := tsgu.ParseHandshakeResponse(b)
			return p.Error, err
		}},
		{create, tsgu.TypeTunnelResponse, func(b []byte) (uint32, error) {
			p, err := tsgu.ParseTunnelResponse(b)
			return p.Status, err
		}},
		{&tsgu.TunnelAuth{ClientName: tsgu.NewText("test")}, tsgu.TypeTunnelAuthResponse, func(b []byte) (uint32, error) {
			p, err := tsgu.ParseTunnelAuthResponse(b)
			return p.Error, err
		}},
		{&tsgu.ChannelCreate{Port: 3389, Protocol: 3, Names: []tsgu.Text{tsgu.NewText(target)}}, tsgu.TypeChannelResponse, func(b []byte) (uint32, error) {
			p, err := tsgu.ParseChannelResponse(b)
			return p.Error, err
		}},
	} {
		if _, err := tc.Write(wsframe.AppendMaskedFrame(nil, wsframe.Binary, step.request.Append(nil), maskKey)); err != nil {
			return nil, err
		}
		ev, err := c.event()
		if err != nil {
			return nil, err
		}
		if ev.Type != step.answer {
			return nil, fmt.Errorf("the gateway answered with packet type %#x, want %#x (activity %s)", ev.Type, step.answer, activity)
		}
		if status, err := step.status(ev.Body); err != nil || status != 0 {
			return nil, fmt.Errorf("packet type %#x says status %#x, %v (activity %s)", ev.Type, status, err, activity)
		}
	}
	c.buf, c.in = nil, bytes.Clone(c.in)
	return c, nil
}

// Switched reads the head of an HTTP answer, which must be 101, and returns what came after it and the activity id.
func Switched(c *tls.Conn) (rest []byte, activity string, err error) {
	buf := make([]byte, 0, maxHead)
	for {
		n, err := c.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if head, rest, ok := bytes.Cut(buf, []byte("\r\n\r\n")); ok {
			if !bytes.HasPrefix(head, []byte("HTTP/1.1 101 ")) {
				status, _, _ := bytes.Cut(head, []byte("\r\n")) // ours say why in it
				return nil, "", fmt.Errorf("refused: %s", status)
			}
			for line := range strings.Lines(string(head)) {
				if name, value, _ := strings.Cut(line, ":"); strings.EqualFold(name, brokerapi.HeaderActivity) {
					activity = strings.TrimSpace(value)
				}
			}
			return bytes.Clone(rest), activity, nil
		}
		if err != nil {
			return nil, "", fmt.Errorf("no answer: %w", err)
		}
		if len(buf) == cap(buf) {
			return nil, "", fmt.Errorf("the answer's head is longer than %d bytes", maxHead)
		}
	}
}

// event is the next packet, or in raw mode payload dressed as DATA.
func (c *Client) event() (tsgu.Event, error) {
	for {
		for len(c.msg) > 0 {
			if !c.tsgu {
				ev := tsgu.Event{Type: tsgu.TypeData, Body: c.msg}
				c.msg = nil
				return ev, nil
			}
			n, ev, err := c.ts.Decode(c.msg)
			c.msg = c.msg[n:]
			if err != nil || ev.Type != tsgu.None {
				return ev, err
			}
		}
		if len(c.in) == 0 {
			if c.buf == nil {
				c.buf = make([]byte, 17<<10)
			}
			n, err := c.Conn.Read(c.buf)
			if n == 0 {
				return tsgu.Event{}, err
			}
			c.in = c.buf[:n]
		}
		n, ev, err := c.ws.Decode(c.in)
		c.in = c.in[n:]
		if err != nil {
			return tsgu.Event{}, err
		}
		switch ev.Op {
		case wsframe.Binary:
			c.msg = ev.Payload
		case wsframe.Close:
			code, reason := wsframe.ParseClose(ev.Payload)
			return tsgu.Event{}, fmt.Errorf("the gateway closed the session: %d %s", code, reason)
		}
	}
}

// Read gives the host's bytes.
func (c *Client) Read(p []byte) (int, error) {
	for len(c.data) == 0 {
		ev, err := c.event()
		if err != nil {
			return 0, err
		}
		if ev.Type == tsgu.TypeData {
			c.data = ev.Body
		}
	}
	n := copy(p, c.data)
	c.data = c.data[n:]
	return n, nil
}

var frames = sync.Pool{New: func() any { return new([]byte) }}

// Write sends bytes in packets of at most clientPacket, in one write.
func (c *Client) Write(p []byte) (int, error) {
	b, packet := frames.Get().(*[]byte), frames.Get().(*[]byte)
	defer frames.Put(b)
	defer frames.Put(packet)
	out := (*b)[:0]
	for rest := p; len(rest) > 0; {
		part := rest[:min(len(rest), clientPacket)]
		rest = rest[len(part):]
		if c.tsgu {
			*packet = tsgu.AppendData((*packet)[:0], part)
			part = *packet
		}
		out = wsframe.AppendMaskedFrame(out, wsframe.Binary, part, maskKey)
	}
	*b = out
	c.writing.Lock()
	defer c.writing.Unlock()
	if _, err := c.Conn.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close says good-bye as a client does.
func (c *Client) Close() error {
	c.Conn.Write(wsframe.AppendMaskedFrame(nil, wsframe.Close, wsframe.ClosePayload(wsframe.CloseNormal, ""), maskKey))
	return c.Conn.Close()
}
