package client

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// A user lists the own sessions and ends one; what hosts say is printed without control characters, and a refusal is told.
func TestSessions(t *testing.T) {
	w := newWorld(t)
	all := []brokerapi.Session{{
		ID: "s1", Resource: "linux-desktop", Host: "linux-0\x1b[31m", Account: "alice\u202e", State: "Active", Since: time.Now(), Client: "192.0.2.1:5", Proven: true,
		ActivityID: "a\u009b31m\u2028",
	}}
	broker := w.broker.Config.Handler
	w.broker.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path != brokerapi.PathSessions {
			broker.ServeHTTP(rw, r)
			return
		}
		if !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer ey") {
			t.Errorf("%s %s without a token", r.Method, r.URL)
		}
		if r.Method == http.MethodGet {
			w.mu.Lock()
			defer w.mu.Unlock()
			answer(rw, 200, brokerapi.Sessions{Sessions: all})
			return
		}
		var req brokerapi.ActRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			t.Error(err)
		}
		if req.SessionID != "s1" {
			answer(rw, 404, brokerapi.ErrorBody{Error: refusal.New(refusal.UnknownSession, "There is no session %s.", req.SessionID)})
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		all = nil
		answer(rw, 200, brokerapi.ActResponse{Detail: req.Act + " is done"})
	})
	c, out, errs := w.login()
	if err := c.Sessions(t.Context(), false, false); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "s1 ") || !strings.Contains(s, "192.0.2.1:5") || strings.ContainsAny(s, "\x1b\u009b\u202e\u2028") {
		t.Errorf("listed:\n%q", s)
	}
	ctx, stop := context.WithCancel(t.Context())
	watched := make(chan error, 1)
	go func() { watched <- c.Sessions(ctx, false, true) }()
	if err := c.Act(t.Context(), bus.ActEnd, "s2"); err == nil || !strings.Contains(err.Error(), "There is no session s2") {
		t.Errorf("another session: %v", err)
	}
	time.Sleep(200 * time.Millisecond) // the watch has begun
	if err := c.Act(t.Context(), bus.ActEnd, "s1"); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "session s1: end is done") {
		t.Errorf("said:\n%s", out)
	}
	for end := time.Now().Add(10 * time.Second); !strings.Contains(errs.String(), "You have no session"); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the watch didn't see the end:\n%s\n%s", out, errs)
		}
	}
	stop()
	if err := <-watched; err != nil {
		t.Errorf("the watch ended with %v", err)
	}
}
