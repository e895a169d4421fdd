package bus

import (
	"crypto/subtle"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
)

// authenticator binds each connection to the identity in its certificate.
type authenticator struct {
	o Options
	// The tokens let in this process's own two connections, which have no TLS. They never leave the process.
	ownToken, watchToken string
	system               *server.Account

	mu    sync.Mutex
	conns map[uint64]client // by the server's connection id
}

// client is one agent or gateway on this replica.
type client struct {
	id     identity.ID
	issued time.Time // its certificate
}

func newAuthenticator(o Options) *authenticator {
	return &authenticator{o: o, ownToken: randomToken(), watchToken: randomToken(), conns: map[uint64]client{}}
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
	leaf := cs.PeerCertificates[0]
	id, err := identity.FromCertificate(leaf)
	if err == nil {
		err = a.admit(id)
	}
	if err == nil {
		err = a.o.Admit(id, leaf.NotBefore)
	}
	var p wirebus.Permissions
	if err == nil {
		p, err = wirebus.PermissionsFor(id)
	}
	if err != nil {
		a.o.Log.Warn("connection refused", "remote", c.RemoteAddress(), "error", err)
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
	a.came(c.GetID(), client{id, leaf.NotBefore})
	return true
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

func (a *authenticator) came(conn uint64, c client) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.conns[conn]; !known {
		a.conns[conn] = c
		a.o.Presence(c.id, conn, true)
	}
}

func (a *authenticator) gone(conn uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c, known := a.conns[conn]; known {
		delete(a.conns, conn)
		a.o.Presence(c.id, conn, false)
	}
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
