// Package trace is the timeline of one connect: what each part of the system did, when, and for how long, under one
// activity id. `rdv explain` prints it.
package trace

import "time"

// Steps of the connection sequence (docs/architecture.md).
const (
	StepEnrol        = 0
	StepSubscribe    = 1
	StepAuthenticate = 2
	StepPassToken    = 3
	StepValidate     = 4
	StepFeed         = 5
	StepStore        = 6
	StepDialGateway  = 7
	StepAdmit        = 8
	StepOrchestrate  = 9
	StepReverse      = 10
	StepJoin         = 11
	StepRDP          = 12
)

// Titles names each step for a person, indexed by its number.
var Titles = [...]string{
	"host enrolled", "subscribe to the workspace", "sign in at the identity provider", "pass the token to the feed",
	"validate the token", "make the signed connection file", "store the connection file", "dial the gateway",
	"gateway validates and asks the broker", "broker authorises, picks the host, tells its agent",
	"agent dials the same gateway instance", "relay joins the legs", "RDP handshake",
}

// Event is one thing that happened in a connect.
type Event struct {
	ActivityID string `json:"activityId"`
	Step       int    `json:"step"`
	// Component says who did it: "rdv", "feed", "relay", "gateway", "broker", "agent", with the instance after a slash.
	Component string        `json:"component"`
	At        time.Time     `json:"at"` // when it began
	Duration  time.Duration `json:"duration"`
	Detail    string        `json:"detail,omitempty"`
	// Error is a refusal code where the connect ended here.
	Error string `json:"error,omitempty"`
	// User owns the activity: only that user (and administrators) may read it.
	User string `json:"user,omitempty"`
	// ClientAddr is the IP address of a client that a gateway refused before it knew whose it is; UnknownClient where the
	// gateway sees nodes' addresses alone.
	ClientAddr string `json:"clientAddr,omitempty"`
}

// UnknownClient stands for an address that nobody knows.
const UnknownClient = "unknown"

// Summary is one activity in a list.
type Summary struct {
	ActivityID string    `json:"activityId"`
	At         time.Time `json:"at"` // when it began
	// Step is the last that was reported.
	Step int `json:"step"`
	// Error and Detail are those of the last step that failed, else of the last one.
	Error  string `json:"error,omitempty"`
	Detail string `json:"detail,omitempty"`
	// Anonymous says that a gateway refused the client before it knew whose it is: it came from the reader's address, or from
	// one that nobody knows.
	Anonymous bool `json:"anonymous,omitempty"`
}
