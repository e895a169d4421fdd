package enrol

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/bus"
	"rendezvous.dev/rendezvous/broker/internal/testca"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	wirebus "rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// A host chooses where the answer to its renewal goes, and brokers may write anywhere: they answer to the host's own inbox
// alone, and the host is who the subject says.
func TestRenewalsAreAnsweredToTheSender(t *testing.T) {
	const patience = 20 * time.Second
	f := setUp(t)
	ca := testca.New(t, "bus")
	server, err := bus.Start(t.Context(), bus.Options{Namespace: ns, Workspace: ws, Name: "b", TLS: ca.Reloader(identity.Broker(ns, ws)), Host: "127.0.0.1", Port: -1, WebSocketPort: -1, RoutePort: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	broker, err := server.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(broker.Close)
	if err := f.ServeRenewals(t.Context(), broker); err != nil {
		t.Fatal(err)
	}
	heard := make(chan *nats.Msg, 16)
	other := identity.Agent(ns, ws, "linux", "linux-2")
	victims := []string{wirebus.HostConnectSubject("linux", "linux-2"), wirebus.InboxPrefix(other) + ".x", wirebus.InboxPrefix(linux1) + "x.y", wirebus.SubjectConnect, "rdv.presence"}
	for _, subject := range victims {
		if _, err := broker.ChanSubscribe(subject, heard); err != nil {
			t.Fatal(err)
		}
	}
	if err := broker.Flush(); err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect("tls://"+server.Addr().String(), nats.Secure(ca.Reloader(linux1).ClientConfig("127.0.0.1", mtls.AllowRole(ns, ws, identity.RoleBroker))),
		nats.CustomInboxPrefix(wirebus.InboxPrefix(linux1)), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	subject := wirebus.RenewSubject("linux", "linux-1")
	for _, reply := range victims {
		if err := nc.PublishRequest(subject, reply, []byte("not JSON")); err != nil {
			t.Fatal(err)
		}
	}
	// What is sent later is answered later: the others would have been heard by then.
	for range 3 {
		m, err := nc.Request(subject, []byte("not JSON"), patience)
		var res brokerapi.RenewResponse
		if err != nil || json.Unmarshal(m.Data, &res) != nil || res.Err == nil || res.Err.Code != refusal.BadRequest {
			t.Fatalf("%v, %+v", err, res)
		}
	}
	if err := broker.Flush(); err != nil {
		t.Fatal(err)
	}
	for n := len(heard); n > 0; n-- {
		m := <-heard
		t.Errorf("the broker wrote %q to %s", m.Data, m.Subject)
	}
}
