package login

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
)

// table is a stand-in for the kernel's, where a test needs sockets that it can't make.
type table struct{ sockets []Socket }

func (t *table) list(addresses ...netip.Addr) ([]Socket, error) {
	var found []Socket
	for _, s := range t.sockets {
		if slices.Contains(addresses, s.Local.Addr()) || slices.Contains(addresses, s.Remote.Addr()) {
			found = append(found, s)
		}
	}
	return found, nil
}

const agentUID = 0

// fixture is a lease that has dialled, with both ends of its connection in the table.
type fixture struct {
	*Book
	*table
	lease *Lease
	now   time.Time
}

var rdp = netip.MustParseAddrPort("127.0.0.1:3389")

func newFixture(t *testing.T) *fixture {
	f := &fixture{table: &table{}, now: time.Unix(1000, 0)}
	f.Book = NewBook(Options{Sockets: f.list, UID: agentUID, Now: func() time.Time { return f.now }})
	l, err := f.Lease(Session{ID: "s1", Activity: "a1", Person: "alice@example.com", Account: bus.Account{Name: "alice", Create: true, UID: 10001}})
	if err != nil {
		t.Fatal(err)
	}
	f.lease = l
	l.local, l.rdp, l.dialled = netip.AddrPortFrom(l.address, 40000), rdp, f.now
	f.sockets = []Socket{{l.local, rdp, stateEstablished, agentUID}, {rdp, l.local, stateEstablished, 108}}
	return f
}

func reasonOf(err error) Reason {
	var r *Refused
	if errors.As(err, &r) {
		return r.Reason
	}
	return ""
}

func TestAdmit(t *testing.T) {
	type change func(f *fixture)
	from := func(f *fixture, port uint16) netip.AddrPort { return netip.AddrPortFrom(f.lease.address, port) }
	for name, c := range map[string]struct {
		change       change
		user, remote string // "alice", and the lease's address, if empty
		want         Reason
	}{
		"her own":                  {nil, "", "", ""},
		"a name that isn't hers":   {nil, "bob", "", WrongAccount},
		"root":                     {nil, "root", "", WrongAccount},
		"no name":                  {nil, "\x00", "", WrongAccount},
		"from localhost":           {nil, "", "127.0.0.1", NotOurs},
		"from another loopback":    {nil, "", "127.200.200.200", NotOurs},
		"from outside":             {nil, "", "10.0.0.1", NotOurs},
		"not from an address":      {nil, "", "UDS", NotOurs},
		"twice":                    {func(f *fixture) { f.lease.loggedIn = true }, "", "", Used},
		"too late":                 {func(f *fixture) { f.now = f.now.Add(Deadline + 1) }, "", "", Late},
		"after the session":        {func(f *fixture) { f.lease.Release() }, "", "", NotOurs},
		"before the dial":          {func(f *fixture) { f.lease.local = netip.AddrPort{} }, "", "", NotConnected},
		"the connection is gone":   {func(f *fixture) { f.sockets = nil }, "", "", NotConnected},
		"it is closing":            {func(f *fixture) { f.sockets[0].State = 0x04 }, "", "", NotConnected},
		"xrdp closed it":           {func(f *fixture) { f.sockets = f.sockets[:1] }, "", "", NotConnected},
		"it is another process's":  {func(f *fixture) { f.sockets[0].UID = 10002 }, "", "", NotConnected},
		"a local user's beside it": {func(f *fixture) { f.sockets = append(f.sockets, Socket{from(f, 5), rdp, stateEstablished, 10002}) }, "", "", Shared},
		"one that is being made":   {func(f *fixture) { f.sockets = append(f.sockets, Socket{rdp, from(f, 5), 0x03, 0}) }, "", "", Shared},
		"one that was just closed": {func(f *fixture) { f.sockets = append(f.sockets, Socket{from(f, 5), rdp, 0x06, 0}) }, "", "", Shared},
		"half of one":              {func(f *fixture) { f.sockets = append(f.sockets, Socket{rdp, from(f, 5), 0x08, 108}) }, "", "", Shared},
		"to another port": {func(f *fixture) {
			f.sockets = append(f.sockets, Socket{from(f, 5), netip.MustParseAddrPort("127.0.0.1:3390"), stateEstablished, 10002})
		}, "", "", Shared},
		"a listener harms nobody": {func(f *fixture) {
			f.sockets = append(f.sockets, Socket{from(f, 5), netip.AddrPort{}, stateListen, 10002})
		}, "", "", ""},
		"others' sockets are no matter": {func(f *fixture) {
			f.sockets = append(f.sockets, Socket{netip.MustParseAddrPort("127.9.9.9:1"), rdp, stateEstablished, 10002})
		}, "", "", ""},
	} {
		f := newFixture(t)
		if c.change != nil {
			c.change(f)
		}
		user, remote := c.user, c.remote
		if user == "" {
			user = "alice"
		}
		if remote == "" {
			remote = f.lease.address.String()
		}
		for _, spelled := range []string{remote, "::ffff:" + remote} {
			_, err := f.Admit(user, spelled)
			if got := reasonOf(err); got != c.want {
				t.Errorf("%s (%s): %v, want %q", name, spelled, err, c.want)
			}
			if r := (&Refused{}); errors.As(err, &r) && c.want != NotOurs && (r.Session != "s1" || r.Activity != "a1") {
				t.Errorf("%s: it does not name the session that was aimed at: %+v", name, r)
			}
		}
	}
}

// Whoever was at the address once, and left before PAM asked, keeps that session from ever logging in.
func TestIntruderIsRemembered(t *testing.T) {
	f := newFixture(t)
	f.sockets = append(f.sockets, Socket{netip.AddrPortFrom(f.lease.address, 5), rdp, stateEstablished, 10002})
	if !f.lookForIntruders() {
		t.Fatal("nothing was looked for")
	}
	f.sockets = f.sockets[:2] // the intruder is gone without a trace
	_, err := f.Commit("alice", f.lease.address.String())
	if reasonOf(err) != Shared || !strings.Contains(err.Error(), "user 10002") {
		t.Errorf("%v, want it refused because of user 10002", err)
	}
	if f.lookForIntruders() {
		t.Error("it is still looked for")
	}
}

func TestOneLoginPerSession(t *testing.T) {
	f := newFixture(t)
	if _, err := f.Commit("alice", f.lease.address.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Commit("alice", f.lease.address.String()); reasonOf(err) != Used {
		t.Errorf("a second login: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	now := time.Unix(1000, 0)
	taken := &table{}
	b := NewBook(Options{Sockets: taken.list, Now: func() time.Time { return now }})
	seen := map[netip.Addr]bool{}
	var leases []*Lease
	for range 2000 {
		l, err := b.Lease(Session{})
		if err != nil {
			t.Fatal(err)
		}
		a := l.address.As4()
		if seen[l.address] || a[0] != 127 || a[1] == 0 {
			t.Fatalf("%s was given out", l.address)
		}
		seen[l.address] = true
		leases = append(leases, l)
	}
	for _, l := range leases {
		l.Release()
	}
	// They rest: none is given out again for a while, and the book has room again after it.
	for len(b.leases) < maxLeases {
		l, err := b.Lease(Session{})
		if err != nil {
			t.Fatal(err)
		}
		if seen[l.address] {
			t.Fatalf("%s was given out while it rested", l.address)
		}
	}
	if _, err := b.Lease(Session{}); err == nil || !strings.Contains(err.Error(), "all 65536") {
		t.Errorf("exhausted: %v", err)
	}
	now = now.Add(restFor + 1)
	if _, err := b.Lease(Session{}); err != nil {
		t.Errorf("after the rest: %v", err)
	}
}

// An address from which anything comes already, as from before a crash of the agent, is not given out.
func TestUsedAddressIsNotLent(t *testing.T) {
	asked := 0
	b := NewBook(Options{Sockets: func(...netip.Addr) ([]Socket, error) {
		if asked++; asked < 5 {
			return []Socket{{}}, nil
		}
		return nil, nil
	}})
	if _, err := b.Lease(Session{}); err != nil || asked != 5 {
		t.Errorf("%v after %d looks", err, asked)
	}
	b.o.Sockets = func(...netip.Addr) ([]Socket, error) { return []Socket{{}}, nil }
	if _, err := b.Lease(Session{}); err == nil {
		t.Error("a used address was lent")
	}
	b.o.Sockets = func(...netip.Addr) ([]Socket, error) { return nil, errors.New("no /proc") }
	if _, err := b.Lease(Session{}); err == nil || !strings.Contains(err.Error(), "no /proc") {
		t.Errorf("unreadable table: %v", err)
	}
}

// TestKernel is of real sockets: IPv4, and a server that listens on IPv6 for both.
func TestKernel(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("reads Linux's tables")
	}
	for _, listen := range []struct{ network, address string }{{"tcp4", "127.0.0.1:0"}, {"tcp", "[::]:0"}} {
		l, err := net.Listen(listen.network, listen.address)
		if err != nil {
			t.Logf("%s: %v", listen.address, err)
			continue
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		server := "127.0.0.1:" + port
		book := NewBook(Options{UID: uint32(os.Geteuid())})
		lease, err := book.Lease(Session{ID: "s", Account: bus.Account{Name: "alice"}})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := lease.Dial(context.Background(), server)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		remote, _, _ := net.SplitHostPort(accepted.RemoteAddr().String())
		if _, err := book.Admit("alice", remote); err != nil {
			t.Errorf("%s: %v", listen.address, err)
		}
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(remote)}}
		intruder, err := d.Dial("tcp4", server)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := book.Admit("alice", remote); reasonOf(err) != Shared {
			t.Errorf("%s: with an intruder: %v", listen.address, err)
		}
		intruder.(*net.TCPConn).SetLinger(0)
		intruder.Close()
		if _, err := book.Admit("alice", remote); reasonOf(err) != Shared {
			t.Errorf("%s: after an intruder: %v", listen.address, err)
		}
	}
}

func TestParseSockets(t *testing.T) {
	const titles = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	own, other := netip.MustParseAddrPort("127.5.6.7:45508"), netip.MustParseAddrPort("127.0.0.1:3389")
	got, err := parseSockets(strings.NewReader(titles+
		"   0: 0706057F:B1C4 0100007F:0D3D 01 00000000:00000000 00:00000000 00000000 10345        0 12345 1 x 20 4 30 10 -1\n"+
		"   1: 0100007F:0D3D 0806057F:B1C4 01 00000000:00000000 00:00000000 00000000   108        0 1\n"+
		"   2: somebody else's, and broken\n"+
		"   3: 0000000000000000FFFF00000100007F:0D3D 0000000000000000FFFF00000706057F:B1C4 01 00000000:00000000 00:00000000 00000000   108        0 1\n"),
		[]netip.Addr{own.Addr()})
	want := []Socket{{own, other, 1, 10345}, {other, own, 1, 108}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v %v, want %v", got, err, want)
	}
	for _, bad := range []string{"0: 0706057F: x\n", "0: 0706057F 0706057F:0D3D 01 0:0 0:0 0 0\n", "0: 0706057F:1 0100007F:0D3D ZZ 0:0 0:0 0 0\n", "0: 07:1 0706057F:0D3D 01 0:0 0:0 0 0\n", "0: 0706057F:1 0100007F:0D3D 01 0:0 0:0 0 x\n"} {
		if _, err := parseSockets(strings.NewReader(titles+bad), []netip.Addr{own.Addr()}); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func FuzzParseSockets(f *testing.F) {
	f.Add("titles\n0: 0706057F:B1C4 0100007F:0D3D 01 0:0 0:0 0 0 0 1\n")
	f.Fuzz(func(t *testing.T, text string) {
		own := netip.MustParseAddr("127.5.6.7")
		got, err := parseSockets(strings.NewReader(text), []netip.Addr{own})
		if err == nil && len(got) > strings.Count(text, "0706057F:") {
			t.Errorf("%d sockets of %q", len(got), text)
		}
		for _, s := range got {
			if s.Local.Addr() != own && s.Remote.Addr() != own {
				t.Errorf("%v has nothing to do with %s", s, own)
			}
		}
	})
}
