package relay

import "sync"

// writeError says that the other leg failed, not the one that was read.
type writeError struct{ error }

// buffers lends what a direction reads into. An idle direction holds none: it waits for its socket first.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

func getBuffer() *[bufferSize]byte  { return buffers.Get().(*[bufferSize]byte) }
func putBuffer(b *[bufferSize]byte) { buffers.Put(b) }

// copyHostToClient puts the host's bytes into packets, in place: it reads behind room for the headers, fills packets while
// there is something to read, and sends them in one write. It returns why it ended: io.EOF when the host has.
func (s *session) copyHostToClient() error {
	buf := getBuffer()
	defer func() { putBuffer(buf) }()
	first := true
	for {
		n, err := s.fillFromHost(buf)
		if n > 0 {
			if first {
				first = false
				s.firstBytes(buf[s.client.headroom():])
			}
			s.toClient.Add(uint64(n))
			if werr := s.sendFilled(buf, n); werr != nil {
				return writeError{werr}
			}
		}
		if err == errAgain {
			putBuffer(buf)
			buf = nil
			err = s.host.tcp.wait()
			buf = getBuffer()
		}
		if err != nil {
			return err
		}
	}
}

// fillFromHost reads until buf is full or nothing more is there, leaving room for a header before each packet, and says
// how many of the host's bytes buf holds.
func (s *session) fillFromHost(buf *[bufferSize]byte) (total int, err error) {
	head := s.client.headroom()
	for at := 0; at < bufferSize; at += recordSize {
		for have := head; have < recordSize; {
			n, err := s.host.Read(buf[at+have : at+recordSize])
			have += n
			total += n
			if err != nil {
				return total, err
			}
		}
	}
	return total, nil
}

// sendFilled sends what fillFromHost read.
func (s *session) sendFilled(buf *[bufferSize]byte, total int) error {
	start, end := s.client.sealAll(buf, total)
	_, err := s.client.Write(buf[start:end])
	return err
}

// copyClientToHost takes the client's frames off, in place, and passes what is left on in one write. It returns why it
// ended: io.EOF when the client has said good-bye.
func (s *session) copyClientToHost() error {
	buf := getBuffer()
	defer func() { putBuffer(buf) }()
	first := true
	for {
		n, err := s.fillFromClient(buf)
		out, uerr := s.client.unwrap(buf[:n])
		if len(out) > 0 {
			if first {
				first = false
				s.firstBytes(out)
			}
			s.toHost.Add(uint64(len(out)))
			if _, werr := s.host.Write(out); werr != nil && !s.ending.Load() {
				return writeError{werr}
			}
		}
		if uerr != nil {
			return uerr
		}
		if err == errAgain {
			putBuffer(buf)
			buf = nil
			err = s.client.tcp.wait()
			buf = getBuffer()
		}
		if err != nil {
			return err
		}
	}
}

// fillFromClient reads until buf is full or nothing more is there.
func (s *session) fillFromClient(buf *[bufferSize]byte) (n int, err error) {
	for n < bufferSize && err == nil {
		var m int
		m, err = s.client.leg.Read(buf[n:])
		n += m
	}
	return n, err
}
