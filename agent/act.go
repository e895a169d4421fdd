package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"rendezvous.dev/rendezvous/agent/control"
	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	// actTimeout bounds what is done to one session.
	actTimeout = 25 * time.Second
	// actGrace is how long a connection that is to end has to end by itself: its other end says why.
	actGrace = 2 * time.Second
)

// openControl makes ready for acting on desktops: by a helper beside them, or by this process where it is root on their
// machine.
func (a *Agent) openControl() (closeIt func(), err error) {
	if a.opts.control != nil {
		a.control = a.opts.control
		return func() {}, nil
	}
	if !a.opts.LoginShared {
		a.control = localControl()
		return func() {}, nil
	}
	l, err := listenPrivate(filepath.Join(a.opts.LoginDir, control.SocketName))
	if err != nil {
		return nil, fmt.Errorf("--login-dir: %w", err)
	}
	r := &control.Remote{Caller: login.PeerUID, Log: a.log}
	a.control = r
	go func() {
		if err := r.Serve(l); err != nil {
			a.log.Error("session helper's socket", "error", err)
		}
	}()
	return func() { l.Close() }, nil
}

// target is a session that is to be acted on.
type target struct {
	bus.HostSession
	carried  bool // by a connection of this agent
	uid      string
	displays []int
}

// find gives the session that a broker means: a connection by its id, or a desktop that its user left, by its proof.
func (l *ledger) find(id, proof string) (t target, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.sessions[id]; s != nil && id != "" {
		t = target{HostSession: s.HostSession, carried: true, uid: s.uid}
	} else if proof != "" {
		for _, h := range l.desktops {
			if account, rec, known := l.ownerOf(h.desktop); known && rec.Proof == proof {
				t = target{uid: h.uid, HostSession: bus.HostSession{User: rec.Person, ActivityID: rec.Activity, Account: account, State: bus.SessionDisconnected}}
				break
			}
		}
	}
	if !t.carried && t.uid == "" {
		return t, false
	}
	for _, h := range l.desktops {
		if t.uid != "" && h.uid == t.uid {
			t.displays = append(t.displays, h.display)
		}
	}
	slices.Sort(t.displays)
	return t, true
}

// disconnect ends a session's connection, if it doesn't end by itself within grace. false says that it had none.
func (l *ledger) disconnect(ctx context.Context, id string, grace time.Duration) bool {
	there := func() *carried {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.sessions[id]
	}
	s := there()
	if s == nil {
		return false
	}
	l.mu.Lock()
	s.ended = true // also where it has yet to be joined
	l.mu.Unlock()
	for until := time.Now().Add(grace); there() == s && time.Now().Before(until); {
		if sleep(ctx, 20*time.Millisecond) != nil {
			break
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.end()
	return true
}

// onSession does to a session what a broker says, and answers when it is done.
func (a *Agent) onSession(msg *nats.Msg) {
	began := time.Now()
	var act bus.SessionAct
	if err := json.Unmarshal(msg.Data, &act); err != nil {
		a.answerAct(msg, "", refusal.New(refusal.BadRequest, "Session host %s can't read the broker's request: %v. Are broker and agent of matching versions?", a.opts.Host, err))
		return
	}
	go func() { // others wait behind
		ctx, cancel := context.WithTimeout(context.Background(), actTimeout)
		defer cancel()
		detail, refused := a.act(ctx, act)
		log := a.log.With("act", act.Act, "session", act.SessionID, "activity", act.ActivityID, "by", act.By, "took", time.Since(began).Round(time.Millisecond).String())
		event := trace.Event{ActivityID: act.ActivityID, Step: trace.StepRDP, At: began, Duration: time.Since(began), Detail: act.Act + ": " + detail}
		if refused != nil {
			log.Info("not done to the session", "code", refused.Code, "why", refused.Message)
			event.Detail, event.Error = act.Act+": "+refused.Message, string(refused.Code)
		} else {
			log.Info("done to the session", "detail", detail)
		}
		a.trace(event)
		signal(a.changed)
		a.answerAct(msg, detail, refused)
	}()
}

func (a *Agent) answerAct(msg *nats.Msg, detail string, refused *refusal.Error) {
	data, err := json.Marshal(bus.SessionActReply{Err: refused, Detail: detail})
	if err == nil {
		err = msg.Respond(data)
	}
	if err != nil {
		a.log.Error("broker not answered", "error", err)
	}
}

// act carries out what is to be done to a session, and says what that was.
func (a *Agent) act(ctx context.Context, act bus.SessionAct) (detail string, refused *refusal.Error) {
	host := a.current().Host
	t, ok := a.ledger.find(act.SessionID, act.Proof)
	if !ok {
		return "", refusal.New(refusal.UnknownSession, "Session %s is not on host %s any more: list the sessions again.", act.SessionID, host)
	}
	switch act.Act {
	case bus.ActDisconnect:
		if !t.carried {
			return "nobody was connected", nil
		}
		a.ledger.disconnect(ctx, act.SessionID, actGrace)
		return "the connection was closed, the desktop stays", nil
	case bus.ActMessage:
		if err := bus.CheckMessageText(act.Text); err != nil {
			return "", refusal.New(refusal.BadRequest, "Host %s shows no such message: %v.", host, err)
		}
		if refused := a.onDesktops(ctx, t, host, act, func(d control.Desktop) error { return a.control.Message(ctx, d, act.Text) }); refused != nil {
			return "", refused
		}
		return "shown on " + displays(t), nil
	case bus.ActEnd:
		if t.carried && t.uid != "" && len(t.displays) == 0 { // it has only just logged in, or has logged off
			a.ledger.disconnect(ctx, act.SessionID, 0)
			return "there was no desktop; the connection was closed", nil
		}
		if refused := a.onDesktops(ctx, t, host, act, func(d control.Desktop) error { return a.control.LogOff(ctx, d) }); refused != nil {
			return "", refused
		}
		a.ledger.disconnect(ctx, act.SessionID, actGrace) // its client is told by the RDP server
		return "logged off from " + displays(t), nil
	}
	return "", refusal.New(refusal.BadRequest, "Session host %s knows no act %q: its agent is older than the broker.", host, act.Act)
}

// onlyDesktop is of controls that can find the one desktop that somebody is connected to.
type onlyDesktop interface {
	OnlyDesktop(context.Context) (control.Desktop, error)
}

// guess does something to the desktop of the one session that this agent carries, on a host where nobody logs in by a
// connection and so nothing else says which it is.
func (a *Agent) guess(ctx context.Context, only onlyDesktop, t target, host string, act bus.SessionAct, do func(control.Desktop) error) *refusal.Error {
	if n := a.ledger.count(); n != 1 || t.State != bus.SessionActive {
		return refusal.New(refusal.HostRefused, "Host %s can't %s session %s: it carries %d connections, and doesn't know which desktop is whose. It can disconnect the session.", host, act.Act, act.SessionID, n)
	}
	d, err := only.OnlyDesktop(ctx)
	if err == nil {
		err = do(d)
	}
	if err != nil {
		return refusal.New(refusal.HostRefused, "Host %s could not %s session %s: %v.", host, act.Act, act.SessionID, err)
	}
	return nil
}

// onDesktops does something to each desktop of a session. One that has gone meanwhile is no error.
func (a *Agent) onDesktops(ctx context.Context, t target, host string, act bus.SessionAct, do func(control.Desktop) error) *refusal.Error {
	uid, err := strconv.ParseUint(t.uid, 10, 32)
	only, canGuess := a.control.(onlyDesktop)
	switch {
	case t.uid == "" && a.signIn != nil:
		return refusal.New(refusal.HostNotReady, "Session %s has not logged in on host %s yet: it can only be disconnected.", act.SessionID, host)
	case t.uid == "" && t.carried && canGuess:
		return a.guess(ctx, only, t, host, act, do)
	case t.uid == "" || a.control == nil || err != nil:
		return refusal.New(refusal.HostRefused, "Host %s can't %s session %s: it doesn't log people in by their connections (spec.accounts of its HostPool), so its agent doesn't know which desktop is whose. It can disconnect it.", host, act.Act, act.SessionID)
	}
	done := 0
	for _, display := range t.displays {
		switch err := do(control.Desktop{UID: uint32(uid), Display: display}); {
		case errors.Is(err, control.ErrNoDesktop):
		case err != nil:
			return refusal.New(refusal.HostRefused, "Host %s could not %s session %s: %v.", host, act.Act, act.SessionID, err)
		default:
			done++
		}
	}
	if done == 0 && act.Act == bus.ActMessage {
		return refusal.New(refusal.UnknownSession, "Session %s has no desktop on host %s now: list the sessions again.", act.SessionID, host)
	}
	return nil
}

func displays(t target) string {
	if t.uid == "" {
		return "the desktop that is connected"
	}
	var names []string
	for _, d := range t.displays {
		names = append(names, ":"+strconv.Itoa(d))
	}
	return "display " + strings.Join(names, ", ") + " of " + t.Account
}
