package orchestrate

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Users and administrators end, disconnect and message sessions. Any broker takes that: the request goes over the bus to
// the host's agent, wherever that is connected, which does it and says so.

// actTimeout is how long a host has to answer. Its agent gives up sooner.
const actTimeout = 30 * time.Second

// Sessions lists all sessions that this broker hears of, its own hosts' and others', by pool, host and id. Who a session's
// user is, and all that goes with that, stands only where a broker's proof says so.
func (b *Orchestrator) Sessions() []brokerapi.Session {
	snap := b.o.Source.Snapshot()
	return b.live.listed(func(k hostKey) (uid string, timeout time.Duration, ok bool) {
		pool, host := declared(snap, k)
		if host == nil {
			return "", 0, false
		}
		return host.UID, pool.HeartbeatTimeout, true
	})
}

func (r *registry) listed(declared func(hostKey) (uid string, timeout time.Duration, ok bool)) []brokerapi.Session {
	all := []brokerapi.Session{}
	for _, s := range r.liveSessions(declared) {
		all = append(all, brokerapi.Session{
			ID: s.SessionID, ActivityID: s.ActivityID, User: s.User, Account: s.Account, Resource: s.Resource, Pool: s.Pool, Host: s.Host,
			State: s.State, Since: s.Since, Started: s.IssuedAt, Gateway: s.Gateway, Instance: s.Instance, Client: s.Client, Proven: true,
		})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, h := range r.hosts {
		uid, timeout, ok := declared(k)
		if !ok || !r.connected(h, timeout) {
			continue
		}
		for i := range h.report.Sessions {
			s := &h.report.Sessions[i]
			if s.Assumed || h.proofs.of(s, uid) != nil { // assumed: nothing says that there is a session
				continue
			}
			sum := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%d/%d", k.pool, k.host, i, s.Since.UnixNano()))
			all = append(all, brokerapi.Session{ID: "unknown-" + hex.EncodeToString(sum[:8]), Pool: k.pool, Host: k.host, State: state(s.State), Since: s.Since})
		}
	}
	slices.SortFunc(all, func(a, b brokerapi.Session) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), cmp.Compare(a.Host, b.Host), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// state keeps a host's word among those that there are.
func state(s string) string {
	switch s {
	case bus.SessionPending, bus.SessionActive, bus.SessionDisconnected:
		return s
	}
	return "Unknown"
}

// Act does something to a session, and says what was done. Where user isn't empty, the session must be that user's; an
// administrator's right was checked before.
func (b *Orchestrator) Act(ctx context.Context, req brokerapi.ActRequest, user string) (detail string, err error) {
	begin := b.o.Now()
	var s *LiveSession
	detail, refused := func() (string, *refusal.Error) {
		switch req.Act {
		case bus.ActEnd, bus.ActDisconnect:
		case bus.ActMessage:
			if err := bus.CheckMessageText(req.Text); err != nil {
				return "", refusal.New(refusal.BadRequest, "text: %v.", err)
			}
		default:
			return "", refusal.New(refusal.BadRequest, "act: %q is not one of %s, %s, %s.", req.Act, bus.ActEnd, bus.ActDisconnect, bus.ActMessage)
		}
		if s = b.session(req.SessionID); s == nil || user != "" && s.User != user {
			s = nil // whose it is, is nobody else's to learn
			return "", b.unknown(req.SessionID)
		}
		return b.tellHost(ctx, s, req)
	}()
	result := "done"
	if refused != nil {
		result = string(refused.Code)
	}
	act := req.Act
	if refused != nil && refused.Code == refusal.BadRequest {
		act = "invalid"
	}
	b.o.Metrics.SessionActs.WithLabelValues(act, result).Inc()
	log := b.o.Log.With("act", req.Act, "session", req.SessionID, "by", req.By, "took", b.o.Now().Sub(begin).Round(time.Millisecond).String())
	if s == nil {
		log.Info("nothing done to the session", "error", refused)
		return "", refused
	}
	log = log.With("activity", s.ActivityID, "user", s.User, "pool", s.Pool, "host", s.Host)
	event := trace.Event{
		ActivityID: s.ActivityID, Step: trace.StepRDP, Component: "broker/" + b.o.Name, At: begin, Duration: b.o.Now().Sub(begin), User: s.User,
		Detail: fmt.Sprintf("%s by %s: %s", req.Act, req.By, detail),
	}
	if refused != nil {
		event.Detail, event.Error = fmt.Sprintf("%s by %s: %s", req.Act, req.By, refused.Message), string(refused.Code)
		b.Trace(event)
		log.Info("nothing done to the session", "error", refused)
		return "", refused
	}
	b.Trace(event)
	log.Info("done to the session", "detail", detail)
	return detail, nil
}

// session finds a session by its id.
func (b *Orchestrator) session(id string) *LiveSession {
	all := b.LiveSessions()
	i := slices.IndexFunc(all, func(s LiveSession) bool { return s.SessionID == id })
	if i < 0 {
		return nil
	}
	return &all[i]
}

func (b *Orchestrator) unknown(id string) *refusal.Error {
	if strings.HasPrefix(id, "unknown-") {
		return refusal.New(refusal.UnknownSession, "No broker sent anybody to session %s, so nothing can be done to it from here: end it on its host.", id)
	}
	return refusal.New(refusal.UnknownSession, "There is no session %s (any more): list the sessions again.", id)
}

// tellHost has the session's host do it.
func (b *Orchestrator) tellHost(ctx context.Context, s *LiveSession, req brokerapi.ActRequest) (string, *refusal.Error) {
	if req.Act == bus.ActDisconnect && s.Connected && s.Gateway != "" && s.Instance != "" { // so that the client is told why
		b.publish(bus.GatewayEndSubject(s.Gateway, s.Instance), bus.EndSession{SessionID: s.SessionID, Reason: "Disconnected by " + req.By + ". Your desktop goes on: connect again to get back to it."})
	}
	data, err := json.Marshal(bus.SessionAct{SessionID: s.SessionID, ActivityID: s.ActivityID, Proof: s.Proof, Act: req.Act, Text: req.Text, By: req.By})
	if err != nil {
		return "", refusal.From(err)
	}
	ctx, cancel := context.WithTimeout(ctx, actTimeout)
	defer cancel()
	m, err := b.o.Conn.RequestWithContext(ctx, bus.HostSessionSubject(s.Pool, s.Host), data)
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return "", refusal.New(refusal.HostTimeout, "Host %s takes no such request: its agent is not connected, or is older than this broker (update it).", s.Host)
	case err != nil:
		return "", refusal.New(refusal.HostTimeout, "Host %s did not answer within %v (%v): whether it was done shows in the list of sessions.", s.Host, actTimeout, err)
	}
	var reply bus.SessionActReply
	if err := json.Unmarshal(m.Data, &reply); err != nil {
		return "", refusal.New(refusal.HostRefused, "Host %s gave an answer that can't be read; is its agent much older than the broker?", s.Host)
	}
	if refused := refusal.Received(reply.Err, refusal.HostRefused); refused != nil {
		return "", refused
	}
	return clipDetail(reply.Detail), nil
}

// clipDetail bounds what a host says.
func clipDetail(s string) string {
	return refusal.Received(&refusal.Error{Code: refusal.HostRefused, Message: s}, refusal.HostRefused).Message
}
