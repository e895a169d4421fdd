package tsgu

import "fmt"

// Event is what one call of Decode found.
type Event struct {
	// Type is None when more input is needed.
	Type Type
	// Body aliases the input for DATA, of which it may be a part; else it is the whole body, good until the next call.
	Body []byte
}

// Decoder takes a byte stream of packets apart, whatever way it was cut. DATA passes through in place, never gathered and
// never allocated for; other packets are gathered as their bytes arrive, so a length that lies costs nothing. The zero
// value is ready.
type Decoder struct {
	header [DataHeaderLen]byte // with the u16 of DATA
	have   int

	inBody bool
	typ    Type
	left   int
	body   []byte
}

// Decode takes bytes from the front of b, at least one where b is not empty, and says how many. It returns at the first event.
func (d *Decoder) Decode(b []byte) (n int, ev Event, err error) {
	for {
		if !d.inBody {
			used, err := d.readHeader(b[n:])
			n += used
			if err != nil || !d.inBody {
				return n, Event{}, err
			}
		}
		part := b[n:min(len(b), n+d.left)]
		n += len(part)
		d.left -= len(part)
		if d.typ == TypeData {
			if d.left == 0 {
				d.inBody, d.have = false, 0
			}
			if len(part) > 0 {
				return n, Event{Type: TypeData, Body: part}, nil
			}
			if d.inBody {
				return n, Event{}, nil
			}
			continue // DATA of no bytes tells nothing
		}
		d.body = append(d.body, part...)
		if d.left > 0 {
			return n, Event{}, nil
		}
		ev = Event{Type: d.typ, Body: d.body}
		d.inBody, d.have = false, 0
		return n, ev, nil
	}
}

// Release gives the memory of gathered packets back; call it before the data phase, where they are rare.
func (d *Decoder) Release() { d.body = nil }

// readHeader gathers the header and, once whole, opens the packet.
func (d *Decoder) readHeader(b []byte) (n int, err error) {
	if d.have < HeaderLen {
		n = copy(d.header[d.have:HeaderLen], b)
		d.have += n
		if d.have < HeaderLen {
			return n, nil
		}
	}
	typ, length := Type(le.Uint16(d.header[:])), le.Uint32(d.header[4:])
	if typ != TypeData {
		if length < HeaderLen || length > HeaderLen+MaxBody {
			return n, &Error{typ, fmt.Sprintf("its length is %d bytes; %d to %d are taken", length, HeaderLen, HeaderLen+MaxBody)}
		}
		d.inBody, d.typ, d.left, d.body = true, typ, int(length-HeaderLen), d.body[:0]
		return n, nil
	}
	used := copy(d.header[d.have:], b[n:])
	n += used
	d.have += used
	if d.have < DataHeaderLen {
		return n, nil
	}
	size := le.Uint16(d.header[HeaderLen:])
	if length != DataHeaderLen+uint32(size) {
		return n, &Error{typ, fmt.Sprintf("its length is %d bytes, but it tells of %d bytes of data", length, size)}
	}
	d.inBody, d.typ, d.left = true, typ, int(size)
	return n, nil
}
