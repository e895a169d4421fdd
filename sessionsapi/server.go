package sessionsapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/door"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const (
	maxBody = 64 << 10
	// maxWatches bounds watches at one time; each asks the brokers once in watchEvery.
	maxWatches = 64
	watchEvery = time.Second
	// watchMost is how long a watch lasts where it doesn't say.
	watchMost = 30 * time.Minute
	// maxRemembered bounds the lists from which a watch can go on.
	maxRemembered = 128
	answerTimeout = 45 * time.Second
)

// Options of the API. All are required, but for Now and Log.
type Options struct {
	Brokers      Brokers
	Authenticate func(*http.Request) (User, error)
	Allowed      func(context.Context, User, Attributes) (bool, string, error)
	Now          func() time.Time
	Log          *slog.Logger
}

type server struct {
	o       Options
	watches chan struct{}

	mu    sync.Mutex
	last  int64                         // resource version
	lists map[string]map[string]Session // by resource version, by namespace/name
	order []string                      // of lists, oldest first
}

// Handler is the API.
func Handler(o Options) http.Handler {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &server{o: o, watches: make(chan struct{}, maxWatches), lists: map[string]map[string]Session{}}
}

// failure is an error as Kubernetes clients read it.
type failure struct{ metav1.Status }

func (f *failure) Error() string { return f.Message }

func fail(code int, reason metav1.StatusReason, format string, args ...any) *failure {
	return &failure{metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: fmt.Sprintf(format, args...),
	}}
}

func badRequest(format string, args ...any) *failure {
	return fail(http.StatusBadRequest, metav1.StatusReasonBadRequest, format, args...)
}

// request is one request, and what its path says.
type request struct {
	*http.Request
	user                         User
	namespace, name, subresource string
	selection
}

// ServeHTTP answers who came through the API server.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	err := func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				s.o.Log.Error("panic", "path", r.URL.Path, "error", p, "stack", string(debug.Stack()))
				err = errors.New("the operator failed; its log has more")
			}
		}()
		user, err := s.o.Authenticate(r)
		if errors.Is(err, ErrUnauthenticated) {
			return fail(http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "%v", err)
		}
		if err != nil {
			return err
		}
		door.From(r.Context()).Vouch()
		return s.route(w, &request{Request: r, user: user})
	}()
	if err == nil {
		return
	}
	var f *failure
	var refused *refusal.Error
	switch {
	case errors.As(err, &f):
	case errors.As(err, &refused):
		f = ofRefusal(refused)
	default:
		f = fail(http.StatusInternalServerError, metav1.StatusReasonInternalError, "%v", err)
	}
	s.o.Log.Info("request for sessions refused", "method", r.Method, "path", r.URL.Path, "code", f.Code, "error", f.Message)
	writeJSON(w, int(f.Code), f.Status)
}

// ofRefusal gives a broker's refusal the status that kubectl shows best.
func ofRefusal(e *refusal.Error) *failure {
	switch e.Code {
	case refusal.UnknownSession:
		return fail(http.StatusNotFound, metav1.StatusReasonNotFound, "%s", e.Message)
	case refusal.BadRequest:
		return fail(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%s", e.Message)
	case refusal.HostTimeout:
		return fail(http.StatusGatewayTimeout, metav1.StatusReasonTimeout, "%s", e.Message)
	case refusal.HostRefused, refusal.HostNotReady:
		return fail(http.StatusConflict, metav1.StatusReasonConflict, "%s", e.Message)
	}
	return fail(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "%s", e.Error())
}

func (s *server) route(w http.ResponseWriter, r *request) error {
	gv := "/apis/" + groupVersion
	path := strings.TrimSuffix(r.URL.Path, "/")
	switch path {
	case "/healthz", "/livez", "/readyz":
		fmt.Fprintln(w, "ok")
		return nil
	case "/apis":
		return writeJSON(w, http.StatusOK, metav1.APIGroupList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIGroupList"}, Groups: []metav1.APIGroup{apiGroup()}})
	case "/apis/" + Group:
		return writeJSON(w, http.StatusOK, apiGroup())
	case gv:
		return writeJSON(w, http.StatusOK, apiResources())
	}
	rest, ok := strings.CutPrefix(path, gv+"/")
	parts := strings.Split(rest, "/")
	if ok && len(parts) >= 3 && parts[0] == "namespaces" {
		r.namespace, parts = parts[1], parts[2:]
	}
	if !ok || parts[0] != Resource || len(parts) > 3 || len(parts) > 1 && r.namespace == "" {
		return fail(http.StatusNotFound, metav1.StatusReasonNotFound, "the server could not find the requested resource")
	}
	if len(parts) > 1 {
		r.name = parts[1]
	}
	if len(parts) > 2 {
		r.subresource = parts[2]
	}
	q := r.URL.Query()
	var err error
	if r.selection, err = parseSelection(q.Get("labelSelector"), q.Get("fieldSelector")); err != nil {
		return err
	}
	watch, _ := strconv.ParseBool(q.Get("watch"))
	switch {
	case r.Method == http.MethodGet && r.name == "" && watch:
		return s.guarded(r, "watch", func() error { return s.watch(w, r) })
	case r.Method == http.MethodGet && r.name == "":
		return s.guarded(r, "list", func() error { return s.list(w, r) })
	case r.Method == http.MethodGet && r.subresource == "":
		return s.guarded(r, "get", func() error { return s.get(w, r) })
	case r.Method == http.MethodDelete && r.name != "" && r.subresource == "":
		return s.guarded(r, "delete", func() error { return s.delete(w, r) })
	case r.Method == http.MethodPost && (r.subresource == Disconnect || r.subresource == Message):
		return s.guarded(r, "create", func() error { return s.create(w, r) })
	}
	return fail(http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, "%s is not possible here: sessions are listed, watched, deleted (which logs off), and have the subresources %s and %s", r.Method, Disconnect, Message)
}

// guarded does something if Kubernetes lets the user.
func (s *server) guarded(r *request, verb string, do func() error) error {
	allowed, why, err := s.o.Allowed(r.Context(), r.user, Attributes{Verb: verb, Namespace: r.namespace, Name: r.name, Subresource: r.subresource})
	if err != nil {
		return err
	}
	if !allowed {
		what := Resource
		if r.subresource != "" {
			what += "/" + r.subresource
		}
		where := "at the cluster scope"
		if r.namespace != "" {
			where = fmt.Sprintf("in the namespace %q", r.namespace)
		}
		if why != "" {
			why = ": " + why
		}
		return fail(http.StatusForbidden, metav1.StatusReasonForbidden, "%s.%s is forbidden: User %q cannot %s resource %q in API group %q %s%s", Resource, Group, r.user.Name, verb, what, Group, where, why)
	}
	return do()
}

func apiGroup() metav1.APIGroup {
	v := metav1.GroupVersionForDiscovery{GroupVersion: groupVersion, Version: Version}
	return metav1.APIGroup{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIGroup"}, Name: Group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v}
}

func apiResources() metav1.APIResourceList {
	return metav1.APIResourceList{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIResourceList"}, GroupVersion: groupVersion,
		APIResources: []metav1.APIResource{
			{Name: Resource, SingularName: "session", Namespaced: true, Kind: kind, Verbs: metav1.Verbs{"get", "list"}, ShortNames: []string{"sess"}},
			{Name: Resource + "/" + Disconnect, Namespaced: true, Kind: kind, Verbs: metav1.Verbs{"create"}},
			{Name: Resource + "/" + Message, Namespaced: true, Kind: kind, Verbs: metav1.Verbs{"create"}},
		},
	}
}

// gather gives the sessions that a request is about, as they are now, and a resource version from which a watch can go on.
func (s *server) gather(ctx context.Context, r *request) (items []Session, missing []string, version string, err error) {
	found, missing, err := s.o.Brokers.Sessions(ctx, r.namespace)
	if err != nil {
		return nil, nil, "", err
	}
	items = []Session{}
	seen := map[string]Session{}
	for _, f := range found {
		o := session(f)
		if r.picks(&o) {
			items = append(items, o)
			seen[f.Namespace+"/"+f.Workspace+"/"+f.ID] = o
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last+1, s.o.Now().UnixMicro())
	version = strconv.FormatInt(s.last, 10)
	for i := range items {
		items[i].ResourceVersion = version
	}
	s.lists[version] = seen
	if s.order = append(s.order, version); len(s.order) > maxRemembered {
		delete(s.lists, s.order[0])
		s.order = slices.Delete(s.order, 0, 1)
	}
	return items, missing, version, nil
}

// remembered is the list that had a resource version, nil where it is forgotten.
func (s *server) remembered(version string) map[string]Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lists[version]
}

func (s *server) list(w http.ResponseWriter, r *request) error {
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	items, missing, version, err := s.gather(ctx, r)
	if err != nil {
		return err
	}
	warn(w, missing)
	if wantsTable(r.Header.Get("Accept")) {
		t, err := table(items, version, r.URL.Query().Get("includeObject"), s.o.Now(), true)
		if err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, t)
	}
	return writeJSON(w, http.StatusOK, SessionList{
		TypeMeta: metav1.TypeMeta{APIVersion: groupVersion, Kind: kind + "List"}, ListMeta: metav1.ListMeta{ResourceVersion: version}, Items: items,
	})
}

// warn says what a list lacks; kubectl shows it.
func warn(w http.ResponseWriter, missing []string) {
	for _, m := range missing {
		w.Header().Add("Warning", "299 - "+strconv.Quote(strings.Map(func(r rune) rune {
			if r < ' ' || r > '~' || r == '"' || r == '\\' {
				return ' '
			}
			return r
		}, m)))
	}
}

// find gives the named session.
func (s *server) find(ctx context.Context, r *request) (*Session, error) {
	items, missing, _, err := s.gather(ctx, r)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(items, func(o Session) bool { return o.Name == r.name })
	switch {
	case i >= 0:
		return &items[i], nil
	case len(missing) > 0:
		return nil, fail(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "session %q is not among those that can be listed now: %s", r.name, strings.Join(missing, "; "))
	}
	return nil, fail(http.StatusNotFound, metav1.StatusReasonNotFound, "%s.%s %q not found", Resource, Group, r.name)
}

func (s *server) get(w http.ResponseWriter, r *request) error {
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	o, err := s.find(ctx, r)
	if err != nil {
		return err
	}
	if wantsTable(r.Header.Get("Accept")) {
		t, err := table([]Session{*o}, o.ResourceVersion, r.URL.Query().Get("includeObject"), s.o.Now(), true)
		if err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, t)
	}
	return writeJSON(w, http.StatusOK, o)
}

// delete logs a session off. It returns when the host has done it.
func (s *server) delete(w http.ResponseWriter, r *request) error {
	var options metav1.DeleteOptions
	if err := readBody(r, &options); err != nil {
		return err
	}
	dry := len(options.DryRun) > 0 || r.URL.Query().Get("dryRun") != ""
	o, err := s.act(r, brokerapi.ActRequest{Act: bus.ActEnd}, dry, options.Preconditions)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusSuccess,
		Details: &metav1.StatusDetails{Name: o.Name, Group: Group, Kind: Resource, UID: o.UID},
	})
}

// messageBody is what is sent to the subresources; only a message has a text.
type messageBody struct {
	Text string `json:"text"`
}

func (s *server) create(w http.ResponseWriter, r *request) error {
	var body messageBody
	if err := readBody(r, &body); err != nil {
		return err
	}
	req := brokerapi.ActRequest{Act: bus.ActDisconnect}
	if r.subresource == Message {
		req = brokerapi.ActRequest{Act: bus.ActMessage, Text: body.Text}
		if err := bus.CheckMessageText(body.Text); err != nil {
			return badRequest("text: %v", err)
		}
	}
	o, err := s.act(r, req, r.URL.Query().Get("dryRun") != "", nil)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusSuccess, Code: http.StatusCreated,
		Details: &metav1.StatusDetails{Name: o.Name, Group: Group, Kind: Resource, UID: o.UID},
	})
}

// act has the session's broker do something, and logs who wanted it.
func (s *server) act(r *request, req brokerapi.ActRequest, dry bool, pre *metav1.Preconditions) (*Session, error) {
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	o, err := s.find(ctx, r)
	if err != nil {
		return nil, err
	}
	if pre != nil && pre.UID != nil && *pre.UID != o.UID {
		return nil, fail(http.StatusConflict, metav1.StatusReasonConflict, "session %q has UID %s, not %s", r.name, o.UID, *pre.UID)
	}
	if dry {
		return o, nil
	}
	req.SessionID, req.By = o.Name, r.user.Name
	detail, err := s.o.Brokers.Act(ctx, r.namespace, o.Status.Workspace, req)
	s.o.Log.Info("session", "act", req.Act, "namespace", r.namespace, "session", o.Name, "activity", o.Status.ActivityID, "of", o.Status.User,
		"host", o.Status.Host, "by", r.user.Name, "groups", r.user.Groups, "detail", detail, "error", err)
	return o, err
}

// readBody reads JSON; none is fine.
func readBody(r *request, v any) error {
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return badRequest("body: %v", err)
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fail(http.StatusUnsupportedMediaType, metav1.StatusReasonUnsupportedMediaType, "the body is not the JSON that is wanted here: %v", err)
	}
	return nil
}

// event is one of a watch.
type event struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

// watch tells what changes, by looking again and again.
func (s *server) watch(w http.ResponseWriter, r *request) error {
	q := r.URL.Query()
	if q.Get("sendInitialEvents") != "" {
		return fail(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is forbidden: list, then watch from its resourceVersion")
	}
	select {
	case s.watches <- struct{}{}:
		defer func() { <-s.watches }()
	default:
		return fail(http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, "%d watches of sessions are open, and there may be no more: try again later", maxWatches)
	}
	most := watchMost
	if n, err := strconv.Atoi(q.Get("timeoutSeconds")); err == nil && n > 0 {
		most = min(most, time.Duration(n)*time.Second)
	}
	ctx, cancel := context.WithTimeout(r.Context(), most)
	defer cancel()
	http.NewResponseController(w).SetWriteDeadline(time.Time{})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := json.NewEncoder(w)
	flush := http.NewResponseController(w).Flush
	flush()
	asTable, header := wantsTable(r.Header.Get("Accept")), true
	send := func(kind string, o Session) error {
		var object any = o
		if asTable {
			t, err := table([]Session{o}, o.ResourceVersion, q.Get("includeObject"), s.o.Now(), header)
			if err != nil {
				return err
			}
			object, header = t, false
		}
		return out.Encode(event{kind, object})
	}
	before := s.remembered(q.Get("resourceVersion")) // where it is forgotten, all are told as new
	for {
		items, missing, version, err := s.gather(ctx, r)
		if err == nil && len(missing) == 0 { // what can't be had now has not ended
			now := s.remembered(version)
			for _, o := range items {
				old, was := before[o.Namespace+"/"+o.Status.Workspace+"/"+o.Name]
				switch {
				case !was:
					err = send("ADDED", o)
				case !same(old, o):
					err = send("MODIFIED", o)
				}
				if err != nil {
					return nil // the client went away
				}
			}
			for key, old := range before {
				if _, still := now[key]; !still {
					old.ResourceVersion = version
					if send("DELETED", old) != nil {
						return nil
					}
				}
			}
			before = now
			flush()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchEvery):
		}
	}
}

// same says whether a session is as it was.
func same(a, b Session) bool {
	since := a.Status.Since.Equal(&b.Status.Since)
	a.Status.Since, b.Status.Since = metav1.Time{}, metav1.Time{}
	return since && a.Status == b.Status
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(data)
	return nil
}
