package orchestrate

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/choose"
)

const (
	// subjectJourney is between brokers only.
	subjectJourney = "rdv.journey"
	// gatewaySilence is how long a gateway pod's last report counts.
	gatewaySilence = 30 * time.Second
	// journeyTime is how long one who has just been given a ticket counts as on the way to a gateway. Clients open a file
	// within seconds, or keep it for later.
	journeyTime = 30 * time.Second
	// arrivalTime is how long one who has arrived counts beside what the gateway reports, which is soon to tell of it.
	arrivalTime = 5 * time.Second
)

type gatewayKey struct{ gateway, instance string }

type liveGateway struct {
	report bus.GatewayReport
	at     time.Time
}

// journey is one client on its way to a gateway: it has its ticket, or its connect is being orchestrated.
type journey struct {
	gateway string
	until   time.Time
	arrived bool // the gateway's next report counts it
}

// gatewayLoad is what is known of one gateway, summed over its pods.
type gatewayLoad struct {
	sessions, pending, onTheWay int32
	// heard says that some pod reports, open that one of them takes new sessions.
	heard, open bool
}

func (l gatewayLoad) connections() int32 { return l.sessions + l.pending + l.onTheWay }

func (r *registry) gatewayReport(k gatewayKey, rep bus.GatewayReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.gateways[k]; !known && r.pods(k.gateway) >= maxPods {
		return
	}
	r.gateways[k] = liveGateway{rep, r.now()}
	for id, j := range r.onTheWay {
		if j.arrived && j.gateway == k.gateway {
			delete(r.onTheWay, id)
		}
	}
}

// pods counts the pods of a gateway that were heard of late, and forgets the others; mu is held.
func (r *registry) pods(gateway string) (n int) {
	for k, g := range r.gateways {
		switch {
		case k.gateway != gateway:
		case r.now().Sub(g.at) < gatewaySilence:
			n++
		default:
			delete(r.gateways, k)
		}
	}
	return n
}

// gatewayLoads gives the load of every gateway that is heard of, or expected somebody.
func (r *registry) gatewayLoads() map[string]gatewayLoad {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.loads("")
}

// loads is gatewayLoads, without the holder of ticket where that is given; mu is held.
func (r *registry) loads(ticket string) map[string]gatewayLoad {
	now := r.now()
	loads := map[string]gatewayLoad{}
	for k, g := range r.gateways {
		if now.Sub(g.at) >= gatewaySilence {
			continue
		}
		l := loads[k.gateway]
		l.sessions, l.pending, l.heard = l.sessions+g.report.Sessions, l.pending+g.report.Pending, true
		l.open = l.open || !g.report.Draining && (g.report.MaxSessions == 0 || g.report.Sessions+g.report.Pending < g.report.MaxSessions)
		loads[k.gateway] = l
	}
	for id, j := range r.onTheWay {
		if now.Before(j.until) && id != ticket {
			l := loads[j.gateway]
			l.onTheWay++
			loads[j.gateway] = l
		}
	}
	return loads
}

// travel notes that the holder of a ticket is on the way to a gateway, or has arrived there.
func (r *registry) travel(ticket, gateway string, arrived bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.note(ticket, gateway, arrived)
}

// note is travel; mu is held. That somebody set out is old news once there was an arrival.
func (r *registry) note(ticket, gateway string, arrived bool) {
	if r.onTheWay[ticket].arrived && !arrived {
		return
	}
	stay := journeyTime
	if arrived {
		stay = arrivalTime
	}
	r.onTheWay[ticket] = journey{gateway: gateway, until: r.now().Add(stay), arrived: arrived}
}

// latencies gives the round trips from one gateway to the others, the shortest that any of its pods measured.
func (r *registry) latencies(from string) map[string]time.Duration {
	now := r.now()
	found := map[string]time.Duration{from: 0}
	for k, g := range r.gateways {
		if k.gateway != from || now.Sub(g.at) >= gatewaySilence {
			continue
		}
		for name, micros := range g.report.Latencies {
			trip := max(0, time.Duration(micros)*time.Microsecond)
			if known, ok := found[name]; !ok || trip < known {
				found[name] = trip
			}
		}
	}
	return found
}

// choose applies the rule of step 7, and notes in the same moment that the ticket's holder is on the way: the next one's
// choice counts it. The holder itself doesn't count. Where the client is at the gateway named entry, the round trips that
// it measured to the others stand for the client's; a broker that knows of no entry weighs all as equally near. listened
// says that this broker has been there for long enough for silence to mean anything. Where no gateway is open, a ready one
// is better than none, and where none was measured, one that wasn't.
func (r *registry) choose(gateways []*model.Gateway, ticket, entry string, listened bool) (chosen string, weighed []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	loads := r.loads(ticket)
	state := map[string]string{}
	for _, g := range gateways {
		switch l := loads[g.Name]; {
		case !g.Ready:
			state[g.Name] = "not ready"
		case l.heard && !l.open:
			state[g.Name] = "full or draining"
		case !l.heard && listened:
			state[g.Name] = "silent"
		}
	}
	var trips map[string]time.Duration
	measured := func(string) bool { return true }
	if entry != "" {
		trips = r.latencies(entry)
		measured = func(name string) bool { _, ok := trips[name]; return ok }
	}
	var ranked []choose.Weighed
	ok := false
	for _, usable := range []func(*model.Gateway) bool{
		func(g *model.Gateway) bool { return state[g.Name] == "" && measured(g.Name) },
		func(g *model.Gateway) bool { return state[g.Name] == "" },
		func(g *model.Gateway) bool { return g.Ready },
	} {
		var candidates []choose.Candidate
		for _, g := range gateways {
			candidates = append(candidates, choose.Candidate{
				Name: g.Name, Answered: usable(g), Latency: trips[g.Name], Connections: int(loads[g.Name].connections()),
			})
		}
		if ranked, ok = choose.Gateway(candidates); ok {
			break
		}
	}
	for _, w := range ranked {
		l := loads[w.Name]
		text := fmt.Sprintf("%s %d+%d+%d", w.Name, l.sessions, l.pending, l.onTheWay)
		trip, known := trips[w.Name]
		switch s := state[w.Name]; {
		case s != "":
			text += " (" + s + ")"
		case known:
			text += fmt.Sprintf(" %.1fms", float64(trip.Microseconds())/1e3)
		case entry != "":
			text += " (not measured)"
		}
		weighed = append(weighed, text)
	}
	if !ok {
		return "", weighed
	}
	r.note(ticket, ranked[0].Name, false)
	return ranked[0].Name, weighed
}

// journeyMessage tells the other brokers of a journey.
type journeyMessage struct {
	Ticket  string `json:"ticket"` // its id
	Gateway string `json:"gateway"`
	Arrived bool   `json:"arrived,omitempty"`
}

func (b *Orchestrator) onJourney(_ context.Context, m *nats.Msg) {
	var j journeyMessage
	if b.decode(m, &j) {
		b.live.travel(j.Ticket, j.Gateway, j.Arrived)
	}
}

// Connections counts each gateway's live sessions and those on their way to it.
func (b *Orchestrator) Connections() map[string]int32 {
	counts := map[string]int32{}
	for name, l := range b.live.gatewayLoads() {
		counts[name] = l.connections()
	}
	return counts
}

// Choose picks the gateway for a ticket's holder who named none: the open one with the fewest connections, ties by name.
// Those on their way count, to this broker at once and to the others within moments, so that clients that come at one
// time are spread. It returns nil where no gateway is ready. weighed tells each gateway's sessions, connects in work and
// tickets just handed out.
func (b *Orchestrator) Choose(gateways []*model.Gateway, ticket string) (chosen *model.Gateway, weighed string) {
	return b.choose(gateways, ticket, "")
}

// choose is Choose, by the measurements of the entry gateway where there is one.
func (b *Orchestrator) choose(gateways []*model.Gateway, ticket, entry string) (chosen *model.Gateway, weighed string) {
	name, parts := b.live.choose(gateways, ticket, entry, b.o.Now().Sub(b.started) >= gatewaySilence)
	weighed = "sessions+connecting+on their way: " + strings.Join(parts, ", ")
	for _, g := range gateways {
		if g.Name == name {
			b.publish(subjectJourney, journeyMessage{Ticket: ticket, Gateway: name})
			return g, weighed
		}
	}
	return nil, weighed
}

// Expect counts a ticket's holder, who chose the gateway, among those on their way to it.
func (b *Orchestrator) Expect(gateway, ticket string) {
	b.live.travel(ticket, gateway, false)
	b.publish(subjectJourney, journeyMessage{Ticket: ticket, Gateway: gateway})
}

// arrived counts a ticket's holder at the gateway where it turned up, until that gateway reports it.
func (b *Orchestrator) arrived(gateway, ticket string) {
	b.live.travel(ticket, gateway, true)
	b.publish(subjectJourney, journeyMessage{Ticket: ticket, Gateway: gateway, Arrived: true})
}

// onGateways tells a gateway of the others, so that it measures the way to them.
func (b *Orchestrator) onGateways(_ context.Context, m *nats.Msg) {
	var req bus.GatewaysRequest
	if !b.decode(m, &req) || !b.repliesTo(m, req.Gateway) {
		return
	}
	var reply bus.GatewaysReply
	for _, g := range b.o.Source.Snapshot().Gateways {
		reply.Gateways = append(reply.Gateways, bus.GatewayAddress{Name: g.Name, Hostname: g.Hostname, Port: g.Port, CABundle: g.CABundle})
	}
	b.respond(m, req.Gateway, reply)
}
