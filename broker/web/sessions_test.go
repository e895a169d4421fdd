package web

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// desks are two people's sessions and an unproven one.
type desks struct{ done []string }

func (*desks) Sessions() []brokerapi.Session {
	return []brokerapi.Session{
		{ID: "s1", User: "alice", Pool: "linux", Host: "a", State: "Active", Proven: true},
		{ID: "s2", User: "bob", Pool: "linux", Host: "a", State: "Active", Proven: true},
		{ID: "unknown-1", Pool: "linux", Host: "a", State: "Active"},
		{ID: "unknown-2", User: "alice", Pool: "linux", Host: "a", State: "Active"}, // never listed so, and not shown
	}
}

func (d *desks) Act(_ context.Context, req brokerapi.ActRequest, user string) (string, error) {
	if req.SessionID != "s1" || user != "" && user != "alice" {
		return "", refusal.New(refusal.UnknownSession, "no")
	}
	d.done = append(d.done, fmt.Sprintf("%s %s for %s", req.Act, req.SessionID, req.By))
	return "done", nil
}

// A user sees and acts on own sessions alone, and whoever the request says wants it, it is the token's user.
func TestOwnSessions(t *testing.T) {
	f := setUp(t)
	var own brokerapi.Sessions
	f.get(brokerapi.PathSessions, "alice", &own)
	if len(own.Sessions) != 1 || own.Sessions[0].ID != "s1" {
		t.Errorf("alice's sessions: %+v", own)
	}
	own = brokerapi.Sessions{}
	f.get(brokerapi.PathSessions, "carol", &own)
	if own.Sessions == nil || len(own.Sessions) != 0 {
		t.Errorf("carol's sessions: %+v", own)
	}
	if w := f.do("GET", brokerapi.PathSessions, "", ""); w.Code != http.StatusUnauthorized {
		t.Errorf("without a token: %d", w.Code)
	}
	for _, path := range []string{brokerapi.PathAllSessions} { // the operator's listener has it, this one doesn't
		for _, method := range []string{"GET", "POST"} {
			if w := f.do(method, path, "alice", `{"sessionId":"s1","act":"end","by":"x"}`); w.Code != http.StatusNotFound {
				t.Errorf("%s %s at the feed: %d %s", method, path, w.Code, w.Body)
			}
		}
	}
	if w := f.do("POST", brokerapi.PathSessions, "alice", `{"sessionId":"s1","act":"end","by":"root"}`); w.Code != http.StatusOK || f.desks.done[0] != "end s1 for alice" {
		t.Errorf("%d %s, done: %q", w.Code, w.Body, f.desks.done)
	}
	if w := f.do("POST", brokerapi.PathSessions, "bob", `{"sessionId":"s1","act":"end"}`); w.Code != http.StatusNotFound {
		t.Errorf("bob ends alice's session: %d %s", w.Code, w.Body)
	}
	if len(f.desks.done) != 1 {
		t.Errorf("done: %q", f.desks.done)
	}
}

// The operator's listener shows all, and asks on whose behalf.
func TestAllSessions(t *testing.T) {
	d := &desks{}
	h := SessionsHandler(Options{Sessions: d})
	do := func(method, path, body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		return w
	}
	var all brokerapi.Sessions
	if err := json.Unmarshal(do("GET", brokerapi.PathAllSessions, "").Body.Bytes(), &all); err != nil || len(all.Sessions) != 4 {
		t.Errorf("%+v, %v", all, err)
	}
	for body, want := range map[string]int{
		`{"sessionId":"s1","act":"end","by":"admin"}`: 200, `{"sessionId":"s1","act":"end"}`: 400, `{"sessionId":"s3","act":"end","by":"admin"}`: 404, `{`: 400,
	} {
		if w := do("POST", brokerapi.PathAllSessions, body); w.Code != want {
			t.Errorf("%s: %d %s, want %d", body, w.Code, w.Body, want)
		}
	}
	if len(d.done) != 1 || d.done[0] != "end s1 for admin" {
		t.Errorf("done: %q", d.done)
	}
	if w := do("GET", brokerapi.PathResources, ""); w.Code != http.StatusNotFound {
		t.Errorf("the feed is on the operator's listener: %d", w.Code)
	}
}
