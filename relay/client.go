package relay

import (
	"errors"
	"io"
	"time"

	"rendezvous.dev/rendezvous/wire/chunked"
	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// client is the client's leg with its framing: WebSocket, TSGU inside it, or the legacy form of TSGU, whose packets come
// in chunks on one connection and leave as they are on another.
type client struct {
	*leg      // what is written to
	from *leg // what is read: the same one, but for the legacy form
	framing
	// What the client's TSGU capabilities allow.
	serviceMessages bool
	idleTimeouts    bool

	// Owned by whichever goroutine reads the client.
	ws     wsframe.Decoder
	chunks chunked.Decoder
	ts     tsgu.Decoder

	// Before the channel is open only: bytes read, payload of them, and where they stand.
	buf, in, payload []byte
}

func newClient(to, from *leg, f framing) *client {
	return &client{leg: to, from: from, framing: f, ws: wsframe.Decoder{Masked: true}}
}

func (c *client) SetDeadline(t time.Time) error {
	return errors.Join(c.from.SetReadDeadline(t), c.leg.SetWriteDeadline(t))
}

// Close says good-bye where it can and closes both channels.
func (c *client) Close() error {
	err := c.leg.Close()
	if c.from != c.leg {
		err = errors.Join(err, c.from.Close())
	}
	return err
}

// abort closes both channels now.
func (c *client) abort() {
	c.leg.tcp.Close()
	c.from.tcp.Close()
}

// next reads up to the next whole packet, before the channel is open.
func (c *client) next() (tsgu.Event, error) {
	for {
		for len(c.payload) > 0 {
			n, ev, err := c.ts.Decode(c.payload)
			c.payload = c.payload[n:]
			if err != nil || ev.Type != tsgu.None {
				return ev, err
			}
		}
		if len(c.in) == 0 {
			if c.buf == nil {
				c.buf = make([]byte, 2<<10)
			}
			n, err := c.from.Read(c.buf)
			if n == 0 && err != nil {
				return tsgu.Event{}, err
			}
			c.in = c.buf[:n]
		}
		n, payload, err := c.unframe(c.in)
		c.in, c.payload = c.in[n:], payload
		if err != nil {
			return tsgu.Event{}, err
		}
	}
}

// unframe takes bytes from the front of b, says how many, and hands out what they carry, in place. The client's close is
// io.EOF.
func (c *client) unframe(b []byte) (n int, payload []byte, err error) {
	if !c.webSocket {
		return c.chunks.Decode(b)
	}
	n, ev, err := c.ws.Decode(b)
	if err == nil {
		payload, err = c.take(ev)
	}
	return n, payload, err
}

// brokeProtocol says that err is the client's breach of one of its protocols.
func brokeProtocol(err error) bool {
	var ws *wsframe.Error
	var chunk *chunked.Error
	var ts *tsgu.Error
	return errors.As(err, &ws) || errors.As(err, &chunk) || errors.As(err, &ts)
}

// take answers a WebSocket control frame or hands payload through. The client's close is io.EOF.
func (c *client) take(ev wsframe.Event) ([]byte, error) {
	switch ev.Op {
	case wsframe.Binary:
		return ev.Payload, nil
	case wsframe.Ping:
		return nil, c.control(wsframe.Pong, ev.Payload)
	case wsframe.Close:
		return nil, io.EOF
	}
	return nil, nil
}

// unwrapAll turns what the client sent into the bytes for the host, span by span.
func (c *client) unwrapAll(b *batch) error {
	filled := b.filled()
	b.spans, b.content = 0, 0
	for _, s := range filled {
		out, err := c.unwrap(b.mem[s.at:s.end()])
		if len(out) > 0 {
			b.add(len(b.mem)-cap(out), len(out)) // no slice of mem is cut short at its end, so its capacity tells where it begins
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unwrap turns what the client sent, in place, into the bytes for the host: b loses its frames and packets, and what is
// left moves together. What came before an error is still good.
func (c *client) unwrap(b []byte) (out []byte, err error) {
	for len(b) > 0 {
		n, payload, err := c.unframe(b)
		b = b[n:]
		if err != nil {
			return out, err
		}
		if !c.tsgu {
			out = together(out, payload)
			continue
		}
		for len(payload) > 0 {
			n, ev, err := c.ts.Decode(payload)
			payload = payload[n:]
			switch {
			case err != nil:
				return out, err
			case ev.Type == tsgu.TypeData:
				out = together(out, ev.Body)
			case ev.Type == tsgu.TypeCloseChannel:
				// Nobody need hear it: the client leaves anyway.
				c.send(&tsgu.CloseChannel{Response: true})
				return out, io.EOF
			case ev.Type == tsgu.TypeCloseChannelResponse:
				return out, io.EOF
			}
			// A KEEPALIVE is not answered: clients echo ours. What else a newer client says while its channel is open is its own.
		}
	}
	return out, nil
}

// together joins out and part, which lies behind it in one buffer: the shorter one moves to the other, and nothing is
// allocated. Neither slice is cut short at its end, so that capacities tell where they stand.
func together(out, part []byte) []byte {
	if len(out) == 0 {
		return part
	}
	if len(out) >= len(part) {
		return append(out, part...)
	}
	at := cap(out) - cap(part)
	from := at - len(out)
	copy(out[from:at], out)
	return out[from : at+len(part)]
}

// wrap appends one packet as one message.
func (c *client) wrap(b, packet []byte) []byte {
	if c.webSocket {
		return wsframe.AppendFrame(b, wsframe.Binary, packet)
	}
	return append(b, packet...)
}

// send writes one packet as one message. TLS writes whole slices, so packets of several goroutines never mix.
func (c *client) send(p packet) error {
	_, err := c.Write(c.wrap(nil, p.Append(nil)))
	return err
}

// control writes one control frame of WebSocket.
func (c *client) control(op wsframe.Opcode, payload []byte) error {
	_, err := c.Write(wsframe.AppendFrame(nil, op, payload))
	return err
}
