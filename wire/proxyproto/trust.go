package proxyproto

import (
	"fmt"
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
