// Package ticket is the secret in a downloaded .rdp file: a JWT (RFC 7519) signed with the workspace's Ed25519 key. A
// client presents it as PAA cookie (MS-TSGU 2.2.10.14) or as bearer token. The gateway checks it alone; the broker checks it
// again and authorises against the Workspace as it is by then.
package ticket

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Audience is who a ticket is for.
const Audience = "rendezvous-gateway"

const (
	// MaxLength bounds a ticket in bytes, when it is made and before anything parses it. A PAA cookie could hold 32,767
	// characters; a relay reads request heads of 16 KiB.
	MaxLength = 12 << 10
	// maxGroups bounds the groups in a ticket, in bytes of JSON: some 25 GUIDs. One group that grants is enough, so a ticket
	// that leaves others out is as good, and a host's report carries as much again for each of its sessions.
	maxGroups = 1 << 10
)

// leeway forgives clocks that differ between broker and gateway pods.
const leeway = 5 * time.Second

// Claims is what a ticket says.
type Claims struct {
	// ID is random per ticket.
	ID        string
	Namespace string
	Workspace string
	User      string
	// Groups are those of the user's groups that the resource named when the ticket was made, as many as FitGroups takes.
	Groups   []string
	Resource string
	// Target is the name that the client must ask for.
	Target string
	// Account holds the claims of the sign-in that the account on the host follows from: those that the HostPool named.
	Account map[string]string
	// ActivityID is set where the ticket was made for one connect.
	ActivityID string
	// RedirectFlags goes into TUNNEL_AUTH_RESP.
	RedirectFlags uint32
	// SignedIn is when the token was issued that the ticket rests on; zero in tickets of brokers that didn't say.
	SignedIn time.Time
	IssuedAt time.Time
	Expires  time.Time
}

// Since is what the ticket's user and groups are as of.
func (c *Claims) Since() time.Time {
	if c.SignedIn.IsZero() {
		return c.IssuedAt
	}
	return c.SignedIn
}

// FitGroups gives as many of the groups as a ticket may name, the first of them in any case.
func FitGroups(groups []string) []string {
	size := 0
	for i, g := range groups {
		text, _ := json.Marshal(g) // a string always can be
		if size += len(text) + len(","); size > maxGroups && i > 0 {
			return groups[:i]
		}
	}
	return groups
}

type private struct {
	Groups        []string          `json:"grp,omitempty"`
	Resource      string            `json:"res"`
	Target        string            `json:"tgt"`
	ActivityID    string            `json:"act,omitempty"`
	Account       map[string]string `json:"acc,omitempty"`
	RedirectFlags uint32            `json:"rdf,omitempty"`
	// SignedIn is in seconds since 1970.
	SignedIn int64 `json:"sgn,omitempty"`
}

// Issuer names the workspace that signed a ticket.
func Issuer(namespace, workspace string) string { return "rendezvous:" + namespace + "/" + workspace }

// Sign makes the ticket with the workspace's key. One that no gateway would read is an error.
func Sign(c Claims, key ed25519.PrivateKey) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("ticket: %w", err)
	}
	priv := private{Groups: c.Groups, Resource: c.Resource, Target: c.Target, ActivityID: c.ActivityID, RedirectFlags: c.RedirectFlags, Account: c.Account}
	if !c.SignedIn.IsZero() {
		priv.SignedIn = c.SignedIn.Unix()
	}
	raw, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: Issuer(c.Namespace, c.Workspace), Audience: jwt.Audience{Audience}, Subject: c.User, ID: c.ID,
		IssuedAt: jwt.NewNumericDate(c.IssuedAt), Expiry: jwt.NewNumericDate(c.Expires),
	}).Claims(priv).Serialize()
	if err != nil {
		return "", fmt.Errorf("ticket: %w", err)
	}
	if len(raw) > MaxLength {
		return "", fmt.Errorf("ticket: it is %d bytes long, more than the %d that gateways read: it names %d groups", len(raw), MaxLength, len(c.Groups))
	}
	return raw, nil
}

// Ticket is a ticket whose signature nobody has checked yet.
type Ticket struct {
	// Namespace and Workspace are what it claims to be of, so that the caller finds the key for Verify.
	Namespace, Workspace string

	token  *jwt.JSONWebToken
	claims struct {
		jwt.Claims
		private
	}
}

// Parse reads a ticket. Its errors are *refusal.Error.
func Parse(raw string) (*Ticket, error) {
	tok, err := parse(raw)
	if err != nil {
		return nil, err
	}
	t := &Ticket{token: tok}
	if err := tok.UnsafeClaimsWithoutVerification(&t.claims); err != nil {
		return nil, invalid("its claims can't be read")
	}
	name, ok := strings.CutPrefix(t.claims.Issuer, "rendezvous:")
	namespace, workspace, ok2 := strings.Cut(name, "/")
	if !ok || !ok2 || !identity.IsLabel(namespace) || !identity.IsLabel(workspace) { // refusals name them
		return nil, invalid("its issuer is no workspace")
	}
	t.Namespace, t.Workspace = namespace, workspace
	return t, nil
}

// Verify checks signature, audience and expiry at now. Its errors are *refusal.Error.
func (t *Ticket) Verify(key ed25519.PublicKey, now time.Time) (Claims, error) {
	if err := t.token.Claims(key); err != nil { // the very bytes that Parse has read
		return Claims{}, invalid("its signature is not this workspace's")
	}
	std, priv := &t.claims.Claims, &t.claims.private
	err := std.ValidateWithLeeway(jwt.Expected{Issuer: Issuer(t.Namespace, t.Workspace), AnyAudience: jwt.Audience{Audience}, Time: now}, leeway)
	switch {
	case errors.Is(err, jwt.ErrExpired):
		return t.verified(), refusal.New(refusal.TicketExpired, "The ticket in the connection file expired at %s: refresh the feed, or run `rdv connect` again, for a new one.", std.Expiry.Time().UTC().Format(time.RFC3339))
	case err != nil:
		return Claims{}, invalid(err.Error())
	case std.Expiry == nil || std.IssuedAt == nil || std.Subject == "" || priv.Resource == "":
		return Claims{}, invalid("it lacks a claim")
	}
	return t.verified(), nil
}

// verified gives the claims, whose signature was found good.
func (t *Ticket) verified() Claims {
	std, priv := &t.claims.Claims, &t.claims.private
	c := Claims{
		ID: std.ID, Namespace: t.Namespace, Workspace: t.Workspace, User: std.Subject, Groups: priv.Groups, Resource: priv.Resource,
		Target: priv.Target, ActivityID: priv.ActivityID, RedirectFlags: priv.RedirectFlags, Account: priv.Account,
	}
	if std.IssuedAt != nil {
		c.IssuedAt = std.IssuedAt.Time()
	}
	if std.Expiry != nil {
		c.Expires = std.Expiry.Time()
	}
	if priv.SignedIn != 0 {
		c.SignedIn = time.Unix(priv.SignedIn, 0)
	}
	return c
}

// Verify parses a ticket that must be of one workspace, and checks it as Ticket.Verify does.
func Verify(raw string, key ed25519.PublicKey, namespace, workspace string, now time.Time) (Claims, error) {
	t, err := Parse(raw)
	if err != nil {
		return Claims{}, err
	}
	if t.Namespace != namespace || t.Workspace != workspace {
		return Claims{}, invalid("it is another workspace's")
	}
	return t.Verify(key, now)
}

func parse(raw string) (*jwt.JSONWebToken, error) {
	if raw == "" {
		return nil, refusal.New(refusal.TicketMissing, "The request carries no ticket: use a connection file from the workspace's feed, or `rdv connect`.")
	}
	if len(raw) > MaxLength {
		return nil, invalid(fmt.Sprintf("it is longer than %d bytes", MaxLength))
	}
	tok, err := jwt.ParseSigned(raw, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		return nil, invalid("it is not a signed ticket")
	}
	return tok, nil
}

func invalid(why string) error {
	return refusal.New(refusal.TicketInvalid, "The ticket was refused: %s. Download the connection file from the workspace again, unchanged.", why)
}
