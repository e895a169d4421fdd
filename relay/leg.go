package relay

import (
	"cmp"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// leg is one side of a session: a client's or an agent's TLS connection. crypto/tls does its handshake; its records are
// our own from then on, where takeOver says so.
type leg struct {
	tcp *conn
	tls *tls.Conn // nil once the records are our own
	// unread was read already, by whoever had the leg before.
	unread []byte

	// Owned by whichever goroutine reads.
	in      direction
	rest    []byte // read, not decrypted
	rerr    error  // ends reading; the TLS stream is of no use after it
	useless int    // records in a row that carried nothing

	// updating is set by the reader where the peer asks for our next key, and obeyed by the next write.
	updating atomic.Bool

	wmu  sync.Mutex
	out  direction
	werr error // ends writing
}

func newLeg(tc *net.TCPConn, conf *tls.Config) (*leg, error) {
	c, err := newConn(tc)
	if err != nil {
		return nil, err
	}
	return &leg{tcp: c, tls: tls.Server(c, conf)}, nil
}

var errShutdown = errors.New("relay: the leg was closed for writing")

// maxUseless bounds empty records and key updates in a row, as in crypto/tls: they cost us and carry nothing.
const maxUseless = 16

// takeOver ends crypto/tls's part after the handshake. It is refused, and crypto/tls goes on, for TLS 1.2 and for suites
// without AES-GCM. crypto/tls has nothing buffered then: conn never gave it more than the record that it asked for.
//
// How many records it has sent under the new key is the number of tickets; that the last record on the wire opens under
// key and number proves both.
func (l *leg) takeOver(s *handshakeSecrets) error {
	state := l.tls.ConnectionState()
	suite := suiteOf(state.CipherSuite)
	last := l.tcp.handshakeOver()
	if state.Version != tls.VersionTLS13 || suite == nil || s.fromClient == nil || s.fromServer == nil {
		return nil
	}
	in, err := newDirection(suite, s.fromClient, 0)
	if err != nil {
		return err
	}
	out, err := newDirection(suite, s.fromServer, 0)
	if err != nil {
		return err
	}
	switch s.tickets {
	case 0:
	case 1:
		if typ, _, err := out.open(last); err != nil || typ != typeHandshake {
			return errors.New("relay: the session ticket is not the first record under its key")
		}
	default:
		return errors.New("relay: more session tickets than crypto/tls is known to send")
	}
	l.in, l.out, l.tls = in, out, nil
	l.rest, l.tcp.early = l.tcp.early, nil
	return nil
}

// Read gives what is unread first. A stream that ends without TLS's good-bye is io.ErrUnexpectedEOF.
func (l *leg) Read(p []byte) (int, error) {
	for len(l.unread) == 0 {
		if l.tls != nil {
			return l.readTLS(p)
		}
		b := getBatch()
		err := l.fill(b, recordOverhead+maxContent)
		for _, r := range b.filled() {
			l.unread = append(l.unread, b.mem[r.at:r.at+r.n]...)
		}
		l.rest = append(l.rest, b.mem[b.start:b.end]...)
		putBatch(b)
		if err == errAgain {
			err = l.tcp.wait()
		}
		if err != nil {
			return 0, err
		}
	}
	n := copy(p, l.unread)
	if l.unread = l.unread[n:]; len(l.unread) == 0 {
		l.unread = nil
	}
	return n, nil
}

func (l *leg) readTLS(p []byte) (int, error) {
	n, err := l.tls.Read(p)
	if err == io.EOF && l.tcp.eof {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// fill reads into b what is there, and decrypts it: b has spans then, or the error says why not; errAgain is that
// nothing is there. No more than limit bytes are taken from TCP at once.
func (l *leg) fill(b *batch, limit int) error {
	b.spans = 0
	b.content = 0
	if len(l.unread) > 0 {
		n := copy(b.mem[room:room+maxContent], l.unread)
		b.add(room, n)
		if l.unread = l.unread[n:]; len(l.unread) == 0 {
			l.unread = nil
		}
		return nil
	}
	if l.tls != nil {
		return l.fillTLS(b)
	}
	if l.rest != nil {
		b.start, b.end = room, room+copy(b.mem[room:], l.rest)
		l.rest = nil
	}
	for l.rerr == nil {
		l.rerr = l.decrypt(b)
		if b.spans > 0 {
			return nil // the error is for the next call
		}
		if l.rerr != nil {
			break
		}
		b.settle()
		n, err := l.tcp.readNow(b.mem[b.end:min(len(b.mem), b.end+limit)])
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		b.end += n
	}
	return l.rerr
}

// fillTLS is fill where crypto/tls reads.
func (l *leg) fillTLS(b *batch) error {
	for at := room; b.content <= b.most-maxContent; {
		n, err := l.readTLS(b.mem[at : at+maxContent])
		if n > 0 {
			b.add(at, n)
			at = b.span[b.spans-1].end() + recordOverhead
		}
		if err != nil {
			if b.spans > 0 {
				return nil // crypto/tls will say it again
			}
			return err
		}
	}
	return nil
}

// decrypt opens the whole records in b, until one batch is full. Its errors are alerts, the peer's breach of TLS, or
// io.EOF, its good-bye.
func (l *leg) decrypt(b *batch) error {
	for {
		raw := b.mem[b.start:b.end]
		n, err := recordLen(raw)
		if err != nil {
			return l.breach(err)
		}
		if n == 0 || n > len(raw) || b.content+n > b.most || b.spans == len(b.span)-1 {
			return nil
		}
		typ, content, err := l.in.open(raw[:n])
		if err != nil {
			return l.breach(err)
		}
		at := b.start + recordHeader
		b.start += n
		if typ == typeData && len(content) > 0 {
			l.useless = 0
			b.add(at, len(content))
			continue
		}
		if l.useless++; l.useless > maxUseless {
			return l.breach(alertUnexpectedMessage)
		}
		switch typ {
		case typeData:
		case typeHandshake:
			err = l.keyUpdated(content)
		case typeAlert:
			err = alerted(content)
		default:
			err = alertUnexpectedMessage
		}
		if err != nil {
			return l.breach(err)
		}
	}
}

// keyUpdated obeys the only handshake message that a client may send now. It stands alone in its record: what follows has
// another key.
func (l *leg) keyUpdated(msg []byte) error {
	switch {
	case len(msg) != 5 || msg[0] != keyUpdate || msg[1]|msg[2] != 0 || msg[3] != 1:
		return alertUnexpectedMessage
	case msg[4] > updateRequested:
		return alertIllegalParameter
	}
	if msg[4] == updateRequested {
		l.updating.Store(true)
	}
	return l.in.update()
}

// alerted reads an alert: good-bye, or an error, whatever level it says (6).
func alerted(b []byte) error {
	if len(b) != 2 {
		return alertDecodeError
	}
	switch alert(b[1]) {
	case alertCloseNotify:
		return io.EOF
	case alertUserCanceled:
		return nil
	}
	return &net.OpError{Op: "remote error", Err: tls.AlertError(b[1])}
}

// breach tells the peer what it did, where nobody is writing just now.
func (l *leg) breach(err error) error {
	var a alert
	if errors.As(err, &a) && l.wmu.TryLock() {
		defer l.wmu.Unlock()
		if l.werr == nil {
			l.tcp.SetWriteDeadline(time.Now().Add(lingerTime))
			l.alertLocked(a, errShutdown)
		}
	}
	return err
}

// Write sends p in records of their own.
func (l *leg) Write(p []byte) (n int, err error) {
	if l.tls != nil {
		return l.tls.Write(p)
	}
	b := getBatch()
	defer putBatch(b)
	l.wmu.Lock()
	defer l.wmu.Unlock()
	for err == nil && n < len(p) {
		b.spans, b.content = 0, 0
		sent := 0
		for at := room; n+sent < len(p) && b.content <= maxBatch-maxContent; at += recordOverhead + maxContent {
			m := copy(b.mem[at:at+maxContent], p[n+sent:])
			b.add(at, m)
			sent += m
		}
		if err = l.sendLocked(b); err == nil {
			n += sent
		}
	}
	return n, err
}

// send seals the spans of b in place and writes them at once. What b held is gone then.
func (l *leg) send(b *batch) error {
	if l.tls != nil {
		for _, s := range b.filled() {
			if _, err := l.tls.Write(b.mem[s.at : s.at+s.n]); err != nil {
				return err
			}
		}
		return nil
	}
	l.wmu.Lock()
	defer l.wmu.Unlock()
	return l.sendLocked(b)
}

func (l *leg) sendLocked(b *batch) error {
	if l.werr != nil {
		return l.werr
	}
	if l.out.seq >= rekeyAfter || l.updating.Load() {
		if err := l.updateLocked(); err != nil {
			return err
		}
	}
	b.iov = b.iovs[:0]
	end := 0
	for _, s := range b.filled() {
		from := s.at - recordHeader
		rec := b.mem[from : s.at+s.n+1+recordTag]
		if l.werr = l.out.seal(rec, typeData); l.werr != nil {
			return l.werr
		}
		if from == end { // stands right behind the last one
			last := &b.iov[len(b.iov)-1]
			*last = (*last)[:len(*last)+len(rec)]
		} else {
			b.iov = append(b.iov, rec)
		}
		end = from + len(rec)
	}
	if len(b.iov) == 1 {
		_, l.werr = l.tcp.TCPConn.Write(b.iov[0])
	} else {
		_, l.werr = b.iov.WriteTo(l.tcp.TCPConn)
	}
	return l.werr // part of a record may be out: nothing can follow it
}

// updateLocked replaces our key (4.6.3).
func (l *leg) updateLocked() error {
	l.updating.Store(false)
	l.smallLocked(typeHandshake, keyUpdate, 0, 0, 1, updateNotRequested)
	if l.werr == nil {
		l.werr = l.out.update()
	}
	return l.werr
}

// alertLocked writes an alert, after which nothing else is written.
func (l *leg) alertLocked(a alert, after error) error {
	if l.werr == nil {
		level := byte(alertLevelFatal)
		if a == alertCloseNotify {
			level = alertLevelWarning
		}
		l.smallLocked(typeAlert, level, byte(a))
	}
	if err := l.werr; err != nil {
		return err
	}
	l.werr = after
	return nil
}

// smallLocked writes a record of few bytes.
func (l *leg) smallLocked(typ byte, content ...byte) {
	rec := make([]byte, recordOverhead+len(content))
	copy(rec[recordHeader:], content)
	if l.werr = l.out.seal(rec, typ); l.werr == nil {
		_, l.werr = l.tcp.TCPConn.Write(rec)
	}
}

// writeLast sends p, which must fit a record, and TLS's good-bye in one write.
func (l *leg) writeLast(p []byte) error {
	if l.tls != nil {
		if _, err := l.tls.Write(p); err != nil {
			return err
		}
		return l.tls.CloseWrite()
	}
	const alertSize = 2
	b := make([]byte, recordOverhead+len(p), 2*recordOverhead+len(p)+alertSize)
	copy(b[recordHeader:], p)
	bye := b[len(b) : len(b)+recordOverhead+alertSize]
	bye[recordHeader], bye[recordHeader+1] = alertLevelWarning, byte(alertCloseNotify)
	l.wmu.Lock()
	defer l.wmu.Unlock()
	if l.werr != nil {
		return l.werr
	}
	err := l.out.seal(b, typeData)
	if err == nil {
		err = l.out.seal(bye, typeAlert)
	}
	if err == nil {
		_, err = l.tcp.TCPConn.Write(b[:cap(b)])
	}
	l.werr = cmp.Or(err, errShutdown)
	return err
}

// CloseWrite says TLS's good-bye. It doesn't end TCP's half.
func (l *leg) CloseWrite() error {
	if l.tls != nil {
		return l.tls.CloseWrite()
	}
	l.wmu.Lock()
	defer l.wmu.Unlock()
	return l.alertLocked(alertCloseNotify, errShutdown)
}

// Close says good-bye where nobody is writing just now, and closes the connection.
func (l *leg) Close() error {
	if l.tls != nil {
		return l.tls.Close()
	}
	if l.wmu.TryLock() {
		l.alertLocked(alertCloseNotify, net.ErrClosed)
		l.wmu.Unlock()
	}
	return l.tcp.Close()
}

func (l *leg) SetDeadline(t time.Time) error      { return l.tcp.SetDeadline(t) }
func (l *leg) SetReadDeadline(t time.Time) error  { return l.tcp.SetReadDeadline(t) }
func (l *leg) SetWriteDeadline(t time.Time) error { return l.tcp.SetWriteDeadline(t) }

// maxEarly bounds what a client may say while it waits for its host.
const maxEarly = 4 << 10

// watch reads the leg while nothing is expected from it, and calls gone when it ends. What it reads stays unread. The
// function that it returns ends the watch.
func (l *leg) watch(gone func()) (stop func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var early []byte
		defer func() { l.unread = append(early, l.unread...) }()
		buf := make([]byte, 512)
		for len(early) < maxEarly {
			n, err := l.Read(buf)
			early = append(early, buf[:n]...)
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				return
			}
			if err != nil {
				gone()
				return
			}
		}
	}()
	return func() {
		l.SetReadDeadline(time.Unix(1, 0))
		<-done
		l.SetReadDeadline(time.Time{})
	}
}
