package proxyproto

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Networks are those from which headers are believed.
type Networks []netip.Prefix

// ParseNetworks reads networks in CIDR notation.
func ParseNetworks(texts []string) (all Networks, err error) {
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("proxyproto: %q is not a network in CIDR notation", text)
		}
		all = append(all, p.Masked())
	}
	return all, nil
}

// Believe says that a header of a connection from there is believed.
func (n Networks) Believe(from netip.Addr) bool {
	from = from.Unmap().WithZone("")
	return slices.ContainsFunc(n, func(p netip.Prefix) bool { return p.Contains(from) })
}

// Addr is a TCP connection's address, as it is compared; not valid for other addresses.
func Addr(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// warnEvery is how often one listener's refused headers are logged at most: a load balancer sends one with each connection.
const warnEvery = time.Minute

// Warnings logs headers that were refused. The zero value is ready.
type Warnings struct{ refused, unreadable rare }

// Refused notes a header that came from a network that isn't named; field is where to name it.
func (w *Warnings) Refused(log *slog.Logger, field string, from net.Addr) {
	if n := w.refused.due(time.Now()); n > 0 {
		log.Warn("connections begin with a PROXY protocol header from an address whose headers are not believed, and are refused: name the load balancer's network in the field, or switch the PROXY protocol off at the load balancer",
			"field", field, "address", from.String(), "refused", n)
	}
}

// Unreadable notes a header that would have been believed, and can't be read.
func (w *Warnings) Unreadable(log *slog.Logger, from net.Addr, err error) {
	if n := w.unreadable.due(time.Now()); n > 0 {
		log.Warn("connections begin with a PROXY protocol header that can't be read, and are refused: check what the load balancer sends", "address", from.String(), "error", err, "refused", n)
	}
}

// rare counts what is told of once in warnEvery.
type rare struct {
	mu   sync.Mutex
	next time.Time
	seen int // since it was last told
}

// due counts one more, and gives how many are to be told of now, 0 for none.
func (r *rare) due(now time.Time) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen++
	if !now.Before(r.next) {
		n, r.seen, r.next = r.seen, 0, now.Add(warnEvery)
	}
	return n
}

// Read reads the header that a stream may begin with, into buf's capacity, which grows to MaxLength where a header needs it.
// Rest is what was read and comes after the header: all of it where there is none. Found says that the stream begins with a
// header, which the error, if there is one, is about.
func Read(r io.Reader, buf []byte) (source netip.AddrPort, found bool, rest []byte, err error) {
	for {
		source, n, err := Parse(buf)
		switch err {
		case nil, ErrNone:
			return source, err == nil, buf[n:], nil
		case ErrShort:
		default:
			return source, true, nil, err
		}
		if len(buf) == cap(buf) {
			buf = append(make([]byte, 0, MaxLength), buf...)
		}
		got, err := r.Read(buf[len(buf):cap(buf)])
		if buf = buf[:len(buf)+got]; got == 0 && err != nil {
			return source, false, nil, err
		}
	}
}
