package web

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/prometheus/client_golang/prometheus"

	"rendezvous.dev/rendezvous/broker/enrol"
	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/metrics"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/oidc"
	"rendezvous.dev/rendezvous/broker/traces"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	ns, ws   = "ns", "ws"
	activity = "00000000-0000-4000-8000-000000000001"
)

var now = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// people are the users whose token is their name.
type people map[string][]string

func (p people) Validate(_ context.Context, token string) (oidc.User, error) {
	switch groups, ok := p[token]; {
	case ok:
		u := oidc.User{Name: token, Groups: groups, SignedIn: now.Add(-time.Minute)}
		if token == "carol" || token == "dave" {
			u.GroupsProblem = oidc.GroupsAbsent
		}
		return u, nil
	case token == "":
		return oidc.User{}, refusal.New(refusal.TokenMissing, "sign in")
	case token == "panic":
		panic("boom")
	}
	return oidc.User{}, refusal.New(refusal.TokenExpired, "sign in again")
}

func (people) CA() string { return "CA" }

func (p people) Discovery() []byte {
	if _, away := p["away"]; away {
		return nil
	}
	return []byte(`{"issuer":"https://idp","token_endpoint":"https://idp/token"}`)
}

// lapsed are groups that users have lost since they signed in.
type lapsed map[string]string

func (l lapsed) SignedIn(user string, _ time.Time, groups []string, _ bool) []string {
	return slices.DeleteFunc(slices.Clone(groups), func(g string) bool { return g == l[user] })
}

type fixture struct {
	t       testing.TB
	lapsed  lapsed
	handler http.Handler
	world   *fake.World
	traces  *traces.Store
	key     ed25519.PrivateKey
	load    map[string]int32
	token   string
	people  people
	desks   desks
	log     bytes.Buffer
	metrics *prometheus.Registry
}

func setUp(t testing.TB) *fixture {
	f := &fixture{t: t, metrics: prometheus.NewRegistry(), lapsed: lapsed{}, traces: traces.New(), load: map[string]int32{"a": 5, "b": 2, "c": 0}, people: people{"alice": {"engineers", "x"}, "bob": nil, "carol": nil, "dave": nil}}
	f.token = "rdvreg.ns.linux.-." + base64.RawURLEncoding.EncodeToString(make([]byte, 32))
	hash := sha256.Sum256([]byte(f.token))
	f.world = fake.New(&model.Snapshot{
		Workspace: &model.Workspace{
			Name: ws, DisplayName: "Demo", TicketLifetime: time.Hour,
			OIDC: model.OIDC{IssuerURL: "https://idp", ClientID: "rdv", Scopes: []string{"openid"}},
			Resources: []model.Resource{
				{Name: "desk", DisplayName: "Desk", Type: model.Desktop, Pool: "linux", Groups: []string{"engineers"}, Icon: []byte("png")},
				{Name: "own", DisplayName: "Own", Type: model.Desktop, Pool: "linux", Users: []string{"bob", "dave"}},
				{Name: "broken", DisplayName: "Broken", Type: model.Desktop, Pool: "none", Users: []string{"bob"}},
			},
		},
		Pools: map[string]*model.Pool{"linux": {
			Name: "linux", Properties: []string{"use multimon:i:1"},
			Registration: model.Registration{TokenHash: hex.EncodeToString(hash[:]), Expires: now.Add(time.Hour)},
		}},
		Gateways: []*model.Gateway{
			{Name: "a", Hostname: "a.test", Port: 443, Ready: true, Region: "eu"}, {Name: "b", Hostname: "b.test", Port: 8443, Ready: true}, {Name: "c", Hostname: "c.test", Port: 443},
		},
	})
	var err error
	if _, f.key, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Demo"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, rsaKey.Public(), rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	signer := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: rsaKey}
	clock := func() time.Time { return now }
	f.handler = Handler(Options{
		Namespace: ns, Workspace: ws, Name: "b0", Source: f.world, Identity: f.people,
		Enrol:  enrol.New(enrol.Options{Namespace: ns, Workspace: ws, Source: f.world, Writer: f.world, Now: clock}),
		Traces: f.traces, Trace: func(e trace.Event) { f.traces.Hear("rdv.trace.broker", e) },
		Gateways:  loads{f},
		Sessions:  &f.desks,
		Access:    f.lapsed,
		TicketKey: func() (ed25519.PrivateKey, error) { return f.key, nil },
		Signer:    func() *tls.Certificate { return signer }, Now: clock, Log: slog.New(slog.NewTextHandler(&f.log, nil)), Metrics: metrics.New(f.metrics),
	})
	return f
}

// loads chooses by the fixture's load, and counts those on their way in it.
type loads struct{ f *fixture }

func (l loads) Connections() map[string]int32 { return l.f.load }
func (l loads) Expect(gateway, _ string)      { l.f.load[gateway]++ }
func (l loads) Choose(gateways []*model.Gateway, ticket string) (best *model.Gateway, weighed string) {
	for _, g := range gateways {
		if g.Ready && (best == nil || l.f.load[g.Name] < l.f.load[best.Name]) {
			best = g
		}
	}
	if best != nil {
		l.Expect(best.Name, ticket)
	}
	return best, "WEIGHED"
}

func (f *fixture) do(method, path, token, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	f.handler.ServeHTTP(w, r)
	return w
}

func (f *fixture) get(path, token string, v any) {
	f.t.Helper()
	w := f.do("GET", path, token, "")
	if w.Code != http.StatusOK {
		f.t.Fatalf("GET %s: %d %s", path, w.Code, w.Body)
	}
	if err := json.Unmarshal(w.Body.Bytes(), v); err != nil {
		f.t.Fatal(err)
	}
}

func TestLists(t *testing.T) {
	f := setUp(t)
	var w brokerapi.Workspace
	f.get(brokerapi.PathWorkspace, "", &w)
	if w.Name != ws || w.DisplayName != "Demo" || w.IssuerURL != "https://idp" || w.ClientID != "rdv" || w.IssuerCA != "CA" {
		t.Errorf("%+v", w)
	}
	for user, want := range map[string]string{"alice": "desk", "bob": "own broken", "carol": ""} {
		var r brokerapi.Resources
		f.get(brokerapi.PathResources, user, &r)
		var names []string
		for _, res := range r.Resources {
			names = append(names, res.Name)
		}
		if got := strings.Join(names, " "); got != want || r.User != user {
			t.Errorf("%s: got %q for %q, want %q", user, got, r.User, want)
		}
		if len(r.Gateways) != 2 || r.Gateways[0].Name != "a" || r.Gateways[0].Connections != 5 || r.Gateways[0].PingPath != pingPath {
			t.Errorf("gateways %+v", r.Gateways)
		}
	}
	xml := f.do("GET", brokerapi.PathWebFeed, "alice", "")
	if xml.Code != 200 || !strings.HasPrefix(xml.Header().Get("Content-Type"), "text/xml") || !strings.Contains(xml.Body.String(), `Alias="desk"`) || strings.Contains(xml.Body.String(), `Alias="own"`) {
		t.Errorf("%v %s", xml.Header(), xml.Body)
	}
	if icon := f.do("GET", brokerapi.PathResources+"/desk.png", "alice", ""); icon.Body.String() != "png" || icon.Header().Get("Content-Type") != "image/png" {
		t.Errorf("icon: %d %s", icon.Code, icon.Body)
	}
}

// lines reads a UTF-16 file.
func lines(t *testing.T, file []byte) map[string]string {
	t.Helper()
	if !bytes.HasPrefix(file, []byte{0xff, 0xfe}) {
		t.Fatalf("no .rdp file: %q", file)
	}
	var units []uint16
	for b := file[2:]; len(b) > 1; b = b[2:] {
		units = append(units, uint16(b[0])|uint16(b[1])<<8)
	}
	m := map[string]string{}
	for _, l := range strings.Split(string(utf16.Decode(units)), "\r\n") {
		if p := strings.SplitN(l, ":", 3); len(p) == 3 {
			m[p[0]] = p[2]
		}
	}
	return m
}

func TestConnectionFile(t *testing.T) {
	f := setUp(t)
	w := f.do("GET", brokerapi.PathResources+"/desk.rdp?gateway=a&activity="+activity, "alice", "")
	if w.Code != 200 || w.Header().Get("Content-Type") != "application/x-rdp" || w.Header().Get("Content-Disposition") != "attachment; filename=desk.rdp" || w.Header().Get(brokerapi.HeaderActivity) != activity {
		t.Fatalf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	l := lines(t, w.Body.Bytes())
	if l["gatewayhostname"] != "a.test:443" || l["full address"] != brokerapi.PoolName(ns, "linux") || l["use multimon"] != "1" || l["signature"] == "" {
		t.Errorf("%v", l)
	}
	c, err := ticket.Verify(l["gatewayaccesstoken"], f.key.Public().(ed25519.PublicKey), ns, ws, now)
	if err != nil {
		t.Fatal(err)
	}
	if c.User != "alice" || c.Resource != "desk" || c.Target != brokerapi.PoolName(ns, "linux") || c.ActivityID != activity || strings.Join(c.Groups, " ") != "engineers" ||
		!c.Expires.Equal(now.Add(time.Hour)) || c.RedirectFlags != 0x1f {
		t.Errorf("%+v", c)
	}
	var events []trace.Event
	f.get(brokerapi.PathActivities+activity, "alice", &events)
	if len(events) != 2 || events[0].Step != trace.StepValidate || events[1].Step != trace.StepFeed {
		t.Errorf("%+v", events)
	}

	if f.load["a"] != 6 {
		t.Errorf("the client is not counted on its way to gateway a: %v", f.load)
	}
	f.do("GET", brokerapi.PathResources+"/desk.rdp?activity=00000000-0000-4000-8000-000000000002", "alice", "")
	f.get(brokerapi.PathActivities+"00000000-0000-4000-8000-000000000002", "alice", &events)
	if d := events[len(events)-1].Detail; d != "desk.rdp for alice through gateway b, the emptiest (WEIGHED)" {
		t.Errorf("the trace says %q", d)
	}

	f.load["a"], f.load["b"] = 1, 2
	f.do("GET", brokerapi.PathResources+"/desk.rdp?gateway=b&gateway=a&gateway=gone&activity=00000000-0000-4000-8000-000000000003", "alice", "")
	f.get(brokerapi.PathActivities+"00000000-0000-4000-8000-000000000003", "alice", &events)
	if d := events[len(events)-1].Detail; d != "desk.rdp for alice through gateway a, the emptiest of those that are nearest (WEIGHED)" {
		t.Errorf("the trace says %q", d)
	}
	f.load["a"], f.load["b"] = 6, 3

	if l["resourceprovider"] != "" {
		t.Error("a file is for the ARM form though nobody asked for it")
	}
	l = lines(t, f.do("GET", brokerapi.PathResources+"/desk.rdp?gateway=a&form=arm", "alice", "").Body.Bytes())
	if l["resourceprovider"] != "arm" || l["gatewayhostname"] != "a.test:443" || l["loadbalanceinfo"] == "" || l["remoteapplicationprogram"] == "" || l["signature"] == "" {
		t.Errorf("the ARM form: %v", l)
	}
	f.load["a"], f.load["b"] = 6, 3

	// Without a wish, the ready gateway with the fewest connections; without an activity, none in the ticket.
	l = lines(t, f.do("GET", brokerapi.PathResources+"/own.rdp", "bob", "").Body.Bytes())
	if l["gatewayhostname"] != "b.test:8443" {
		t.Errorf("gateway %s, want b, which has fewer connections", l["gatewayhostname"])
	}
	if c, err := ticket.Verify(l["gatewayaccesstoken"], f.key.Public().(ed25519.PublicKey), ns, ws, now); err != nil || c.ActivityID != "" {
		t.Errorf("%+v %v", c, err)
	}
}

// Who is disabled gets nothing; whose sign-in was taken back signs in again; who has left a group has nothing of it.
func TestTakenBack(t *testing.T) {
	revoke := func(r ...model.Revocation) func(*fixture) {
		return func(f *fixture) {
			f.world.Edit(func(s *model.Snapshot) { w := *s.Workspace; w.Revocations = r; s.Workspace = &w })
		}
	}
	rdp := brokerapi.PathResources + "/desk.rdp"
	for _, c := range []struct {
		name   string
		before func(*fixture)
		path   string
		status int
		code   refusal.Code
		says   string
	}{
		{"nothing", func(*fixture) {}, rdp, 200, "", ""},
		{"disabled: feed", revoke(model.Revocation{User: "alice", Reason: "left"}), brokerapi.PathResources, 403, refusal.Revoked, "alice is disabled in workspace ws (left)"},
		{"disabled: web feed", revoke(model.Revocation{User: "alice"}), brokerapi.PathWebFeed, 403, refusal.Revoked, "alice is disabled in workspace ws:"},
		{"disabled: download", revoke(model.Revocation{User: "Alice"}), rdp, 403, refusal.Revoked, ""},
		{"disabled: icon", revoke(model.Revocation{User: "alice"}), brokerapi.PathResources + "/desk.png", 403, refusal.Revoked, ""},
		{"disabled: timeline", revoke(model.Revocation{User: "alice"}), brokerapi.PathActivities + activity, 403, refusal.Revoked, ""},
		{"somebody else is disabled", revoke(model.Revocation{User: "bob"}), rdp, 200, "", ""},
		{"a ticket is taken back", revoke(model.Revocation{Ticket: "AAAAAAAAAAAAAAAAAAAAAAAAAA"}), rdp, 200, "", ""},
		{"signed in before", revoke(model.Revocation{User: "alice", Before: now}), rdp, 401, refusal.TokenExpired, "sign in again"},
		{"signed in since", revoke(model.Revocation{User: "alice", Before: now.Add(-time.Hour)}), rdp, 200, "", ""},
		{"left the group: download", func(f *fixture) { f.lapsed["alice"] = "engineers" }, rdp, 403, refusal.NotGranted, ""},
		{"left another group", func(f *fixture) { f.lapsed["alice"] = "x" }, rdp, 200, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := setUp(t)
			c.before(f)
			w := f.do("GET", c.path, "alice", "")
			var e brokerapi.ErrorBody
			json.Unmarshal(w.Body.Bytes(), &e)
			if w.Code != c.status || c.code != "" && (e.Error == nil || e.Error.Code != c.code || !strings.Contains(e.Error.Message, c.says)) {
				t.Errorf("%d %s", w.Code, w.Body)
			}
		})
	}
	f := setUp(t)
	f.lapsed["alice"] = "engineers"
	var r brokerapi.Resources
	if f.get(brokerapi.PathResources, "alice", &r); len(r.Resources) != 0 {
		t.Errorf("who left the group is still shown %+v", r.Resources)
	}
}

// An administrator finds the id of a ticket in the log of its download.
func TestDownloadIsLogged(t *testing.T) {
	f := setUp(t)
	raw := lines(t, f.do("GET", brokerapi.PathResources+"/desk.rdp", "alice", "").Body.Bytes())["gatewayaccesstoken"]
	c, err := ticket.Verify(raw, f.key.Public().(ed25519.PublicKey), ns, ws, now)
	if err != nil {
		t.Fatal(err)
	}
	if !c.SignedIn.Equal(now.Add(-time.Minute)) {
		t.Errorf("the ticket says that alice signed in at %v", c.SignedIn)
	}
	if !strings.Contains(f.log.String(), "ticket="+c.ID) || len(c.ID) != 26 {
		t.Errorf("ticket %q is not in the log:\n%s", c.ID, &f.log)
	}
}

// A ticket names the groups of its resource and no others, so it fits whatever else its user may use.
func TestTicketFits(t *testing.T) {
	f := setUp(t)
	var guids []string
	for i := range 500 {
		guids = append(guids, fmt.Sprintf("%08x-1111-2222-3333-%012x", i, i))
	}
	f.people["dave"] = append([]string{"engineers"}, guids...)
	f.world.Edit(func(s *model.Snapshot) {
		s.Workspace.Resources = append(s.Workspace.Resources,
			model.Resource{Name: "elsewhere", Type: model.Desktop, Pool: "linux", Groups: guids[:200]},
			model.Resource{Name: "all", Type: model.Desktop, Pool: "linux", Groups: guids},
			model.Resource{Name: "long", Type: model.Desktop, Pool: "linux", Users: []string{strings.Repeat("u", 9000)}})
	})
	f.people[strings.Repeat("u", 9000)] = nil
	for _, c := range []struct {
		resource, user string
		least, most    int // groups
		refused        bool
	}{
		{"desk", "dave", 1, 1, false},
		{"elsewhere", "dave", 1, 30, false},
		{"all", "dave", 1, 30, false},
		{"long", strings.Repeat("u", 9000), 0, 0, true},
	} {
		t.Run(c.resource, func(t *testing.T) {
			w := f.do("GET", brokerapi.PathResources+"/"+c.resource+".rdp", c.user, "")
			if c.refused {
				if w.Code == 200 || !strings.Contains(w.Body.String(), "No ticket can be made for") {
					t.Errorf("%d %s", w.Code, w.Body)
				}
				return
			}
			raw := lines(t, w.Body.Bytes())["gatewayaccesstoken"]
			got, err := ticket.Verify(raw, f.key.Public().(ed25519.PublicKey), ns, ws, now)
			if err != nil || len(got.Groups) < c.least || len(got.Groups) > c.most {
				t.Fatalf("%d bytes: %v, groups %v", len(raw), err, got.Groups)
			}
			if res := f.world.Snapshot().Workspace.Resource(c.resource); !res.Grants(got.User, got.Groups) {
				t.Error("no group that the ticket names grants the resource")
			}
		})
	}
}

func TestDiscovery(t *testing.T) {
	f := setUp(t)
	w := f.do("GET", "/common"+brokerapi.PathDiscovery, "", "")
	if w.Code != 200 || !strings.Contains(w.Body.String(), "https://idp/token") || w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	delete(f.people, "alice")
	f.people["away"] = nil
	w = f.do("GET", "/common"+brokerapi.PathDiscovery, "", "")
	if w.Code != 200 || w.Body.String() != `{"issuer":"https://idp"}` {
		t.Errorf("the provider was never heard: %d %s", w.Code, w.Body)
	}
}

func TestRefusals(t *testing.T) {
	f := setUp(t)
	rdp := func(name string) string { return brokerapi.PathResources + "/" + name + ".rdp" }
	for _, c := range []struct {
		name, method, path, token, body string
		edit                            func(*model.Snapshot)
		status                          int
		code                            refusal.Code
	}{
		{name: "no token", path: brokerapi.PathResources, status: 401, code: refusal.TokenMissing},
		{name: "expired token", path: brokerapi.PathResources, token: "x", status: 401, code: refusal.TokenExpired},
		{name: "no grant", path: rdp("own"), token: "alice", status: 403, code: refusal.NotGranted},
		{name: "no grant, icon", path: brokerapi.PathResources + "/desk.png", token: "bob", status: 403, code: refusal.NotGranted},
		{name: "no icon", path: brokerapi.PathResources + "/own.png", token: "bob", status: 404, code: refusal.UnknownResource},
		{name: "unknown resource", path: rdp("none"), token: "alice", status: 404, code: refusal.UnknownResource},
		{name: "no such kind of file", path: brokerapi.PathResources + "/desk.exe", token: "alice", status: 404, code: refusal.UnknownResource},
		{name: "unknown gateway", path: rdp("desk") + "?gateway=x", token: "alice", status: 404, code: refusal.UnknownInstance},
		{name: "unknown form", path: rdp("desk") + "?form=x", token: "alice", status: 400, code: refusal.BadRequest},
		{name: "pool missing", path: rdp("broken"), token: "bob", status: 503, code: refusal.NoHost},
		{name: "somebody's activity", path: brokerapi.PathActivities + activity, token: "bob", status: 404, code: refusal.UnknownResource},
		{name: "adding to somebody's activity", method: "POST", path: brokerapi.PathActivities + activity, token: "bob", body: "[]", status: 404, code: refusal.UnknownResource},
		{name: "no JSON", method: "POST", path: brokerapi.PathActivities + activity, token: "alice", body: "x", status: 400, code: refusal.BadRequest},
		{name: "too many steps", method: "POST", path: brokerapi.PathActivities + activity, token: "alice", body: "[" + strings.Repeat("{},", maxAdded) + "{}]", status: 400, code: refusal.BadRequest},
		{name: "too long", method: "POST", path: brokerapi.PathEnroll, body: `{"host":"` + strings.Repeat("x", maxBody) + `"}`, status: 400, code: refusal.BadRequest},
		{name: "bad registration token", path: brokerapi.PathEnroll, token: "x", status: 401, code: refusal.RegistrationInvalid},
		{name: "enrolment without requests", method: "POST", path: brokerapi.PathEnroll, body: `{"token":"` + f.token + `","host":"h"}`, status: 400, code: refusal.BadRequest},
		{name: "nothing there", path: "/", status: 404, code: refusal.UnknownResource},
		{name: "wrong method", method: "DELETE", path: brokerapi.PathResources, token: "alice", status: 404, code: refusal.UnknownResource},
		{name: "a bug", path: brokerapi.PathResources, token: "panic", status: 500, code: refusal.Internal},
		{name: "no gateway ready", path: rdp("desk"), token: "alice", status: 503, code: refusal.AdmissionAway, edit: func(s *model.Snapshot) { s.Gateways = s.Gateways[2:] }},
		{name: "no Workspace", path: brokerapi.PathWorkspace, status: 503, code: refusal.BrokerAway, edit: func(s *model.Snapshot) { s.Workspace = nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.traces.Hear("rdv.trace.broker", trace.Event{ActivityID: activity, User: "alice"})
			if c.edit != nil {
				f.world.Edit(c.edit)
			}
			w := f.do(cmp.Or(c.method, "GET"), c.path, c.token, c.body)
			var e brokerapi.ErrorBody
			if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Error == nil {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
			if w.Code != c.status || e.Error.Code != c.code {
				t.Errorf("got %d %s, want %d %s", w.Code, e.Error, c.status, c.code)
			}
			if id := w.Header().Get(brokerapi.HeaderActivity); !traces.IsActivity(id) || e.Error.ActivityID != id {
				t.Errorf("activity %q in the header, %q in the body", id, e.Error.ActivityID)
			}
			for _, h := range []string{"Cache-Control", "Content-Security-Policy", "Strict-Transport-Security", "X-Content-Type-Options"} {
				if w.Header().Get(h) == "" {
					t.Errorf("no %s", h)
				}
			}
			if c.status == 401 && w.Header().Get("WWW-Authenticate") == "" {
				t.Error("no WWW-Authenticate")
			}
		})
	}
}

// The token as the workspace reads it.
func TestWhoAmI(t *testing.T) {
	f := setUp(t)
	f.world.Edit(func(s *model.Snapshot) {
		ws, pool := *s.Workspace, *s.Pools["linux"]
		ws.OIDC.UsernameClaim, ws.OIDC.GroupsClaim = "email", "realm_access.roles"
		pool.Accounts = &model.Accounts{Create: true}
		s.Workspace, s.Pools = &ws, map[string]*model.Pool{"linux": &pool}
	})
	var alice, bob, carol brokerapi.Identity
	f.get(brokerapi.PathWhoAmI, "alice", &alice)
	if alice.User != "alice" || alice.UserClaim != "email" || alice.GroupsClaim != "realm_access.roles" || !slices.Equal(alice.Groups, []string{"engineers", "x"}) ||
		alice.GroupsNotice != "" || !alice.SignedIn.Equal(now.Add(-time.Minute)) || !slices.Equal(alice.Resources, []brokerapi.IdentityResource{{Name: "desk", HostPool: "linux", Account: "alice"}}) {
		t.Errorf("alice: %+v", alice)
	}
	f.get(brokerapi.PathWhoAmI, "bob", &bob)
	if len(bob.Resources) != 2 || bob.Resources[0].Account != "bob" || !strings.Contains(bob.Resources[1].Problem, "HostPool none does not exist") {
		t.Errorf("bob: %+v", bob)
	}
	f.get(brokerapi.PathWhoAmI, "carol", &carol)
	if !strings.Contains(carol.GroupsNotice, `no claim "realm_access.roles"`) {
		t.Errorf("carol: %+v", carol)
	}
	if w := f.do("GET", brokerapi.PathWhoAmI, "", ""); w.Code != http.StatusUnauthorized {
		t.Errorf("nobody: %d", w.Code)
	}
}

// Where groups can't be read, refusal, list, log and metric say so, and which claims there are.
func TestGroupsThatCannotBeRead(t *testing.T) {
	f := setUp(t)
	f.world.Edit(func(s *model.Snapshot) {
		ws := *s.Workspace
		ws.OIDC.GroupsClaim = "groups"
		s.Workspace = &ws
	})
	const says = `your token has no claim \"groups\"`
	if w := f.do("GET", brokerapi.PathResources, "carol", ""); !strings.Contains(w.Body.String(), says) {
		t.Errorf("the list says %s", w.Body)
	}
	if w := f.do("GET", brokerapi.PathResources+"/desk.rdp", "carol", ""); w.Code != http.StatusForbidden || !strings.Contains(w.Body.String(), says) {
		t.Errorf("the refusal says %s", w.Body)
	}
	if w := f.do("GET", brokerapi.PathResources+"/own.rdp", "carol", ""); strings.Contains(w.Body.String(), says) {
		t.Errorf("no group grants this one, and the refusal says %s", w.Body)
	}
	if w := f.do("GET", brokerapi.PathResources, "alice", ""); strings.Contains(w.Body.String(), "notice") {
		t.Errorf("alice is told %s", w.Body)
	}
	if w := f.do("GET", brokerapi.PathResources, "dave", ""); strings.Contains(w.Body.String(), "notice") {
		t.Errorf("dave has what he needs, and is told %s", w.Body)
	}
	if n := strings.Count(f.log.String(), "a user's groups can't be read from the token"); n != 1 {
		t.Errorf("logged %d times in a minute: %s", n, &f.log)
	}
	counted := 0.
	families, _ := f.metrics.Gather()
	for _, family := range families {
		if family.GetName() == "rendezvous_broker_groups_unread_total" {
			counted = family.Metric[0].Counter.GetValue()
		}
	}
	if counted != 4 {
		t.Errorf("counted %v, want 4", counted)
	}
	f.world.Edit(func(s *model.Snapshot) {
		ws := *s.Workspace
		ws.Resources = slices.Clone(ws.Resources)
		ws.Resources[0].Groups = nil
		s.Workspace = &ws
	})
	if w := f.do("GET", brokerapi.PathResources, "carol", ""); strings.Contains(w.Body.String(), "notice") {
		t.Errorf("nothing goes by groups, and the list says %s", w.Body)
	}
}

// A user finds what was refused without knowing its id: the user's own, and what a gateway refused at the user's address.
func TestActivities(t *testing.T) {
	f := setUp(t)
	hear := func(id int, e trace.Event) {
		e.ActivityID = fmt.Sprintf("00000000-0000-4000-8000-%012d", id)
		e.At, e.Step, e.Component = now.Add(time.Duration(id)*time.Second), trace.StepAdmit, "relay/x"
		f.traces.Hear("rdv.trace.gateway.a", e)
	}
	hear(1, trace.Event{User: "alice", Error: "ticket-expired", Detail: "expired"})
	hear(2, trace.Event{User: "bob", Error: "ticket-expired"})
	hear(3, trace.Event{Error: "protocol-error", ClientAddr: "192.0.2.1"}) // httptest's
	hear(4, trace.Event{Error: "protocol-error", ClientAddr: "192.0.2.2"})
	var list []trace.Summary
	f.get(brokerapi.PathActivities, "alice", &list)
	want := []trace.Summary{
		{ActivityID: "00000000-0000-4000-8000-000000000003", At: now.Add(3 * time.Second), Step: trace.StepAdmit, Error: "protocol-error", Anonymous: true},
		{ActivityID: activity, At: now.Add(time.Second), Step: trace.StepAdmit, Error: "ticket-expired", Detail: "expired"},
	}
	if !slices.Equal(list, want) {
		t.Errorf("got %+v, want %+v", list, want)
	}
	if w := f.do("GET", brokerapi.PathActivities, "", ""); w.Code != http.StatusUnauthorized {
		t.Errorf("without a token: %d", w.Code)
	}
}

func TestOwnSteps(t *testing.T) {
	f := setUp(t)
	body := `[{"step":7,"component":"broker/forged","user":"bob","activityId":"x","detail":"gateway a: 12 ms"},{"step":12,"component":"rdv/laptop"}]`
	if w := f.do("POST", brokerapi.PathActivities+strings.ToUpper(activity), "alice", body); w.Code != http.StatusNoContent {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	var events []trace.Event
	f.get(brokerapi.PathActivities+activity, "alice", &events)
	if len(events) != 2 || events[0].Component != "rdv" || events[0].User != "alice" || events[0].Detail != "gateway a: 12 ms" || events[1].Component != "rdv/laptop" {
		t.Errorf("%+v", events)
	}
}

func TestPreEnroll(t *testing.T) {
	f := setUp(t)
	var pre brokerapi.PreEnroll
	f.get(brokerapi.PathEnroll, f.token, &pre)
	if pre.Pool != "linux" || pre.Namespace != ns || pre.Workspace != ws {
		t.Errorf("%+v", pre)
	}
}

// Every code has a status, so that none falls through to 500 by being forgotten.
func TestStatuses(t *testing.T) {
	for _, c := range []refusal.Code{
		refusal.TokenMissing, refusal.TokenInvalid, refusal.TokenExpired, refusal.TokenWrongAudience, refusal.IdentityAway, refusal.NotGranted,
		refusal.UnknownResource, refusal.NoHost, refusal.BrokerAway, refusal.RegistrationInvalid, refusal.RegistrationExpired,
		refusal.RegistrationSpent, refusal.BadRequest, refusal.WrongRole, refusal.IssuerAway,
	} {
		if statusOf(c) == http.StatusInternalServerError {
			t.Errorf("%s is a 500", c)
		}
	}
}

func TestOverTLS(t *testing.T) {
	f := setUp(t)
	s := httptest.NewUnstartedServer(nil)
	s.Config = Server(Options{Source: f.world, Identity: people{}, Log: nopLog()}, &tls.Config{})
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	res, err := s.Client().Get(s.URL + brokerapi.PathWorkspace)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, _ := io.ReadAll(res.Body); res.ProtoMajor != 2 || !bytes.Contains(body, []byte("https://idp")) {
		t.Errorf("HTTP/%d: %s", res.ProtoMajor, body)
	}
}

func nopLog() *slog.Logger { return slog.New(slog.DiscardHandler) }
