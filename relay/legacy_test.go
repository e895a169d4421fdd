package relay

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/tsgu"
)

// pods starts relays of one gateway, which share its certificate and know each other.
func pods(t *testing.T, change func(*Options, *fakeAdmission)) (a, b *stack) {
	t.Helper()
	a = newStack(t, change)
	b = newStack(t, func(o *Options, f *fakeAdmission) {
		o.Instance, o.TLS = "10-0-0-2", a.conf
		if change != nil {
			change(o, f)
		}
	})
	b.roots = a.roots
	a.knows(b)
	b.knows(a)
	return a, b
}

func (s *stack) knows(peer *stack) {
	s.adm.mu.Lock()
	defer s.adm.mu.Unlock()
	s.adm.peers = []*admission.Peer{{Instance: peer.relay.instance, Address: peer.addr}}
}

// across gets a session whose OUT channel is at out and whose IN channel is at in.
func across(t *testing.T, out, in *stack) (*rdpClient, *agentLeg) {
	t.Helper()
	id := newGUID()
	c, r, header, e := out.openOut(id)
	if e != nil {
		t.Fatal(e)
	}
	i, e := in.openIn(id)
	if e != nil {
		t.Fatal(e)
	}
	client := &rdpClient{Conn: i, out: c, t: t, r: r, tsgu: true, header: header}
	if typ, status := client.open(testTicket, testTarget); status != 0 {
		t.Fatalf("packet %#x refused with %#x", typ, status)
	}
	a := out.agent()
	client.SetDeadline(time.Now().Add(2 * patience))
	a.SetDeadline(time.Now().Add(2 * patience))
	return client, a
}

// ended waits until a connection has ended from the other side.
func ended(t *testing.T, what string, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s goes on", what)
	}
}

// TestFreeRDPsBytes: what a real FreeRDP sent, cut at random, opens its channel.
func TestFreeRDPsBytes(t *testing.T) {
	s := newStack(t, nil)
	captured := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join("testdata", "freerdp-3.15", name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	out, in := captured("legacy-out.raw"), captured("legacy-in.raw")
	r := rand.New(rand.NewPCG(rand.Uint64(), 0))
	for round := range 10 {
		id := []byte(newGUID()) // both channels', as FreeRDP makes one per connection
		own := func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("857ff186-5f16-5280-9bcf-65c91fcb1bb2"), id) }
		o, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		o.Write(own(out))
		o.SetDeadline(time.Now().Add(patience))
		answer := bufio.NewReader(o)
		if resp, err := http.ReadResponse(answer, nil); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatal(resp, err)
		}
		i, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		for b := own(in); len(b) > 0; {
			n := min(len(b), 1+r.IntN(200))
			i.Write(b[:n])
			b = b[n:]
		}
		a := s.agent()
		if got, err := io.ReadAll(a); err != nil || !bytes.HasPrefix(got, []byte("\x03\x00\x00+&\xe0")) || len(got) != 43 {
			t.Fatalf("round %d: the host read %q, %v; want FreeRDP's connection request and its good-bye", round, got, err)
		}
		for _, c := range []io.Closer{o, i, a} {
			c.Close()
		}
	}
}

func TestLegacyPairing(t *testing.T) {
	s := newStack(t, nil)
	no := func(t *testing.T, e *refusal.Error, says string) {
		t.Helper()
		if e == nil || e.Code != refusal.Protocol || !strings.Contains(e.Message, says) || e.ActivityID == "" {
			t.Errorf("%v; want one that says %q", e, says)
		}
	}
	elsewhere := func(f func()) {
		s.from = netip.MustParseAddr("127.0.0.2")
		defer func() { s.from = netip.Addr{} }()
		f()
	}
	t.Run("the first keep what they have", func(t *testing.T) {
		id := newGUID()
		c := s.dialLegacy(id)
		elsewhere(func() {
			_, _, _, e := s.openOut(id)
			no(t, e, "in use by a client at another address")
		})
		_, e := s.openIn(id)
		no(t, e, "has its IN channel already")
		if typ, status := c.open(testTicket, testTarget); status != 0 {
			t.Fatalf("packet %#x refused with %#x", typ, status)
		}
		a := s.agent()
		elsewhere(func() {
			_, _, _, e := s.openOut(strings.ToUpper(id)) // the same GUID
			no(t, e, "in use by a client at another address")
		})
		c.Write([]byte("still here"))
		expect(t, a, "still here")
		a.Write([]byte("me too"))
		expect(t, c, "me too")
		c.Close()
		a.Close()
		s.idle()
		s.dialLegacy(id).Close() // free again
		s.idle()
	})
	t.Run("the same client comes again", func(t *testing.T) {
		for _, stage := range []string{"OUT alone", "a pair", "a session"} {
			id := newGUID()
			old, _, _, e := s.openOut(id)
			if e != nil {
				t.Fatal(e)
			}
			var host *agentLeg
			switch stage {
			case "a pair":
				s.openIn(id)
			case "a session":
				old.Close()
				first := s.dialLegacy(id)
				first.open(testTicket, testTarget)
				host, old = s.agent(), first.out
			}
			c := s.dialLegacy(strings.ToUpper(id)) // the old connection seems to live
			ended(t, stage+": the older OUT channel", old)
			if host != nil {
				ended(t, stage+": the older session", host)
				host.Close()
			}
			if typ, status := c.open(testTicket, testTarget); status != 0 {
				t.Fatalf("%s: packet %#x refused with %#x", stage, typ, status)
			}
			a := s.agent()
			c.Write([]byte("here again"))
			expect(t, a, "here again")
			c.Close()
			a.Close()
			s.idle()
		}
	})
	t.Run("another address", func(t *testing.T) {
		id := newGUID()
		out, _, _, _ := s.openOut(id)
		s.from = netip.MustParseAddr("127.0.0.2")
		_, e := s.openIn(id)
		no(t, e, "from 127.0.0.2, but its OUT channel from another address")
		s.from = netip.Addr{}
		in, e := s.openIn(id) // the first is not disturbed
		if e != nil {
			t.Fatal(e)
		}
		in.Close()
		ended(t, "the OUT channel", out)
		cfg := *s.relay.config.Load()
		hidden := cfg
		hidden.AddressesHidden = true
		s.relay.SetConfig(hidden)
		defer s.relay.SetConfig(cfg)
		id = newGUID()
		out, _, _, _ = s.openOut(id)
		defer out.Close()
		s.from = netip.MustParseAddr("127.0.0.2")
		defer func() { s.from = netip.Addr{} }()
		if _, e := s.openIn(id); e != nil {
			t.Errorf("where a Service hides addresses they must not be compared: %v", e)
		}
	})
	t.Run("the OUT channel leaves between the IN channel's requests", func(t *testing.T) {
		id := newGUID()
		out, _, _, _ := s.openOut(id)
		in, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		s.request(in, bufio.NewReader(in), "RDG_IN_DATA /remoteDesktopGateway/ HTTP/1.1\nRDG-Connection-Id: "+id+"\nContent-Length: 0")
		out.Close()
		ended(t, "the IN channel", in)
	})
	t.Run("another id in the second request", func(t *testing.T) {
		id := newGUID()
		out, _, _, _ := s.openOut(id)
		in, err := s.dial(s.addr, testHost)
		if err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(in)
		s.request(in, r, "RDG_IN_DATA /remoteDesktopGateway/ HTTP/1.1\nRDG-Connection-Id: "+id+"\nContent-Length: 0")
		resp, body := s.request(in, r, "RDG_IN_DATA /remoteDesktopGateway/ HTTP/1.1\nRDG-Connection-Id: "+newGUID()+"\nTransfer-Encoding: chunked")
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s %s", resp.Status, body)
		}
		in.Close()
		ended(t, "the OUT channel", out)
	})
	t.Run("no chunk", func(t *testing.T) {
		c := s.dialLegacy(newGUID())
		c.Conn.Write([]byte("nonsense\r\n"))
		if _, err := io.ReadAll(c); err != nil {
			t.Errorf("the OUT channel ended with %v, not with a good-bye", err)
		}
		c.Close()
	})
	s.idle()
}

// TestUnpaired: an OUT channel alone is told that it waited in vain, and one whose client leaves ends before.
func TestUnpaired(t *testing.T) {
	s := newStack(t, func(o *Options, _ *fakeAdmission) { o.PairTimeout = 300 * time.Millisecond })
	out, r, header, _ := s.openOut(newGUID())
	got, err := io.ReadAll(r)
	if err != nil || len(got) != 12 || tsgu.Type(binary.LittleEndian.Uint16(got)) != tsgu.TypeCloseChannel || binary.LittleEndian.Uint32(got[8:]) != tsgu.CloseUnpaired {
		t.Errorf("%x, %v; want CLOSE_CHANNEL with %#x", got, err, tsgu.CloseUnpaired)
	}
	if log := s.log.String(); !strings.Contains(log, "No IN channel") || !strings.Contains(log, header.Get("Activity-Id")) {
		t.Error("the log does not tell why")
	}
	out.Close()
	s.idle()
}

func TestPairingTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all halves
		here, there := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")
		h, _ := all.enter("id", here, nil)
		began := time.Now()
		if in, late := h.await(30*time.Second, nil); in != nil || !late || time.Since(began) != 30*time.Second {
			t.Errorf("%v %t after %s", in, late, time.Since(began))
		}
		all.leave(h)
		if all.deliver(h, &leg{}) {
			t.Error("an IN channel was handed to an OUT channel that has gone")
		}
		h, _ = all.enter("id", here, nil)
		if other, _ := all.enter("id", there, nil); other != nil {
			t.Error("two OUT channels of one id")
		}
		want := &leg{}
		go func() {
			time.Sleep(29 * time.Second)
			all.deliver(h, want)
		}()
		if in, late := h.await(30*time.Second, nil); in != want || late {
			t.Errorf("%v %t", in, late)
		}
	})
}

func TestAcrossPods(t *testing.T) {
	a, b := pods(t, func(o *Options, _ *fakeAdmission) { o.CloseGrace = time.Second })
	t.Run("every byte arrives", func(t *testing.T) {
		c, host := across(t, a, b)
		const total = 2 << 20
		up, down := make([]byte, total), make([]byte, total)
		rand.NewChaCha8([32]byte{1}).Read(up)
		rand.NewChaCha8([32]byte{2}).Read(down)
		var all sync.WaitGroup
		all.Go(func() {
			r := rand.New(rand.NewPCG(rand.Uint64(), 0))
			var framed []byte
			for rest := up; len(rest) > 0; {
				n := min(len(rest), 1+r.IntN(40000))
				framed = append(framed, c.frame(rest[:n])...)
				rest = rest[n:]
			}
			for len(framed) > 0 {
				n := min(len(framed), 1+r.IntN(30000))
				c.Conn.Write(framed[:n])
				framed = framed[n:]
			}
		})
		all.Go(func() { host.Write(down) })
		for name, d := range map[string]struct {
			from io.Reader
			want []byte
		}{"to host": {host, up}, "to client": {c, down}} {
			all.Go(func() {
				got := make([]byte, total)
				if _, err := io.ReadFull(d.from, got); err != nil || !bytes.Equal(got, d.want) {
					t.Errorf("%s: other bytes; %v", name, err)
				}
			})
		}
		all.Wait()
		if len(b.relay.live()) != 0 {
			t.Error("the pod of the IN channel has a session of its own")
		}
		c.Close()
		host.Close()
	})
	for name, end := range map[string]func(c *rdpClient, host *agentLeg){
		"the OUT channel vanishes": func(c *rdpClient, _ *agentLeg) { c.out.NetConn().Close() },
		"the IN channel vanishes":  func(c *rdpClient, _ *agentLeg) { c.Conn.NetConn().Close() },
		"the IN channel ends":      func(c *rdpClient, _ *agentLeg) { fmt.Fprint(c.Conn, "0\r\n\r\n") },
		"the client says good-bye": func(c *rdpClient, _ *agentLeg) { c.packet(&tsgu.CloseChannel{}) },
		"TLS says good-bye":        func(c *rdpClient, _ *agentLeg) { c.CloseWrite() },
		"the host vanishes":        func(_ *rdpClient, host *agentLeg) { host.NetConn().Close() },
		"the host ends":            func(_ *rdpClient, host *agentLeg) { host.CloseWrite() },
		"an administrator ends it": func(c *rdpClient, _ *agentLeg) {
			for _, s := range a.relay.live() {
				a.relay.End(s.id, refusal.EndedByAdmin, "m")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, host := across(t, a, b)
			c.Write([]byte("last words"))
			expect(t, host, "last words")
			end(c, host)
			for what, conn := range map[string]net.Conn{"the OUT channel": c.out, "the IN channel": c.Conn, "the host's leg": host} {
				if strings.HasPrefix(name, what) {
					continue
				}
				ended(t, what, conn)
			}
			host.Close()
			a.idle()
			b.idle()
		})
	}
	t.Run("the same client comes again, at the other pod", func(t *testing.T) {
		id := newGUID()
		old := b.dialLegacy(id) // seems to live
		out, r, header, e := a.openOut(id)
		if e != nil {
			t.Fatal(e)
		}
		in, e := b.openIn(id)
		if e != nil {
			t.Fatalf("what is left of the older connection is in the way: %v", e)
		}
		c := &rdpClient{Conn: in, out: out, t: t, r: r, tsgu: true, header: header}
		if typ, status := c.open(testTicket, testTarget); status != 0 {
			t.Fatalf("packet %#x refused with %#x", typ, status)
		}
		a.agent().Close()
		c.Close()
		old.Close()
		a.idle()
		b.idle()
	})
	t.Run("refusals", func(t *testing.T) {
		id := newGUID()
		out, _, _, _ := a.openOut(id)
		b.from = netip.MustParseAddr("127.0.0.2")
		if _, e := b.openIn(id); e == nil || !strings.Contains(e.Message, "127.0.0.2") {
			t.Errorf("from another address: %v", e)
		}
		b.from = netip.Addr{}
		in, e := b.openIn(id)
		if e != nil {
			t.Fatal(e)
		}
		if _, e := b.openIn(id); e == nil || !strings.Contains(e.Message, "already") {
			t.Errorf("a second IN channel: %v", e)
		}
		if _, e := a.openIn(id); e == nil || !strings.Contains(e.Message, "already") {
			t.Errorf("a second IN channel at the first pod: %v", e)
		}
		if _, e := b.openIn(newGUID()); e == nil || !strings.Contains(e.Message, "is at this gateway") {
			t.Errorf("no OUT channel at all: %v", e)
		}
		in.Close()
		ended(t, "the OUT channel", out)
		a.idle()
		b.idle()
	})
	t.Run("a peer that is not there", func(t *testing.T) {
		b.adm.mu.Lock()
		peers := b.adm.peers
		b.adm.peers = append([]*admission.Peer{{Instance: "10-0-0-9", Address: "127.0.0.1:1"}}, peers...)
		b.adm.mu.Unlock()
		defer b.knows(a)
		c, host := across(t, a, b)
		c.Close()
		host.Close()
		a.idle()
		b.idle()
	})
	if b.relay.splices != 0 {
		t.Errorf("%d connections are still handed on", b.relay.splices)
	}
}

// TestOldClients: those who need the legacy form most speak TLS 1.2, which crypto/tls carries.
func TestOldClients(t *testing.T) {
	a, b := pods(t, nil)
	a.maxTLS, b.maxTLS = tls.VersionTLS12, tls.VersionTLS12
	for name, in := range map[string]*stack{"one pod": a, "two pods": b} {
		t.Run(name, func(t *testing.T) {
			c, host := across(t, a, in)
			data := make([]byte, 1<<20)
			rand.NewChaCha8([32]byte{3}).Read(data)
			go host.Write(data)
			go func() {
				for rest := data; len(rest) > 0; rest = rest[min(len(rest), 30000):] {
					c.Write(rest[:min(len(rest), 30000)])
				}
			}()
			for what, from := range map[string]io.Reader{"client": c, "host": host} {
				got := make([]byte, len(data))
				if _, err := io.ReadFull(from, got); err != nil || !bytes.Equal(got, data) {
					t.Errorf("to the %s: other bytes; %v", what, err)
				}
			}
			c.out.Close()
			ended(t, "the IN channel", c.Conn)
			ended(t, "the host's leg", host)
			host.Close()
			a.idle()
			b.idle()
		})
	}
}

// TestStrangersAtTheHop: who does not hold the listener's key gets nothing, whichever side of a hop he plays.
func TestStrangersAtTheHop(t *testing.T) {
	a, b := pods(t, nil)
	id := newGUID()
	out, _, _, e := a.openOut(id)
	if e != nil {
		t.Fatal(e)
	}
	own := a.reload.Certificate()
	other := t.TempDir()
	writeCertificate(t, other)
	strange, err := mtls.NewReloader(other, nil)
	if err != nil {
		t.Fatal(err)
	}
	name := func(instance, print string) string { return instance + "." + print + ".pair." + testHost }
	for what, conf := range map[string]*tls.Config{
		"no certificate":         {ServerName: name(testInstance, fingerprint(own))},
		"another certificate":    {ServerName: name(testInstance, fingerprint(own)), Certificates: []tls.Certificate{*strange.Certificate()}},
		"another one, its name":  {ServerName: name(testInstance, fingerprint(strange.Certificate())), Certificates: []tls.Certificate{*strange.Certificate()}},
		"right one, wrong key":   {ServerName: name(testInstance, fingerprint(own)), Certificates: []tls.Certificate{{Certificate: own.Certificate, PrivateKey: strange.Certificate().PrivateKey}}},
		"right, wrong instance":  {ServerName: name("10-0-0-7", fingerprint(own)), Certificates: []tls.Certificate{*own}},
		"right, TLS 1.2":         {ServerName: name(testInstance, fingerprint(own)), Certificates: []tls.Certificate{*own}, MaxVersion: tls.VersionTLS12},
		"right, no such name":    {ServerName: "pair." + testHost, Certificates: []tls.Certificate{*own}},
		"right, the public name": {ServerName: testHost, Certificates: []tls.Certificate{*own}},
	} {
		t.Run(what, func(t *testing.T) {
			conf.InsecureSkipVerify = true
			c, err := tls.Dial("tcp", a.addr, conf)
			if err != nil {
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %s\r\n\r\n", pathPair, pairProtocol, headerConnection, id)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err == nil && resp.StatusCode != http.StatusNotFound {
				t.Errorf("answered %s", resp.Status)
			}
		})
	}
	t.Run("a hop serves nothing else", func(t *testing.T) {
		c, err := tls.Dial("tcp", a.addr, &tls.Config{ServerName: name(testInstance, fingerprint(own)), Certificates: []tls.Certificate{*own}, InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if resp, _ := a.request(c, bufio.NewReader(c), "GET /rendezvous/v1/ping HTTP/1.1"); resp.StatusCode != http.StatusNotFound {
			t.Errorf("answered %s", resp.Status)
		}
	})
	t.Run("a false peer", func(t *testing.T) {
		l, err := tls.Listen("tcp", "127.0.0.1:0", strange.ServerConfig())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		said := make(chan int64, 10)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				n, _ := io.Copy(io.Discard, c)
				said <- n
				c.Close()
			}
		}()
		b.adm.mu.Lock()
		b.adm.peers = []*admission.Peer{{Instance: testInstance, Address: l.Addr().String()}}
		b.adm.mu.Unlock()
		defer b.knows(a)
		if _, e := b.openIn(id); e == nil || !strings.Contains(e.Message, "is at this gateway") {
			t.Errorf("%v", e)
		}
		if n := <-said; n != 0 {
			t.Errorf("a server with another certificate was told %d bytes", n)
		}
	})
	in, e := b.openIn(id) // after all that the OUT channel still waits, and a peer may have it
	if e != nil {
		t.Fatal(e)
	}
	in.Close()
	ended(t, "the OUT channel", out)
}

// TestPairsAroundARenewal: one pod has the new certificate already, the other doesn't, either way round.
func TestPairsAroundARenewal(t *testing.T) {
	a, b := pods(t, nil)
	// b reads the same files with a reloader of its own, and stays behind.
	old, err := mtls.NewReloader(a.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := newStack(t, func(o *Options, _ *fakeAdmission) { o.Instance, o.TLS = "10-0-0-3", old.ServerConfig() })
	c.roots = a.roots
	a.knows(c)
	c.knows(a)
	time.Sleep(10 * time.Millisecond) // another time of modification
	roots := writeCertificate(t, a.dir)
	if err := a.reload.Reload(); err != nil || a.reload.Certificate().Leaf.Equal(old.Certificate().Leaf) {
		t.Fatalf("the certificate was not renewed: %v", err)
	}
	a.roots, b.roots = roots, roots
	for name, pair := range map[string][2]*stack{"newer asks older": {c, a}, "older asks newer": {a, c}, "newer asks newer": {a, b}} {
		t.Run(name, func(t *testing.T) {
			pair[1].knows(pair[0])
			client, host := across(t, pair[0], pair[1])
			client.Write([]byte("x"))
			expect(t, host, "x")
			client.Close()
			host.Close()
		})
	}
	a.relay.certs.mu.Lock()
	a.relay.certs.renewed = time.Now().Add(-renewalTime)
	a.relay.certs.mu.Unlock()
	if held := a.relay.certs.held(); len(held) != 1 || !held[0].Leaf.Equal(a.reload.Certificate().Leaf) {
		t.Errorf("%d certificates are good for a hop long after a renewal", len(held))
	}
}

// TestHalvesAreStrangers: OUT channels that nobody vouches for make room for those who come after, and leave nothing.
func TestHalvesAreStrangers(t *testing.T) {
	s := newStack(t, func(o *Options, _ *fakeAdmission) { o.Config.MaxPending = 4 })
	var silent []*tls.Conn
	for range 12 {
		eventually(t, "one more OUT channel has a place", func() bool { // the one that it takes the place of has to end first
			c, _, _, e := s.openOut(newGUID())
			if e == nil {
				silent = append(silent, c)
			}
			return e == nil
		})
	}
	silent[len(silent)-1].Close()
	silent[len(silent)-2].Close()
	eventually(t, "they have gone", func() bool { return s.relay.strangers.Len() == 2 })
	c := s.dialLegacy(newGUID())
	if typ, status := c.open(testTicket, testTarget); status != 0 {
		t.Fatalf("packet %#x refused with %#x", typ, status)
	}
	a := s.agent()
	c.Write([]byte("x"))
	expect(t, a, "x")
	for _, gone := range silent[:8] {
		ended(t, "the OUT channel of an early stranger", gone)
	}
	c.Close()
	a.Close()
	for _, left := range silent {
		left.Close()
	}
	s.idle()
}
