// Package proof is the brokers' signed word that one of them sent a user to a session host. A broker hands it to the
// host's agent with the connect (bus.HostConnect.Proof), the agent returns it with the session in its reports
// (bus.HostSession.Proof), and any broker checks it there. So brokers share no list of sessions, and a host can't claim a
// user that nobody sent to it.
//
// A proof is a compact JWS (RFC 7515) over JWT claims (RFC 7519), signed by EdDSA with the workspace's ticket key:
//
//	header   {"alg":"EdDSA","typ":"rendezvous-session+jwt"}, exactly these bytes
//	claims   iss aud sub iat exp jti as in a JWT; pool host uid res grp tkt sgn act gw ins acc cli are ours
//
// The audience and the type keep it apart from a ticket (wire/ticket), which the same key signs: neither is ever taken
// for the other. Only brokers read proofs, so there is no older or newer form to tell apart: a reader ignores claims that
// it doesn't know.
package proof

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/wire/ticket"
)

const (
	// Audience is who a proof is for.
	Audience = "rendezvous-session"
	// Lifetime bounds how long after a connect its session still draws its user back to the host.
	Lifetime = 30 * 24 * time.Hour
	// MaxLength bounds a proof in bytes, before anything is read of it. It says little more than the ticket of its connect.
	MaxLength = ticket.MaxLength
	// leeway forgives clocks that differ between broker pods.
	leeway = 5 * time.Second
)

// The protected header never varies. A signature over any other first part is not ours, whatever it says there.
const headerJSON = `{"alg":"EdDSA","typ":"rendezvous-session+jwt"}`

var (
	encoding = base64.RawURLEncoding.Strict()
	header   = encoding.EncodeToString([]byte(headerJSON))
)

// Claims is what a proof says: a broker sent User, by the ticket TicketID, for the session SessionID, to this host.
type Claims struct {
	Namespace, Workspace string
	// Pool, Host and HostUID name the SessionHost: one that is made again under the same name has another UID.
	Pool, Host, HostUID string
	User                string
	Resource            string
	// Groups are the ticket's: those of the user's that grants named when it was made.
	Groups []string
	// TicketID is the ticket's own; SessionID and ActivityID are the connect's.
	TicketID, SessionID, ActivityID string
	// SignedIn is what the ticket's user and groups were as of; zero where it didn't say.
	SignedIn time.Time
	// Gateway and Instance name the pod that held the client.
	Gateway, Instance string
	// Account is where the session logs in on the host, empty where the RDP server asks for credentials itself.
	Account string
	// Client is the address that came to the gateway, empty where that didn't say.
	Client            string
	IssuedAt, Expires time.Time
}

// wire is a proof's payload.
type wire struct {
	Issuer   string   `json:"iss"`
	Audience string   `json:"aud"`
	User     string   `json:"sub"`
	Session  string   `json:"jti"`
	IssuedAt int64    `json:"iat"` // seconds since 1970
	Expires  int64    `json:"exp"`
	Pool     string   `json:"pool"`
	Host     string   `json:"host"`
	HostUID  string   `json:"uid"`
	Resource string   `json:"res"`
	Groups   []string `json:"grp,omitempty"`
	Ticket   string   `json:"tkt,omitempty"`
	SignedIn int64    `json:"sgn,omitempty"` // seconds since 1970
	Activity string   `json:"act,omitempty"`
	Gateway  string   `json:"gw,omitempty"`
	Instance string   `json:"ins,omitempty"`
	Account  string   `json:"acc,omitempty"`
	Client   string   `json:"cli,omitempty"`
}

// Sign makes the proof with the workspace's ticket key. Claims that Verify would refuse are an error.
func Sign(c Claims, key ed25519.PrivateKey) (string, error) {
	w := wire{
		Issuer: ticket.Issuer(c.Namespace, c.Workspace), Audience: Audience, User: c.User, Session: c.SessionID,
		IssuedAt: c.IssuedAt.Unix(), Expires: c.Expires.Unix(), Pool: c.Pool, Host: c.Host, HostUID: c.HostUID,
		Resource: c.Resource, Groups: c.Groups, Ticket: c.TicketID, Gateway: c.Gateway, Instance: c.Instance, Account: c.Account,
		Activity: c.ActivityID, Client: c.Client,
	}
	if !c.SignedIn.IsZero() {
		w.SignedIn = c.SignedIn.Unix()
	}
	if err := w.complete(); err != nil {
		return "", err
	}
	payload, err := json.Marshal(w)
	if err != nil {
		return "", fmt.Errorf("proof: %w", err)
	}
	signed := header + "." + encoding.EncodeToString(payload)
	raw := signed + "." + encoding.EncodeToString(ed25519.Sign(key, []byte(signed)))
	if len(raw) > MaxLength {
		return "", fmt.Errorf("proof: it is %d bytes long, more than %d: the ticket names %d groups", len(raw), MaxLength, len(c.Groups))
	}
	return raw, nil
}

// Verify checks a proof of one workspace at now: its form, its signature and then its claims. Whose session it is for,
// and on which host, is for the caller to compare.
func Verify(raw string, key ed25519.PublicKey, namespace, workspace string, now time.Time) (Claims, error) {
	if len(raw) > MaxLength {
		return Claims{}, fmt.Errorf("proof: it is longer than %d bytes", MaxLength)
	}
	end := strings.LastIndexByte(raw, '.')
	first, payload, ok := strings.Cut(raw[:max(end, 0)], ".")
	if !ok || first != header {
		return Claims{}, errors.New("proof: it is not of this form")
	}
	// The decoder skips line breaks. There is one text for one proof, so that who keeps proofs by their text keeps each once.
	signature, err := encoding.DecodeString(raw[end+1:])
	if err != nil || encoding.EncodeToString(signature) != raw[end+1:] || len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, []byte(raw[:end]), signature) {
		return Claims{}, errors.New("proof: its signature is not this workspace's")
	}
	var w wire
	data, err := encoding.DecodeString(payload)
	if err == nil {
		err = json.Unmarshal(data, &w)
	}
	if err != nil {
		return Claims{}, errors.New("proof: its claims can't be read")
	}
	if err := w.complete(); err != nil {
		return Claims{}, err
	}
	issued, expires := time.Unix(w.IssuedAt, 0), time.Unix(w.Expires, 0)
	switch {
	case w.Issuer != ticket.Issuer(namespace, workspace):
		return Claims{}, errors.New("proof: it is another workspace's")
	case w.Audience != Audience:
		return Claims{}, fmt.Errorf("proof: its audience is %q, not %q", w.Audience, Audience)
	case now.Add(leeway).Before(issued):
		return Claims{}, errors.New("proof: it is of the future")
	case !now.Before(expires.Add(leeway)):
		return Claims{}, errors.New("proof: it has expired")
	}
	c := Claims{
		Namespace: namespace, Workspace: workspace, Pool: w.Pool, Host: w.Host, HostUID: w.HostUID, User: w.User, Resource: w.Resource,
		Groups: w.Groups, TicketID: w.Ticket, SessionID: w.Session, Gateway: w.Gateway, Instance: w.Instance, Account: w.Account,
		ActivityID: w.Activity, Client: w.Client, IssuedAt: issued, Expires: expires,
	}
	if w.SignedIn != 0 {
		c.SignedIn = time.Unix(w.SignedIn, 0)
	}
	return c, nil
}

// complete says which claim is missing.
func (w *wire) complete() error {
	for _, c := range []struct{ name, value string }{
		{"sub", w.User}, {"jti", w.Session}, {"pool", w.Pool}, {"host", w.Host}, {"uid", w.HostUID}, {"res", w.Resource},
	} {
		if c.value == "" {
			return fmt.Errorf("proof: it lacks the claim %q", c.name)
		}
	}
	return nil
}
