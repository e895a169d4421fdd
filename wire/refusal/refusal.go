// Package refusal is the closed set of reasons for which Rendezvous turns a request down, with the text that a person
// reads. Every refusal carries a stable code (for machines, metrics labels and tests), a message that names the object
// or field and the way out, and the activity id of the connect that it ended.
package refusal

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// Code is the stable, lower-case name of a reason. It appears in JSON answers, metrics labels, logs and traces.
type Code string

// The reasons. Add to the end of a group; never rename one that has shipped.
const (
	// Tokens of the identity provider, at the feed.
	TokenMissing       Code = "token-missing"
	TokenInvalid       Code = "token-invalid" // bad form or signature, or wrong issuer
	TokenExpired       Code = "token-expired"
	TokenWrongAudience Code = "token-wrong-audience"
	IdentityAway       Code = "identity-provider-unavailable"

	// What the user may use.
	NotGranted      Code = "not-granted"
	UnknownResource Code = "unknown-resource"
	Revoked         Code = "revoked" // the user or the ticket, by the Workspace's revocations

	// Tickets, at the gateway.
	TicketMissing Code = "ticket-missing"
	TicketInvalid Code = "ticket-invalid" // forged, altered or of another workspace
	TicketExpired Code = "ticket-expired"
	WrongTarget   Code = "wrong-target" // the client asked for another name than the ticket's

	// Placement and hosts.
	NoHost       Code = "no-host-available"
	HostTimeout  Code = "host-timeout" // the host promised to dial and didn't, or did not answer
	HostRefused  Code = "host-refused"
	HostFull     Code = "host-full"
	HostDraining Code = "host-draining"
	HostNotReady Code = "host-not-ready" // the RDP server on the host does not answer
	// AccountRefused is a person who can't have the account that the pool's rule gives.
	AccountRefused Code = "account-refused"
	// UnknownSession is a session that has ended, or that is nobody's known.
	UnknownSession Code = "unknown-session"

	// Gateways and brokers.
	GatewayFull     Code = "gateway-full"
	GatewayDraining Code = "gateway-draining"
	AdmissionAway   Code = "gateway-container-unavailable"
	BrokerAway      Code = "broker-unavailable"
	JoinUnknown     Code = "join-secret-unknown" // wrong, late or used before
	UnknownInstance Code = "unknown-gateway-instance"
	Protocol        Code = "protocol-error"
	IdleTimeout     Code = "idle-timeout"
	DrainDeadline   Code = "drain-deadline"
	EndedByAdmin    Code = "ended-by-administrator"
	ProxyHeader     Code = "proxy-header-refused" // of a load balancer whose headers aren't believed

	// Enrolment.
	RegistrationInvalid Code = "registration-token-invalid" // unknown or revoked by rotation
	RegistrationExpired Code = "registration-token-expired"
	RegistrationSpent   Code = "registration-token-spent"
	BadRequest          Code = "bad-request"
	WrongRole           Code = "wrong-role" // a certificate of another role
	IssuerAway          Code = "issuer-unavailable"
	Internal            Code = "internal-error"
)

// Error is one refusal. It is an error, so that it travels through ordinary Go code, and JSON, so that it travels to clients.
type Error struct {
	Code Code `json:"code"`
	// Message names the object or field and the way out, in one or two sentences, without the activity id.
	Message string `json:"message"`
	// ActivityID is the connect (or request) that was refused; empty until the answering side fills it in.
	ActivityID string `json:"activityId,omitempty"`
}

// Error gives the message, the code and the activity id on one line.
func (e *Error) Error() string {
	if e.ActivityID == "" {
		return fmt.Sprintf("%s (%s)", e.Message, e.Code)
	}
	return fmt.Sprintf("%s (%s, activity %s)", e.Message, e.Code, e.ActivityID)
}

// Is makes errors.Is(err, &Error{Code: c}) compare by code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// New makes a refusal.
func New(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// From finds the refusal in err, or wraps err as Internal. It returns nil for nil.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Code: Internal, Message: err.Error()}
}

// With returns a copy of e that carries the activity id.
func (e *Error) With(activityID string) *Error {
	c := *e
	c.ActivityID = activityID
	return &c
}

// codes is the set of Codes. A test holds it to the constants above.
var codes = map[Code]bool{
	TokenMissing: true, TokenInvalid: true, TokenExpired: true, TokenWrongAudience: true, IdentityAway: true,
	NotGranted: true, UnknownResource: true, Revoked: true,
	TicketMissing: true, TicketInvalid: true, TicketExpired: true, WrongTarget: true,
	NoHost: true, HostTimeout: true, HostRefused: true, HostFull: true, HostDraining: true, HostNotReady: true, AccountRefused: true, UnknownSession: true,
	GatewayFull: true, GatewayDraining: true, AdmissionAway: true, BrokerAway: true, JoinUnknown: true, UnknownInstance: true,
	Protocol: true, IdleTimeout: true, DrainDeadline: true, EndedByAdmin: true, ProxyHeader: true,
	RegistrationInvalid: true, RegistrationExpired: true, RegistrationSpent: true, BadRequest: true, WrongRole: true, IssuerAway: true,
	Internal: true,
}

// MaxMessage bounds the message of a refusal that came from another process, in bytes.
const MaxMessage = 1 << 10

// Received is a refusal that another process sent, as it may be shown, counted and passed on: with a code of this set,
// or else instead, and a message of at most MaxMessage bytes on one line. The activity id is the receiver's to fill in.
// It gives nil for nil.
func Received(e *Error, instead Code) *Error {
	if e == nil {
		return nil
	}
	code := e.Code
	if !codes[code] {
		code = instead
	}
	return &Error{Code: code, Message: Line(e.Message, MaxMessage)}
}

// Line is a text that another process sent as one printable line of at most so many bytes.
func Line(text string, most int) string {
	// Cut first, so that a long text costs no more than a short one. What is cut may have been the rest of a letter.
	text = strings.ToValidUTF8(text[:min(len(text), most)], "")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
}
