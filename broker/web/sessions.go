package web

import (
	"crypto/tls"
	"net/http"
	"slices"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// SessionsServer makes the HTTP server for the operator, which shows an administrator's Kubernetes API its sessions. Its
// listener must take nobody else's certificate.
func SessionsServer(o Options, tlsConfig *tls.Config) *http.Server {
	s := Server(o, tlsConfig)
	s.Handler = SessionsHandler(o)
	return s
}

// SessionsHandler is SessionsServer without its listener.
func SessionsHandler(o Options) http.Handler {
	a := newAPI(o)
	mux := http.NewServeMux()
	for pattern, h := range map[string]handler{
		"GET " + brokerapi.PathAllSessions:  byOperator(a.allSessions),
		"POST " + brokerapi.PathAllSessions: byOperator(a.anyAct),
		"/":                                 a.nothing,
	} {
		mux.Handle(pattern, a.answer(pattern, h))
	}
	return mux
}

// byOperator is a handler behind TLS that takes the operator's certificate alone.
func byOperator(h handler) handler {
	return func(w http.ResponseWriter, r *request) error {
		r.vouch()
		return h(w, r)
	}
}

func (a *api) allSessions(w http.ResponseWriter, _ *request) error {
	return writeJSON(w, http.StatusOK, brokerapi.Sessions{Sessions: a.o.Sessions.Sessions()})
}

// anyAct does to a session what the operator was asked to, by somebody whom Kubernetes lets.
func (a *api) anyAct(w http.ResponseWriter, r *request) error {
	var req brokerapi.ActRequest
	if err := readJSON(r, &req); err != nil {
		return err
	}
	if req.By == "" {
		return refusal.New(refusal.BadRequest, "The request doesn't say who wants it (by).")
	}
	return a.act(w, r, req, "")
}

// ownSessions are the user's, as brokers vouch for it.
func (a *api) ownSessions(w http.ResponseWriter, r *request) error {
	own := slices.DeleteFunc(a.o.Sessions.Sessions(), func(s brokerapi.Session) bool { return !s.Proven || s.User != r.user.Name })
	if own == nil {
		own = []brokerapi.Session{}
	}
	return writeJSON(w, http.StatusOK, brokerapi.Sessions{Sessions: own})
}

func (a *api) ownAct(w http.ResponseWriter, r *request) error {
	var req brokerapi.ActRequest
	if err := readJSON(r, &req); err != nil {
		return err
	}
	req.By = r.user.Name
	return a.act(w, r, req, r.user.Name)
}

func (a *api) act(w http.ResponseWriter, r *request, req brokerapi.ActRequest, user string) error {
	detail, err := a.o.Sessions.Act(r.Context(), req, user)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, brokerapi.ActResponse{Detail: detail})
}
