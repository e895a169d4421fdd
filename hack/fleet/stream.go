package fleet

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"
)

const (
	// pace and chunk make 4 KiB a second each way, about what a quiet desktop moves.
	pace  = 250 * time.Millisecond
	chunk = 1 << 10
	// patience is how long nothing may come before a session counts as dropped.
	patience = time.Minute

	headLength = 12 // u32 bytes that follow, u64 number of the chunk
)

// errWrong says that bytes came other than they were sent: the worst that can happen.
var errWrong = errors.New("wrong bytes")

// stream is one end of a session's data. Each way runs numbered chunks of pseudo-random bytes that both ends can compute
// from the session's seed; the last one, of no bytes, carries how many there were.
type stream struct {
	conn    net.Conn
	out, in *rand.ChaCha8
	stop    chan struct{} // closed to have send say the last word

	sent, checked atomic.Uint64 // bytes
	heard         atomic.Int64  // when the last chunk came, in Unix nanoseconds
	tally         *tally
}

// newStream makes the client's end, or the host's.
func newStream(conn net.Conn, seed [32]byte, client bool, t *tally) *stream {
	s := &stream{conn: conn, out: directed(seed, "to host"), in: directed(seed, "to client"), stop: make(chan struct{}), tally: t}
	if !client {
		s.out, s.in = s.in, s.out
	}
	s.heard.Store(time.Now().UnixNano())
	return s
}

func directed(seed [32]byte, way string) *rand.ChaCha8 {
	return rand.NewChaCha8(sha256.Sum256(append(seed[:], way...)))
}

// send writes a chunk at each tick until stop closes, and then the last word.
func (s *stream) send() error {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	buf := make([]byte, headLength+chunk)
	for number := uint64(0); ; number++ {
		select {
		case <-s.stop:
			binary.BigEndian.PutUint32(buf, 0)
			binary.BigEndian.PutUint64(buf[4:], s.sent.Load())
			_, err := s.conn.Write(buf[:headLength])
			return err
		case <-tick.C:
		}
		binary.BigEndian.PutUint32(buf, chunk)
		binary.BigEndian.PutUint64(buf[4:], number)
		s.out.Read(buf[headLength:])
		s.conn.SetWriteDeadline(time.Now().Add(patience))
		if _, err := s.conn.Write(buf); err != nil {
			return err
		}
		s.sent.Add(chunk)
	}
}

// receive checks each byte until the other end's last word; nil means that all came, and nothing else.
func (s *stream) receive() error {
	buf, want := make([]byte, headLength+chunk), make([]byte, chunk)
	for number := uint64(0); ; number++ {
		s.conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadFull(s.conn, buf[:headLength]); err != nil {
			return err
		}
		length, said := binary.BigEndian.Uint32(buf), binary.BigEndian.Uint64(buf[4:])
		switch {
		case length == 0 && said != s.checked.Load():
			return fmt.Errorf("%w: %d were sent, %d came", errWrong, said, s.checked.Load())
		case length == 0:
			return nil
		case length != chunk || said != number:
			return fmt.Errorf("%w: chunk %d of %d bytes, want chunk %d of %d", errWrong, said, length, number, chunk)
		}
		if _, err := io.ReadFull(s.conn, buf[headLength:]); err != nil {
			return err
		}
		s.in.Read(want)
		if !bytes.Equal(want, buf[headLength:]) {
			return fmt.Errorf("%w in chunk %d", errWrong, number)
		}
		now := time.Now()
		s.tally.took(now, now.Sub(time.Unix(0, s.heard.Swap(now.UnixNano())))-pace, chunk)
		s.checked.Add(chunk)
	}
}
