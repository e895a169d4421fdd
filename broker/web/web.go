// Package web is the broker's HTTPS interface, as wire/brokerapi describes it: the feed for signed-in users, the
// timelines of their connects, and enrolment for machines with a registration token.
package web

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/broker/enrol"
	"rendezvous.dev/rendezvous/broker/metrics"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/oidc"
	"rendezvous.dev/rendezvous/broker/traces"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/door"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	// maxBody bounds a request's body. The largest is an enrolment with two certificate requests.
	maxBody = 64 << 10
	// maxHeader bounds a request's head, which holds a token (oidc takes 64 KiB) and little else.
	maxHeader = 80 << 10
	// pathHealth answers 200, for load balancers.
	pathHealth = "/healthz"
	// answerTimeout leaves room for an issuer to sign.
	answerTimeout = 90 * time.Second
)

// Identity validates users' tokens; *oidc.Validator does.
type Identity interface {
	Validate(ctx context.Context, token string) (oidc.User, error)
	// Discovery is the provider's discovery document (JSON) as it was last read, nil where it never was.
	Discovery() []byte
	// CA is the provider's (PEM), empty where public roots verify it.
	CA() string
}

// Gateways knows how much goes through each gateway; *orchestrate.Orchestrator does.
type Gateways interface {
	// Connections counts each gateway's live sessions and those on their way to it.
	Connections() map[string]int32
	// Choose picks the gateway for a ticket's holder, nil where none is ready, and tells what it weighed.
	Choose(gateways []*model.Gateway, ticket string) (chosen *model.Gateway, weighed string)
	// Expect counts a ticket's holder, who chose the gateway, among those on their way to it.
	Expect(gateway, ticket string)
}

// Access knows what users have lost since they signed in; *orchestrate.Orchestrator does.
type Access interface {
	// SignedIn takes in what a good token says: when it was issued, and the user's groups, complete where it names all of
	// them. It gives those of the groups that no newer token lacks.
	SignedIn(user string, at time.Time, groups []string, complete bool) []string
}

// Sessions knows the workspace's live sessions and acts on them; *orchestrate.Orchestrator does.
type Sessions interface {
	// Sessions lists them, by pool, host and id.
	Sessions() []brokerapi.Session
	// Act does something to one. Where user isn't empty, the session must be that user's.
	Act(ctx context.Context, req brokerapi.ActRequest, user string) (detail string, err error)
}

// Options of the API. All but Access, Now, Log and Metrics are required.
type Options struct {
	Namespace, Workspace string
	// Name is this replica's, for traces.
	Name     string
	Source   model.Source
	Identity Identity
	Enrol    *enrol.Service
	Traces   *traces.Store
	// Trace publishes a step of a connect to all replicas, this one included.
	Trace    func(trace.Event)
	Gateways Gateways
	Sessions Sessions
	// Access, where it is nil, believes every token.
	Access Access
	// TicketKey signs tickets.
	TicketKey func() (ed25519.PrivateKey, error)
	// Signer signs connection files.
	Signer  func() *tls.Certificate
	Now     func() time.Time
	Log     *slog.Logger
	Metrics *metrics.Metrics
}

type api struct {
	o Options

	mu    sync.Mutex
	noted map[string]time.Time // when a problem with groups was last logged
}

// Server makes the HTTP server; the caller gives it its listener.
func Server(o Options, tlsConfig *tls.Config) *http.Server {
	tlsConfig = tlsConfig.Clone()
	tlsConfig.NextProtos = []string{"h2", "http/1.1"}
	return &http.Server{
		Handler: Handler(o), TLSConfig: tlsConfig, MaxHeaderBytes: maxHeader, ConnContext: door.ConnContext,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: answerTimeout + 10*time.Second, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
}

// vouch says that a request came with something that only those have who are known.
func (r *request) vouch() { door.From(r.Context()).Vouch() }

// throughProxy refuses a request that came through a load balancer whose word on its clients isn't taken.
func (a *api) throughProxy(r *request) error {
	if field := door.From(r.Context()).Unbelieved(); field != "" {
		return refusal.New(refusal.ProxyHeader, "The load balancer before workspace %s sends PROXY protocol headers, which the brokers do not take: ask your administrator to set %s, or to switch them off.",
			a.o.Workspace, field)
	}
	return nil
}

// newAPI fills in what may be left out.
func newAPI(o Options) *api {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	return &api{o: o}
}

// Handler is the API without its listener.
func Handler(o Options) http.Handler {
	a := newAPI(o)
	mux := http.NewServeMux()
	for pattern, h := range map[string]handler{
		"GET " + brokerapi.PathWorkspace:             a.workspace,
		"GET " + brokerapi.PathResources:             a.signedIn(a.resources),
		"GET " + brokerapi.PathResources + "/{file}": a.signedIn(a.file),
		"GET " + brokerapi.PathWhoAmI:                a.signedIn(a.whoAmI),
		"GET " + brokerapi.PathWebFeed:               a.signedIn(a.webFeed),
		"GET " + brokerapi.PathActivities + "{id}":   a.signedIn(a.activity),
		"GET " + brokerapi.PathActivities + "{$}":    a.signedIn(a.activities),
		"POST " + brokerapi.PathActivities + "{id}":  a.signedIn(a.addToActivity),
		"GET " + brokerapi.PathSessions:              a.signedIn(a.ownSessions),
		"POST " + brokerapi.PathSessions:             a.signedIn(a.ownAct),
		"GET /{tenant}" + brokerapi.PathDiscovery:    a.discovery,
		"GET " + brokerapi.PathEnroll:                a.preEnroll,
		"POST " + brokerapi.PathEnroll:               a.enroll,
		"GET " + pathHealth:                          a.healthy,
		"/":                                          a.nothing,
	} {
		mux.Handle(pattern, a.answer(pattern, h))
	}
	return mux
}

// request is one request with what was made of it.
type request struct {
	*http.Request
	activity string
	begin    time.Time
	user     oidc.User // of signedIn handlers
}

// handler answers a request, or returns why not.
type handler func(http.ResponseWriter, *request) error

// answer puts around a handler what all of them have in common.
func (a *api) answer(pattern string, h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
		defer cancel()
		req := &request{Request: r.WithContext(ctx), activity: activityOf(r), begin: a.o.Now()}
		req.Body = http.MaxBytesReader(w, r.Body, maxBody)
		for name, value := range map[string]string{
			brokerapi.HeaderActivity:    req.activity,
			"Cache-Control":             "no-store",
			"Content-Security-Policy":   "default-src 'none'; frame-ancestors 'none'",
			"Referrer-Policy":           "no-referrer",
			"Strict-Transport-Security": "max-age=31536000",
			"X-Content-Type-Options":    "nosniff",
		} {
			w.Header().Set(name, value)
		}
		status := http.StatusOK
		if err := a.guard(h, w, req); err != nil {
			status = a.refuse(w, req, err)
		}
		a.o.Metrics.Feed.WithLabelValues(pattern, fmt.Sprint(status)).Inc()
	})
}

// guard turns a panic into an error.
func (a *api) guard(h handler, w http.ResponseWriter, r *request) (err error) {
	defer func() {
		if p := recover(); p != nil {
			a.o.Log.Error("panic", "activity", r.activity, "path", r.URL.Path, "error", p, "stack", string(debug.Stack()))
			err = refusal.New(refusal.Internal, "The broker failed; its log has more under the activity id.")
		}
	}()
	if err := a.throughProxy(r); err != nil {
		return err
	}
	return h(w, r)
}

func (a *api) refuse(w http.ResponseWriter, r *request, err error) int {
	e := refusal.From(err).With(r.activity)
	status := statusOf(e.Code)
	if status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "5")
	}
	a.o.Log.Info("request refused", "activity", r.activity, "path", r.URL.Path, "user", r.user.Name, "remote", r.RemoteAddr, "error", e)
	writeJSON(w, status, brokerapi.ErrorBody{Error: e})
	return status
}

// statusOf is the HTTP status that fits a refusal.
func statusOf(c refusal.Code) int {
	switch c {
	case refusal.TokenMissing, refusal.TokenInvalid, refusal.TokenExpired, refusal.TokenWrongAudience,
		refusal.RegistrationInvalid, refusal.RegistrationExpired, refusal.RegistrationSpent:
		return http.StatusUnauthorized
	case refusal.NotGranted, refusal.Revoked, refusal.WrongRole:
		return http.StatusForbidden
	case refusal.UnknownResource, refusal.UnknownInstance, refusal.UnknownSession:
		return http.StatusNotFound
	case refusal.BadRequest:
		return http.StatusBadRequest
	case refusal.ProxyHeader, refusal.IdentityAway, refusal.IssuerAway, refusal.BrokerAway, refusal.NoHost, refusal.AdmissionAway:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// signedIn validates the bearer token first: step 4.
func (a *api) signedIn(h handler) handler {
	return func(w http.ResponseWriter, r *request) error {
		token, _ := bearer(r.Request)
		user, err := a.o.Identity.Validate(r.Context(), token)
		e := trace.Event{
			ActivityID: r.activity, Step: trace.StepValidate, Component: "feed/" + a.o.Name, At: r.begin, Duration: a.o.Now().Sub(r.begin),
			User: user.Name, Detail: "token of " + user.Name,
		}
		if err != nil {
			return err // nobody's activity, so it is told to this client alone
		}
		r.user = user
		a.noteGroups(r)
		if err := a.stillUser(r); err != nil {
			return err
		}
		r.vouch()
		if given(r.Request) != "" {
			a.o.Trace(e)
		}
		return h(w, r)
	}
}

// noteGroups counts and, once a minute and reason, logs that groups can't be read where grants go by groups.
func (a *api) noteGroups(r *request) {
	problem := r.user.GroupsProblem
	ws := a.o.Source.Snapshot().Workspace
	if problem == "" || ws == nil || !ws.GrantsGroups() {
		return
	}
	a.o.Metrics.GroupsUnread.WithLabelValues(problem).Inc()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.noted == nil {
		a.noted = map[string]time.Time{}
	}
	if r.begin.Sub(a.noted[problem]) < time.Minute {
		return
	}
	a.noted[problem] = r.begin
	level := slog.LevelWarn
	if problem == oidc.GroupsAbsent { // as it may be for people in no group
		level = slog.LevelInfo
	}
	a.o.Log.Log(r.Context(), level, "a user's groups can't be read from the token", "activity", r.activity, "user", r.user.Name, "reason", problem,
		"groupsClaim", ws.OIDC.GroupsClaim, "claims", r.user.ClaimNames())
}

// groupsNotice tells the user of it, where grants go by groups.
func groupsNotice(ws *model.Workspace, r *request) string {
	if !ws.GrantsGroups() {
		return ""
	}
	return r.user.GroupsNotice(ws.OIDC)
}

// stillUser refuses a user whose token was taken back, and leaves of the user's groups those that later tokens have.
func (a *api) stillUser(r *request) error {
	ws := a.o.Source.Snapshot().Workspace
	if ws != nil {
		if rev := ws.Revoked(r.user.Name, "", r.user.SignedIn); rev != nil {
			code := refusal.Revoked
			if !rev.Before.IsZero() {
				code = refusal.TokenExpired // another sign-in helps
			}
			return refusal.New(code, "%s", rev.Says(a.o.Workspace, r.user.Name))
		}
	}
	if a.o.Access != nil {
		r.user.Groups = a.o.Access.SignedIn(r.user.Name, r.user.SignedIn, r.user.Groups, r.user.GroupsComplete())
	}
	return nil
}

func bearer(r *http.Request) (string, bool) {
	scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return "", false
	}
	return strings.TrimSpace(token), true
}

// given is the activity id that the client gave, empty if none.
func given(r *http.Request) string {
	for _, id := range []string{r.URL.Query().Get("activity"), r.Header.Get(brokerapi.HeaderActivity)} {
		if id = strings.ToLower(id); traces.IsActivity(id) {
			return id
		}
	}
	return ""
}

func activityOf(r *http.Request) string {
	if id := given(r); id != "" {
		return id
	}
	return newGUID()
}

// newGUID makes a random GUID (RFC 9562, version 4).
func newGUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func (a *api) healthy(w http.ResponseWriter, _ *request) error {
	return write(w, http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
}

func (a *api) nothing(_ http.ResponseWriter, r *request) error {
	return refusal.New(refusal.UnknownResource, "There is no %s %s here; %s says what this workspace is.", r.Method, r.URL.Path, brokerapi.PathWorkspace)
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return write(w, status, "application/json", data)
}

// write sends a whole answer. That the client went away meanwhile is nobody's error.
func write(w http.ResponseWriter, status int, contentType string, data []byte) error {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	w.Write(data)
	return nil
}

func readJSON(r *request, v any) error {
	d := json.NewDecoder(r.Body)
	if err := d.Decode(v); err != nil {
		if tooLong := (*http.MaxBytesError)(nil); errors.As(err, &tooLong) {
			return refusal.New(refusal.BadRequest, "The request's body is longer than %d bytes.", tooLong.Limit)
		}
		return refusal.New(refusal.BadRequest, "The request's body is not the JSON that %s takes.", r.URL.Path)
	}
	return nil
}
