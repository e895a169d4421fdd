package sessionsapi_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"rendezvous.dev/rendezvous/sessionsapi"
)

// Whatever is asked of the sessions API, an answer is a Status or what was asked for, and nothing is done for whom RBAC
// doesn't let.
func FuzzRequest(f *testing.F) {
	for _, seed := range [][3]string{
		{"GET", base + "?fieldSelector=user%3Dalice&labelSelector=a%20in%20(b)", ""}, {"GET", base + "/s1", ""}, {"DELETE", base + "/s1?dryRun=All", `{"preconditions":{"uid":"x"}}`},
		{"POST", base + "/s1/message", `{"text":"hello"}`}, {"POST", base + "/s1/disconnect?dryRun=x", ""}, {"GET", "/apis/live.rendezvous.dev/v1alpha1/sessions?limit=1&resourceVersion=x", ""},
		{"DELETE", base + "/../../x/sessions/s1", `{"dryRun":["None"]}`}, {"PATCH", base + "/s1", "{}"},
	} {
		f.Add(seed[0], seed[1], "application/json;as=Table;g=meta.k8s.io;v=v1", seed[2])
	}
	f.Fuzz(func(t *testing.T, method, target, accept, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || len(body) > 128<<10 {
			return
		}
		if q := u.Query(); q.Has("watch") {
			return // it goes on
		}
		for _, user := range []string{"eddie", "bob", ""} {
			d := &desks{sessions: []sessionsapi.Found{found("team", "s1", "alice", "linux", "h")}}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			r := httptest.NewRequest(http.MethodGet, "/", strings.NewReader(body)).WithContext(ctx)
			r.Method, r.URL, r.RequestURI = method, u, target
			r.Header["Accept"] = []string{accept}
			r.Header.Set("X-Remote-User", user)
			w := httptest.NewRecorder()
			open(d).ServeHTTP(w, r)
			cancel()
			if w.Code >= 500 {
				t.Fatalf("%s %s: %d %s", method, target, w.Code, w.Body)
			}
			var status metav1.Status
			if w.Code >= 400 && (json.Unmarshal(w.Body.Bytes(), &status) != nil || status.Kind != "Status" || status.Message == "" || int(status.Code) != w.Code) {
				t.Fatalf("%s %s: %d %s", method, target, w.Code, w.Body)
			}
			if user != "eddie" && len(d.done) > 0 {
				t.Fatalf("%s %s did %v for %q", method, target, d.done, user)
			}
			if strings.Contains(u.RawQuery, "dryRun=All") && len(d.done) > 0 {
				t.Fatalf("%s %s did %v", method, target, d.done)
			}
		}
	})
}
