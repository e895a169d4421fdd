package orchestrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/broker/accounts"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/placement"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	// A connect's own deadline is the gateway's, within these: clocks of pods may differ.
	shortestConnect, longestConnect = time.Second, time.Minute
	// promiseGrace is how long after a connect's deadline an accepted session may still be on its way into a report.
	promiseGrace = 5 * time.Second
	// maxNamed bounds the hosts that a refusal names.
	maxNamed = 8
)

// connect is one pass over a ConnectRequest.
type connect struct {
	b        *Orchestrator
	req      bus.ConnectRequest
	deadline time.Time

	claims   ticket.Claims   // set by authorise
	resource *model.Resource // set by authorise
	gateway  *model.Gateway  // set by authorise
	pool     *model.Pool     // set by place
	account  *bus.Account    // set by settleAccount; nil where hosts ask for credentials themselves
	tries    []try           // what was answered in vain
	// asked are the hosts that were asked, with the sequence of the report after which to ask again, or 0 for never.
	asked map[string]uint64
}

var errHostGone = errors.New("its SessionHost does not exist any more")

type try struct {
	host string
	err  *refusal.Error
}

func (b *Orchestrator) onConnect(ctx context.Context, m *nats.Msg) {
	b.slots <- struct{}{}
	go func() {
		defer func() { <-b.slots }()
		b.answerConnect(ctx, m)
	}()
}

// answerConnect answers one request, once.
func (b *Orchestrator) answerConnect(ctx context.Context, m *nats.Msg) {
	begin := b.o.Now()
	c := &connect{b: b, asked: map[string]uint64{}}
	if !b.decode(m, &c.req) {
		return
	}
	if !b.repliesTo(m, c.req.Gateway) {
		return
	}
	c.deadline = begin.Add(min(max(c.req.Deadline.Sub(begin), shortestConnect), longestConnect))
	ctx, cancel := context.WithDeadline(ctx, c.deadline)
	defer cancel()

	host, err := c.run(ctx)
	reply := bus.ConnectReply{Host: host}
	result := "accepted"
	event := trace.Event{
		ActivityID: c.req.ActivityID, Step: trace.StepOrchestrate, Component: "broker/" + b.o.Name, At: begin,
		Duration: b.o.Now().Sub(begin), User: c.claims.User,
	}
	if err != nil {
		reply.Err = refusal.From(err).With(c.req.ActivityID)
		event.Error, event.Detail = string(reply.Err.Code), reply.Err.Message
		result = string(reply.Err.Code)
		b.o.Log.Info("connect refused", "activity", c.req.ActivityID, "session", c.req.SessionID, "user", c.claims.User, "ticket", c.claims.ID, "gateway", c.req.Gateway, "error", reply.Err)
	} else {
		reply.Pool = c.pool.Name
		event.Detail = fmt.Sprintf("%s may use %s by ticket %s; host %s of pool %s dials gateway %s", c.claims.User, c.claims.Resource, c.claims.ID, host, c.pool.Name, c.req.Gateway)
		b.o.Log.Info("connect accepted", "activity", c.req.ActivityID, "session", c.req.SessionID, "user", c.claims.User, "ticket", c.claims.ID, "gateway", c.req.Gateway, "pool", c.pool.Name, "host", host)
	}
	b.respond(m, c.req.Gateway, reply)
	b.Trace(event)
	b.o.Metrics.Connects.WithLabelValues(result).Inc()
	if err != nil {
		result = "refused"
	}
	b.o.Metrics.ConnectSeconds.WithLabelValues(result).Observe(event.Duration.Seconds())
}

// repliesTo says whether the answer goes where the gateway that a request names listens, and nowhere else: nobody gets a
// message sent to somebody else by having us reply to it.
func (b *Orchestrator) repliesTo(m *nats.Msg, gateway string) bool {
	if identity.IsLabel(gateway) && strings.HasPrefix(m.Reply, bus.InboxPrefix(identity.Gateway(b.o.Namespace, b.o.Workspace, gateway))+".") {
		return true
	}
	b.o.Log.Warn("a gateway's request with a strange reply subject", "subject", m.Subject, "reply", m.Reply, "gateway", gateway)
	return false
}

// respond answers a gateway's request.
func (b *Orchestrator) respond(m *nats.Msg, gateway string, reply any) {
	data, err := json.Marshal(reply)
	if err == nil {
		err = m.Respond(data)
	}
	if err != nil {
		b.o.Log.Warn("can't answer a gateway", "subject", m.Subject, "gateway", gateway, "error", err)
	}
}

// run is the connect: authorise, then place and ask a host, until one accepts. It places anew for each question, because
// in a storm the world is another by then. It looks again for a moment before it says that every place is taken, and for
// some longer where a host is likely on its way back, as after this broker or another was replaced.
func (c *connect) run(ctx context.Context) (string, error) {
	if err := c.authorise(); err != nil {
		return "", err
	}
	if err := c.settleAccount(ctx); err != nil {
		return "", err
	}
	c.b.arrived(c.req.Gateway, c.claims.ID)
	var settled time.Time // set once no place was found: asking hosts in vain may take long
	pause := lookAgain
	for {
		cand, found, why, err := c.place()
		switch {
		case err != nil:
			return "", err
		case ctx.Err() != nil:
			return "", c.failed(&why)
		case found:
			if c.try(ctx, cand) {
				return cand.Host, nil
			}
			continue
		}
		if settled.IsZero() {
			settled = time.Now().Add(c.b.o.Settle)
		}
		placeMayCome := (why.Full() > 0 || c.refusedAsFull()) && time.Now().Before(settled)
		if !placeMayCome && !c.b.hostMayReturn(c.pool.Name) {
			return "", c.failed(&why)
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, longestPause)
		case <-ctx.Done():
		}
	}
}

// refusedAsFull says whether a host that was asked may have a place by now.
func (c *connect) refusedAsFull() bool {
	return slices.ContainsFunc(c.tries, func(t try) bool { return t.err.Code == refusal.HostFull })
}

// try asks a host, after it was given to the user where need be, and says whether it takes the session.
func (c *connect) try(ctx context.Context, cand placement.Candidate) bool {
	c.asked[cand.Host] = 0
	mine, refused := c.assign(ctx, cand)
	var after uint64
	if mine && refused == nil {
		refused, after = c.ask(ctx, cand)
	}
	if refused == nil {
		return mine
	}
	if refused.Code == refusal.HostFull || refused.Code == refusal.HostTimeout {
		c.asked[cand.Host] = after // a later report may tell of a free place, or that the host is there again
	}
	c.tries = append(c.tries, try{cand.Host, refused})
	return false
}

// assign gives a host to the user for good, where the candidate asks for it. mine is false where it went to somebody
// else meanwhile.
func (c *connect) assign(ctx context.Context, cand placement.Candidate) (mine bool, refused *refusal.Error) {
	if !cand.Assign {
		return true, nil
	}
	owner, err := c.b.o.Writer.Assign(ctx, cand.Host, c.claims.User)
	if err != nil {
		return false, refusal.New(refusal.NoHost, "Host %s can't be assigned to you now: %v.", cand.Host, err)
	}
	return c.b.user(owner) == c.claims.User, nil
}

// authorise checks the ticket again, and against the Workspace as it is now.
func (c *connect) authorise() error {
	b, o := c.b, c.b.o
	key, err := o.TicketKey()
	if err != nil {
		return refusal.New(refusal.Internal, "The broker can't check tickets: %v.", err)
	}
	claims, err := ticket.Verify(c.req.Ticket, key, o.Namespace, o.Workspace, o.Now())
	if err != nil {
		return err
	}
	c.claims = claims
	snap := o.Source.Snapshot()
	if snap.Workspace == nil {
		return refusal.New(refusal.BrokerAway, "Workspace %s does not exist, or its broker has not read it yet: try again in a moment.", o.Workspace)
	}
	c.claims.User = snap.Workspace.OIDC.User(claims.User) // an older broker's ticket has the token's spelling
	claims = c.claims
	h := holding{user: claims.User, resource: claims.Resource, ticket: claims.ID, groups: claims.Groups, since: claims.Since()}
	if _, refused := b.lost(snap.Workspace, h); refused != nil {
		return refused
	}
	c.resource = snap.Workspace.Resource(claims.Resource)
	if c.gateway = snap.Gateway(c.req.Gateway); c.gateway == nil {
		return refusal.New(refusal.UnknownInstance, "Gateway %s does not serve workspace %s: its labels must match the Workspace's spec.gatewaySelector.", c.req.Gateway, o.Workspace)
	}
	want := brokerapi.PoolName(o.Namespace, c.resource.Pool)
	if claims.Target != want {
		return refusal.New(refusal.WrongTarget, "The connection file is for %s, and %q is now served by %s: download it again.", claims.Target, claims.Resource, want)
	}
	if c.req.Target != "" && !strings.EqualFold(c.req.Target, want) {
		return refusal.New(refusal.WrongTarget, "The client asked for %q, and its ticket is for %q: use the connection file unchanged.", c.req.Target, want)
	}
	return nil
}

// settleAccount finds into which account the user is logged in, before any host is asked.
func (c *connect) settleAccount(ctx context.Context) (err error) {
	pool := c.b.o.Source.Snapshot().Pools[c.resource.Pool]
	if pool == nil || pool.Accounts == nil {
		return nil // place tells of a pool that is missing
	}
	c.account, err = c.b.accounts.Account(ctx, pool, accounts.Person{Name: c.claims.User, Claims: c.claims.Account, Spelling: c.b.user})
	return err
}

// place finds the host to ask next, as things stand now.
func (c *connect) place() (placement.Candidate, bool, placement.Why, error) {
	snap := c.b.o.Source.Snapshot()
	if c.pool = snap.Pools[c.resource.Pool]; c.pool == nil {
		return placement.Candidate{}, false, placement.Why{}, refusal.New(refusal.NoHost, "Resource %q names HostPool %q, which does not exist in this workspace: an administrator must make it, or change the resource's hostPoolRef.", c.resource.Name, c.resource.Pool)
	}
	begin := time.Now()
	cand, found, why := c.b.live.best(c.pool, c.b.poolHosts(snap, c.pool.Name), c.claims.User, c.asked)
	c.b.o.Metrics.PlacementSeconds.Observe(time.Since(begin).Seconds())
	return cand, found, why, nil
}

// ask tells a host's agent to dial, and gives its refusal, nil where it accepts, and the sequence of its last report
// before that.
func (c *connect) ask(ctx context.Context, cand placement.Candidate) (*refusal.Error, uint64) {
	o, begin := c.b.o, c.b.o.Now()
	k := hostKey{c.pool.Name, cand.Host}
	settle := func(bool, uint64) {}
	if !cand.Resume {
		settle = c.b.live.promise(k, c.req.SessionID, c.claims.User, c.deadline.Add(promiseGrace))
	}
	refused, after := c.request(ctx, k)
	settle(refused == nil, after)
	result := "accepted"
	event := trace.Event{
		ActivityID: c.req.ActivityID, Step: trace.StepOrchestrate, Component: "broker/" + o.Name, At: begin,
		Duration: o.Now().Sub(begin), User: c.claims.User, Detail: fmt.Sprintf("host %s accepts", cand.Host),
	}
	if refused != nil {
		result = string(refused.Code)
		event.Detail = fmt.Sprintf("host %s: %s", cand.Host, refused.Message)
		o.Log.Info("host did not take the session", "activity", c.req.ActivityID, "session", c.req.SessionID, "host", cand.Host, "error", refused)
	}
	c.b.Trace(event)
	o.Metrics.HostTries.WithLabelValues(result).Inc()
	return refused, after
}

func (c *connect) request(ctx context.Context, k hostKey) (refused *refusal.Error, after uint64) {
	proven, err := c.prove(k.host)
	if err != nil {
		return refusal.New(refusal.HostRefused, "Host %s can't be asked: %v.", k.host, err), 0
	}
	data, err := json.Marshal(bus.HostConnect{
		ActivityID: c.req.ActivityID, SessionID: c.req.SessionID, User: c.claims.User, Resource: c.resource.Name,
		Address: net.JoinHostPort(c.gateway.Hostname, strconv.Itoa(int(c.gateway.Port))), ServerName: c.gateway.Hostname,
		CABundle: c.gateway.CABundle, Gateway: c.req.Gateway, Instance: c.req.Instance, JoinSecret: c.req.JoinSecret, Deadline: c.req.Deadline,
		Account: c.account, Proof: proven,
	})
	if err != nil {
		return refusal.From(err), 0
	}
	ctx, cancel := context.WithTimeout(ctx, c.pool.ConnectTimeout)
	defer cancel()
	m, err := c.b.o.Conn.RequestWithContext(ctx, bus.HostConnectSubject(k.pool, k.host), data)
	switch {
	case errors.Is(err, nats.ErrNoResponders): // its broker was lost, say: it may be asked again once it is heard again
		return refusal.New(refusal.HostTimeout, "Host %s is not connected to the broker.", k.host), c.b.live.missed(k)
	case err != nil && ctx.Err() != nil:
		return refusal.New(refusal.HostTimeout, "Host %s did not answer within %v.", k.host, c.pool.ConnectTimeout), 0
	case err != nil:
		return refusal.New(refusal.HostTimeout, "Host %s can't be asked: %v.", k.host, err), 0
	}
	var reply bus.HostReply
	if err := json.Unmarshal(m.Data, &reply); err != nil {
		return refusal.New(refusal.HostRefused, "Host %s gave an answer that can't be read; is its agent much older than the broker?", k.host), 0
	}
	return refusal.Received(reply.Err, refusal.HostRefused), reply.Sequence
}

// failed sums up why no host took the session: the host's own refusal where the pool has one host, else all of it.
func (c *connect) failed(why *placement.Why) error {
	const wayOut = "Try again in a moment; if it lasts, give the activity id to an administrator, who finds more with `kubectl get sessionhosts`."
	if len(c.tries) == 0 {
		return refusal.New(refusal.NoHost, "No host of pool %s can take a session: %s. %s", c.pool.Name, why, wayOut)
	}
	if why.Hosts == 1 {
		t := c.tries[0].err
		return refusal.New(t.Code, "%s %s", t.Message, wayOut)
	}
	code := refusal.NoHost
	var said []string
	for _, t := range c.tries {
		if t.err.Code == refusal.HostTimeout {
			code = refusal.HostTimeout
		}
		said = append(said, fmt.Sprintf("%s (%s)", t.host, t.err.Code))
	}
	slices.Sort(said)
	more := ""
	if len(said) > maxNamed {
		more = fmt.Sprintf(" and %d more", len(said)-maxNamed)
		said = said[:maxNamed]
	}
	return refusal.New(code, "No host of pool %s took the session. Asked in vain: %s%s. Now: %s. %s", c.pool.Name, strings.Join(said, ", "), more, why, wayOut)
}
