package orchestrate

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/placement"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// startingUp is how long after the last sign of it a pod that is not connected counts as on its way.
const startingUp = 5 * time.Minute

// onEntry answers which gateway is to serve a client that came to one and is told where to go. Nothing is orchestrated: the
// client comes with the same ticket to the gateway that it is told. But a client that would be refused there is refused
// here, where it can be shown why.
func (b *Orchestrator) onEntry(ctx context.Context, m *nats.Msg) {
	b.slots <- struct{}{}
	go func() {
		defer func() { <-b.slots }()
		b.answerEntry(ctx, m)
	}()
}

func (b *Orchestrator) answerEntry(ctx context.Context, m *nats.Msg) {
	var req bus.EntryRequest
	if !b.decode(m, &req) || !b.repliesTo(m, req.Gateway) {
		return
	}
	begin := b.o.Now()
	c := &connect{b: b, asked: map[string]uint64{}, req: bus.ConnectRequest{ActivityID: req.ActivityID, Ticket: req.Ticket, ClientAddr: req.ClientAddr, Gateway: req.Gateway, Instance: req.Instance}}
	reply, detail := c.enter(ctx)
	result := "elsewhere"
	event := trace.Event{
		ActivityID: req.ActivityID, Step: trace.StepDialGateway, Component: "broker/" + b.o.Name, At: begin,
		Duration: b.o.Now().Sub(begin), User: c.claims.User, Detail: detail,
	}
	switch {
	case reply.Err != nil:
		reply.Err = reply.Err.With(req.ActivityID)
		event.Error, event.Detail = string(reply.Err.Code), reply.Err.Message
		if result = event.Error; reply.Retry {
			result = "retry"
		}
		b.o.Log.Info("entry refused", "activity", req.ActivityID, "user", c.claims.User, "gateway", req.Gateway, "retry", reply.Retry, "error", reply.Err)
	case reply.Gateway == req.Gateway:
		result = "here"
		fallthrough
	default:
		b.o.Log.Info("gateway chosen", "activity", req.ActivityID, "user", c.claims.User, "entry", req.Gateway, "gateway", reply.Gateway, "weighed", detail)
	}
	b.respond(m, req.Gateway, reply)
	b.Trace(event)
	b.o.Metrics.Entries.WithLabelValues(result).Inc()
}

// enter authorises, sees whether a host may take the session, and chooses the gateway. detail says what was weighed.
func (c *connect) enter(ctx context.Context) (reply bus.EntryReply, detail string) {
	refuse := func(err error, retry bool) (bus.EntryReply, string) {
		return bus.EntryReply{Err: refusal.From(err), Retry: retry}, ""
	}
	if err := c.authorise(); err != nil {
		return refuse(err, false)
	}
	found, why, err := c.placeSoon(ctx)
	switch {
	case err != nil:
		return refuse(err, false)
	case !found && c.b.hostOnItsWay(c.pool.Name):
		return refuse(refusal.New(refusal.NoHost, "A host of pool %s is starting (%s): the client tries again by itself.", c.pool.Name, &why), true)
	case !found:
		return refuse(c.failed(&why), false)
	}
	g, weighed := c.b.choose(c.b.o.Source.Snapshot().Gateways, c.claims.ID, c.req.Gateway)
	if g == nil {
		return refuse(refusal.New(refusal.AdmissionAway, "No gateway of workspace %s is ready: try again in a moment.", c.b.o.Workspace), false)
	}
	return bus.EntryReply{Gateway: g.Name, Hostname: g.Hostname, Port: g.Port, Target: c.claims.Target},
		fmt.Sprintf("entry gateway %s sends the client to %s (%s)", c.req.Gateway, g.Name, weighed)
}

// placeSoon says whether some host has a place. As a connect does, it looks again for a moment where all are taken, so that
// nobody is sent away over a place that has just come free.
func (c *connect) placeSoon(ctx context.Context) (found bool, why placement.Why, err error) {
	settled, pause := time.Now().Add(c.b.o.Settle), lookAgain
	for {
		_, found, why, err = c.place()
		if found || err != nil || why.Full() == 0 || ctx.Err() != nil || time.Now().After(settled) {
			return found, why, err
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, longestPause)
		case <-ctx.Done():
		}
	}
}

// hostOnItsWay says whether a host of the pool that takes no session now is about to: it was heard of a moment ago, its RDP
// server is not up yet, or it is a pod that was just made, or is being made anew.
func (b *Orchestrator) hostOnItsWay(pool string) bool {
	if b.hostMayReturn(pool) {
		return true
	}
	now := b.o.Now()
	snap := b.o.Source.Snapshot()
	for _, h := range b.poolHosts(snap, pool) {
		live, connected := b.live.live(hostKey{pool, h.Name}, snap.Pools[pool].HeartbeatTimeout)
		if connected && !live.report.RDPReady || !connected && h.Pod && now.Sub(lastSign(h.Host, live.at)) < startingUp {
			return true
		}
	}
	return false
}

// lastSign is when a host was last heard of, by this broker or the one that wrote its status, or declared.
func lastSign(h *model.Host, heard time.Time) time.Time {
	signs := []time.Time{h.Created, h.Enrolment.At, heard}
	if h.Agent != nil {
		signs = append(signs, h.Agent.LastHeartbeat)
	}
	return slices.MaxFunc(signs, time.Time.Compare)
}
