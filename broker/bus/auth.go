package bus

import (
	"crypto/subtle"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
)

// authenticator binds each connection to the identity in its certificate.
type authenticator struct {
	o     Options
	front *front // what the connections came through; set by Start
	// The tokens let in this process's own two connections, which have no TLS. They never leave the process.
	ownToken, watchToken string
	system               *server.Account

	// displace closes connections that newer ones of their identity have replaced. It does not block.
	displace func(identity.ID, []uint64)

	mu    sync.Mutex
	conns map[uint64]client        // by the server's connection id
	byID  map[identity.ID][]uint64 // the same, the oldest first
}

// client is one agent or gateway on this replica.
type client struct {
	id     identity.ID
	key    string    // its certificate's, as identity.KeyFingerprint
	issued time.Time // its certificate
	since  time.Time
	picked bool // a gateway's permissions are those of one that the workspace has
}

func newAuthenticator(o Options) *authenticator {
	return &authenticator{o: o, ownToken: randomToken(), watchToken: randomToken(), conns: map[uint64]client{}, byID: map[identity.ID][]uint64{}}
}

// admit is asked in the TLS handshake, once the certificate's chain is verified. Brokers have routes, and no business
// on the listeners for agents and gateways.
func (a *authenticator) admit(id identity.ID) error {
	if id.Namespace != a.o.Namespace || id.Workspace != a.o.Workspace {
		return fmt.Errorf("the certificate is %s's; this is the bus of workspace %s/%s", id, a.o.Namespace, a.o.Workspace)
	}
	if id.Role != identity.RoleAgent && id.Role != identity.RoleGateway {
		return fmt.Errorf("the certificate is %s's; this listener takes roles %q and %q", id, identity.RoleAgent, identity.RoleGateway)
	}
	return nil
}

// Check implements server.Authentication: it gives the connection its permissions. It is called again when routes change.
func (a *authenticator) Check(c server.ClientAuthentication) bool {
	cs := c.GetTLSConnectionState()
	if cs == nil {
		return a.checkInProcess(c)
	}
	if len(cs.PeerCertificates) == 0 {
		return false
	}
	leaf, remote := cs.PeerCertificates[0], a.front.remote(c.RemoteAddress())
	id, err := identity.FromCertificate(leaf)
	if err == nil {
		err = a.admit(id)
	}
	key := identity.KeyFingerprint(leaf.RawSubjectPublicKeyInfo)
	if err == nil {
		err = a.o.Admit(id, key, leaf.NotBefore)
	}
	var p wirebus.Permissions
	picked := true
	if err == nil {
		p, err = wirebus.PermissionsFor(id)
		if picked = a.picked(id); !picked {
			p = wirebus.UnpickedPermissions(id)
			a.o.Log.Warn("gateway hears only which sessions to end: the workspace does not pick it", "gateway", id.Gateway, "remote", remote.String())
		}
	}
	if err != nil {
		a.o.Log.Warn("connection refused", "remote", remote.String(), "error", err)
		return false
	}
	c.RegisterUser(&server.User{
		Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: p.Publish},
			Subscribe: &server.SubjectPermission{Allow: p.Subscribe},
			Response:  &server.ResponsePermission{MaxMsgs: 1, Expires: replyTTL},
		},
		// A connection lives no longer than the certificate that opened it; its owner comes back with a renewed one.
		ConnectionDeadline: leaf.NotAfter,
	})
	if !a.came(c.GetID(), client{id, key, leaf.NotBefore, time.Now(), picked}) {
		a.o.Log.Warn("connection refused", "remote", remote.String(), "error", fmt.Errorf("%s has too many connections already", id))
		return false
	}
	// Who was put out since Admit was asked above may have been missed by a Recheck meanwhile.
	if err := a.o.Admit(id, key, leaf.NotBefore); err != nil || a.picked(id) != picked {
		a.o.Log.Warn("connection refused", "remote", remote.String(), "error", err)
		a.gone(c.GetID())
		return false
	}
	if d := a.front.of(c.RemoteAddress()); d != nil {
		d.Vouch()
	}
	return true
}

// picked says whether an identity has all that its role may; all but gateways do.
func (a *authenticator) picked(id identity.ID) bool {
	return id.Role != identity.RoleGateway || a.o.Picked(id.Gateway)
}

func (a *authenticator) checkInProcess(c server.ClientAuthentication) bool {
	token := c.GetOpts().Token
	switch {
	case same(token, a.ownToken):
		c.RegisterUser(&server.User{})
		return true
	case same(token, a.watchToken):
		c.RegisterUser(&server.User{Account: a.system})
		return true
	}
	return false
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// came notes a connection, unless its identity has too many. An agent has one connection, and for a moment two while it
// changes from one to the next: the newer wins. Of a gateway's identity each pod has one.
func (a *authenticator) came(conn uint64, c client) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.conns[conn]; known {
		return true
	}
	older := a.byID[c.id]
	if c.id.Role == identity.RoleAgent {
		if len(older) >= 2*maxPerAgent { // the older are being closed: this one may come again
			return false
		}
		if n := len(older) + 1 - maxPerAgent; n > 0 {
			a.displace(c.id, slices.Clone(older[:n]))
		}
		if len(older) > 0 {
			time.AfterFunc(displaceAfter, func() { a.displaceBefore(c.id, conn) })
		}
	} else if len(older) >= maxPerGateway {
		return false
	}
	a.conns[conn] = c
	a.byID[c.id] = append(older, conn)
	a.o.Presence(c.id, conn, true)
	return true
}

// displaceBefore closes the connections of an identity that came before conn, if conn is still there.
func (a *authenticator) displaceBefore(id identity.ID, conn uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := slices.Index(a.byID[id], conn); i > 0 {
		a.displace(id, slices.Clone(a.byID[id][:i]))
	}
}

// displaceOlder closes the connections of an identity that came before at.
func (a *authenticator) displaceOlder(id identity.ID, at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var older []uint64
	for _, conn := range a.byID[id] {
		if a.conns[conn].since.Before(at) {
			older = append(older, conn)
		}
	}
	if len(older) > 0 {
		a.displace(id, older)
	}
}

func (a *authenticator) gone(conn uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, known := a.conns[conn]
	if !known {
		return
	}
	delete(a.conns, conn)
	rest := slices.DeleteFunc(slices.Clone(a.byID[c.id]), func(other uint64) bool { return other == conn })
	if a.byID[c.id] = rest; len(rest) == 0 {
		delete(a.byID, c.id)
	}
	a.o.Presence(c.id, conn, false)
}

func (a *authenticator) present() map[uint64]client {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.conns)
}

func (a *authenticator) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.conns)
}
