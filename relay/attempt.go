package relay

import (
	"container/list"
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// Transports, as told to the gateway container.
const (
	transportTSGU   = "tsgu-websocket"
	transportLegacy = "tsgu-legacy"
	transportRaw    = "raw-websocket"
)

// errClientGone says that the client left while it was being served: there is nobody to answer.
var errClientGone = errors.New("relay: the client has left")

// attempt is one client's way from its request to its session. Its methods are called in this order: authenticate or
// trust, connect, begin; close always.
type attempt struct {
	r         *Relay
	v         *visitor
	from      *leg // what the client is read from: v's, but for the legacy form
	transport string
	activity  string
	sessionID string
	requested time.Time
	secured   time.Duration // from accept to request

	// Set by authenticate, or by trust and connect.
	ticket        string // dropped by connect
	checked       bool   // the gateway container has said what it thinks of the ticket
	workspace     string
	user          string
	resource      string
	target        string
	redirectFlags uint32
	asked         time.Time     // when admission began
	asking        time.Duration // time spent on it so far

	// Set by connect.
	host  string
	agent *arrival

	session *session // set by begin

	// Guarded by Relay.mu.
	place  *list.Element // among the places; nil once it is given back, or was taken
	who    string        // whose it is: a user's, a ticket's, or empty for strangers
	silent bool          // it waits for its client
}

// newAttempt reserves a place for a client. It is nil where there is none, and the client was told.
func (r *Relay) newAttempt(v *visitor, transport, activity string) *attempt {
	a := &attempt{r: r, v: v, from: v.leg, transport: transport, activity: activity, sessionID: newGUID(), requested: time.Now()}
	a.secured = a.requested.Sub(v.accepted)
	a.silent = transport != transportRaw
	if e := r.reserve(a); e != nil {
		e = a.refused(e)
		v.sayNo(httpStatus(e.Code), e)
		return nil
	}
	return a
}

// newWebSocket is newAttempt for a request to upgrade, which is not needed after it. ok is the answer once all else is well.
func (r *Relay) newWebSocket(v *visitor, req *request, transport, activity string) (a *attempt, ok *answer) {
	ok, e := upgradeWebSocket(req, activity)
	if e != nil {
		v.refuseClient(http.StatusBadRequest, e)
		return nil, nil
	}
	req.forget()
	return r.newAttempt(v, transport, activity), ok
}

// close gives the place back where no session came of it.
func (a *attempt) close() {
	if a.session != nil {
		return
	}
	a.r.release(a, nil)
	if a.agent != nil {
		a.agent.leg.tcp.Close()
	}
}

// refused stamps, counts, logs and reports a refusal.
func (a *attempt) refused(e *refusal.Error) *refusal.Error {
	if !a.checked {
		a.r.reportStranger(a.v, a.activity, e)
		return a.count(e)
	}
	return a.refusedAt(trace.StepAdmit, a.requested, time.Since(a.requested), e)
}

// refusedAt is refused in a step of a client whose ticket was looked at.
func (a *attempt) refusedAt(n int, at time.Time, d time.Duration, e *refusal.Error) *refusal.Error {
	a.step(n, at, d, e.Message, e.Code)
	return a.count(e)
}

func (a *attempt) count(e *refusal.Error) *refusal.Error {
	a.r.metrics.Admissions.WithLabelValues(a.transport, string(e.Code)).Inc()
	a.r.log.Info("client refused", "activity", a.activity, "peer", a.v.tcp.RemoteAddr().String(), "transport", a.transport,
		"workspace", a.workspace, "user", a.user, "code", e.Code, "error", e.Message)
	return e.With(a.activity)
}

// step reports one step of the connection sequence.
func (a *attempt) step(n int, at time.Time, d time.Duration, detail string, code refusal.Code) {
	a.r.reports.step(a.activity, a.workspace, n, at, d, detail, code)
}

// authenticate has the gateway container check the ticket alone.
func (a *attempt) authenticate(ticket string) *refusal.Error {
	a.asked = time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	resp, err := a.r.admission.Authenticate(ctx, &admission.AuthenticateRequest{
		ActivityId: a.activity, Ticket: ticket, ClientAddr: a.v.tcp.RemoteAddr().String()})
	a.asking = time.Since(a.asked)
	if err != nil {
		return a.refused(a.r.admissionFailed(a.activity, err))
	}
	a.told(resp)
	a.target, a.redirectFlags = resp.Target, resp.RedirectFlags
	if e := received(resp.Error); e != nil {
		return a.refusedTicket(e)
	}
	if e := a.r.known(a, userKey(a.workspace, a.user)); e != nil {
		return a.refused(e)
	}
	a.v.vouch()
	a.ticket = ticket
	return nil
}

// trust leaves the check of the ticket to connect, which saves a call. The client counts as vouched for until then: a bad
// ticket is refused at once, and it is a stranger again.
func (a *attempt) trust(ticket string) *refusal.Error {
	a.asked = time.Now()
	if e := a.r.known(a, ticketKey(ticket)); e != nil {
		return a.refused(e)
	}
	a.v.vouch()
	a.ticket = ticket
	return nil
}

// told takes what the gateway container says of the ticket, the first time. No answer tells nothing.
func (a *attempt) told(resp interface {
	GetActivityId() string
	GetWorkspace() string
	GetUser() string
	GetResource() string
}) {
	if a.checked {
		return
	}
	a.checked = true
	if id := parseGUID(resp.GetActivityId()); id != "" {
		a.activity = id
	}
	a.workspace, a.user, a.resource = resp.GetWorkspace(), resp.GetUser(), resp.GetResource()
	a.step(trace.StepDialGateway, a.v.accepted, a.secured, a.transport+" from "+a.v.tcp.RemoteAddr().String(), "")
}

// connect has the session orchestrated and waits for the agent's leg. Its error is a *refusal.Error or errClientGone.
func (a *attempt) connect(target string) error {
	if !a.r.busy(a) {
		return errClientGone
	}
	wait := time.Duration(a.r.config.Load().JoinTimeoutSeconds) * time.Second
	timed, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	ctx, leave := context.WithCancelCause(timed)
	defer leave(nil)

	a.v.SetDeadline(time.Time{})
	a.from.SetDeadline(time.Time{})
	unwatch := a.from.watch(func() { leave(errClientGone) })
	err := a.orchestrate(ctx, target, wait)
	unwatch()
	if context.Cause(ctx) == errClientGone {
		a.r.metrics.Admissions.WithLabelValues(a.transport, "client-gone").Inc()
		a.r.log.Info("the client left before its host came", "activity", a.activity, "user", a.user)
		return errClientGone
	}
	return err
}

func (a *attempt) orchestrate(ctx context.Context, target string, wait time.Duration) error {
	secret := make([]byte, 32)
	rand.Read(secret)
	w := a.r.joins.add(secret, a.activity)
	defer func() {
		if a.agent == nil {
			a.r.joins.cancel(w)
		}
	}()

	began := time.Now()
	deadline, _ := ctx.Deadline()
	resp, err := a.r.admission.Connect(ctx, &admission.ConnectRequest{
		ActivityId: a.activity, Ticket: a.ticket, Target: target, ClientAddr: a.v.tcp.RemoteAddr().String(), SessionId: a.sessionID,
		Instance: a.r.instance, JoinSecret: secret, Transport: a.transport, Deadline: timestamppb.New(deadline)})
	clear(secret)
	a.ticket = ""
	promised := time.Now()
	a.asking += promised.Sub(began)
	a.told(resp)
	if err == nil && resp.Error == nil {
		a.host = resp.Host
		a.step(trace.StepAdmit, a.asked, a.asking, "host "+a.host, "")
		return a.awaitAgent(ctx, w, promised, wait)
	}
	if context.Cause(ctx) == errClientGone {
		return errClientGone
	}
	var e *refusal.Error
	if err != nil {
		e = a.r.admissionFailed(a.activity, err)
	} else {
		e = received(resp.Error)
	}
	if a.user == "" {
		a.v.doubt()
	}
	return a.refusedTicket(e)
}

// refusedTicket is refused with what the gateway container says, which may be that nobody knows whose the ticket is.
func (a *attempt) refusedTicket(e *refusal.Error) *refusal.Error {
	if a.user == "" {
		a.r.reportStranger(a.v, a.activity, e)
	}
	return a.refusedAt(trace.StepAdmit, a.asked, a.asking, e)
}

// received is a refusal of the gateway container.
func received(e *admission.Error) *refusal.Error {
	if e == nil {
		return nil
	}
	return refusal.Received(&refusal.Error{Code: refusal.Code(e.Code), Message: e.Message}, refusal.Internal)
}

// awaitAgent waits for the leg that the host has promised. The agent may have been quicker than the promise.
func (a *attempt) awaitAgent(ctx context.Context, w *joinWait, promised time.Time, wait time.Duration) error {
	var e *refusal.Error
	select {
	case a.agent = <-w.leg:
		if a.agent != nil {
			a.step(trace.StepReverse, a.agent.accepted, a.agent.arrived.Sub(a.agent.accepted), "host "+a.host+" from "+a.agent.leg.tcp.RemoteAddr().String(), "")
			return nil
		}
		w.deliver(nil) // for cancel
		e = refusal.New(refusal.HostTimeout, "The connection of host %s broke as it arrived at the gateway: connect again.", a.host)
	case <-ctx.Done():
		if context.Cause(ctx) == errClientGone {
			return errClientGone
		}
		e = refusal.New(refusal.HostTimeout, "Host %s accepted the session, but its agent did not dial this gateway within %s: check the host's way out to %s, then connect again.",
			a.host, wait, a.r.config.Load().Hostname)
	}
	return a.refusedAt(trace.StepReverse, promised, time.Since(promised), e)
}

// begin makes the session of the attempt.
func (a *attempt) begin(c *client) *session {
	a.agent.leg.SetDeadline(time.Time{})
	a.v.SetDeadline(time.Time{})
	a.from.SetDeadline(time.Time{})
	s := &session{
		r: a.r, id: a.sessionID, activity: a.activity, workspace: a.workspace, user: a.user, resource: a.resource,
		hostName: a.host, transport: a.transport, started: time.Now(), requested: a.requested, arrived: a.agent.arrived,
		client: c, host: a.agent.leg, idleTimeout: time.Duration(a.r.config.Load().IdleTimeoutSeconds) * time.Second,
	}
	a.session = s
	a.r.disown(a.v.tcp)
	a.r.metrics.Admissions.WithLabelValues(a.transport, "ok").Inc()
	a.r.release(a, s)
	return s
}

// admissionFailed is the refusal where the gateway container gave no answer.
func (r *Relay) admissionFailed(activity string, err error) *refusal.Error {
	r.log.Warn("the gateway container gave no answer", "activity", activity, "error", err)
	if status.Code(err) == codes.DeadlineExceeded {
		return refusal.New(refusal.BrokerAway, "The broker did not answer in time: try again; if it lasts, ask your administrator to look at the Workspace's broker.")
	}
	return refusal.New(refusal.AdmissionAway, "The gateway container beside this relay does not answer: try again in a few seconds; sessions that run go on.")
}

// upgradeWebSocket checks the request's WebSocket headers and makes the 101. A key may be anything: clients in use send
// such that RFC 6455 would not have them send, and nothing rests on it.
func upgradeWebSocket(req *request, activity string) (*answer, *refusal.Error) {
	key := req.get("Sec-WebSocket-Key")
	lacks := ""
	switch {
	case !req.has("Upgrade", "websocket"):
		lacks = "Upgrade: websocket"
	case !req.has("Connection", "Upgrade"):
		lacks = "Connection: Upgrade"
	case req.get("Sec-WebSocket-Version") != "13":
		lacks = "Sec-WebSocket-Version: 13"
	case key == "":
		lacks = "Sec-WebSocket-Key"
	}
	if lacks != "" {
		return nil, refusal.New(refusal.Protocol, "The WebSocket upgrade has no header %q (RFC 6455): a proxy on the way may have removed it; let it pass WebSocket through, or update the client.", lacks).With(activity)
	}
	ok := &answer{status: http.StatusSwitchingProtocols, activity: activity, header: []headerField{
		{"Upgrade", "websocket"}, {"Connection", "Upgrade"}, {"Sec-WebSocket-Accept", wsframe.AcceptKey(key)}}}
	if req.has("Sec-WebSocket-Protocol", "binary") {
		ok.header = append(ok.header, headerField{"Sec-WebSocket-Protocol", "binary"})
	}
	return ok, nil
}
