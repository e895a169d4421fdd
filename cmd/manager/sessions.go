package main

import (
	"log/slog"

	ctrl "sigs.k8s.io/controller-runtime"

	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/sessionsapi"
)

// sessionsOptions say where the API of sessions is served.
type sessionsOptions struct {
	addr, namespace, service string
}

// add has the manager serve it, unless it is off.
func (o sessionsOptions) add(mgr ctrl.Manager, images render.Options, log *slog.Logger) error {
	if o.addr == "" {
		return nil
	}
	authenticator := &sessionsapi.Authenticator{Reader: mgr.GetAPIReader()}
	return mgr.Add(&sessionsapi.Server{
		Addr: o.addr, Namespace: o.namespace, Service: o.service, Client: mgr.GetClient(), Reader: mgr.GetAPIReader(), Log: log,
		Handler: sessionsapi.Handler(sessionsapi.Options{
			Brokers: &sessionsapi.WorkspaceBrokers{
				Workspaces: mgr.GetClient(), Secrets: mgr.GetAPIReader(), Secret: render.WorkspaceOperatorIdentity, URL: images.SessionsURL,
			},
			Authenticate: authenticator.Authenticate,
			Allowed:      sessionsapi.Authorizer{Client: mgr.GetClient()}.Allowed,
			Log:          log,
		}),
	})
}
