package bus

import (
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/internal/testca"
	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
)

// Of two connections of one agent's identity the newer stays. The older is told, and closed only once the newer has had the
// time to subscribe, so that an agent that changes connections misses no request.
func TestNewerConnectionWins(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	told := make(chan wirebus.HostDisplaced, 8)
	connect := func() *nats.Conn {
		nc := mustDial(t, s, ca, agentA)
		if _, err := nc.Subscribe(wirebus.HostDisplacedSubject("pool", "a"), func(m *nats.Msg) {
			var d wirebus.HostDisplaced
			if err := json.Unmarshal(m.Data, &d); err != nil {
				t.Error(err)
			}
			if id, err := nc.GetClientID(); err == nil && d.Conn == id && d.Broker == nc.ConnectedServerName() {
				told <- d
			}
		}); err != nil {
			t.Fatal(err)
		}
		echo(t, nc, wirebus.HostConnectSubject("pool", "a"))
		return nc
	}
	bystander := mustDial(t, s, ca, agentB)
	older := connect()
	broker := own(t, s)
	stop, missed := make(chan struct{}), make(chan error, 1)
	var asking sync.WaitGroup
	asking.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			if _, err := broker.Request(wirebus.HostConnectSubject("pool", "a"), nil, patience); err != nil {
				select {
				case missed <- err:
				default:
				}
			}
		}
	})
	began := time.Now()
	newer := connect()
	eventually(t, "the older connection is closed", older.IsClosed)
	if d := time.Since(began); d < displaceAfter {
		t.Errorf("it was closed after %v", d)
	}
	close(stop)
	asking.Wait()
	select {
	case err := <-missed:
		t.Errorf("a request got no answer meanwhile: %v", err)
	default:
	}
	select {
	case <-told:
	default:
		t.Error("the older was not told")
	}
	if newer.Flush() != nil || bystander.Flush() != nil || s.Clients() != 2 {
		t.Errorf("newer %v, bystander %v, %d clients", newer.Status(), bystander.Status(), s.Clients())
	}
}

// The newer connection must last: where it ends at once, the older stays.
func TestOlderConnectionStaysWhereTheNewerEnds(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	older := mustDial(t, s, ca, agentA)
	mustDial(t, s, ca, agentA).Close()
	eventually(t, "the newer has ended", func() bool { return s.Clients() == 1 })
	time.Sleep(displaceAfter + quiet)
	if err := older.Flush(); err != nil {
		t.Errorf("the older was closed: %v", err)
	}
}

func TestDisplaceOlder(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	before := time.Now()
	a, b := mustDial(t, s, ca, agentA), mustDial(t, s, ca, agentB)
	s.DisplaceOlder(agentA, before)
	time.Sleep(quiet)
	if err := a.Flush(); err != nil {
		t.Fatalf("a newer connection was closed: %v", err)
	}
	s.DisplaceOlder(agentA, time.Now())
	eventually(t, "the older connection is closed", a.IsClosed)
	if err := b.Flush(); err != nil {
		t.Errorf("another host's was closed: %v", err)
	}
}

// One identity holds a few connections at most, whatever it does.
func TestConnectionsOfOneIdentityAreBounded(t *testing.T) {
	ca := testca.New(t, "ca")
	s := start(t, ca, Options{})
	r := ca.Reloader(agentA)
	var last *nats.Conn
	refused := 0
	for range 100 {
		nc, err := dial("tls://"+s.Addr().String(), r, agentA)
		if n := s.Clients(); n > 2*maxPerAgent {
			t.Fatalf("%d connections", n)
		}
		if err != nil {
			refused++
			continue
		}
		defer nc.Close()
		last = nc
	}
	if refused == 0 {
		t.Error("none was refused")
	}
	other := mustDial(t, s, ca, agentB)
	if err := other.Flush(); err != nil {
		t.Errorf("another host: %v", err)
	}
	other.Close()
	eventually(t, "the older are closed", func() bool { return s.Clients() <= maxPerAgent })
	if err := last.Flush(); err != nil {
		t.Errorf("the newest was closed: %v", err)
	}
}

func TestConnectionsOfAGatewayAreBounded(t *testing.T) {
	a := newAuthenticator(Options{Presence: func(identity.ID, uint64, bool) {}})
	a.displace = func(id identity.ID, conns []uint64) { t.Errorf("%v of %s are closed", conns, id) }
	for i := range uint64(maxPerGateway) {
		if !a.came(i, client{id: gateway}) {
			t.Fatalf("connection %d is refused", i)
		}
	}
	if a.came(maxPerGateway, client{id: gateway}) {
		t.Error("one more is taken")
	}
	if !a.came(0, client{id: gateway}) || !a.came(maxPerGateway+1, client{id: agentA}) {
		t.Error("a known one, or another identity's, is refused")
	}
	a.gone(7)
	if !a.came(maxPerGateway, client{id: gateway}) || a.count() != maxPerGateway+1 {
		t.Errorf("after one has gone: %d", a.count())
	}
}

// Who is put out between the question whether they may come and their coming is not let in.
func TestAdmitIsAskedOnceTheyAreKnown(t *testing.T) {
	ca := testca.New(t, "ca")
	var mu sync.Mutex
	asked := 0
	s := start(t, ca, Options{Admit: func(identity.ID, string, time.Time) error {
		mu.Lock()
		defer mu.Unlock()
		if asked++; asked > 1 {
			return errors.New("put out meanwhile")
		}
		return nil
	}})
	if nc, err := dial("tls://"+s.Addr().String(), ca.Reloader(agentA), agentA); err == nil {
		nc.Close()
		t.Error("let in")
	}
	if n := s.Clients(); n != 0 {
		t.Errorf("%d clients are counted", n)
	}
}
