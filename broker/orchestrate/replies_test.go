package orchestrate

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
)

// A gateway chooses where the answer goes and says which gateway it is, and brokers may write anywhere: they answer to the
// inbox of the gateway that is named alone, which only that one's pods hear.
func TestGatewaysAreAnsweredToTheirInbox(t *testing.T) {
	w := newWorld(t, 1)
	w.agent(0, "pool", "h1", 2)
	broker, err := w.servers[0].Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(broker.Close)
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	own := bus.InboxPrefix(identity.Gateway(ns, ws, "gw"))
	victims := []string{bus.HostConnectSubject("pool", "other"), bus.InboxPrefix(identity.Gateway(ns, ws, "other")) + ".x", bus.GatewayEndSubject("other", "pod"), "rdv.standing.x", own + "x.y"}
	heard := make(chan *nats.Msg, 64)
	for _, subject := range victims {
		if _, err := broker.ChanSubscribe(subject, heard); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := gw.ChanSubscribe(own+".>", heard); err != nil {
		t.Fatal(err)
	}
	broker.Flush()
	gw.Flush()
	named := func(gateway string) map[string][]byte {
		connect := request(w.ticket(nil), nil)
		connect.Gateway = gateway
		messages := map[string][]byte{}
		for subject, v := range map[string]any{
			bus.SubjectConnect:  connect,
			bus.SubjectEntry:    bus.EntryRequest{ActivityID: activity, Ticket: connect.Ticket, Gateway: gateway, Instance: connect.Instance},
			bus.SubjectGateways: bus.GatewaysRequest{Gateway: gateway},
		} {
			if messages[subject], err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		return messages
	}
	for subject, message := range named("gw") {
		for _, reply := range victims {
			gw.PublishRequest(subject, reply, message)
		}
	}
	for subject, message := range named("other") { // in another's name
		gw.PublishRequest(subject, own+".x", message)
	}
	for subject, message := range named("gw.>") {
		gw.PublishRequest(subject, own+".x", message)
	}
	// What is sent later is answered later: the others would have been heard by then.
	for range 3 {
		for subject, message := range named("gw") {
			gw.PublishRequest(subject, own+".good", message)
		}
	}
	for range 9 {
		select {
		case m := <-heard:
			if m.Subject != own+".good" {
				t.Fatalf("a broker wrote %q to %s", m.Data, m.Subject)
			}
		case <-time.After(patience):
			t.Fatal("good requests are not answered")
		}
	}
	broker.Flush()
	for n := len(heard); n > 0; n-- {
		m := <-heard
		t.Errorf("a broker wrote %q to %s", m.Data, m.Subject)
	}
}
