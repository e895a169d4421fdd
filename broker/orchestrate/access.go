package orchestrate

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/proof"
	"rendezvous.dev/rendezvous/broker/standing"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Access can be taken back: by the Workspace, which is edited, and by a user's newer token, which lacks a group. Either
// ends what rests on it, a ticket at its next connect and a live session at once.

const (
	// subjectStanding is between brokers only, as subjectPresence is: what users' newest tokens said. With a broker's name
	// after it, it is for that one alone.
	subjectStanding = "rdv.standing"
	// standingMessageSize is from which size on a message is full, in bytes of groups, a third more as JSON.
	standingMessageSize = 256 << 10
	// endPause is between two looks at all sessions, and endEvery the longest time without one.
	endPause, endEvery = 500 * time.Millisecond, sweepEvery
	// endAgain and endAgainMost are how long after a command a session has to be gone before the command is repeated: at
	// first, and later on.
	endAgain, endAgainMost = time.Second, 30 * time.Second
	// endInVain commands is when a session that goes on is an error.
	endInVain = 6
)

// Why sessions are ended, as metrics have it.
const (
	causeUser     = "user-revoked"
	causeTicket   = "ticket-revoked"
	causeResource = "resource-removed"
	causeGrant    = "grant-removed"
	causeGroup    = "group-lost"
)

// holding is what somebody's access rests on: a ticket's, or the live session's that it brought about.
type holding struct {
	user, resource, ticket string
	groups                 []string
	since                  time.Time // what user and groups are as of
}

// lost says why a holding is good no more, and the cause of it; nil where it is good.
func (b *Orchestrator) lost(ws *model.Workspace, h holding) (cause string, refused *refusal.Error) {
	id := ""
	if h.ticket != "" {
		id = " (Ticket " + h.ticket + ".)"
	}
	if r := ws.Revoked(h.user, h.ticket, h.since); r != nil {
		if cause = causeUser; r.Ticket != "" {
			cause = causeTicket
		}
		return cause, refusal.New(refusal.Revoked, "%s%s", r.Says(b.o.Workspace, h.user), id)
	}
	res := ws.Resource(h.resource)
	if res == nil {
		return causeResource, refusal.New(refusal.UnknownResource, "Workspace %s has no resource %q any more: refresh the feed (`rdv list`).%s", b.o.Workspace, h.resource, id)
	}
	if res.Grants(h.user, nil) || b.standing.In(res.Groups, h.user, h.since, h.groups) {
		return "", nil
	}
	if res.Grants(h.user, h.groups) {
		return causeGroup, refusal.New(refusal.NotGranted, "%s may not use %q any more: a later sign-in shows that %s has left the group that granted it. If that is wrong, sign in again and download the connection file again; otherwise ask an administrator of workspace %s.%s",
			h.user, h.resource, h.user, b.o.Workspace, id)
	}
	return causeGrant, refusal.New(refusal.NotGranted, "%s may not use %q (any more): ask an administrator of workspace %s to name you, or a group of yours, in the resource's access.%s", h.user, h.resource, b.o.Workspace, id)
}

// SignedIn takes in what a good token says: whose it is, when it was issued, and the user's groups, complete where it names
// all of them. It gives those of the groups that no newer token lacks. News is told to all brokers.
func (b *Orchestrator) SignedIn(user string, at time.Time, groups []string, complete bool) []string {
	if complete {
		r := standing.NewRecord(user, at, groups)
		if b.standing.Learn(r) {
			b.accessChanged()
			b.publish(subjectStanding, []standing.Record{r})
		}
	}
	return b.standing.Standing(user, at, groups)
}

func (b *Orchestrator) onStanding(_ context.Context, m *nats.Msg) {
	var records []standing.Record
	if !b.decode(m, &records) {
		return
	}
	news := false
	for _, r := range records {
		news = b.standing.Learn(r) || news
	}
	if news {
		b.accessChanged()
	}
}

// tellStanding tells a broker that was just met what this one knows.
func (b *Orchestrator) tellStanding(broker string) {
	var part []standing.Record
	size := 0
	send := func() {
		if len(part) > 0 {
			b.publish(fmt.Sprintf("%s.%s", subjectStanding, broker), part)
		}
		part, size = nil, 0
	}
	for _, r := range b.standing.All() {
		part, size = append(part, r), size+len(r.Groups)+len(r.User)+100
		if size >= standingMessageSize {
			send()
		}
	}
	send()
}

// accessChanged has the live sessions looked at soon.
func (b *Orchestrator) accessChanged() {
	select {
	case b.access <- struct{}{}:
	default:
	}
}

// ending is a session that is being ended.
type ending struct {
	cause string
	told  int       // how often its gateway was told
	again time.Time // when to tell it next
}

// endLost looks, again and again, for live sessions whose access was taken back, and has their gateways end them.
func (b *Orchestrator) endLost(ctx context.Context) {
	under := map[string]*ending{} // by session
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.access:
		case <-wait.C:
		}
		b.endLostOnce(under)
		pause := endEvery
		if len(under) > 0 {
			pause = endAgain
		}
		wait.Reset(pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(endPause):
		}
	}
}

// endLostOnce goes through the live sessions once. A session is one broker's to end, the one with its host's channel; where
// no broker has that, every broker's: a gateway obeys once.
func (b *Orchestrator) endLostOnce(under map[string]*ending) {
	ws, now := b.o.Source.Snapshot().Workspace, b.o.Now()
	if ws == nil { // not read yet, or deleted, which is the operator's to carry out
		return
	}
	there := map[string]bool{}
	for _, s := range b.live.carried() {
		h := holding{user: ws.OIDC.User(s.User), resource: s.Resource, ticket: s.TicketID, groups: s.Groups, since: s.SignedIn}
		if h.since.IsZero() {
			h.since = s.IssuedAt
		}
		cause, refused := b.lost(ws, h)
		if refused == nil {
			continue
		}
		there[s.SessionID] = true
		e := under[s.SessionID]
		if e == nil || e.cause != cause {
			e = &ending{cause: cause}
			under[s.SessionID] = e
			b.tellEnd(&s, cause, refused, now)
		}
		if now.Before(e.again) {
			continue
		}
		b.publish(bus.GatewayEndSubject(s.Gateway, s.Instance), bus.EndSession{SessionID: s.SessionID, Reason: refused.Message})
		if e.told++; e.told == endInVain {
			b.o.Log.Error("a session goes on though its gateway was told to end it", "session", s.SessionID, "activity", s.ActivityID, "user", s.User, "host", s.Host, "gateway", s.Gateway, "instance", s.Instance)
		}
		e.again = now.Add(min(endAgain<<min(e.told-1, 10), endAgainMost))
	}
	for id := range under {
		if !there[id] {
			delete(under, id)
		}
	}
}

// tellEnd says once that a session is ended, and why.
func (b *Orchestrator) tellEnd(s *proof.Claims, cause string, why *refusal.Error, now time.Time) {
	b.o.Log.Info("session ended: access was taken back", "activity", s.ActivityID, "session", s.SessionID, "user", s.User, "ticket", s.TicketID,
		"resource", s.Resource, "host", s.Host, "gateway", s.Gateway, "cause", cause, "error", why)
	b.Trace(trace.Event{
		ActivityID: s.ActivityID, Step: trace.StepOrchestrate, Component: "broker/" + b.o.Name, At: now, User: s.User,
		Error: string(why.Code), Detail: "ended: " + why.Message,
	})
	b.o.Metrics.SessionsEnded.WithLabelValues(cause).Inc()
}

// carried gives the sessions that gateways carry and that are this broker's to end, by what their proofs say: also those on
// hosts that have lost their channel of late, whose connection to the gateway may live on.
func (r *registry) carried() (all []proof.Claims) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hosts {
		if h.at.IsZero() || !h.local && h.conn != "" || h.gone && r.now().Sub(h.lost) > forget {
			continue
		}
		for i := range h.report.Sessions {
			s := &h.report.Sessions[i]
			p := h.proofs.good[s.Proof]
			// The SessionHost may have been made again meanwhile; the session is its user's all the same.
			if s.SessionID == "" || s.State == bus.SessionDisconnected || p == nil || h.proofs.of(s, p.HostUID) == nil {
				continue
			}
			if p.Gateway != "" && p.Instance != "" {
				all = append(all, *p)
			}
		}
	}
	slices.SortFunc(all, func(a, b proof.Claims) int { return a.IssuedAt.Compare(b.IssuedAt) })
	return all
}
