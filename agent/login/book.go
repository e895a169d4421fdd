package login

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
)

const (
	// restFor is how long an address is not given out again after its session: what is left of that session in the RDP
	// server must not meet the next one.
	restFor = 10 * time.Minute
	// maxLeases bounds the addresses that are out or rest.
	maxLeases = 1 << 16
	// draws is how many addresses are drawn for one session before it is given up.
	draws = 16
	// watchEvery is how often the table is looked at while a session has yet to log in. An intruder's connection lasts for
	// several round trips, a TLS handshake among them, before xrdp asks PAM.
	watchEvery = 10 * time.Millisecond
	// watchShare is the most of the time that goes into looking, as a divisor: the table of a busy machine is long.
	watchShare = 10
)

// Session is one session that may log in.
type Session struct {
	ID, Activity string
	Person       string // the Rendezvous user
	Account      bus.Account
	// Resource and Proof are kept with the account: see Record.
	Resource, Proof string
}

// Options of a Book.
type Options struct {
	// Sockets lists the machine's TCP sockets that have one of the IPv4 addresses at either end, both ends of a connection
	// each its own. nil means the kernel's table.
	Sockets func(addresses ...netip.Addr) ([]Socket, error)
	// UID that the agent's own sockets have.
	UID uint32
	Now func() time.Time // time.Now if nil
}

// Book lends loopback addresses to sessions, and knows which of them may log in. Safe for concurrent use.
type Book struct {
	o Options

	mu       sync.Mutex
	leases   map[netip.Addr]*Lease
	watching bool
}

// NewBook makes an empty one. What an earlier process lent ended with its connections.
func NewBook(o Options) *Book {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Sockets == nil {
		o.Sockets = kernelSockets
	}
	return &Book{o: o, leases: map[netip.Addr]*Lease{}}
}

// Lease is one session's address.
type Lease struct {
	book    *Book
	session Session
	address netip.Addr

	// Guarded by book.mu.
	local    netip.AddrPort // of the connection; zero before it
	rdp      netip.AddrPort // the RDP server's end
	dialled  time.Time
	loggedIn bool
	released time.Time // zero while the session lives
	// intruder is the other connection that was seen at the address; a session that had one never logs in.
	intruder *Refused
}

// Lease gives a session an address of its own.
func (b *Book) Lease(s Session) (*Lease, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.o.Now()
	if len(b.leases) >= maxLeases {
		for a, l := range b.leases {
			if !l.released.IsZero() && now.Sub(l.released) > restFor {
				delete(b.leases, a)
			}
		}
		if len(b.leases) >= maxLeases {
			return nil, fmt.Errorf("all %d loopback addresses for logins are taken, or rest for %v: too many sessions came within that time", maxLeases, restFor)
		}
	}
	for range draws {
		a := draw()
		if old := b.leases[a]; old != nil && (old.released.IsZero() || now.Sub(old.released) <= restFor) {
			continue
		}
		taken, err := b.o.Sockets(a)
		if err != nil {
			return nil, fmt.Errorf("the machine's sockets can't be read: %w", err)
		}
		if len(taken) > 0 {
			continue
		}
		l := &Lease{book: b, session: s, address: a}
		b.leases[a] = l
		return l, nil
	}
	return nil, errors.New("no free loopback address was found: does something on this machine use all of 127.0.0.0/8?")
}

// draw is a random address of 127.0.0.0/8 outside 127.0.0.0/16, where resolvers and other services have theirs, and not
// the last, which is the broadcast address.
func draw() netip.Addr {
	for {
		var b [3]byte
		rand.Read(b[:])
		if b[0] != 0 && b != [3]byte{255, 255, 255} {
			return netip.AddrFrom4([4]byte{127, b[0], b[1], b[2]})
		}
	}
}

// Dial connects the session to the RDP server, which must be at an IPv4 loopback address.
func (l *Lease) Dial(ctx context.Context, rdpAddr string) (*net.TCPConn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: l.address.AsSlice()}}
	conn, err := d.DialContext(ctx, "tcp4", rdpAddr)
	if err != nil {
		return nil, err
	}
	local, lerr := netip.ParseAddrPort(conn.LocalAddr().String())
	remote, rerr := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err := errors.Join(lerr, rerr); err != nil || !remote.Addr().IsLoopback() {
		conn.Close()
		return nil, fmt.Errorf("%s is not a loopback address (%v)", rdpAddr, err)
	}
	b := l.book
	b.mu.Lock()
	defer b.mu.Unlock()
	l.local, l.rdp, l.dialled = local, remote, b.o.Now()
	if !b.watching {
		b.watching = true
		go b.watch()
	}
	return conn.(*net.TCPConn), nil
}

// pending says that a session may still log in. mu is held.
func (l *Lease) pending(now time.Time) bool {
	return l.local != netip.AddrPort{} && l.released.IsZero() && !l.loggedIn && l.intruder == nil && now.Sub(l.dialled) <= Deadline
}

// watch looks for intruders for as long as a session has yet to log in. One that closed its connection in the moment in
// which PAM asks would not be seen then.
func (b *Book) watch() {
	for pause := watchEvery; ; {
		time.Sleep(pause)
		began := time.Now()
		if !b.lookForIntruders() {
			return
		}
		pause = max(watchEvery, watchShare*time.Since(began))
	}
}

// lookForIntruders is one look; false says that there is nothing to look for.
func (b *Book) lookForIntruders() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	ends := map[netip.Addr][]Socket{}
	now := b.o.Now()
	for a, l := range b.leases {
		if l.pending(now) {
			ends[a] = nil
		}
	}
	if len(ends) == 0 {
		b.watching = false
		return false
	}
	all, err := b.o.Sockets(slices.Collect(maps.Keys(ends))...)
	if err != nil {
		return true // PAM's question meets the same, and is refused
	}
	for _, s := range all {
		for _, a := range []netip.Addr{s.Local.Addr(), s.Remote.Addr()} {
			if _, ok := ends[a]; ok {
				ends[a] = append(ends[a], s)
			}
		}
	}
	for a, sockets := range ends {
		b.leases[a].inspect(sockets, b.o.UID)
	}
	return true
}

// inspect takes in the sockets that have the lease's address, and says whether both ends of its own connection are among
// them. mu is held.
func (l *Lease) inspect(sockets []Socket, uid uint32) (connected bool) {
	var ours, theirs bool
	for _, s := range sockets {
		switch {
		case s.State == stateListen:
		case s.Local == l.local && s.Remote == l.rdp:
			ours = s.UID == uid && s.State == stateEstablished
		case s.Local == l.rdp && s.Remote == l.local:
			theirs = s.State == stateEstablished
		case l.intruder != nil:
		case s.Local.Addr() == l.address:
			l.intruder = refuse(Shared, "user %d of this host made a connection from %s to %s, by which %s was to log in", s.UID, s.Local, s.Remote, l.session.Person).at(l)
		default:
			l.intruder = refuse(Shared, "another connection came to %s from %s, by which %s was to log in", s.Local, s.Remote, l.session.Person).at(l)
		}
	}
	return ours && theirs
}

// Release takes the address back. A login that comes later is refused.
func (l *Lease) Release() {
	l.book.mu.Lock()
	defer l.book.mu.Unlock()
	l.released = l.book.o.Now()
}

// Session that the address belongs to.
func (l *Lease) Session() Session { return l.session }

// Admit says whether a login as user from remote is a session's own. It changes nothing: Commit does, after the account
// is there. Its errors are *Refused.
func (b *Book) Admit(user, remote string) (*Lease, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.admit(user, remote)
}

// admit does Admit's work. mu is held.
func (b *Book) admit(user, remote string) (*Lease, error) {
	address, err := netip.ParseAddr(remote)
	if err != nil {
		return nil, refuse(NotOurs, "a login as %q came from %q, which is no address", clip(user), clip(remote))
	}
	l := b.leases[address.Unmap()]
	switch {
	case l == nil || !l.released.IsZero():
		return nil, refuse(NotOurs, "a login as %q came from %s, from where no session of this host dials", clip(user), address)
	case l.local == netip.AddrPort{}:
		return nil, refuse(NotConnected, "a login as %q came from %s before its session had dialled", clip(user), address).at(l)
	}
	ends, err := b.o.Sockets(l.address)
	if err != nil {
		return nil, refuse(NotConnected, "the machine's sockets can't be read: %v", err).at(l)
	}
	connected := l.inspect(ends, b.o.UID)
	switch {
	case l.intruder != nil: // first, because it says who it is that tries
		return nil, l.intruder
	case !connected:
		return nil, refuse(NotConnected, "a login as %q came from %s, whose session is no longer connected", clip(user), address).at(l)
	case l.loggedIn:
		return nil, refuse(Used, "a login as %q came from %s, by which its session has logged in already", clip(user), address).at(l)
	case b.o.Now().Sub(l.dialled) > Deadline:
		return nil, refuse(Late, "a login as %q came from %s more than %v after its session began", clip(user), address, Deadline).at(l)
	case user != l.session.Account.Name:
		return nil, refuse(WrongAccount, "a login as %q came by the connection of %s, whose account is %q", clip(user), l.session.Person, l.session.Account.Name).at(l)
	}
	return l, nil
}

// Commit is Admit once more, and the session's one login.
func (b *Book) Commit(user, remote string) (*Lease, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l, err := b.admit(user, remote)
	if err == nil {
		l.loggedIn = true
	}
	return l, err
}

// clip bounds what strangers say before it is logged.
func clip(s string) string {
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return s
}
