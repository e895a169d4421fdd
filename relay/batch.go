package relay

import (
	"net"
	"sync"

	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

const (
	// maxBatch bounds the bytes of one batch: one frame of a u16 length takes them.
	maxBatch = 0xffff
	// maxTSGU bounds those that become one DATA packet. Its u16 length would take more, but no gateway that clients are
	// known to work with sends more than 16 KiB at once.
	maxTSGU = recordOverhead + maxContent
	// room is left at the front of a batch: for a record of headers alone, and for the header of the record after it.
	room = 64
	// readSize is what one read may bring: 128 KiB takes some 5 % more CPU time per byte.
	readSize = 256 << 10
)

// batch is the memory that bytes pass through, from one leg's record layer to the other's, without being copied:
//
//	read       room | record | record | record | part of a record
//	decrypted  room | . span . | . span . | . span . | part of a record
//	framed      [.head.| . span . | . span . | . span . | part of a record
//	sealed         [record | record | record | record]
//
// It works because a record takes as much around its content on the way out as it did on the way in.
type batch struct {
	mem        [room + readSize]byte
	start, end int // what was read and not decrypted

	span    [16]span
	spans   int
	content int // bytes in all spans
	most    int // bound of content

	iovs [16][]byte
	iov  net.Buffers // into iovs
}

// span is content of one record, at mem[at:at+n]. Before it there is recordHeader, behind it the rest of recordOverhead.
type span struct{ at, n int }

func (s span) end() int { return s.at + s.n }

func (b *batch) filled() []span { return b.span[:b.spans] }

// add appends content. What fits into the record of the last span moves there.
func (b *batch) add(at, n int) {
	b.content += n
	if b.spans > 0 {
		if last := &b.span[b.spans-1]; last.n+n <= maxContent {
			copy(b.mem[last.end():], b.mem[at:at+n])
			last.n += n
			return
		}
	}
	b.span[b.spans] = span{at, n}
	b.spans++
}

// settle moves what was not decrypted to the front, so that a whole record fits behind it.
func (b *batch) settle() {
	if b.start > room {
		b.end = room + copy(b.mem[room:], b.mem[b.start:b.end])
		b.start = room
	}
}

// framing is what stands around RDP bytes on the client's side.
type framing struct {
	webSocket bool // binary frames
	tsgu      bool // DATA packets; in the frames, where there are any
}

// frame puts the headers of one packet of RDP bytes to the client before the spans, within the first span's record
// where they fit.
func (b *batch) frame(f framing) {
	size, n := b.content, 0
	if f.tsgu {
		size += tsgu.DataHeaderLen
		n += tsgu.DataHeaderLen
	}
	if f.webSocket {
		n += wsframe.HeaderLen(size)
	}
	first := &b.span[0]
	at := first.at - n
	if first.n+n <= maxContent {
		first.at, first.n = at, first.n+n
	} else {
		at -= recordOverhead
		copy(b.span[1:], b.filled())
		b.spans++
		b.span[0] = span{at, n}
	}
	if f.webSocket {
		at += wsframe.PutHeader(b.mem[at:], wsframe.Binary, size)
	}
	if f.tsgu {
		tsgu.PutDataHeader(b.mem[at:], b.content)
	}
}

// batches lends them. An idle direction holds none, unless part of a record has come.
var batches = sync.Pool{New: func() any { return new(batch) }}

func getBatch() *batch {
	b := batches.Get().(*batch)
	b.start, b.end, b.spans, b.content, b.most = room, room, 0, 0, maxBatch
	return b
}

func putBatch(b *batch) { batches.Put(b) }
