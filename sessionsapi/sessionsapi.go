// Package sessionsapi is the Kubernetes API of live sessions, sessions.live.rendezvous.dev: an aggregated API that the
// operator serves. `kubectl get`, `-w` and `delete` work on it as on any other kind, with Kubernetes RBAC, and nothing of
// it is stored: each answer is what the workspaces' brokers say now.
//
//	types.go    the kind, its columns, and how a broker's word becomes one
//	server.go   the HTTP API: discovery, get, list, watch, delete, disconnect, message
//	auth.go     who asks (the API server says, by its front proxy's certificate) and whether they may (it is asked)
//	serving.go  the certificate by which the API server knows this one
//	brokers.go  asking the brokers, with an identity of the operator's own
//
// It is written by hand. k8s.io/apiserver would add 38 MB to the operator for storage, admission, OpenAPI and flow
// control, none of which a read of some memory needs.
//
// Discovery names the verbs get and list alone. kubectl doesn't ask discovery before it watches or deletes; the garbage
// collector, the quota and the namespace controllers do, and would otherwise watch all sessions for ever, or wait with
// the end of a namespace for this API.
package sessionsapi

import (
	"context"

	"rendezvous.dev/rendezvous/wire/brokerapi"
)

// Names of the API.
const (
	Group    = "live.rendezvous.dev"
	Version  = "v1alpha1"
	Resource = "sessions"
	// Disconnect and Message are its subresources: create them.
	Disconnect = "disconnect"
	Message    = "message"
)

// Found is a session and the workspace that it is of.
type Found struct {
	Namespace, Workspace string
	brokerapi.Session
}

// Brokers are the workspaces' brokers.
type Brokers interface {
	// Sessions lists those of a namespace, or of all where it is empty. What can't be had now is named in missing.
	Sessions(ctx context.Context, namespace string) (found []Found, missing []string, err error)
	// Act does something to a session. Its errors are *refusal.Error where a broker refused.
	Act(ctx context.Context, namespace, workspace string, req brokerapi.ActRequest) (detail string, err error)
}
