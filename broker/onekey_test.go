package broker_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/agent"
	"rendezvous.dev/rendezvous/broker"
	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
)

// A real agent at a real broker: it enrols, renews to another key without being missed, is put out by a revocation, and
// comes back with the host's new token.
func TestMachineIsOneKeyAllTheWay(t *testing.T) {
	ca := testca.New(t, "ca")
	local := testca.IdentitySpec(identity.Broker("ns", "ws"))
	public := local
	public.URIs = nil
	newToken := func(pool, host string) (token, hash string) {
		secret := make([]byte, 32)
		rand.Read(secret)
		token = fmt.Sprintf("rdvreg.ns.%s.%s.%s", pool, host, base64.RawURLEncoding.EncodeToString(secret))
		sum := sha256.Sum256([]byte(token))
		return token, hex.EncodeToString(sum[:])
	}
	poolToken, poolHash := newToken("pool", "-")
	world := fake.New(&model.Snapshot{
		Workspace: &model.Workspace{Name: "ws"},
		Pools: map[string]*model.Pool{"pool": {
			Name: "pool", Generation: 1, MaxSessions: 2, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 5 * time.Second,
			Registration: model.Registration{TokenHash: poolHash, Expires: time.Now().Add(time.Hour)},
		}},
	})
	world.Signer = func(r model.CertificateRequest) ([]byte, error) { return ca.SignCSR(r.CSR), nil }
	busPort := freePort(t)
	started := make(chan broker.Addresses, 1)
	run(t, func(ctx context.Context) error {
		return broker.Run(ctx, broker.Options{
			Config: config.Broker{
				Namespace: "ns", Workspace: "ws", BusURLs: []string{fmt.Sprintf("tls://127.0.0.1:%d", busPort)}, InternalIssuer: config.Issuer{Name: "internal"},
			},
			ConfigDir: t.TempDir(), TLSDir: ca.Dir(ca.Issue(public)), BusDir: ca.Dir(ca.Issue(local)), SigningDir: ca.Dir(ca.Issue(public)),
			TicketsDir: ca.Dir(ca.IssueEd25519(testca.IdentitySpec(identity.TicketSigner("ns", "ws")))),
			Name:       "broker-0", Host: "127.0.0.1", FeedPort: -1, BusPort: busPort, BusWebSocketPort: -1, BusRoutePort: -1, SessionsPort: -1, MetricsAddr: "127.0.0.1:0",
			Inventory: world, Log: slog.New(slog.DiscardHandler), Started: func(a broker.Addresses) { started <- a },
		})
	})
	addrs := <-started
	pair, err := tls.X509KeyPair(ca.Issue(public))
	must(t, err)
	rdpAddr := listen(t, &tls.Config{Certificates: []tls.Certificate{pair}}, func(net.Conn) {}, func(c net.Conn) { io.Copy(io.Discard, c); c.Close() })
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	state, err := os.MkdirTemp("", "rdv") // short enough for a socket's path
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(state) })
	a, err := agent.New(agent.Options{
		Broker: "https://" + addrs.Feed.String(), CAFile: write("ca", string(ca.PEM)), TokenFile: write("token", poolToken), Host: "h1",
		StateDir: filepath.Join(state, "s"), RDPAddr: rdpAddr, Version: "test", Log: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	run(t, a.Run)
	enrolment := func() model.Enrolment {
		h := world.Snapshot().Hosts["h1"]
		if h == nil {
			return model.Enrolment{}
		}
		return h.Enrolment
	}
	connected := func() bool {
		h := world.Snapshot().Hosts["h1"]
		return h != nil && h.Agent != nil && h.Agent.Connected
	}
	eventually(t, "the machine is connected", connected)
	first := enrolment()
	if first.Key == "" || first.HostUID != world.Snapshot().Hosts["h1"].UID || first.TokenHash != poolHash {
		t.Fatalf("enrolled as %+v", first)
	}

	world.EditHost("h1", func(h *model.Host) { h.Enrolment.At = h.Enrolment.At.Add(-time.Minute) })
	before := len(world.AgentWrites())
	a.RenewNow()
	eventually(t, "the host is another key", func() bool { e := enrolment(); return e.Key != first.Key && e.Key != "" && e.NextKey == "" })
	for _, w := range world.AgentWrites()[before:] {
		if !w.Status.Connected {
			t.Error("the host was missed meanwhile")
		}
	}

	world.EditHost("h1", func(h *model.Host) { h.Revoke = "stolen" })
	eventually(t, "the machine is out", func() bool { return enrolment().Key == "" && !connected() })
	if len(enrolment().RevokedFor) == 0 {
		t.Errorf("recorded %+v", enrolment())
	}
	// Its pool's token does not bring it back; one of its own does.
	again, hash := newToken("pool", "-")
	world.Edit(func(s *model.Snapshot) {
		p := *s.Pools["pool"]
		p.Registration.TokenHash = hash
		s.Pools["pool"] = &p
	})
	write("token", again)
	time.Sleep(2 * time.Second)
	if connected() || enrolment().Key != "" {
		t.Fatalf("the pool's token brought it back: %+v", enrolment())
	}
	own, ownHash := newToken("pool", "h1")
	world.EditHost("h1", func(h *model.Host) {
		h.Registration = model.Registration{TokenHash: ownHash, Expires: time.Now().Add(time.Hour)}
	})
	write("token", own)
	eventually(t, "the machine is back", func() bool { return enrolment().TokenHash == ownHash && connected() })
}
