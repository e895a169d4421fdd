package sessionsapi_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/sessionsapi"
	"rendezvous.dev/rendezvous/wire/brokerapi"
)

const base = "/apis/live.rendezvous.dev/v1alpha1/namespaces/team/sessions"

// open is the API with everybody let in, but for bob, who may do nothing, and nobody, who is unknown.
func open(d sessionsapi.Brokers) http.Handler {
	return sessionsapi.Handler(sessionsapi.Options{
		Brokers: d,
		Authenticate: func(r *http.Request) (sessionsapi.User, error) {
			if r.Header.Get("X-Remote-User") == "" {
				return sessionsapi.User{}, sessionsapi.ErrUnauthenticated
			}
			return sessionsapi.User{Name: r.Header.Get("X-Remote-User")}, nil
		},
		Allowed: func(_ context.Context, u sessionsapi.User, _ sessionsapi.Attributes) (bool, string, error) {
			return u.Name != "bob", "", nil
		},
	})
}

// A watch outlasts the server's bound on answers, over either protocol.
func TestWatchLasts(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		d := &desks{sessions: []sessionsapi.Found{found("team", "s1", "alice", "linux", "h")}}
		s := httptest.NewUnstartedServer(open(d))
		s.EnableHTTP2 = http2
		s.Config.WriteTimeout, s.Config.ReadTimeout = time.Second, time.Second
		s.StartTLS()
		req, _ := http.NewRequestWithContext(t.Context(), "GET", s.URL+base+"?watch=true&timeoutSeconds=30", nil)
		req.Header.Set("X-Remote-User", "eddie")
		res, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(res.Body)
		next := func() string {
			t.Helper()
			if !lines.Scan() {
				t.Fatalf("HTTP/%d: the watch ended: %v", res.ProtoMajor, lines.Err())
			}
			var e struct {
				Type   string
				Object sessionsapi.Session
			}
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				t.Fatal(err)
			}
			return e.Type + " " + e.Object.Name + " " + e.Object.Status.State
		}
		if got := next(); got != "ADDED s1 Active" {
			t.Errorf("HTTP/%d: %s", res.ProtoMajor, got)
		}
		time.Sleep(2500 * time.Millisecond)
		d.set(func() { d.sessions[0].State = "Disconnected" })
		if got := next(); got != "MODIFIED s1 Disconnected" {
			t.Errorf("HTTP/%d: %s", res.ProtoMajor, got)
		}
		d.set(func() { d.missing, d.sessions = []string{"a broker is away"}, nil })
		time.Sleep(1500 * time.Millisecond) // what can't be had has not ended
		d.set(func() { d.missing = nil })
		if got := next(); got != "DELETED s1 Disconnected" {
			t.Errorf("HTTP/%d: %s", res.ProtoMajor, got)
		}
		res.Body.Close()
		s.Close()
	}
}

// What the API answers to whom, and that nothing refused is done.
func TestRequests(t *testing.T) {
	d := &desks{sessions: []sessionsapi.Found{found("team", "s1", "alice", "linux", "h"), {Namespace: "team", Workspace: "office", Session: brokerapi.Session{ID: "unknown-1", Pool: "linux", Host: "h", State: "Active"}}}}
	h := open(d)
	for _, c := range []struct {
		user, method, path, body string
		code                     int
		says                     string
	}{
		{"", "GET", base, "", 401, "through the Kubernetes API server alone"},
		{"bob", "GET", base, "", 403, `User \"bob\" cannot list resource \"sessions\"`},
		{"bob", "GET", base + "?watch=1", "", 403, "cannot watch"},
		{"bob", "DELETE", base + "/s1", "", 403, "cannot delete"},
		{"bob", "POST", base + "/s1/message", `{"text":"x"}`, 403, "cannot create resource \\\"sessions/message\\\""},
		{"bob", "GET", "/apis/live.rendezvous.dev/v1alpha1", "", 200, `"sessions/disconnect"`},
		{"eddie", "GET", "/apis", "", 200, "APIGroupList"},
		{"eddie", "GET", "/apis/live.rendezvous.dev", "", 200, "APIGroup"},
		{"eddie", "GET", "/apis/other/v1/sessions", "", 404, "NotFound"},
		{"eddie", "GET", "/apis/live.rendezvous.dev/v1alpha1/sessions/s1", "", 404, "NotFound"},
		{"eddie", "GET", base, "", 200, `"user":"alice"`},
		{"eddie", "GET", base + "/s2", "", 404, `\"s2\" not found`},
		{"eddie", "GET", base + "?fieldSelector=colour%3Dred", "", 400, "is not a field of sessions"},
		{"eddie", "GET", base + "?labelSelector=%3D%3D", "", 400, "labelSelector"},
		{"eddie", "GET", base + "?watch=1&sendInitialEvents=true", "", 422, "sendInitialEvents"},
		{"eddie", "PUT", base + "/s1", "{}", 405, "sessions are listed"},
		{"eddie", "POST", base, "{}", 405, "sessions are listed"},
		{"eddie", "DELETE", base, "", 405, "sessions are listed"},
		{"eddie", "POST", base + "/s1/explode", "{}", 405, "sessions are listed"},
		{"eddie", "POST", base + "/s1/message", `{}`, 400, "the message has no text"},
		{"eddie", "POST", base + "/s1/message", `{"text":"\u001b[2J"}`, 400, "control character"},
		{"eddie", "POST", base + "/s1/message", `text`, 415, "not the JSON"},
		{"eddie", "POST", base + "/s1/message", fmt.Sprintf(`{"text":%q}`, strings.Repeat("x", 70000)), 400, "body"},
		{"eddie", "POST", base + "/s1/message", `{"text":"fail"}`, 409, "no display"},
		{"eddie", "DELETE", base + "/s1?dryRun=All", "", 200, "Success"},
		{"eddie", "DELETE", base + "/s1", `{"dryRun":["All"]}`, 200, "Success"},
		{"eddie", "DELETE", base + "/s1", `{"preconditions":{"uid":"another"}}`, 409, "has UID"},
		{"eddie", "DELETE", base + "/s2", "", 404, "not found"},
	} {
		r := httptest.NewRequest(c.method, c.path, strings.NewReader(c.body))
		if c.user != "" {
			r.Header.Set("X-Remote-User", c.user)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.says) {
			t.Errorf("%s %s %s as %q: %d %s\nwant %d, %q", c.method, c.path, c.body, c.user, w.Code, w.Body, c.code, c.says)
		}
	}
	if done := d.acts(); len(done) > 0 {
		t.Errorf("done: %q", done)
	}
}
