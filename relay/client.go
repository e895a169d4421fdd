package relay

import (
	"io"

	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// client is the client's leg with its framing: WebSocket, and TSGU inside where tsgu is set.
type client struct {
	*leg
	tsgu bool
	// What the client's TSGU capabilities allow.
	serviceMessages bool
	idleTimeouts    bool

	// Owned by whichever goroutine reads the client.
	ws wsframe.Decoder
	ts tsgu.Decoder

	// Before the channel is open only: bytes read, WebSocket payload of them, and where they stand.
	buf, in, payload []byte
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
			n, err := c.leg.Read(c.buf)
			if n == 0 && err != nil {
				return tsgu.Event{}, err
			}
			c.in = c.buf[:n]
		}
		n, ev, err := c.ws.Decode(c.in)
		c.in = c.in[n:]
		if err != nil {
			return tsgu.Event{}, err
		}
		if c.payload, err = c.take(ev); err != nil {
			return tsgu.Event{}, err
		}
	}
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
		n, ev, err := c.ws.Decode(b)
		b = b[n:]
		if err != nil {
			return out, err
		}
		if ev.Op == wsframe.Binary && !c.tsgu {
			out = together(out, ev.Payload)
			continue
		}
		payload, err := c.take(ev)
		if err != nil {
			return out, err
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

// send writes one packet as one message. TLS writes whole slices, so packets of several goroutines never mix.
func (c *client) send(p packet) error {
	_, err := c.Write(wsframe.AppendFrame(nil, wsframe.Binary, p.Append(nil)))
	return err
}

// control writes one control frame.
func (c *client) control(op wsframe.Opcode, payload []byte) error {
	_, err := c.Write(wsframe.AppendFrame(nil, op, payload))
	return err
}
