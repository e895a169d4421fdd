package orchestrate

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/choose"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
)

// ask sends a request as the gateway that nc belongs to.
func ask[Reply any](t *testing.T, nc *nats.Conn, subject string, req any) (reply Reply) {
	t.Helper()
	data, err := json.Marshal(req)
	if err != nil {
		t.Error(err)
	}
	m, err := nc.Request(subject, data, patience)
	if err == nil {
		err = json.Unmarshal(m.Data, &reply)
	}
	if err != nil {
		t.Error(err)
	}
	return reply
}

func entry(w *world, edit func(*ticket.Claims)) bus.EntryRequest {
	return bus.EntryRequest{ActivityID: activity, Ticket: w.ticket(edit), Gateway: "gw", Instance: "10-0-0-1"}
}

// Two gateways: far is 25 ms from gw, or near.
func TestEntry(t *testing.T) {
	w := newWorld(t, 1)
	w.agent(0, "pool", "h1", 2)
	w.fake.Edit(func(s *model.Snapshot) {
		s.Gateways = append(slices.Clone(s.Gateways), &model.Gateway{Name: "other", Hostname: "other.example.com", Port: 443, Ready: true})
	})
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	other := w.dial(0, identity.Gateway(ns, ws, "other"))

	all := ask[bus.GatewaysReply](t, gw, bus.SubjectGateways, bus.GatewaysRequest{Gateway: "gw"}).Gateways
	if len(all) != 2 || all[0] != (bus.GatewayAddress{Name: "gw", Hostname: "gw.example.com", Port: 8443, CABundle: "PEM"}) || all[1].Name != "other" {
		t.Errorf("the gateways are %v", all)
	}

	report := func(nc *nats.Conn, name string, r bus.GatewayReport) {
		data, _ := json.Marshal(r)
		nc.Publish(bus.GatewayReportSubject(name, "pod"), data)
		nc.Flush()
		eventually(t, "the report is heard", func() bool {
			w.brokers[0].live.mu.Lock()
			defer w.brokers[0].live.mu.Unlock()
			got := w.brokers[0].live.gateways[gatewayKey{name, "pod"}].report
			return got.Sessions == r.Sessions && fmt.Sprint(got.Latencies) == fmt.Sprint(r.Latencies)
		})
	}
	report(other, "other", bus.GatewayReport{Sessions: 1})
	id := 0
	enter := func(want, weighed string) {
		t.Helper()
		id++
		reply := ask[bus.EntryReply](t, gw, bus.SubjectEntry, entry(w, func(c *ticket.Claims) { c.ID = fmt.Sprint("entry", id) }))
		if reply.Err != nil || reply.Gateway != want || reply.Target != brokerapi.PoolName(ns, "pool") {
			t.Errorf("the client is sent to %+v, want %s", reply, want)
		}
		if want == "other" && (reply.Hostname != "other.example.com" || reply.Port != 443) {
			t.Errorf("the other gateway is at %s:%d", reply.Hostname, reply.Port)
		}
		eventually(t, "the timeline says "+weighed, func() bool {
			events, _ := w.traces.Get(activity, "alice")
			return slices.ContainsFunc(events, func(e trace.Event) bool {
				return e.Step == trace.StepDialGateway && strings.Contains(e.Detail, "to "+want+" (") && strings.Contains(e.Detail, weighed)
			})
		})
	}
	report(gw, "gw", bus.GatewayReport{Sessions: 7, Latencies: map[string]int64{"other": 25000}})
	enter("gw", "gw 7+0+0 0.0ms, other 1+0+0 25.0ms") // far: this one serves, full of people as it is
	report(gw, "gw", bus.GatewayReport{Sessions: 7})
	enter("gw", "other 1+0+0 (not measured)")
	report(gw, "gw", bus.GatewayReport{Sessions: 7, Latencies: map[string]int64{"other": 9999}})
	enter("other", "other 1+0+0 10.0ms, gw 7+0+2 0.0ms") // near: the emptier one
	report(gw, "gw", bus.GatewayReport{Sessions: 8, Draining: true, Latencies: map[string]int64{"other": 90000}})
	enter("other", "gw 8+0+2 (full or draining)")

	refused := func(what string, edit func(*ticket.Claims), code refusal.Code, retry bool) {
		t.Helper()
		reply := ask[bus.EntryReply](t, gw, bus.SubjectEntry, entry(w, edit))
		if reply.Err == nil || reply.Err.Code != code || reply.Retry != retry || reply.Err.ActivityID != activity {
			t.Errorf("%s: %+v %v, want %s, retry %v", what, reply, reply.Err, code, retry)
		}
	}
	refused("a stranger", func(c *ticket.Claims) { c.User = "mallory" }, refusal.NotGranted, false)
	refused("an old ticket", func(c *ticket.Claims) { c.Expires = time.Now().Add(-time.Minute) }, refusal.TicketExpired, false)
	mine := func(c *ticket.Claims) {
		c.Resource, c.Groups, c.Target = "mine", []string{"engineers"}, brokerapi.PoolName(ns, "personal")
	}
	w.brokers[0].started = time.Now().Add(-time.Hour) // who was not heard of until now is not there
	refused("an empty pool", mine, refusal.NoHost, false)
	w.fake.EditHost("new", func(h *model.Host) { h.Pool, h.Created, h.Pod = "personal", time.Now(), true })
	refused("a pod that was just made", mine, refusal.NoHost, true)
	w.fake.EditHost("new", func(h *model.Host) { h.Pod = false })
	refused("a machine that has yet to be enrolled", mine, refusal.NoHost, false)
	w.fake.EditHost("new", func(h *model.Host) { h.Created, h.Pod = time.Now().Add(-startingUp), true })
	refused("a pod that never came", mine, refusal.NoHost, false)
	w.fake.EditHost("new", func(h *model.Host) { h.Agent = &model.AgentStatus{LastHeartbeat: time.Now().Add(-time.Minute)} })
	refused("a pod that is made anew", mine, refusal.NoHost, true)
	old := time.Now().Add(-startingUp)
	w.fake.EditHost("new", func(h *model.Host) { h.Pod, h.Agent = false, &model.AgentStatus{LastHeartbeat: old} })
	refused("a machine that nobody hears", mine, refusal.NoHost, false)
	w.fake.EditHost("new", func(h *model.Host) { h.Agent = &model.AgentStatus{Connected: true, LastHeartbeat: old} })
	refused("a machine that a broker hears which is not met yet", mine, refusal.NoHost, true)
	w.fake.Edit(func(s *model.Snapshot) { delete(s.Hosts, "new") })
	a := w.agent(0, "personal", "booting", 1)
	a.set(func() { a.ready = false })
	refused("a host whose desktop is not up", mine, refusal.NoHost, true)
}

// A place that comes free while the client asks is no reason to send it away.
func TestEntryWaitsForAPlace(t *testing.T) {
	w := newWorld(t, 1)
	w.brokers[0].o.Settle = patience
	a := w.agent(0, "pool", "h1", 2)
	taken := []bus.HostSession{{SessionID: "1", User: "bob", State: bus.SessionActive}, {SessionID: "2", User: "carol", State: bus.SessionActive}}
	a.set(func() { a.sessions = taken })
	gw := w.dial(0, identity.Gateway(ns, ws, "gw"))
	answered := make(chan bus.EntryReply, 1)
	go func() { answered <- ask[bus.EntryReply](t, gw, bus.SubjectEntry, entry(w, nil)) }()
	eventually(t, "the client's question is in work", func() bool { return len(w.brokers[0].slots) == 1 })
	a.set(func() { a.sessions = taken[:1] })
	if reply := <-answered; reply.Err != nil || reply.Gateway != "gw" {
		t.Errorf("%+v, %v", reply, reply.Err)
	}
	w.brokers[0].o.Settle = time.Millisecond
	a.set(func() { a.sessions = taken })
	if reply := ask[bus.EntryReply](t, gw, bus.SubjectEntry, entry(w, nil)); reply.Err == nil || reply.Err.Code != refusal.NoHost || reply.Retry {
		t.Errorf("every place is taken: %+v, %v", reply, reply.Err)
	}
}

// TestEntryChoiceProperties holds the choice at an entry gateway against its definition, on random fleets.
func TestEntryChoiceProperties(t *testing.T) {
	now := time.Unix(1000, 0)
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 2))
		reg := newRegistry(func() time.Time { return now })
		var gateways []*model.Gateway
		for i := range 1 + r.IntN(6) {
			gateways = append(gateways, &model.Gateway{Name: fmt.Sprint("g", i), Ready: r.IntN(5) > 0})
		}
		entry := gateways[r.IntN(len(gateways))].Name
		trips := map[string]time.Duration{entry: 0}
		sessions := map[string]int{}
		open := map[string]bool{}
		for _, g := range gateways {
			rep := bus.GatewayReport{Sessions: int32(r.IntN(4)), Draining: r.IntN(6) == 0}
			if g.Name == entry { // two pods, of which each may have measured
				second := bus.GatewayReport{Draining: true, Latencies: map[string]int64{}}
				rep.Latencies = map[string]int64{}
				for _, to := range gateways {
					for _, m := range []map[string]int64{rep.Latencies, second.Latencies} {
						trip := r.Int64N(50_000)
						if to.Name == entry || r.IntN(3) == 0 {
							continue
						}
						m[to.Name] = trip
						if d, ok := trips[to.Name]; !ok || time.Duration(trip)*time.Microsecond < d {
							trips[to.Name] = time.Duration(trip) * time.Microsecond
						}
					}
				}
				reg.gatewayReport(gatewayKey{g.Name, "second"}, second)
			}
			reg.gatewayReport(gatewayKey{g.Name, "pod"}, rep)
			sessions[g.Name], open[g.Name] = int(rep.Sessions), g.Ready && !rep.Draining
		}
		reg.travel("me", gateways[0].Name, false) // the feed's guess, which must not count against anybody
		got, weighed := reg.choose(gateways, "me", entry, true)

		var candidates []*model.Gateway
		for _, ok := range []func(g *model.Gateway) bool{
			func(g *model.Gateway) bool { _, m := trips[g.Name]; return m && open[g.Name] },
			func(g *model.Gateway) bool { return open[g.Name] },
			func(g *model.Gateway) bool { return g.Ready },
		} {
			for _, g := range gateways {
				if ok(g) {
					candidates = append(candidates, g)
				}
			}
			if candidates != nil {
				break
			}
		}
		if (got == "") != (candidates == nil) || len(weighed) != len(gateways) {
			t.Fatalf("seed %d: chose %q of %d candidates, weighed %v", seed, got, len(candidates), weighed)
		}
		group := func(name string) int { return int(trips[name] / choose.GroupWidth) }
		for _, g := range candidates {
			if slices.Compare([]int{group(g.Name), sessions[g.Name]}, []int{group(got), sessions[got]}) < 0 {
				t.Fatalf("seed %d: %s is better than the chosen %s; weighed %v", seed, g.Name, got, weighed)
			}
		}
		if got != "" && reg.onTheWay["me"].gateway != got {
			t.Fatalf("seed %d: the client is sent to %s, and expected at %s", seed, got, reg.onTheWay["me"].gateway)
		}
	}
}
