package relay

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
	"rendezvous.dev/rendezvous/wire/tsgu"
	"rendezvous.dev/rendezvous/wire/wsframe"
)

// Reasons for a session's end beside those of package refusal.
const (
	clientClosed = "client-closed"
	hostClosed   = "host-closed"
)

// session is two legs that are joined.
type session struct {
	// Static.
	r           *Relay
	id          string
	activity    string
	workspace   string
	user        string
	resource    string
	hostName    string
	transport   string
	requested   time.Time // when the client's request came
	arrived     time.Time // when the agent's did
	started     time.Time
	idleTimeout time.Duration
	client      *client
	host        *leg

	toClient atomic.Uint64
	toHost   atomic.Uint64
	opened   atomic.Int32 // directions that have carried bytes
	farewell sync.Once    // the client was told that it ends
	ending   atomic.Bool  // farewell has begun: a host that takes no more bytes is no news
	over     atomic.Bool

	// Owned by tick.
	counted  [2]uint64 // bytes that metrics have
	lastMove time.Time
	lastKeep time.Time
	keeping  atomic.Bool // a KEEPALIVE is being written

	mu     sync.Mutex
	reason string
	timer  *time.Timer // the next tick
	grace  *time.Timer // ends the other direction once one has ended
}

// run copies until both directions have ended. It owns both legs and its caller's goroutine.
func (s *session) run() {
	s.host.tcp.polling, s.client.from.tcp.polling = true, true
	now := time.Now()
	s.lastMove, s.lastKeep = now, now
	s.r.reports.started(s)
	s.r.reports.step(s.activity, s.workspace, trace.StepJoin, s.arrived, now.Sub(s.arrived), "legs joined on "+s.r.instance, "")
	observe(s.r.metrics.Connect, now.Sub(s.requested), s.activity)
	s.r.log.Info("session joined", "activity", s.activity, "session", s.id, "workspace", s.workspace, "user", s.user,
		"resource", s.resource, "host", s.hostName, "transport", s.transport, "setup", now.Sub(s.requested).String())
	s.schedule()

	var down sync.WaitGroup
	down.Go(func() { s.hostEnded(s.copyHostToClient()) })
	s.clientEnded(s.copyClientToHost())
	down.Wait()
	s.close()
}

// clientEnded half-closes the host's leg where the client said good-bye, and ends all at once where it vanished.
func (s *session) clientEnded(err error) {
	var host writeError
	switch {
	case err == io.EOF:
		s.because(clientClosed)
		s.armGrace()
		s.host.SetWriteDeadline(time.Now().Add(s.r.closeGrace))
		s.host.CloseWrite()
	case brokeProtocol(err):
		s.r.log.Info("the client broke the protocol", "activity", s.activity, "session", s.id, "error", err)
		s.end(refusal.Protocol, "The client broke the protocol: update it.")
	case errors.As(err, &host):
		s.because(hostClosed)
		s.armGrace()
		s.host.tcp.Close()
	default:
		s.because(clientClosed)
		s.abort()
	}
}

// hostEnded tells the client that the host has ended, and lets it say its last words.
func (s *session) hostEnded(err error) {
	var client writeError
	switch {
	case errors.As(err, &client):
		s.because(clientClosed)
		s.abort()
	case err == io.EOF:
		s.because(hostClosed)
		s.sayGoodbye(tsgu.StatusOK, wsframe.CloseNormal, hostClosed, "")
	default:
		s.because(hostClosed)
		s.sayGoodbye(tsgu.CloseAborted, wsframe.CloseGoingAway, hostClosed, "")
		s.host.tcp.Close()
	}
}

// end ends the session for a reason that the client is told.
func (s *session) end(code refusal.Code, message string) {
	if !s.because(string(code)) {
		return
	}
	s.r.log.Info("session is ended", "activity", s.activity, "session", s.id, "code", code, "error", message)
	status := tsgu.CloseAborted
	if code == refusal.IdleTimeout && s.client.idleTimeouts {
		status = tsgu.CloseSessionTimeout
	}
	s.sayGoodbye(status, wsframe.CloseGoingAway, string(code), message)
	s.host.tcp.Close()
}

// because keeps the first reason.
func (s *session) because(reason string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reason != "" {
		return false
	}
	s.reason = reason
	return true
}

// sayGoodbye closes channel and WebSocket once, in one write, and gives the client closeGrace to go. A client that doesn't
// read doesn't hold it up; what it still sends goes nowhere.
func (s *session) sayGoodbye(status uint32, code int, reason, message string) {
	s.farewell.Do(func() {
		s.ending.Store(true)
		s.armGrace()
		var b []byte
		if s.client.tsgu {
			if message != "" && s.client.serviceMessages {
				text := tsgu.ServiceMessage{Message: tsgu.NewText(fmt.Sprintf("%s (%s, activity %s)", message, reason, s.activity))}
				b = s.client.wrap(b, text.Append(nil))
			}
			b = s.client.wrap(b, (&tsgu.CloseChannel{Status: status}).Append(nil))
		}
		if s.client.webSocket {
			b = wsframe.AppendFrame(b, wsframe.Close, wsframe.ClosePayload(code, fmt.Sprintf("%s; activity %s", reason, s.activity)))
		}
		s.client.SetWriteDeadline(time.Now().Add(lingerTime))
		s.client.writeLast(b)
	})
}

// armGrace bounds what may follow once one direction has ended.
func (s *session) armGrace() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.grace == nil && !s.over.Load() {
		s.grace = time.AfterFunc(s.r.closeGrace, s.abort)
	}
}

// abort ends both directions now.
func (s *session) abort() {
	s.client.abort()
	s.host.tcp.Close()
}

// close is the end of run: nobody copies any more.
func (s *session) close() {
	s.over.Store(true)
	s.mu.Lock()
	for _, t := range []*time.Timer{s.timer, s.grace} {
		if t != nil {
			t.Stop()
		}
	}
	reason := s.reason
	s.mu.Unlock()
	s.host.SetWriteDeadline(time.Now().Add(lingerTime))
	s.host.Close()
	s.client.SetWriteDeadline(time.Now().Add(lingerTime))
	s.client.Close()
	s.countBytes()
	lasted := time.Since(s.started)
	s.r.metrics.Ended.WithLabelValues(reason).Inc()
	observe(s.r.metrics.Duration, lasted, s.activity)
	s.r.log.Info("session ended", "activity", s.activity, "session", s.id, "reason", reason, "lasted", lasted.String(),
		"toClient", s.toClient.Load(), "toHost", s.toHost.Load())
	s.r.reports.ended(s, reason)
	s.r.remove(s)
}

// tickEvery is how often bytes are counted and idleness is looked for.
const tickEvery = 15 * time.Second

// schedule plans the next tick.
func (s *session) schedule() {
	every := tickEvery
	if s.client.tsgu {
		every = min(every, s.r.keepAlive)
	}
	if s.idleTimeout > 0 {
		every = min(every, max(s.idleTimeout/4, 10*time.Millisecond))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over.Load() {
		s.timer = time.AfterFunc(every, s.tick)
	}
}

// tick counts bytes, ends an idle session and keeps a TSGU client's path open. One timer serves all three.
func (s *session) tick() {
	now := time.Now()
	if s.countBytes() {
		s.lastMove = now
	}
	if s.idleTimeout > 0 && now.Sub(s.lastMove) >= s.idleTimeout {
		s.end(refusal.IdleTimeout, fmt.Sprintf("The session was idle for %s: connect again to go on with it.", s.idleTimeout))
		return
	}
	keep := s.client.tsgu && now.Sub(s.lastKeep) >= s.r.keepAlive && s.keeping.CompareAndSwap(false, true)
	if keep {
		s.lastKeep = now
	}
	s.schedule()
	if keep { // after schedule: a client that doesn't read may hold this up, but not the next tick
		s.client.Write(s.client.wrap(nil, tsgu.AppendKeepAlive(nil)))
		s.keeping.Store(false)
	}
}

// countBytes gives the metrics what was carried since it last did, and says whether that was anything. Only tick calls
// it, and close, after which no tick counts.
func (s *session) countBytes() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := [2]uint64{s.toClient.Load(), s.toHost.Load()}
	moved := now != s.counted
	s.r.metrics.Bytes.WithLabelValues("to_client").Add(float64(now[0] - s.counted[0]))
	s.r.metrics.Bytes.WithLabelValues("to_host").Add(float64(now[1] - s.counted[1]))
	s.counted = now
	return moved
}

// report is the session as the gateway container is told of it.
func (s *session) report() *admission.Session {
	return &admission.Session{SessionId: s.id, ActivityId: s.activity, Workspace: s.workspace, User: s.user, Resource: s.resource,
		Host: s.hostName, Transport: s.transport, Started: timestamppb.New(s.started), BytesToClient: s.toClient.Load(), BytesToHost: s.toHost.Load()}
}

// count adds a batch to a direction's bytes. Once both directions have carried their first, RDP's handshake is under way.
func (s *session) count(carried *atomic.Uint64, b *batch) {
	const tpkt = 3 // what X.224 requests and confirms open with (T.123)
	n := uint64(b.content)
	if carried.Add(n) != n || s.opened.Add(1) != 2 {
		return
	}
	detail := "first bytes both ways"
	if b.mem[b.span[0].at] == tpkt {
		detail += ", X.224"
	}
	s.r.reports.step(s.activity, s.workspace, trace.StepRDP, s.started, time.Since(s.started), detail, "")
}
