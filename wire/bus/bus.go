// Package bus is what agents, gateways and brokers say to each other over NATS: subjects, messages (JSON), and the
// permissions that bind each connection to the identity in its certificate.
//
//	subject                              from -> to           message -> reply
//	rdv.connect                          gateway -> a broker  ConnectRequest -> ConnectReply
//	rdv.entry                            gateway -> a broker  EntryRequest -> EntryReply
//	rdv.gateways                         gateway -> a broker  GatewaysRequest -> GatewaysReply
//	rdv.host.POOL.HOST.connect           broker -> agent      HostConnect -> HostReply
//	rdv.host.POOL.HOST.config            broker -> agent      HostConfig
//	rdv.host.POOL.HOST.displaced         broker -> agent      HostDisplaced
//	rdv.host.POOL.HOST.session           broker -> agent      SessionAct -> SessionActReply
//	rdv.report.POOL.HOST                 agent -> brokers     HostReport
//	rdv.renew.POOL.HOST                  agent -> a broker    brokerapi.RenewRequest -> brokerapi.RenewResponse
//	rdv.gateway.GATEWAY.INSTANCE.report  gateway -> brokers   GatewayReport
//	rdv.gateway.GATEWAY.INSTANCE.end     broker -> gateway    EndSession
//	rdv.trace.ROLE.NAME                  all -> brokers       trace.Event
//
// "A broker" is one of the queue group Brokers; "brokers" is every one of them. A reader ignores fields that it does
// not know, so that a rollout may mix versions.
package bus

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/rdpkey"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Brokers is the queue group in which one broker answers.
const Brokers = "brokers"

// Subjects with no variable part, and the patterns that brokers subscribe to.
const (
	SubjectConnect    = "rdv.connect"
	SubjectEntry      = "rdv.entry"
	SubjectGateways   = "rdv.gateways"
	AllReports        = "rdv.report.*.*"
	AllRenewals       = "rdv.renew.*.*"
	AllGatewayReports = "rdv.gateway.*.*.report"
	AllTraces         = "rdv.trace.>"
)

// HostConnectSubject is where one host's agent takes connect requests.
func HostConnectSubject(pool, host string) string {
	return fmt.Sprintf("rdv.host.%s.%s.connect", pool, host)
}

// HostConfigSubject is where one host's agent takes its limits and drain state.
func HostConfigSubject(pool, host string) string {
	return fmt.Sprintf("rdv.host.%s.%s.config", pool, host)
}

// HostDisplacedSubject is where one host's agent is told that a newer connection took the place of its own.
func HostDisplacedSubject(pool, host string) string {
	return fmt.Sprintf("rdv.host.%s.%s.displaced", pool, host)
}

// HostSessionSubject is where one host's agent is told to end, disconnect or message a session.
func HostSessionSubject(pool, host string) string {
	return fmt.Sprintf("rdv.host.%s.%s.session", pool, host)
}

// ReportSubject is where one host's agent reports.
func ReportSubject(pool, host string) string { return fmt.Sprintf("rdv.report.%s.%s", pool, host) }

// RenewSubject is where one host's agent asks for its next certificates.
func RenewSubject(pool, host string) string { return fmt.Sprintf("rdv.renew.%s.%s", pool, host) }

// GatewayReportSubject is where one gateway pod reports its load.
func GatewayReportSubject(gateway, instance string) string {
	return fmt.Sprintf("rdv.gateway.%s.%s.report", gateway, instance)
}

// GatewayEndSubject is where one gateway pod is told to end a session.
func GatewayEndSubject(gateway, instance string) string {
	return fmt.Sprintf("rdv.gateway.%s.%s.end", gateway, instance)
}

// TraceSubject is where the holder of an identity publishes the steps of a connect.
func TraceSubject(id identity.ID) string {
	switch id.Role {
	case identity.RoleAgent:
		return fmt.Sprintf("rdv.trace.agent.%s.%s", id.Pool, id.Host)
	case identity.RoleGateway:
		return fmt.Sprintf("rdv.trace.gateway.%s", id.Gateway)
	}
	return "rdv.trace.broker"
}

// InboxPrefix is where replies to the holder of an identity go. Only its own connections may listen there.
func InboxPrefix(id identity.ID) string {
	switch id.Role {
	case identity.RoleAgent:
		return fmt.Sprintf("_INBOX.agent.%s.%s", id.Pool, id.Host)
	case identity.RoleGateway:
		return fmt.Sprintf("_INBOX.gateway.%s", id.Gateway)
	}
	return "_INBOX.broker"
}

// Permissions is what one connection may publish and subscribe to. Replies to received requests are allowed besides.
type Permissions struct {
	Publish   []string
	Subscribe []string
}

// PermissionsFor binds a connection to its identity. A role with no place on the bus is an error.
func PermissionsFor(id identity.ID) (Permissions, error) {
	inbox := InboxPrefix(id) + ".>"
	switch id.Role {
	case identity.RoleBroker:
		return Permissions{Publish: []string{">"}, Subscribe: []string{">"}}, nil
	case identity.RoleGateway:
		return Permissions{
			Publish:   []string{SubjectConnect, SubjectEntry, SubjectGateways, fmt.Sprintf("rdv.gateway.%s.*.report", id.Gateway), TraceSubject(id)},
			Subscribe: []string{fmt.Sprintf("rdv.gateway.%s.*.end", id.Gateway), inbox},
		}, nil
	case identity.RoleAgent:
		return Permissions{
			Publish:   []string{ReportSubject(id.Pool, id.Host), RenewSubject(id.Pool, id.Host), TraceSubject(id)},
			Subscribe: []string{HostConnectSubject(id.Pool, id.Host), HostConfigSubject(id.Pool, id.Host), HostDisplacedSubject(id.Pool, id.Host), HostSessionSubject(id.Pool, id.Host), inbox},
		}, nil
	}
	return Permissions{}, fmt.Errorf("bus: a certificate of role %q has no place on the bus", id.Role)
}

// UnpickedPermissions is what a gateway may that its workspace does not pick (any more), or that is being deleted: hear which
// of its sessions to end, for those go on, and be refused connects with the reason. It learns and says nothing else.
func UnpickedPermissions(id identity.ID) Permissions {
	return Permissions{
		Publish:   []string{SubjectConnect, SubjectEntry},
		Subscribe: []string{fmt.Sprintf("rdv.gateway.%s.*.end", id.Gateway), InboxPrefix(id) + ".>"},
	}
}

// ConnectRequest asks the brokers to orchestrate one connect.
type ConnectRequest struct {
	ActivityID string `json:"activityId"`
	SessionID  string `json:"sessionId"`
	Ticket     string `json:"ticket"`
	// Target is the name that the client asked for, empty in raw mode.
	Target     string `json:"target,omitempty"`
	ClientAddr string `json:"clientAddr,omitempty"`
	Transport  string `json:"transport,omitempty"`
	// Gateway and Instance name the pod that holds the client leg.
	Gateway  string `json:"gateway"`
	Instance string `json:"instance"`
	// JoinSecret is 32 random bytes; the agent presents it once.
	JoinSecret []byte `json:"joinSecret"`
	// Deadline is when the gateway gives up the client.
	Deadline time.Time `json:"deadline"`
}

// ConnectReply is the brokers' answer. Err set means refused.
type ConnectReply struct {
	Err  *refusal.Error `json:"error,omitempty"`
	Pool string         `json:"pool,omitempty"`
	Host string         `json:"host,omitempty"`
}

// EntryRequest asks which gateway is to serve a client that is told where to go (step 7). Nothing is orchestrated yet.
type EntryRequest struct {
	ActivityID string `json:"activityId"`
	Ticket     string `json:"ticket"`
	ClientAddr string `json:"clientAddr,omitempty"`
	// Gateway and Instance name the pod that the client came to: the entry gateway.
	Gateway  string `json:"gateway"`
	Instance string `json:"instance"`
}

// EntryReply names the gateway that serves the client. Err set means refused.
type EntryReply struct {
	Err *refusal.Error `json:"error,omitempty"`
	// Retry says, with Err, that a host is on its way: the same request may succeed soon.
	Retry    bool   `json:"retry,omitempty"`
	Gateway  string `json:"gateway,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	Port     int32  `json:"port,omitempty"`
	// Target is the name that the host's certificate carries.
	Target string `json:"target,omitempty"`
}

// GatewaysRequest asks for the gateways of the workspace, to measure the way to them.
type GatewaysRequest struct {
	Gateway string `json:"gateway"` // who asks
}

// GatewaysReply is the gateways of the workspace, the asking one included.
type GatewaysReply struct {
	Gateways []GatewayAddress `json:"gateways"`
}

// GatewayAddress is where clients and agents reach a gateway.
type GatewayAddress struct {
	Name     string `json:"name"`
	Hostname string `json:"hostname"`
	Port     int32  `json:"port"`
	// CABundle (PEM) verifies its certificate; empty means the machine's own roots.
	CABundle string `json:"caBundle,omitempty"`
}

// HostConnect tells an agent to dial a gateway for one session.
type HostConnect struct {
	ActivityID string `json:"activityId"`
	SessionID  string `json:"sessionId"`
	User       string `json:"user"`
	Resource   string `json:"resource"`
	// Address is host:port of the gateway's public listener.
	Address string `json:"address"`
	// ServerName is the name that the gateway's certificate must carry.
	ServerName string `json:"serverName"`
	// CABundle (PEM) verifies that certificate; empty means the machine's own roots.
	CABundle string `json:"caBundle,omitempty"`
	// Gateway names it.
	Gateway string `json:"gateway,omitempty"`
	// Instance is the gateway pod that holds the client; it travels in the join request.
	Instance   string    `json:"instance"`
	JoinSecret []byte    `json:"joinSecret"`
	Deadline   time.Time `json:"deadline"`
	// Proof is the brokers' signed word that they sent User to this host. The agent can't read it: it returns it with the
	// session in its reports.
	Proof string `json:"proof,omitempty"`
	// Account is where the session logs in by its connection; nil where the RDP server asks for credentials itself.
	Account *Account `json:"account,omitempty"`
}

// Account is a person's account on a session host.
type Account struct {
	// Name on the host, such as "alice".
	Name string `json:"name"`
	// Create says that the host makes the account where it has none, with UID and a home folder. Otherwise the host's own
	// directory (NSS) must know it.
	Create bool   `json:"create,omitempty"`
	UID    uint32 `json:"uid,omitempty"`
}

// HostReply is the agent's last word: it accepts, or refuses against its own limit. Err set means refused.
type HostReply struct {
	Err *refusal.Error `json:"error,omitempty"`
	// Sequence is of the last report before this answer: any later one was made with it in mind, and lists the session
	// unless it has ended since. 0 from agents that don't say.
	Sequence uint64 `json:"sequence,omitempty"`
}

// HostConfig is what a host's agent must hold to. Brokers send it when it changes and when an agent reports another Generation.
type HostConfig struct {
	// Generation grows with each change; an agent echoes the one that it holds in its report.
	Generation  int64 `json:"generation"`
	MaxSessions int32 `json:"maxSessions"`
	Draining    bool  `json:"draining"`
	// DrainReason is shown to users who are refused because of it.
	DrainReason string `json:"drainReason,omitempty"`
	// ReportEvery is how often the agent reports when nothing changes, in seconds.
	ReportEvery int32 `json:"reportEvery"`
	// RDPKey is the kind of key that the host's RDP certificate is to be over: a host that has one over another renews. Zero
	// where the pool issues none, and from brokers of before.
	RDPKey rdpkey.Kind `json:"rdpKey,omitzero"`
}

// HostDisplaced tells the connections of one agent's identity that one of them is about to be closed, because a newer one
// came. Where the newer is not the agent's own, another machine has its key.
type HostDisplaced struct {
	// Broker is the server's name, Conn the connection's id there.
	Broker string `json:"broker"`
	Conn   uint64 `json:"conn"`
}

// HostReport is an agent's presence: sent at start, every HostConfig.ReportEvery seconds, and at once after a change.
type HostReport struct {
	Pool string `json:"pool"`
	Host string `json:"host"`
	// Boot is random per agent start, so that a reader tells a restart from a late message.
	Boot string `json:"boot"`
	// Sequence grows with each report of one boot.
	Sequence         uint64 `json:"sequence"`
	ConfigGeneration int64  `json:"configGeneration"`
	AgentVersion     string `json:"agentVersion"`
	OS               string `json:"os"`
	// RDPReady says that the RDP server on the host answered the agent's last probe.
	RDPReady bool `json:"rdpReady"`
	// Message says why RDPReady is false.
	Message  string        `json:"message,omitempty"`
	Sessions []HostSession `json:"sessions,omitempty"`
	// Load is the 1-minute load average per CPU, 0 where the OS has none.
	Load float64 `json:"load,omitempty"`
	// CertificateFingerprint is the SHA-256 of the RDP certificate that the host serves, in hex.
	CertificateFingerprint string `json:"certificateFingerprint,omitempty"`
	CertificateNotAfter    string `json:"certificateNotAfter,omitempty"`
	// Logins says that the host logs people in by their connections, to HostConnect.Account.
	Logins bool `json:"logins,omitempty"`
	// LoginsRefused counts the logins by connection that the host refused since its agent's start, by reason.
	LoginsRefused map[string]uint64 `json:"loginsRefused,omitempty"`
	// Leaving says that the agent stops now: the host leaves placement at once.
	Leaving bool `json:"leaving,omitempty"`
}

// What can be done to a session.
const (
	ActEnd        = "end"        // log off: the desktop and what runs in it end
	ActDisconnect = "disconnect" // the client's connection ends, the desktop stays
	ActMessage    = "message"    // a window with a text on the session's display
)

// MaxMessageText bounds SessionAct.Text, in bytes.
const MaxMessageText = 2 << 10

// SessionAct tells a host's agent what to do to one session. SessionID is that of the connect that brought its user here
// last, as the proof in the host's reports has it; the desktop may have outlived that connection.
type SessionAct struct {
	SessionID  string `json:"sessionId"`
	ActivityID string `json:"activityId,omitempty"`
	// Act is ActEnd, ActDisconnect or ActMessage.
	Act string `json:"act"`
	// Proof is the one that the host reports with the session: it names a desktop whose connection has ended.
	Proof string `json:"proof,omitempty"`
	// Text is the message: plain text, at most MaxMessageText bytes.
	Text string `json:"text,omitempty"`
	// By says who wants it, for the host's log.
	By string `json:"by,omitempty"`
}

// SessionActReply is the agent's answer once it was done. Err set means that it was not.
type SessionActReply struct {
	Err *refusal.Error `json:"error,omitempty"`
	// Detail says what was done, for logs and timelines.
	Detail string `json:"detail,omitempty"`
}

// LoginReasons are the keys of HostReport.LoginsRefused: why a login by connection was refused (agent/login says what each
// means). Readers ignore others.
var LoginReasons = []string{
	"not-ours", "shared", "not-connected", "wrong-account", "used", "late", "caller", "bad-request", "account", "busy",
}

// Session states.
const (
	SessionPending      = "Pending" // accepted, not joined yet
	SessionActive       = "Active"
	SessionDisconnected = "Disconnected"
)

// HostSession is one session on a host, as the host sees it.
type HostSession struct {
	SessionID  string    `json:"sessionId,omitempty"`
	ActivityID string    `json:"activityId,omitempty"`
	User       string    `json:"user"`
	Resource   string    `json:"resource,omitempty"`
	State      string    `json:"state"`
	Since      time.Time `json:"since"`
	// Gateway and Instance name the pod that carries it, empty where none does.
	Gateway  string `json:"gateway,omitempty"`
	Instance string `json:"instance,omitempty"`
	// Account is whose account on the host it runs in, where the host knows.
	Account string `json:"account,omitempty"`
	// Proof is of the HostConnect that brought User here.
	Proof string `json:"proof,omitempty"`
	// Assumed says that the host can't see whether the session lives on: its user's connection ended a moment ago. It
	// draws the user back and takes no place.
	Assumed bool `json:"assumed,omitempty"`
}

// GatewayReport is one gateway pod's load, sent every few seconds and after a change.
type GatewayReport struct {
	Gateway     string    `json:"gateway"`
	Instance    string    `json:"instance"`
	Sessions    int32     `json:"sessions"`
	Pending     int32     `json:"pending"`
	MaxSessions int32     `json:"maxSessions"`
	Draining    bool      `json:"draining"`
	At          time.Time `json:"at"`
	// Latencies is the round trip from this pod to each of the workspace's other gateways that answered of late, in
	// microseconds, by name.
	Latencies map[string]int64 `json:"latencies,omitempty"`
}

// EndSession tells a gateway pod to end one session.
type EndSession struct {
	SessionID string `json:"sessionId"`
	Reason    string `json:"reason"`
}

// CheckMessageText says why a text can't be shown to a user: it is plain text, and can't change how other text reads.
func CheckMessageText(text string) error {
	switch {
	case strings.TrimSpace(text) == "":
		return errors.New("the message has no text")
	case len(text) > MaxMessageText:
		return fmt.Errorf("the message has %d bytes, and at most %d are shown", len(text), MaxMessageText)
	case !utf8.ValidString(text):
		return errors.New("the message is not UTF-8")
	}
	for _, r := range text {
		switch {
		case r == '\n' || r == '\t':
		case unicode.IsControl(r), r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069:
			return fmt.Errorf("the message has the control character %U: only line breaks and tabs are shown", r)
		}
	}
	return nil
}
