package gateway

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
)

// traced gives the events that a gateway publishes to one workspace.
func (w *world) traced() <-chan trace.Event {
	events := make(chan trace.Event, 100)
	w.broker.Subscribe(bus.AllTraces, func(m *nats.Msg) {
		var e trace.Event
		if err := json.Unmarshal(m.Data, &e); err != nil {
			w.t.Error(err)
		}
		events <- e
	})
	w.broker.Flush()
	return events
}

func next(t *testing.T, events <-chan trace.Event) trace.Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(patience):
		t.Fatal("no event")
		return trace.Event{}
	}
}

// An expired ticket is refused by the gateway alone, and its user finds that all the same: under the activity id that rdv
// showed, as the user's own.
func TestExpiredTicketIsItsUsers(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "demo")
	events := w.traced()
	g, client := start(t, dir, []config.GatewayWorkspace{w.spec()}, nil)
	eventually(t, "ready", func() bool { return g.Ready() == nil })
	expired := w.ticket(func(c *ticket.Claims) { c.ActivityID, c.Expires = "the-ticket's", time.Now().Add(-time.Hour) })

	auth, err := client.Authenticate(within(t), &admission.AuthenticateRequest{ActivityId: "relay's", Ticket: expired})
	if err != nil || auth.Error.GetCode() != string(refusal.TicketExpired) || auth.ActivityId != "the-ticket's" || auth.User != "alice" || auth.Workspace != "demo" {
		t.Fatal(err, auth)
	}
	stream := relayStream(t, client)
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Step{Step: &admission.Step{ActivityId: auth.ActivityId, Workspace: "demo",
		Step: trace.StepAdmit, At: timestamppb.Now(), Error: auth.Error.Code}}})
	if e := next(t, events); e.ActivityID != "the-ticket's" || e.User != "alice" || e.Error != string(refusal.TicketExpired) {
		t.Errorf("TSGU: %+v", e)
	}
	conn, err := client.Connect(within(t), connectRequest(expired, ""))
	if err != nil || conn.ActivityId != "the-ticket's" || conn.User != "alice" || conn.Error.GetCode() != string(refusal.TicketExpired) {
		t.Error(err, conn)
	}
	entry, err := client.Enter(within(t), &admission.EnterRequest{ActivityId: "relay's", Ticket: expired})
	if err != nil || entry.ActivityId != "the-ticket's" || entry.Error.GetCode() != string(refusal.TicketExpired) {
		t.Error(err, entry)
	}
	if e := next(t, events); e.ActivityID != "the-ticket's" || e.User != "alice" || e.Error != string(refusal.TicketExpired) || e.Component != "gateway/"+testInstance {
		t.Errorf("ARM: %+v", e)
	}
}

// A client that is refused before its ticket is known is nobody's; every workspace hears of it, with its address alone.
func TestStrangersRefusalIsTold(t *testing.T) {
	dir := t.TempDir()
	a, b := newWorld(t, dir, "a"), newWorld(t, dir, "b")
	toA, toB := a.traced(), b.traced()
	g, client := start(t, dir, []config.GatewayWorkspace{a.spec(), b.spec()}, nil)
	eventually(t, "connected", func() bool { return g.workspace("a").connected.Load() && g.workspace("b").connected.Load() })
	if auth, err := client.Authenticate(within(t), &admission.AuthenticateRequest{ActivityId: "alice's", Ticket: a.ticket(nil)}); err != nil || auth.Error != nil {
		t.Fatal(err, auth)
	}
	stream := relayStream(t, client)
	send(t, stream, &admission.RelayReport{Report: &admission.RelayReport_Step{Step: &admission.Step{ActivityId: "alice's", Step: trace.StepDialGateway,
		At: timestamppb.Now(), Detail: "no header", Error: string(refusal.Protocol), ClientAddr: "192.0.2.7"}}})
	for _, events := range []<-chan trace.Event{toA, toB} {
		if e := next(t, events); e.ClientAddr != "192.0.2.7" || e.User != "" || e.Error != string(refusal.Protocol) || e.Detail != "no header" {
			t.Errorf("%+v: whoever knows an activity's id must not speak for its user", e)
		}
	}
}

// What a broker answers makes no metric of its own, and no text of any length.
func TestBrokersRefusalsAreOfTheClosedSet(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, dir, "demo")
	long := strings.Repeat("x", 100<<10)
	n := 0
	w.answer(func(bus.ConnectRequest) bus.ConnectReply {
		n++
		if n > 20 {
			return bus.ConnectReply{Pool: "linux", Host: "host\r\n" + long}
		}
		return bus.ConnectReply{Err: refusal.New(refusal.Code(fmt.Sprint("code-", n, long)), "%s", "\x1b[2J"+long)}
	})
	reg := prometheus.NewRegistry()
	g, client := start(t, dir, []config.GatewayWorkspace{w.spec()}, func(o *Options) { o.Metrics = NewMetrics(reg) })
	eventually(t, "ready", func() bool { return g.Ready() == nil })
	for range 21 {
		resp, err := client.Connect(within(t), connectRequest(w.ticket(nil), ""))
		if err != nil || resp.Error.GetCode() != string(refusal.Internal) || len(resp.Error.GetMessage()) > refusal.MaxMessage || strings.Contains(resp.Error.GetMessage(), "\x1b") {
			t.Fatalf("%v %.200v", err, resp)
		}
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "rendezvous_gateway_connects_total" && len(f.Metric) != 1 {
			t.Errorf("21 refusals made %d series", len(f.Metric))
		}
	}
}
