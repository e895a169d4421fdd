// Package model is what the broker knows of the declared world, as plain Go values: no Kubernetes type gets past
// broker/inventory, which fills these in and carries out the writes.
//
// A Snapshot and all that it points to is never changed once it is handed out.
package model

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/rdpkey"
)

// Snapshot is the declared world at one moment.
type Snapshot struct {
	// Workspace is nil while the object does not exist.
	Workspace *Workspace
	Pools     map[string]*Pool
	Hosts     map[string]*Host
	// Gateways are those that the workspace's selector picks, by name.
	Gateways []*Gateway
}

// Gateway finds a gateway of the workspace, nil if there is none of that name.
func (s *Snapshot) Gateway(name string) *Gateway {
	for _, g := range s.Gateways {
		if g.Name == name {
			return g
		}
	}
	return nil
}

// Workspace with its defaults applied.
type Workspace struct {
	Name           string
	DisplayName    string
	Hostname       string
	OIDC           OIDC
	Resources      []Resource
	TicketLifetime time.Duration
	Revocations    []Revocation
}

// Revocation takes back what a user has, or one ticket.
type Revocation struct {
	User, Ticket string // one of them
	Reason       string // for the user; may be empty
	// Before is as of when what the user has is good again; zero where nothing is.
	Before time.Time
}

// Says tells the user whom, or whose ticket, the revocation is of.
func (r *Revocation) Says(workspace, user string) string {
	why := ""
	if r.Reason != "" {
		why = " (" + r.Reason + ")"
	}
	switch {
	case r.Ticket != "":
		return fmt.Sprintf("An administrator of workspace %s has taken this connection file back%s: download it again, or run `rdv connect` again.", workspace, why)
	case r.Before.IsZero():
		return fmt.Sprintf("%s is disabled in workspace %s%s: ask its administrator.", user, workspace, why)
	}
	return fmt.Sprintf("An administrator of workspace %s has taken back what %s signed in to before %s%s: sign in again (`rdv login`), and download connection files again.",
		workspace, user, r.Before.UTC().Format(time.RFC3339), why)
}

// Revoked gives the revocation of what rests on a user's sign-in at since, or on a ticket, nil where there is none. Upper
// and lower case of a user's name are the same here, so that a spelling lets nobody through.
func (w *Workspace) Revoked(user, ticket string, since time.Time) *Revocation {
	for i := range w.Revocations {
		r := &w.Revocations[i]
		switch {
		case r.Ticket != "" && r.Ticket == ticket:
			return r
		case r.User != "" && strings.EqualFold(r.User, user) && (r.Before.IsZero() || since.Before(r.Before)):
			return r
		}
	}
	return nil
}

// GrantsGroups says whether some resource is granted to a group.
func (w *Workspace) GrantsGroups() bool {
	return slices.ContainsFunc(w.Resources, func(r Resource) bool { return len(r.Groups) > 0 })
}

// Resource finds a resource, nil if there is none of that name.
func (w *Workspace) Resource(name string) *Resource {
	for i := range w.Resources {
		if w.Resources[i].Name == name {
			return &w.Resources[i]
		}
	}
	return nil
}

// OIDC says who may sign users in.
type OIDC struct {
	IssuerURL     string
	ClientID      string
	Audiences     []string
	UsernameClaim string
	GroupsClaim   string
	Scopes        []string
}

// User gives the spelling of a user's name by which everything compares it: names that differ in case alone are one
// person's, as mail addresses and UPNs are. The claim sub is exact (OpenID Connect Core 1.0, section 2). A letter of
// another script that has an ASCII letter for its lower case (the Kelvin sign) keeps its own: it is not that letter.
func (o *OIDC) User(name string) string {
	if o.UsernameClaim == "sub" {
		return name
	}
	return strings.Map(func(r rune) rune {
		lower := unicode.ToLower(r)
		if (r < utf8.RuneSelf) != (lower < utf8.RuneSelf) {
			return r
		}
		return lower
	}, name)
}

// Users is User of several names.
func (o *OIDC) Users(names []string) []string {
	if names == nil {
		return nil
	}
	all := make([]string, len(names))
	for i, name := range names {
		all[i] = o.User(name)
	}
	return all
}

// Resource types.
const (
	Desktop   = "Desktop"
	RemoteApp = "RemoteApp"
)

// Resource is one desktop or app.
type Resource struct {
	Name        string
	DisplayName string
	Type        string
	Pool        string
	// Program and Arguments are a RemoteApp's.
	Program, Arguments string
	Users, Groups      []string
	Redirection        Redirection
	Icon               []byte // PNG
}

// Grants says whether a user, of these groups, may use the resource.
func (r *Resource) Grants(user string, groups []string) bool {
	return slices.Contains(r.Users, user) || slices.ContainsFunc(r.Groups, func(g string) bool { return slices.Contains(groups, g) })
}

// GrantedGroups are those of the user's groups that the resource names, in order, each once.
func (r *Resource) GrantedGroups(groups []string) []string {
	var named []string
	for _, g := range r.Groups {
		if slices.Contains(groups, g) {
			named = append(named, g)
		}
	}
	slices.Sort(named)
	return slices.Compact(named)
}

// Redirection says what of the user's machine a session may reach.
type Redirection struct {
	Clipboard, Audio, Microphone, Drives, Printers, SmartCards, Ports bool
}

// Pool with its defaults applied.
type Pool struct {
	Name, UID        string
	Generation       int64
	Personal         bool
	DepthFirst       bool // Pooled only
	Automatic        bool // Personal only
	MaxSessions      int32
	HeartbeatTimeout time.Duration
	ConnectTimeout   time.Duration
	// RDPIssuer signs the hosts' RDP certificates; nil where hosts keep their own.
	RDPIssuer   *config.Issuer
	RDPDuration time.Duration
	// RDPKey is the kind of key that hosts make for it. Where it is Chosen, no other is signed.
	RDPKey       rdpkey.Kind
	RDPKeyChosen bool
	Properties   []string
	Registration Registration
	// MaxHosts bounds the hosts that machines make with one token of the pool.
	MaxHosts int
	// Accounts is nil where the hosts ask people for credentials themselves.
	Accounts *Accounts
}

// Accounts says how a person becomes an account of a pool's hosts.
type Accounts struct {
	// Create has hosts make accounts; otherwise they know them.
	Create bool
	// NameClaim gives the name; empty means the workspace's user name.
	NameClaim string
	// UIDClaim gives the user id; empty means the range.
	UIDClaim          string
	FirstUID, LastUID uint32
}

// Claims are those of a user's token that decide on the account.
func (a *Accounts) Claims() []string {
	if a == nil {
		return nil
	}
	return slices.DeleteFunc([]string{a.NameClaim, a.UIDClaim}, func(c string) bool { return c == "" })
}

// Registration tells of a registration token.
type Registration struct {
	TokenHash string // SHA-256 in hex, empty where there is no token
	Expires   time.Time
}

// Host is one session host as declared, and what its status says.
type Host struct {
	Name, Pool string
	// UID tells the object from one of the same name before or after it.
	UID        string
	Generation int64
	Created    time.Time
	// Pod says that the operator made it from its pool's template, and sees to it that it runs.
	Pod          bool
	AssignedUser string
	// New says that the operator has not seen the host yet: it may be somebody's, whose it was before it was deleted.
	// Writer.GetHost says so, and a Snapshot doesn't.
	New          bool
	Drain        *Drain
	Registration Registration
	// MadeByToken says that a machine made it with its pool's token: nobody declared it.
	MadeByToken bool
	// Enrolment is zero where the host has never enrolled.
	Enrolment Enrolment
	// Revoke is what the object's annotation wants the enrolment revoked for, empty for nothing.
	Revoke string
	// Agent is nil where no agent has ever reported.
	Agent *AgentStatus
}

// Enrolment is what is kept of one. A host that has enrolled has a TokenHash.
type Enrolment struct {
	TokenHash string // SHA-256 in hex, of the token that was used
	// Serial of the identity that was issued, in hex.
	Serial string
	At     time.Time
	// HostUID is that of the object that was enrolled.
	HostUID string
	// Key is the fingerprint (identity.KeyFingerprint) of the enrolled key; empty where the enrolment was revoked, or where
	// a release made it that kept none.
	Key string
	// NextKey is that of a renewal whose key the agent has yet to come with.
	NextKey string
	// Renewed is when certificates were last issued, other than by the enrolment.
	Renewed time.Time
	// RevokedFor is what was last carried out of Host.Revoke.
	RevokedFor string
}

// Revoked says that the enrolment was revoked, or is to be.
func (h *Host) Revoked() bool {
	e := &h.Enrolment
	return h.Revoke != "" && h.Revoke != e.RevokedFor || e.Key == "" && e.RevokedFor != ""
}

// Drain keeps new sessions off a host until Until, if that is set.
type Drain struct {
	Reason string
	Until  time.Time
}

// Draining says whether new sessions are to be kept off the host at now.
func (h *Host) Draining(now time.Time) bool {
	return h.Drain != nil && (h.Drain.Until.IsZero() || now.Before(h.Drain.Until))
}

// AgentStatus is what is written of an agent's reports.
type AgentStatus struct {
	Connected         bool
	LastHeartbeat     time.Time
	Version, OS       string
	RDPReady          bool
	Message           string
	Sessions          int32
	DrainAcknowledged bool
	// AcknowledgedGeneration is the host object's, for which the drain is acknowledged; 0 where it isn't.
	AcknowledgedGeneration int64
	CertificateFingerprint string
	CertificateExpires     time.Time
	// SecondMachine is when two machines were last seen to connect as the host by turns, zero for never.
	SecondMachine time.Time
}

// Gateway is one gateway that the workspace uses.
type Gateway struct {
	Name, Region string
	Hostname     string
	Port         int32
	// CABundle (PEM) verifies the gateway's public certificate; empty means public roots.
	CABundle string
	Ready    bool
	// Sessions and Instances are what the status says.
	Sessions  int32
	Instances []GatewayInstance
	// Shared says that other workspaces use the gateway, too.
	Shared bool
}

// GatewayInstance is one pod of a gateway, with the sessions of one workspace on it.
type GatewayInstance struct {
	Name, Workspace string
	Sessions        int32
	Draining        bool
}

// Source gives the newest snapshot. It never blocks and never gives nil.
type Source interface{ Snapshot() *Snapshot }

// Errors of a Writer that callers act on.
var (
	// ErrConflict says that the object changed meanwhile.
	ErrConflict = errors.New("the object was changed by somebody else meanwhile")
	// ErrExists says that an object of that name exists.
	ErrExists = errors.New("the object exists")
	// ErrNotFound says that it doesn't.
	ErrNotFound = errors.New("no such object")
	// ErrDenied says that an issuer refused to sign.
	ErrDenied = errors.New("the issuer refused")
)

// CertificateRequest asks an issuer for a certificate.
type CertificateRequest struct {
	// Host is what the certificate is for; it becomes part of the request object's name.
	Host     string
	CSR      []byte // PEM
	Issuer   config.Issuer
	Duration time.Duration
	// Server adds the server usage to the client usage, or stands alone without Client.
	Client, Server bool
}

// Writer carries out the few writes of the broker. A context bounds each.
type Writer interface {
	// CreateHost makes the SessionHost of a machine that enrols with its pool's token, of this hash; ErrExists where there
	// is one.
	CreateHost(ctx context.Context, pool *Pool, host, tokenHash string) error
	// CountHosts counts the hosts that there are because CreateHost made them with the token, up to most.
	CountHosts(ctx context.Context, tokenHash string, most int) (int, error)
	// GetHost reads a host from the API server itself, with a version for MarkEnrolled; ErrNotFound where there is none.
	GetHost(ctx context.Context, host string) (h *Host, version string, err error)
	// MarkEnrolled records an enrolment as a whole, or a change of one, provided that the host is still at version; otherwise ErrConflict.
	MarkEnrolled(ctx context.Context, host, version string, e Enrolment) error
	// WriteAgent records an agent's state.
	WriteAgent(ctx context.Context, host string, status AgentStatus) error
	// Assign gives an unassigned host to a user for good. It returns whose host it is afterwards: somebody else's, where
	// another broker was faster.
	Assign(ctx context.Context, host, user string) (owner string, err error)
	// ReadAccounts reads who was given which account in a pool, by account name, with a version for AddAccount.
	ReadAccounts(ctx context.Context, pool string) (accounts map[string]string, version string, err error)
	// AddAccount records one more, provided that the list is still at version; otherwise ErrConflict.
	AddAccount(ctx context.Context, pool, version, name, value string) error
	// WriteGateway records how many sessions go through a gateway, and those of this workspace by instance.
	WriteGateway(ctx context.Context, gateway string, sessions int32, mine []GatewayInstance) error
	// Sign has an issuer sign, and waits for it. It returns the chain and the issuer's CA, in PEM. ErrDenied is final.
	Sign(ctx context.Context, r CertificateRequest) (chain, ca []byte, err error)
}
