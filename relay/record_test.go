package relay

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/mtls"
)

// tlsServer makes legs as the relay's listener does.
type tlsServer struct {
	t    testing.TB
	l    net.Listener
	conf *tls.Config
	own  bool // takes records over
}

func newTLSServer(t testing.TB, own bool) *tlsServer {
	t.Helper()
	dir := t.TempDir()
	writeCertificate(t, dir)
	reload, err := mtls.NewReloader(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &tlsServer{t: t, own: own, conf: reload.ServerConfig()}
	s.conf.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		return h.Conn.(*conn).secrets.capture(s.conf), nil
	}
	if s.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.l.Close() })
	return s
}

func (s *tlsServer) accept() (*leg, error) {
	nc, err := s.l.Accept()
	if err != nil {
		return nil, err
	}
	s.t.Cleanup(func() { nc.Close() })
	l, err := newLeg(nc.(*net.TCPConn), s.conf)
	if err != nil {
		return nil, err
	}
	l.SetDeadline(time.Now().Add(patience))
	secrets := l.tcp.secrets
	if err := l.tls.Handshake(); err != nil {
		return nil, err
	}
	if !s.own {
		l.tcp.handshakeOver()
		return l, nil
	}
	return l, l.takeOver(secrets)
}

// rawPeer is a client whose records a test makes.
type rawPeer struct {
	*net.TCPConn
	in, out direction
}

// connect returns both ends.
func (s *tlsServer) connect() (*leg, *rawPeer) {
	s.t.Helper()
	nc, err := net.Dial("tcp", s.l.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	var secrets handshakeSecrets
	shaken := make(chan error, 1)
	c := tls.Client(nc, &tls.Config{InsecureSkipVerify: true, KeyLogWriter: &secrets})
	go func() { shaken <- c.Handshake() }()
	l, err := s.accept()
	if err = errors.Join(err, <-shaken); err != nil {
		s.t.Fatal(err)
	}
	p := &rawPeer{TCPConn: nc.(*net.TCPConn)}
	su := suiteOf(c.ConnectionState().CipherSuite)
	if p.in, err = newDirection(su, secrets.fromServer, 0); err == nil {
		p.out, err = newDirection(su, secrets.fromClient, 0)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return l, p
}

// seal is a record of any type, content and padding.
func (p *rawPeer) seal(typ byte, content []byte, padding int) []byte {
	inner := append(append(bytes.Clone(content), typ), make([]byte, padding)...)
	rec := []byte{23, 3, 3, byte((len(inner) + recordTag) >> 8), byte(len(inner) + recordTag)}
	if err := p.out.count(); err != nil {
		panic(err)
	}
	return p.out.aead.Seal(rec, p.out.nonce[:], inner, rec)
}

// next reads a record. The ticket comes first, unless crypto/tls read it with the handshake.
func (p *rawPeer) next() (typ byte, content []byte, err error) {
	head := make([]byte, recordHeader)
	if _, err := io.ReadFull(p, head); err != nil {
		return 0, nil, err
	}
	n, err := recordLen(head)
	if err != nil {
		return 0, nil, err
	}
	rec := append(head, make([]byte, n-recordHeader)...)
	if _, err := io.ReadFull(p, rec[recordHeader:]); err != nil {
		return 0, nil, err
	}
	return p.in.open(rec)
}

// alert reads up to the next alert.
func (p *rawPeer) alert() (alert, error) {
	for {
		typ, content, err := p.next()
		if err != nil {
			return 0, err
		}
		if typ == typeAlert {
			return alert(content[1]), nil
		}
	}
}

// part is one record of a script.
type part struct {
	typ     byte
	content []byte
	padding int
}

// run plays a script against a leg and tells what it read, and how it ended.
func (s *tlsServer) run(script []part) (string, *leg, *rawPeer) {
	l, p := s.connect()
	go func() {
		for _, r := range script {
			p.Write(p.seal(r.typ, r.content, r.padding))
			if r.typ == typeHandshake && len(r.content) == 5 && r.content[0] == keyUpdate {
				p.out.update()
			}
		}
		p.CloseWrite()
	}()
	var got []byte
	buf := make([]byte, 3000)
	for {
		n, err := l.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			end := "broken"
			switch err {
			case io.EOF, io.ErrUnexpectedEOF:
				end = err.Error()
			}
			return fmt.Sprintf("%x %s", got, end), l, p
		}
	}
}

var goodbye = part{typeAlert, []byte{1, 0}, 0}

// TestRecordsAgreeWithCryptoTLS plays scripts against our records and against those of crypto/tls.
func TestRecordsAgreeWithCryptoTLS(t *testing.T) {
	own, reference := newTLSServer(t, true), newTLSServer(t, false)
	data := func(s string) part { return part{typeData, []byte(s), 0} }
	full := part{typeData, make([]byte, maxContent), 0}
	update := func(b ...byte) part { return part{typeHandshake, append([]byte{keyUpdate, 0, 0, 1}, b...), 0} }
	flood := func(n int, p part) (all []part) {
		for range n {
			all = append(all, p)
		}
		return append(all, data("after"), goodbye)
	}
	scripts := map[string][]part{
		"data and good-bye":           {data("one"), data("two"), goodbye},
		"no good-bye":                 {data("one")},
		"nothing":                     {},
		"data after good-bye":         {data("one"), goodbye, data("two")},
		"padding":                     {{typeData, []byte("padded"), 300}, {typeData, make([]byte, 100), maxContent - 100}, goodbye},
		"zeros at the end stay":       {{typeData, []byte{1, 0, 0, 0}, 0}, goodbye},
		"full":                        {full, full, full, full, full, full, goodbye},
		"one byte too many":           {data("one"), {typeData, make([]byte, maxContent+1), 0}, goodbye},
		"padding too long":            {{typeData, make([]byte, 100), maxContent - 99}, goodbye},
		"empty":                       {data("one"), {typeData, nil, 0}, data("two"), goodbye},
		"a few empty ones":            flood(15, part{typeData, nil, 0}),
		"many empty ones":             flood(40, part{typeData, nil, 0}),
		"no type":                     {data("one"), {0, make([]byte, 10), 0}},
		"key update":                  {data("one"), update(updateNotRequested), data("two"), update(updateRequested), data("three"), goodbye},
		"key update of no known kind": {data("one"), update(2), data("two")},
		"long key update":             {data("one"), update(0, 0), data("two")},
		"a few key updates":           flood(15, update(updateNotRequested)),
		"many key updates":            flood(40, update(updateNotRequested)),
		"another handshake message":   {data("one"), {typeHandshake, []byte{1, 0, 0, 0}, 0}, data("two")},
		"unknown type":                {data("one"), {99, []byte{1}, 0}, data("two")},
		"fatal alert":                 {data("one"), {typeAlert, []byte{2, 80}, 0}},
		"canceled":                    {data("one"), {typeAlert, []byte{1, 90}, 0}, data("two"), goodbye},
		"short alert":                 {data("one"), {typeAlert, []byte{1}, 0}},
	}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 30 {
		var script []part
		for range r.IntN(60) {
			switch n := r.IntN(20); {
			case n == 0:
				script = append(script, update(byte(r.IntN(2))))
			case n == 1:
				script = append(script, part{typeData, make([]byte, r.IntN(3)), r.IntN(50)})
			default:
				b := make([]byte, 1+r.IntN(1+r.IntN(maxContent)))
				for i := range b {
					b[i] = byte(r.Uint32())
				}
				script = append(script, part{typeData, b, r.IntN(2) * r.IntN(200) * (maxContent - len(b)) / maxContent})
			}
		}
		scripts[fmt.Sprintf("random %d", i)] = append(script, goodbye)
	}
	for name, script := range scripts {
		t.Run(name, func(t *testing.T) {
			got, l, _ := own.run(script)
			if l.tls != nil {
				t.Fatal("crypto/tls still has the leg")
			}
			want, _, _ := reference.run(script)
			if got != want {
				t.Errorf("got %s\nwant %s", got, want)
			}
		})
	}
}

// TestProtectedChangeCipherSpec: it must end the connection (RFC 8446, 5); crypto/tls lets it pass.
func TestProtectedChangeCipherSpec(t *testing.T) {
	got, _, p := newTLSServer(t, true).run([]part{{typeData, []byte("one"), 0}, {20, []byte{1}, 0}, {typeData, []byte("two"), 0}})
	if want := "6f6e65 broken"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if a, err := p.alert(); a != alertUnexpectedMessage {
		t.Errorf("alert %d, %v", a, err)
	}
}

// TestForgedRecords: what nobody could have sealed is refused, and the peer is told why.
func TestForgedRecords(t *testing.T) {
	for name, c := range map[string]struct {
		forge func(rec []byte) []byte
		want  alert
	}{
		"flipped bit":          {func(r []byte) []byte { r[9] ^= 1; return r }, alertBadRecordMAC},
		"flipped tag":          {func(r []byte) []byte { r[len(r)-1] ^= 1; return r }, alertBadRecordMAC},
		"other length":         {func(r []byte) []byte { r[4]--; return r }, alertBadRecordMAC},
		"other version":        {func(r []byte) []byte { r[2] = 1; return r }, alertBadRecordMAC},
		"too short for a tag":  {func(r []byte) []byte { return []byte{23, 3, 3, 0, 16} }, alertBadRecordMAC},
		"too long":             {func(r []byte) []byte { return []byte{23, 3, 3, 0x41, 1} }, alertRecordOverflow},
		"plain alert":          {func(r []byte) []byte { return []byte{21, 3, 3, 0, 2, 1, 0} }, alertUnexpectedMessage},
		"change of cipher":     {func(r []byte) []byte { return []byte{20, 3, 3, 0, 1, 1} }, alertUnexpectedMessage},
		"HTTP":                 {func(r []byte) []byte { return []byte("GET / HTTP/1.1\r\n\r\n") }, alertUnexpectedMessage},
		"the first one again":  {nil, alertBadRecordMAC},
		"one that skipped one": {func(r []byte) []byte { return nil }, alertBadRecordMAC},
	} {
		t.Run(name, func(t *testing.T) {
			l, p := newTLSServer(t, true).connect()
			first := p.seal(typeData, []byte("good"), 0)
			second := bytes.Clone(first)
			if c.forge != nil {
				second = c.forge(p.seal(typeData, []byte("forged"), 0))
			}
			p.Write(append(append(bytes.Clone(first), second...), p.seal(typeData, []byte("after"), 0)...))
			got, err := io.ReadAll(l)
			if string(got) != "good" || err != c.want {
				t.Errorf("read %q, %v; want alert %d", got, err, c.want)
			}
			if a, err := p.alert(); a != c.want {
				t.Errorf("the peer was told %d, %v; want %d", a, err, c.want)
			}
			if _, err := l.Write([]byte("x")); err == nil {
				t.Error("it still writes")
			}
			if _, err := l.Read(make([]byte, 1)); err != c.want {
				t.Errorf("a second read says %v", err)
			}
		})
	}
}

// TestKeysAreReplaced: by our wish, at the limit of a key, and by the peer's.
func TestKeysAreReplaced(t *testing.T) {
	l, p := newTLSServer(t, true).connect()
	p.in.seq = 0
	var kinds []byte
	next := func() string {
		t.Helper()
		for {
			typ, content, err := p.next()
			if err != nil {
				t.Fatal(err)
			}
			kinds = append(kinds, typ)
			if typ == typeData {
				return string(content)
			}
			if typ == typeHandshake && content[0] == keyUpdate {
				if !bytes.Equal(content, []byte{keyUpdate, 0, 0, 1, updateNotRequested}) {
					t.Fatalf("key update % x", content)
				}
				p.in.update()
			}
		}
	}
	write := func(s string) {
		t.Helper()
		if _, err := l.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
		if got := next(); got != s {
			t.Fatalf("%q arrived as %q", s, got)
		}
	}
	write("first")
	l.out.seq, p.in.seq = rekeyAfter-1, rekeyAfter-1
	write("last of its key")
	write("first of the next")
	if l.out.seq != 1 {
		t.Errorf("the next key has sealed %d records", l.out.seq)
	}
	p.Write(p.seal(typeHandshake, []byte{keyUpdate, 0, 0, 1, updateRequested}, 0))
	p.out.update()
	p.Write(p.seal(typeHandshake, []byte{keyUpdate, 0, 0, 1, updateRequested}, 0)) // two wishes, one answer
	p.out.update()
	p.Write(p.seal(typeData, []byte("ok"), 0))
	expect(t, l, "ok")
	write("as asked")
	write("and on")
	if want := []byte{23, 23, 22, 23, 22, 23, 23}; !bytes.Equal(kinds, want) {
		t.Errorf("records % d, want % d", kinds, want)
	}
	l.out.seq = 1<<64 - 1
	if err := l.out.count(); err == nil {
		t.Error("a sequence number came round")
	}
}

// TestOpenSSLReplacesKeys: OpenSSL's key updates (s_client's K asks for ours, k does not), against an echo.
func TestOpenSSLReplacesKeys(t *testing.T) {
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("no openssl here")
	}
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"} {
		t.Run(suite, func(t *testing.T) {
			s := newTLSServer(t, true)
			legs := make(chan *leg, 1)
			go func() {
				l, err := s.accept()
				legs <- l
				if err == nil {
					io.Copy(l, l)
					l.CloseWrite()
				}
			}()
			c := exec.Command(path, "s_client", "-connect", s.l.Addr().String(), "-ciphersuites", suite)
			in, _ := c.StdinPipe()
			out, _ := c.StdoutPipe()
			c.Stderr = c.Stdout
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			defer c.Wait()
			defer in.Close()
			kill := time.AfterFunc(patience, func() { c.Process.Kill() })
			defer kill.Stop()
			lines := bufio.NewScanner(out)
			await := func(text string) {
				t.Helper()
				var seen []string
				for lines.Scan() {
					seen = append(seen, lines.Text())
					if strings.Contains(lines.Text(), text) {
						return
					}
				}
				t.Fatalf("OpenSSL never said %q:\n%s", text, strings.Join(seen, "\n"))
			}
			l := <-legs
			if l == nil || (l.tls == nil) != (suite != "TLS_CHACHA20_POLY1305_SHA256") {
				t.Fatalf("leg %+v", l)
			}
			for _, line := range []string{"hello", "K", "world", "k", "again", "K", "K", "enough"} {
				fmt.Fprintln(in, line)
				if line = strings.ToUpper(line); line == "K" {
					await("KEYUPDATE")
				} else {
					await(strings.ToLower(line))
				}
			}
		})
	}
}

// TestTicketsResume: tickets of connections whose records we took over are good, and TLS 1.2 goes on beside.
func TestTicketsResume(t *testing.T) {
	s := newTLSServer(t, true)
	conf := &tls.Config{InsecureSkipVerify: true, ServerName: testHost, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
	old := &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}
	noTicket := &tls.Config{InsecureSkipVerify: true, SessionTicketsDisabled: true}
	for i, conf := range []*tls.Config{conf, conf, conf, noTicket, old} {
		legs := make(chan *leg, 1)
		go func() {
			l, err := s.accept()
			legs <- l
			if err == nil {
				io.Copy(l, l)
				l.Close()
			}
		}()
		c, err := tls.Dial("tcp", s.l.Addr().String(), conf)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		c.Write([]byte("echo"))
		expect(t, c, "echo")
		if got, want := c.ConnectionState().DidResume, i == 1 || i == 2; got != want {
			t.Errorf("connection %d: resumed %t", i, got)
		}
		if l := <-legs; (l.tls == nil) != (conf != old) {
			t.Errorf("connection %d: records are our own: %t", i, l.tls == nil)
		}
		c.CloseWrite()
		if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
			t.Errorf("connection %d: ends with %q, %v", i, rest, err)
		}
		c.Close()
	}
}

// TestRecordsDoNotAllocate: from one leg to the other, framed, nothing is allocated; not for small messages, not for large.
func TestRecordsDoNotAllocate(t *testing.T) {
	s := newTLSServer(t, true)
	host, agent := s.connect()
	out, viewer := s.connect()
	go io.Copy(io.Discard, viewer.TCPConn)
	b := getBatch()
	// The agent's records are sealed beforehand: what AllocsPerRun counts is the relay's work alone.
	const runs = 200
	for _, size := range []int{64, maxContent} {
		records := make([][]byte, runs+1)
		for i := range records {
			records[i] = agent.seal(typeData, make([]byte, size), 0)
		}
		if n := testing.AllocsPerRun(runs, func() {
			agent.Write(records[0])
			records = records[1:]
			for got := 0; got < size; {
				err := host.fill(b, readSize)
				switch {
				case b.spans > 0:
					got += b.content
					b.frame(framing{webSocket: true, tsgu: true})
					err = out.send(b)
				case err == errAgain:
					err = host.tcp.wait()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}); n != 0 {
			t.Errorf("%d bytes: %v allocations", size, n)
		}
	}
}

// FuzzRecords: what a stranger may send behind a handshake does no harm, however it is cut; and what was sealed is read.
func FuzzRecords(f *testing.F) {
	f.Add([]byte{23, 3, 3, 0, 17, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}, uint16(5))
	f.Add([]byte{21, 3, 3, 0, 2, 1, 0}, uint16(1))
	f.Add(make([]byte, 300), uint16(100))
	secret := func() []byte { return bytes.Repeat([]byte{7}, 32) }
	f.Fuzz(func(t *testing.T, data []byte, cut uint16) {
		l := &leg{tcp: &conn{}}
		l.werr = errShutdown // nobody is there to be told
		l.in, _ = newDirection(suiteOf(tls.TLS_AES_128_GCM_SHA256), secret(), 0)
		sealer, _ := newDirection(suiteOf(tls.TLS_AES_128_GCM_SHA256), secret(), 0)
		b := getBatch()
		defer putBatch(b)
		data = data[:min(len(data), maxBatch/2)]
		half := min(int(cut), len(data), maxContent)
		if half > 0 {
			rec := append(append(make([]byte, recordHeader), data[:half]...), make([]byte, recordOverhead-recordHeader)...)
			if err := sealer.seal(rec, typeData); err != nil {
				t.Fatal(err)
			}
			b.end += copy(b.mem[b.end:], rec)
		}
		b.end += copy(b.mem[b.end:], data)
		err := l.decrypt(b)
		if half > 0 && (b.spans != 1 || !bytes.Equal(b.mem[b.span[0].at:b.span[0].end()], data[:half])) {
			t.Errorf("of a record of %d bytes came %v", half, b.filled())
		}
		if half == 0 && b.spans > 0 {
			t.Error("a forged record was read")
		}
		if a := alert(0); err != nil && !errors.As(err, &a) {
			t.Errorf("%v is no alert", err)
		}
	})
}
