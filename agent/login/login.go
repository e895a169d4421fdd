// Package login is the login by connection: whoever the brokers sent to this session host is logged in there as that
// person, with no password.
//
//	book.go      a loopback address of its own for each session that dials the RDP server
//	sockets.go   the kernel's table of TCP sockets: who else comes from such an address?
//	records.go   whose account is whose on this host, kept over restarts
//	protocol.go  what helper and agent say to each other over the agent's Unix socket
//	server.go    the agent's end: is this login that session's?
//	list.go      accounts for a container beside the agent's
//	display.go   is a session's X display its user's own?
//	elsewhere.go which connections can't be the agent's
//	helper.go    the other end: what PAM runs, as root, where the desktops are; makes accounts
//
// The agent dials the RDP server of its own machine from an address of 127.0.0.0/8 that only this session has. xrdp's
// sesman gives PAM that address as the remote host, PAM runs the helper, and the helper asks the agent:
//
//	helper -> agent  {"user":"alice","remote":"127.5.6.7","service":"xrdp-sesman"}
//	agent -> helper  {"account":{"name":"alice","create":true,"uid":10345},"comment":"alice@example.com"}
//	helper -> agent  {"uid":10345}            the account is there, or {"failed":"why not"}
//	agent -> helper  {"ok":true}              and PAM lets her in; or {"error":"…"}
//
// A local user may dial from any such address too. So the agent looks into the kernel's table: exactly one connection
// comes from the address, it is the agent's own, it is young, nobody has logged in by it, and the name is its session's.
// Everything else is refused, counted by Reason and reported with the session that it aimed at.
package login

import (
	"fmt"
	"time"
)

// Reason is why a login was refused: one of bus.LoginReasons.
type Reason string

// The reasons.
const (
	NotOurs      Reason = "not-ours"      // no session of this host dials from that address
	Shared       Reason = "shared"        // another connection comes from the session's address
	NotConnected Reason = "not-connected" // the session's own connection is gone
	WrongAccount Reason = "wrong-account" // the name is another than the session's
	Used         Reason = "used"          // the session has logged in already
	Late         Reason = "late"          // the session is too old to log in
	Caller       Reason = "caller"        // whoever asks is not root
	BadRequest   Reason = "bad-request"   // the request can't be read
	Account      Reason = "account"       // the account can't be made, or isn't the person's
	Busy         Reason = "busy"          // too many ask at once
)

// Refused is a login that was refused.
type Refused struct {
	Reason Reason
	// Message says what happened, for the host's log and the administrator.
	Message string
	// Session and Activity are the session's that the attempt aimed at; empty where it aimed at none.
	Session, Activity string
}

func (r *Refused) Error() string { return fmt.Sprintf("%s (%s)", r.Message, r.Reason) }

func refuse(reason Reason, format string, args ...any) *Refused {
	return &Refused{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// at names the session that an attempt aimed at.
func (r *Refused) at(l *Lease) *Refused {
	r.Session, r.Activity = l.session.ID, l.session.Activity
	return r
}

// Deadline is how long after its dial a session may log in. xrdp's own login window closes sooner.
const Deadline = 2 * time.Minute
