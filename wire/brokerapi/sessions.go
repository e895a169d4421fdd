package brokerapi

import "time"

// Paths of sessions. Users see their own, with a bearer token, at the feed. The operator, on a listener of its own
// (config.PortSessions) that takes its certificate alone, sees all and says on whose behalf it acts: it has asked the
// Kubernetes API server whether they may.
const (
	PathSessions    = "/api/v1/sessions"
	PathAllSessions = "/api/v1/all-sessions"
)

// UnknownUser stands where no broker vouches for whose a session is.
const UnknownUser = ""

// Session is one session on a host of the workspace. Where no proof of a broker goes with it (SessionHosts' claims alone
// count for nothing), only Pool, Host, State and Since are known, and it can't be acted on.
type Session struct {
	// ID is the session's own where it is proven, else a name for as long as it stays as it is.
	ID         string `json:"id"`
	ActivityID string `json:"activityId,omitempty"`
	User       string `json:"user,omitempty"`
	Account    string `json:"account,omitempty"`
	Resource   string `json:"resource,omitempty"`
	Pool       string `json:"pool"`
	Host       string `json:"host"`
	// State is Pending, Active or Disconnected, and Since is since when: the host's word.
	State string    `json:"state"`
	Since time.Time `json:"since"`
	// Started is when its user was sent to the host last.
	Started time.Time `json:"started,omitzero"`
	// Gateway and Instance carry it, or carried it last; Client is the address that connected there.
	Gateway  string `json:"gateway,omitempty"`
	Instance string `json:"instance,omitempty"`
	Client   string `json:"client,omitempty"`
	// Proven says that a broker vouches for whose it is.
	Proven bool `json:"proven"`
}

// Sessions is the answer to GET PathSessions and PathAllSessions.
type Sessions struct {
	Sessions []Session `json:"sessions"`
}

// ActRequest is the body of POST PathSessions and PathAllSessions.
type ActRequest struct {
	SessionID string `json:"sessionId"`
	// Act is bus.ActEnd, ActDisconnect or ActMessage.
	Act  string `json:"act"`
	Text string `json:"text,omitempty"`
	// By is who wants it; the operator says, and a user is who the token says.
	By string `json:"by,omitempty"`
}

// ActResponse says what was done.
type ActResponse struct {
	Detail string `json:"detail"`
}
