package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/mtls"
)

// When the RDP server is asked, by what the kernel says of its listening socket.
func TestWatch(t *testing.T) {
	refused := errors.New("refused")
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	listening := func(waiting int, inodes ...uint32) func() (login.Listening, error) {
		return func() (login.Listening, error) { return login.Listening{Sockets: inodes, Waiting: waiting}, nil }
	}
	unknown := func() (login.Listening, error) { return login.Listening{}, errors.New("not here") }
	same := login.Listening{Sockets: []uint32{7}}
	for name, c := range map[string]struct {
		watch          watch
		suspect, wrong bool
		due, gone      bool
	}{
		"the first time":                      {watch: watch{look: listening(0, 7)}, due: true},
		"nothing listens":                     {watch: watch{look: listening(0), last: same, probed: ago(time.Second)}, gone: true},
		"nothing listens, where a probe fits": {watch: watch{look: listening(0), probed: ago(time.Hour)}, suspect: true, gone: true},
		"as before":                           {watch: watch{look: listening(0, 7), last: same, probed: ago(4 * time.Minute)}},
		"after a long time":                   {watch: watch{look: listening(0, 7), last: same, probed: ago(5 * time.Minute)}, due: true},
		"restarted":                           {watch: watch{look: listening(0, 8), last: same, probed: ago(time.Second)}, due: true},
		"a session went wrong":                {watch: watch{look: listening(0, 7), last: same, probed: ago(time.Second)}, suspect: true, due: true},
		"a connection waits":                  {watch: watch{look: listening(1, 7), last: same, probed: ago(time.Minute)}},
		"one still waits":                     {watch: watch{look: listening(1, 7), last: same, waiting: 1, probed: ago(time.Minute)}, due: true},
		"and was looked at just now":          {watch: watch{look: listening(1, 7), last: same, waiting: 5, probed: ago(time.Second)}},
		"the wrong certificate":               {watch: watch{look: listening(0, 7), last: same, probed: ago(10 * time.Second)}, wrong: true, due: true},
		"failed just now":                     {watch: watch{look: listening(0, 7), last: same, probed: ago(time.Second), err: refused, next: 2 * time.Second}},
		"failed a while ago":                  {watch: watch{look: listening(0, 7), last: same, probed: ago(3 * time.Second), err: refused, next: 2 * time.Second}, due: true},
		"unknown, as before":                  {watch: watch{look: unknown, probed: ago(9 * time.Second)}},
		"unknown, after a while":              {watch: watch{look: unknown, probed: ago(10 * time.Second)}, due: true},
		"unknown, and failed":                 {watch: watch{look: unknown, probed: ago(3 * time.Second), err: refused, next: 2 * time.Second}, due: true},
	} {
		c.watch.timing = timing{}.withDefaults()
		due, gone := c.watch.due(now, c.suspect, c.wrong)
		if due != c.due || (gone != nil) != c.gone {
			t.Errorf("%s: asked %t, %v", name, due, gone)
		}
	}
}

// A server that is well is asked once, and not every few seconds for ever. One that ends, comes back or does not answer is
// noticed all the same.
func TestQuietProbe(t *testing.T) {
	if _, err := login.Listeners(netip.MustParseAddrPort("127.0.0.1:1")); err != nil {
		t.Skip("the kernel can't be asked here: ", err)
	}
	w := newWorld(t)
	var connections, looks atomic.Int32
	var hangs atomic.Bool
	serve := func(address string) net.Listener {
		l, err := net.Listen("tcp", address)
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				connections.Add(1)
				if !hangs.Load() {
					go w.rdp.serve(c)
				}
			}
		}()
		return l
	}
	l := serve("127.0.0.1:0")
	o := w.options()
	o.RDPAddr = l.Addr().String()
	o.timing.probe, o.timing.probeReady, o.timing.probeAgain = 500*time.Millisecond, 10*time.Millisecond, time.Hour
	at := netip.MustParseAddrPort(o.RDPAddr)
	o.listeners = func() (login.Listening, error) {
		looks.Add(1)
		return login.Listeners(at)
	}
	w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 3})
	// The agent's own certificate comes while it probes for the first time.
	settled, since := connections.Load(), looks.Load()
	w.eventually("twenty looks", func() bool { return looks.Load() > since+20 })
	if n := connections.Load(); n > settled+1 || n > 3 {
		t.Errorf("a server that is well had %d connections, %d of them within twenty looks", n, n-settled)
	}

	l.Close()
	w.eventually("a report that nothing listens", func() bool { return !w.last().RDPReady })
	l = serve(o.RDPAddr)
	w.eventually("a ready host again", func() bool { return w.last().RDPReady })
	l.Close()
	hangs.Store(true) // it accepts, and says nothing
	serve(o.RDPAddr)
	w.eventually("a report that the new server doesn't answer", func() bool { return !w.last().RDPReady })
}

// A server takes a renewed certificate up when it pleases: after the first look, say. The report tells then, too.
func TestServerTakesCertificateUpLate(t *testing.T) {
	w := newWorld(t)
	late := startRDP(t, t.TempDir())
	o := w.options()
	o.RDPAddr, o.timing.probeAgain = late.addr, time.Hour
	at := netip.MustParseAddrPort(late.addr)
	var looks atomic.Int32
	o.listeners = func() (login.Listening, error) {
		looks.Add(1)
		return login.Listeners(at)
	}
	if _, err := login.Listeners(at); err != nil {
		t.Skip("the kernel can't be asked here: ", err)
	}
	installed := func() string {
		text, err := os.ReadFile(filepath.Join(w.dir, mtls.CertFile))
		if err != nil {
			return ""
		}
		return string(text)
	}
	takeUp := func() {
		t.Helper()
		for _, name := range []string{mtls.CertFile, mtls.KeyFile} {
			text, err := os.ReadFile(filepath.Join(w.dir, name))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(late.dir, name), text, 0o600))
		}
	}
	a, err := New(o)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	w.eventually("a certificate", func() bool { return installed() != "" })
	takeUp()
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	first := installed()
	a.RenewNow()
	w.eventually("another certificate", func() bool { return installed() != first })
	since := looks.Load()
	w.eventually("ten looks at a server that has the former", func() bool { return looks.Load() > since+10 })
	takeUp()
	want := fingerprint(a.current().rdp)
	w.eventually("a report of the certificate that is served now", func() bool { return w.last().CertificateFingerprint == want })
}
