package web

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Whatever is asked of the feed, each refusal is named, belongs to an activity and is nobody's fault but the request's; and
// only who has a grant gets a file.
func FuzzRequest(f *testing.F) {
	file := brokerapi.PathResources + "/desk.rdp"
	for _, seed := range []struct{ method, target, token, activity, body string }{
		{"GET", file + "?gateway=a&activity=" + activity, "alice", "", ""},
		{"GET", file + "?gateway=a&gateway=b&form=arm", "bob", activity, ""},
		{"GET", brokerapi.PathResources + "/own.png", "bob", "", ""},
		{"GET", brokerapi.PathWorkspace, "", "x", ""},
		{"GET", brokerapi.PathWebFeed, "alice", "", ""},
		{"GET", brokerapi.PathWhoAmI, "carol", "", ""},
		{"POST", brokerapi.PathActivities + activity, "alice", "", `[{"step":1,"component":"rdv","detail":"x"},{"step":99}]`},
		{"GET", brokerapi.PathActivities, "alice", "", ""},
		{"POST", brokerapi.PathSessions, "alice", "", `{"act":"end","session":"s1","by":"root"}`},
		{"POST", brokerapi.PathEnroll, "", "", `{"token":"rdvreg.ns.linux.-.x","host":"h","clientCSR":"x"}`},
		{"GET", brokerapi.PathEnroll, "rdvreg.ns.linux.-.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "", ""},
		{"GET", "/x" + brokerapi.PathDiscovery, "", "", ""},
		{"PROPFIND", "/%2e%2e/%00", "alice", "", ""},
	} {
		f.Add(seed.method, seed.target, seed.token, seed.activity, seed.body)
	}
	fix := setUp(f)
	f.Fuzz(func(t *testing.T, method, target, token, activity, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || target == "*" || len(target)+len(body) > 64<<10 || token == "panic" {
			return // Go's own server answers *
		}
		fix.log.Reset()
		r := httptest.NewRequest(http.MethodGet, "/", strings.NewReader(body))
		r.Method, r.URL, r.RequestURI = method, u, target
		r.Header["Authorization"] = []string{"Bearer " + token}
		r.Header[brokerapi.HeaderActivity] = []string{activity}
		w := httptest.NewRecorder()
		fix.handler.ServeHTTP(w, r)
		switch {
		case w.Code == http.StatusInternalServerError && !strings.Contains(w.Body.String(), string(refusal.Internal)):
			t.Fatalf("%s %s: %d %s", method, target, w.Code, w.Body)
		case w.Code >= 300 && w.Code < 400: // the path was not in its plain form
			if where, err := url.Parse(w.Header().Get("Location")); err != nil || where.Host != "" {
				t.Fatalf("sent to %q", w.Header().Get("Location"))
			}
		case w.Code >= 400:
			var e brokerapi.ErrorBody
			if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Error == nil || e.Error.Code == "" || e.Error.Message == "" || !strings.Contains(e.Error.ActivityID, "-") {
				t.Fatalf("%s %s: %d %s", method, target, w.Code, w.Body)
			}
		}
		if strings.HasPrefix(w.Header().Get("Content-Type"), "application/x-rdp") && !(token == "alice" && strings.Contains(u.Path, "desk") || (token == "bob" || token == "dave") && strings.Contains(u.Path, "own")) {
			t.Fatalf("%q got %s", token, target)
		}
		for name, values := range w.Header() {
			for _, v := range values {
				if strings.ContainsAny(name+v, "\r\n\x00") {
					t.Fatalf("header %q: %q", name, v)
				}
			}
		}
		if len(token) > 20 && strings.Contains(fix.log.String(), token) {
			t.Fatal("the token is in the log")
		}
	})
}
