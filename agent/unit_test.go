package agent

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// TestLedgerNeverOverfills is the promise that lets several brokers place at one time.
func TestLedgerNeverOverfills(t *testing.T) {
	const limit = 5
	l := newLedger()
	l.configure(bus.HostConfig{MaxSessions: limit})
	l.setReady(true, "")
	var live, most, refused atomic.Int64
	var wg sync.WaitGroup
	for broker := range 8 {
		wg.Go(func() {
			for i := range 500 {
				req := bus.HostConnect{SessionID: fmt.Sprintf("%d-%d", broker, i), User: fmt.Sprintf("u%d-%d", broker, i)}
				fresh, err := l.reserve(req, "h", time.Now())
				if err != nil {
					refused.Add(1)
					if err.Code != refusal.HostFull {
						t.Errorf("refused with %v", err)
					}
					continue
				}
				if !fresh {
					t.Errorf("session %s has a place already", req.SessionID)
				}
				n := live.Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				if rand.IntN(2) == 0 {
					l.activate(req.SessionID, time.Now())
				}
				l.mu.Lock()
				if places, _, _ := l.taken(""); places > limit {
					t.Errorf("%d sessions, at most %d may be", places, limit)
				}
				l.mu.Unlock()
				live.Add(-1)
				l.release(req.SessionID, time.Now())
			}
		})
	}
	wg.Wait()
	if most.Load() > limit {
		t.Errorf("%d sessions at one time, at most %d may be", most.Load(), limit)
	}
	if l.count() != 0 {
		t.Errorf("%d sessions left", l.count())
	}
	if err := l.wait(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestLedgerOrder(t *testing.T) {
	req := bus.HostConnect{SessionID: "s", ActivityID: "a"}
	full := bus.HostConfig{MaxSessions: 0}
	tests := []struct {
		name string
		set  func(*ledger)
		want refusal.Code // empty: accepted
	}{
		{"only just started", func(*ledger) {}, refusal.HostNotReady},
		{"RDP server down", func(l *ledger) { l.configure(bus.HostConfig{MaxSessions: 1}); l.setReady(false, "down") }, refusal.HostNotReady},
		{"no place at all", func(l *ledger) { l.configure(full); l.setReady(true, "") }, refusal.HostFull},
		{"drain counts before fullness", func(l *ledger) { c := full; c.Draining = true; l.configure(c); l.setReady(true, "") }, refusal.HostDraining},
		{"stopping counts before all", func(l *ledger) { l.stop() }, refusal.HostDraining},
		{"room", func(l *ledger) { l.configure(bus.HostConfig{MaxSessions: 1}); l.setReady(true, "") }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLedger()
			tt.set(l)
			_, err := l.reserve(req, "h", time.Now())
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.want != "" && (err == nil || err.Code != tt.want || err.ActivityID != "a"):
				t.Errorf("got %v, want %s with the activity id", err, tt.want)
			}
		})
	}
}

// A session that is still being joined when the agent ends must not come alive afterwards.
func TestLedgerEndsPending(t *testing.T) {
	l := newLedger()
	l.configure(bus.HostConfig{MaxSessions: 1})
	l.setReady(true, "")
	l.reserve(bus.HostConnect{SessionID: "s"}, "h", time.Now())
	l.endAll()
	if l.activate("s", time.Now()) {
		t.Error("an ended session was activated")
	}
	if l.activate("never", time.Now()) {
		t.Error("an unknown session was activated")
	}
}

func TestReadConfirm(t *testing.T) {
	confirm := func(kind byte, value byte) []byte {
		return []byte{3, 0, 0, 19, 14, 0xd0, 0, 0, 0, 0, 0, kind, 0, 8, 0, value, 0, 0, 0}
	}
	tests := []struct {
		name string
		in   []byte
		want string // of the error; empty: fine
	}{
		{"TLS", confirm(2, 1), ""},
		{"NLA", confirm(2, 2), ""},
		{"old security", confirm(2, 0), "old RDP security"},
		{"no negotiation", []byte{3, 0, 0, 11, 6, 0xd0, 0, 0, 0, 0, 0}, "old RDP security only"},
		{"failure 2", confirm(3, 2), "does not allow TLS"},
		{"failure 3", confirm(3, 3), "no certificate"},
		{"failure 99", confirm(3, 99), "code 99"},
		{"another kind", confirm(7, 1), "no RDP server"},
		{"SSH", []byte("SSH-2.0-OpenSSH_9.2\r\n"), "no RDP server"},
		{"HTTP", []byte("HTTP/1.1 400 Bad Request\r\n"), "no RDP server"},
		{"absurd length", []byte{3, 0, 0xff, 0xff, 6, 0xd0, 0, 0, 0, 0, 0}, "no RDP server"},
		{"closed at once", nil, "closed the connection"},
		{"closed within", confirm(2, 1)[:15], "closed the connection"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := readConfirm(bytes.NewReader(tt.in))
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzReadConfirm(f *testing.F) {
	f.Add([]byte{3, 0, 0, 19, 14, 0xd0, 0, 0, 0, 0, 0, 2, 0, 8, 0, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		if readConfirm(bytes.NewReader(in)) == nil && len(in) < 19 {
			t.Errorf("%x passed", in)
		}
	})
}

func TestBusOrder(t *testing.T) {
	got := busOrder([]string{"wss://b", "tls://a", "wss://c", "tls://d"})
	if want := []string{"tls://a", "tls://d", "wss://b", "wss://c"}; !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
}

func TestBackoff(t *testing.T) {
	b := backoff{min: 100 * time.Millisecond, max: time.Second}
	limits := []time.Duration{100, 200, 400, 800, 1000, 1000}
	for range 2 {
		for i, limit := range limits {
			if d := b.delay(); d < limit*time.Millisecond/2 || d > limit*time.Millisecond {
				t.Errorf("delay %d is %s, want from half of %dms to all of it", i, d, limit)
			}
		}
		b.reset()
	}
}

func TestRenewAt(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	cert := func(days int) *x509.Certificate {
		return &x509.Certificate{NotBefore: begin, NotAfter: begin.AddDate(0, 0, days)}
	}
	tests := []struct {
		name   string
		m      member
		latest time.Time
		span   time.Duration
	}{
		{"client only", member{client: cert(30)}, begin.AddDate(0, 0, 20), 36 * time.Hour},
		{"the first to end counts", member{client: cert(90), rdp: cert(30)}, begin.AddDate(0, 0, 20), 36 * time.Hour},
	}
	for _, tt := range tests {
		for range 100 {
			if at := renewAt(&tt.m); at.After(tt.latest) || at.Before(tt.latest.Add(-tt.span)) {
				t.Errorf("%s: renewal at %s, want within %s before %s", tt.name, at, tt.span, tt.latest)
			}
		}
	}
	for _, left := range []time.Duration{-time.Hour, 0, time.Minute, 24 * time.Hour} {
		if d := renewRetry(left, time.Second); d < 500*time.Millisecond || d > 10*time.Minute {
			t.Errorf("with %s left the retry comes after %s", left, d)
		}
	}
}

// pumpPair is a pump between two real connections; the test holds their far ends.
func pumpPair(t *testing.T, grace time.Duration) (client *tls.Conn, server *net.TCPConn, done chan error) {
	t.Helper()
	gatewayLeg, gatewayFar := tcpPair(t)
	hostLeg, hostFar := tcpPair(t)
	ca := newAuthority(t)
	client = tls.Server(gatewayFar, ca.config(t, x509.Certificate{DNSNames: []string{gatewayName}}))
	leg := tls.Client(gatewayLeg, &tls.Config{InsecureSkipVerify: true})
	handshake := make(chan error, 1)
	go func() { handshake <- client.Handshake() }()
	must(t, leg.Handshake())
	must(t, <-handshake)
	done = make(chan error, 1)
	go func() {
		_, _, err := pump(&joinedConn{Conn: leg, rest: bufio.NewReader(leg)}, hostLeg, grace)
		done <- err
	}()
	return client, hostFar, done
}

func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	x, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	y, err := l.Accept()
	must(t, err)
	t.Cleanup(func() { x.Close(); y.Close() })
	return x.(*net.TCPConn), y.(*net.TCPConn)
}

// One direction's end must not cut the other's bytes.
func TestPumpHalfClose(t *testing.T) {
	client, server, done := pumpPair(t, 20*time.Second)
	must(t, client.CloseWrite())
	if data, err := io.ReadAll(server); err != nil || len(data) > 0 {
		t.Fatalf("the server read %d bytes, %v; want the client's end", len(data), err)
	}
	want := bytes.Repeat([]byte("last words "), 200_000)
	go func() {
		server.Write(want)
		server.CloseWrite()
	}()
	if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the client read %d bytes, %v; want %d", len(got), err, len(want))
	}
	if err := <-done; err != nil {
		t.Errorf("pump: %v", err)
	}
}

// A peer that never ends its direction must not hold the session open: the pump gives up after the grace.
func TestPumpGrace(t *testing.T) {
	client, _, done := pumpPair(t, 20*time.Millisecond)
	must(t, client.CloseWrite())
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("pump: %v, want the deadline", err)
	}
}

func TestSystemdUnit(t *testing.T) {
	o := unitOptions{
		command:  []string{"/usr/bin/agent", "run", "--broker=https://b", `--host=a"b\c%d$e`},
		writable: []string{"/var/lib/agent", "", "/etc/xrdp certs"}, drainSeconds: 30,
	}
	for golden, loginDir := range map[string]string{
		"rendezvous-agent.service": "", "rendezvous-agent-login.service": "/run/rendezvous-login", "rendezvous-agent-elsewhere.service": "/srv/login",
	} {
		o.loginDir = loginDir
		unit := systemdUnit(o)
		want, err := os.ReadFile(filepath.Join("testdata", golden))
		if err != nil {
			t.Fatal(err)
		}
		if unit != string(want) {
			t.Errorf("%s: got:\n%s\nwant:\n%s", golden, unit, want)
		}
	}
}

func TestOptions(t *testing.T) {
	good := Options{Broker: "https://b/", StateDir: "/s", Host: "h"}
	tests := []struct {
		name   string
		change func(*Options)
		want   string
	}{
		{"good", func(*Options) {}, ""},
		{"no broker", func(o *Options) { o.Broker = "" }, "--broker"},
		{"plain http", func(o *Options) { o.Broker = "http://b" }, "--broker"},
		{"no state folder", func(o *Options) { o.StateDir = "" }, "--state-dir"},
		{"dots in the host name", func(o *Options) { o.Host = "a.b" }, "--host"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := good
			tt.change(&o)
			a, err := New(o)
			if tt.want == "" && (err != nil || a.opts.Broker != "https://b" || a.opts.RDPAddr != "127.0.0.1:3389") {
				t.Errorf("%v, %+v", err, a)
			}
			if tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)) {
				t.Errorf("error %v, want one that begins with %s", err, tt.want)
			}
		})
	}
}

// The agent's identity file must not carry a key.
func TestMemberFileHoldsNoKey(t *testing.T) {
	data, err := json.Marshal(&member{Host: "h", ClientKey: "SECRET", RDPKey: "SECRET"})
	if err != nil || bytes.Contains(data, []byte("SECRET")) {
		t.Errorf("%s, %v", data, err)
	}
}

func BenchmarkCopyPooled(b *testing.B) {
	data := make([]byte, 1<<20)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := copyPooled(io.Discard, bytes.NewReader(data)); err != nil {
			b.Fatal(err)
		}
	}
}

// TestJoinsResumeTLS is that a second join with an instance spares both sides a full handshake, and that a session never
// outlives the trust that it began with.
func TestJoinsResumeTLS(t *testing.T) {
	const name = "gw.example.test"
	ca, other := newAuthority(t), newAuthority(t)
	g := startGateway(t, ca.config(t, x509.Certificate{DNSNames: []string{name}}))
	cache := tls.NewLRUClientSessionCache(1)
	for _, step := range []struct {
		name, serverName, ca string
		resumed, refused     bool
	}{
		{"first", name, ca.pem, false, false},
		{"second", name, ca.pem, true, false},
		{"the same instance under another CA", name, other.pem, false, true},
		{"after a refusal", name, ca.pem, false, false},
		{"another gateway's name", "evil.example.test", ca.pem, false, true},
	} {
		req := bus.HostConnect{Address: g.addr, ServerName: step.serverName, Instance: "10-0-0-1", CABundle: step.ca, JoinSecret: make([]byte, 32)}
		c, err := join(t.Context(), req, cache)
		if (err != nil) != step.refused {
			t.Fatalf("%s: join says %v", step.name, err)
		}
		if err != nil {
			continue
		}
		if got := c.ConnectionState().DidResume; got != step.resumed {
			t.Errorf("%s: resumed %v, want %v", step.name, got, step.resumed)
		}
		c.Close()
		(<-g.joins).Close()
	}
}

// The key is xrdp's to read where the machine has a group of that name, and never everybody's.
func TestKeyGroup(t *testing.T) {
	if os.Geteuid() != 0 || runtime.GOOS == "windows" {
		t.Skip("only root gives files away")
	}
	d := newDirInstaller(filepath.Join(t.TempDir(), "certs"))
	_, err := user.LookupGroup(xrdpGroup)
	if known := err == nil; known != (d.gid > 0) {
		t.Errorf("group xrdp: %v, taken for %d", err, d.gid)
	}
	for _, gid := range []int{-1, 4711} {
		d.gid = gid
		for range 2 { // the second replaces
			must(t, d.Install([]byte("certificate"), []byte("key")))
		}
		fi, err := os.Stat(filepath.Join(d.dir, mtls.KeyFile))
		must(t, err)
		if got := int(reflect.Indirect(reflect.ValueOf(fi.Sys())).FieldByName("Gid").Uint()); got != max(gid, 0) || fi.Mode().Perm() != 0o640 {
			t.Errorf("the key is group %d's, mode %v; want %d", got, fi.Mode(), gid)
		}
	}
}
