package gateway

import (
	"encoding/json"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
)

func TestEnter(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "one")
	var reply atomic.Pointer[bus.EntryReply]
	asked := make(chan bus.EntryRequest, 10)
	w.broker.QueueSubscribe(bus.SubjectEntry, bus.Brokers, func(m *nats.Msg) {
		var r bus.EntryRequest
		if err := json.Unmarshal(m.Data, &r); err != nil {
			t.Error(err)
		}
		asked <- r
		data, _ := json.Marshal(reply.Load())
		m.Respond(data)
	})
	w.broker.Flush()
	_, client := start(t, dir, []config.GatewayWorkspace{w.spec()}, nil)
	enter := func(change func(*ticket.Claims)) *admission.EnterResponse {
		t.Helper()
		resp, err := client.Enter(t.Context(), &admission.EnterRequest{ActivityId: "act-1", Ticket: w.ticket(change), ClientAddr: "192.0.2.1:5", Instance: testInstance})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	reply.Store(&bus.EntryReply{Gateway: "b", Hostname: "b.example.com", Port: 8443, Target: testTarget})
	if r := enter(nil); r.Error != nil || r.Gateway != "b" || r.Hostname != "b.example.com" || r.Port != 8443 || r.Target != testTarget || r.ActivityId != "act-1" {
		t.Errorf("sent to %v", r)
	}
	if r := <-asked; r.Gateway != "gateway-a" || r.Instance != testInstance || r.ActivityID != "act-1" || r.ClientAddr != "192.0.2.1:5" || r.Ticket == "" {
		t.Errorf("the broker was asked %+v", r)
	}
	const own = "0f0e0d0c-0000-4000-8000-000000000001"
	if r := enter(func(c *ticket.Claims) { c.ActivityID = own }); r.ActivityId != own || (<-asked).ActivityID != own {
		t.Errorf("the ticket's activity id is not taken over: %v", r)
	}
	reply.Store(&bus.EntryReply{Err: refusal.New(refusal.NoHost, "A host is starting."), Retry: true})
	if r := enter(nil); r.GetError().GetCode() != string(refusal.NoHost) || !r.Retry {
		t.Errorf("a host on its way: %v", r)
	}
	<-asked
	if r := enter(func(c *ticket.Claims) { c.Expires = time.Now().Add(-time.Minute) }); r.GetError().GetCode() != string(refusal.TicketExpired) || r.Retry {
		t.Errorf("an old ticket: %v", r)
	}
	if len(asked) != 0 {
		t.Error("the broker was asked about an old ticket")
	}
}
