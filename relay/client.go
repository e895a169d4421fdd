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

// together appends part to out where both lie in one buffer, part behind out: it moves down, and nothing is allocated.
func together(out, part []byte) []byte {
	if len(out) == 0 {
		return part
	}
	return append(out, part...)
}

const (
	// recordSize is TLS's largest record: a packet that fills one, headers included, costs one record on the way out.
	recordSize = 16 << 10
	// bufferSize holds a few records, so that one read's worth leaves in one write.
	bufferSize = 4 * recordSize
)

// headroom is what stands before the bytes of a packet to the client, at its longest.
func (c *client) headroom() int {
	if c.tsgu {
		return 4 + tsgu.DataHeaderLen
	}
	return 4
}

// seal writes the headers of a packet whose n bytes stand at b[headroom:], and returns where the packet begins and ends.
// The bytes may move: a short packet's header is shorter.
func (c *client) seal(b []byte, n int, first bool) (start, end int) {
	head := c.headroom()
	size := n + head - 4
	if wsframe.HeaderLen(size) == 2 {
		if first {
			start = 2 // nothing before it: the packet may begin later
		} else {
			copy(b[head-2:], b[head:head+n])
			end = -2
		}
	}
	h := wsframe.PutHeader(b[start:], wsframe.Binary, size)
	if c.tsgu {
		tsgu.PutDataHeader(b[start+h:], n)
	}
	return start, end + head + n
}

// sealAll writes the headers of all packets in buf, whose total bytes stand as fillFromHost left them, and returns where the
// first packet begins and the last one ends.
func (c *client) sealAll(buf *[bufferSize]byte, total int) (start, end int) {
	per := recordSize - c.headroom()
	for at := 0; total > 0; at += recordSize {
		n := min(total, per)
		total -= n
		b, e := c.seal(buf[at:], n, at == 0)
		start += b // not 0 for the first only
		end = at + e
	}
	return start, end
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
