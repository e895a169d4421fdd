package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/agent/control"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// fakeControl notes what is done to which desktop.
type fakeControl struct {
	mu   sync.Mutex
	done []string
	fail error
	then func()
}

func (f *fakeControl) note(what string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	f.done = append(f.done, what)
	if f.then != nil {
		f.then()
	}
	return nil
}

func (f *fakeControl) LogOff(_ context.Context, d control.Desktop) error {
	return f.note("log off " + d.String())
}

func (f *fakeControl) Message(_ context.Context, d control.Desktop, text string) error {
	return f.note("tell " + d.String() + ": " + text)
}

func (f *fakeControl) all() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.done)
}

// act asks as a broker does.
func (w *world) act(a bus.SessionAct) bus.SessionActReply {
	w.t.Helper()
	data, err := json.Marshal(a)
	must(w.t, err)
	m, err := w.conn.Request(bus.HostSessionSubject(pool, host), data, 10*time.Second)
	must(w.t, err)
	var reply bus.SessionActReply
	must(w.t, json.Unmarshal(m.Data, &reply))
	return reply
}

// A session is told to, disconnected and logged off by its id; a desktop that its user left by the proof that goes with it.
func TestActsOnSessions(t *testing.T) {
	if os.Geteuid() != 0 || runtime.GOOS != "linux" {
		t.Skip("only root is answered on the login socket")
	}
	w := newWorld(t)
	o := w.options()
	fake := &fakeControl{}
	o.LoginDir, o.LoginShared, o.control = filepath.Join(filepath.Dir(o.StateDir), "login"), true, fake
	w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 3}) // two desktops are there before alice comes
	d := desktop{uid: "10001", display: 10}
	w.setDesktops(map[desktop]bool{d: true, {uid: "10002", display: 11}: true})
	req := w.request("s1")
	req.Account, req.Proof = &bus.Account{Name: "alice", Create: true, UID: 10001}, "proof of alice"
	if refused := w.connect(req); refused != nil {
		t.Fatal(refused)
	}
	j := <-w.gateway.joins
	from := <-w.rdp.from

	early := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActEnd})
	if early.Err == nil || early.Err.Code != refusal.HostNotReady {
		t.Errorf("log off before the login: %+v", early)
	}
	if answer, ok := w.pam(o, "alice", from, 10001); !ok {
		t.Fatalf("alice did not log in: %s", answer)
	}
	for name, c := range map[string]struct {
		act  bus.SessionAct
		code refusal.Code
	}{
		"no such session": {bus.SessionAct{SessionID: "s2", Act: bus.ActEnd}, refusal.UnknownSession},
		"another's proof": {bus.SessionAct{SessionID: "s2", Proof: "proof of bob", Act: bus.ActEnd}, refusal.UnknownSession},
		"nothing at all":  {bus.SessionAct{Act: bus.ActEnd}, refusal.UnknownSession},
		"unknown act":     {bus.SessionAct{SessionID: "s1", Act: "explode"}, refusal.BadRequest},
		"no text":         {bus.SessionAct{SessionID: "s1", Act: bus.ActMessage}, refusal.BadRequest},
		"escape sequence": {bus.SessionAct{SessionID: "s1", Act: bus.ActMessage, Text: "a\x1b[31m"}, refusal.BadRequest},
		"too long":        {bus.SessionAct{SessionID: "s1", Act: bus.ActMessage, Text: strings.Repeat("x", bus.MaxMessageText+1)}, refusal.BadRequest},
	} {
		if reply := w.act(c.act); reply.Err == nil || reply.Err.Code != c.code {
			t.Errorf("%s: %+v, want %s", name, reply, c.code)
		}
	}
	if done := fake.all(); len(done) > 0 {
		t.Fatalf("refused, and done all the same: %q", done)
	}

	var reply bus.SessionActReply
	w.eventually("alice's desktop seen", func() bool { // by the agent, a moment after her login
		reply = w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActMessage, Text: "<b>Hello</b>\nalice"})
		return reply.Err == nil || reply.Err.Code != refusal.UnknownSession
	})
	if want := []string{"tell display :10 of user id 10001: <b>Hello</b>\nalice"}; reply.Err != nil || !slices.Equal(fake.all(), want) {
		t.Errorf("message: %+v, %q", reply, fake.all())
	}
	fake.fail = errors.New("no display")
	if reply := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActMessage, Text: "x"}); reply.Err == nil || !strings.Contains(reply.Err.Message, "no display") {
		t.Errorf("a message that fails: %+v", reply)
	}
	fake.fail = nil

	if reply := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActDisconnect}); reply.Err != nil {
		t.Fatal(reply.Err)
	}
	w.setDesktops(map[desktop]bool{d: false})
	j.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.Copy(io.Discard, j); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the gateway's leg is open after the disconnect")
	}
	w.eventually("desktop without a client", func() bool {
		s := w.last().Sessions
		return len(s) == 1 && s[0].State == bus.SessionDisconnected && s[0].Proof == "proof of alice"
	})
	fake.then = func() { w.setDesktops(nil) }
	if reply := w.act(bus.SessionAct{SessionID: "s1", Proof: "proof of alice", Act: bus.ActEnd}); reply.Err != nil {
		t.Fatal(reply.Err)
	}
	if done := fake.all(); done[len(done)-1] != "log off display :10 of user id 10001" {
		t.Errorf("done: %q", done)
	}
	w.eventually("no session after the log-off", func() bool { return len(w.last().Sessions) == 0 })
}

// guesser is a control of a machine that tells which one desktop somebody is connected to, as Windows does.
type guesser struct {
	fakeControl
	only control.Desktop
	err  error
}

func (g *guesser) OnlyDesktop(context.Context) (control.Desktop, error) { return g.only, g.err }

// Where nothing says whose desktop is whose, it is acted on only while there is one session and one desktop.
func TestActsOnTheOnlySession(t *testing.T) {
	w := newWorld(t)
	o := w.options()
	g := &guesser{only: control.Desktop{Display: 3}}
	o.control = g
	w.run(o)
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 2})
	join := func(req bus.HostConnect) {
		t.Helper()
		if refused := w.connect(req); refused != nil {
			t.Fatal(refused)
		}
		j := <-w.gateway.joins
		t.Cleanup(func() { j.Close() }) // kept, or the collector would close it
		w.eventually("session", func() bool {
			return slices.ContainsFunc(w.last().Sessions, func(s bus.HostSession) bool { return s.SessionID == req.SessionID && s.State == bus.SessionActive })
		})
	}
	join(w.request("s1"))
	if reply := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActMessage, Text: "hello"}); reply.Err != nil {
		t.Error(reply.Err)
	}
	g.err = errors.New("two desktops")
	if reply := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActEnd}); reply.Err == nil || !strings.Contains(reply.Err.Message, "two desktops") {
		t.Errorf("with two desktops: %+v", reply)
	}
	g.err = nil
	join(w.other("s2"))
	if reply := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActEnd}); reply.Err == nil || !strings.Contains(reply.Err.Message, "carries 2 connections") {
		t.Errorf("with two connections: %+v", reply)
	}
	if done := g.all(); len(done) != 1 || done[0] != "tell display :3 of user id 0: hello" {
		t.Errorf("done: %q", done)
	}
}

// Where people don't log in by their connections, a session can be disconnected, and what can't be done is said.
func TestActsWithoutLogin(t *testing.T) {
	w := newWorld(t)
	w.run(w.options())
	w.ready(bus.HostConfig{Generation: 1, MaxSessions: 1})
	if refused := w.connect(w.request("s1")); refused != nil {
		t.Fatal(refused)
	}
	j := <-w.gateway.joins
	w.eventually("session", func() bool { s := w.last().Sessions; return len(s) == 1 && s[0].State == bus.SessionActive })
	if reply := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActEnd}); reply.Err == nil || !strings.Contains(reply.Err.Message, "spec.accounts") {
		t.Errorf("log off: %+v", reply)
	}
	if reply := w.act(bus.SessionAct{SessionID: "s1", Act: bus.ActDisconnect}); reply.Err != nil {
		t.Error(reply.Err)
	}
	j.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.Copy(io.Discard, j); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the gateway's leg is open after the disconnect")
	}
}
