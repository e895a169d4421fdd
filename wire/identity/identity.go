// Package identity says who is at the other end of a mutual-TLS connection. Every certificate that a workspace's
// internal CA issues carries exactly one URI name:
//
//	rendezvous://NAMESPACE/WORKSPACE/broker
//	rendezvous://NAMESPACE/WORKSPACE/gateway/GATEWAY
//	rendezvous://NAMESPACE/WORKSPACE/agent/POOL/HOST
//	rendezvous://NAMESPACE/WORKSPACE/ticket-signer
//	rendezvous://NAMESPACE/WORKSPACE/operator
//
// The role is part of the name, so that a certificate made for one role is refused in every other.
package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

const scheme = "rendezvous"

// Role is what the holder of a certificate may be.
type Role string

// The roles.
const (
	RoleBroker       Role = "broker"
	RoleGateway      Role = "gateway"
	RoleAgent        Role = "agent"
	RoleTicketSigner Role = "ticket-signer"
	RoleOperator     Role = "operator"
)

// ID is the identity that a certificate carries.
type ID struct {
	Namespace string
	Workspace string
	Role      Role
	Gateway   string // RoleGateway only
	Pool      string // RoleAgent only
	Host      string // RoleAgent only
}

// Broker is the identity of a workspace's broker pods.
func Broker(namespace, workspace string) ID {
	return ID{Namespace: namespace, Workspace: workspace, Role: RoleBroker}
}

// Gateway is the identity of a gateway's pods towards one workspace.
func Gateway(namespace, workspace, gateway string) ID {
	return ID{Namespace: namespace, Workspace: workspace, Role: RoleGateway, Gateway: gateway}
}

// Agent is the identity of one session host's agent.
func Agent(namespace, workspace, pool, host string) ID {
	return ID{Namespace: namespace, Workspace: workspace, Role: RoleAgent, Pool: pool, Host: host}
}

// TicketSigner is the identity in the certificate whose key signs tickets.
func TicketSigner(namespace, workspace string) ID {
	return ID{Namespace: namespace, Workspace: workspace, Role: RoleTicketSigner}
}

// Operator is the identity of the operator towards one workspace's brokers.
func Operator(namespace, workspace string) ID {
	return ID{Namespace: namespace, Workspace: workspace, Role: RoleOperator}
}

// URI is the name that stands in the certificate.
func (id ID) URI() *url.URL {
	path := []string{"", id.Workspace, string(id.Role)}
	switch id.Role {
	case RoleGateway:
		path = append(path, id.Gateway)
	case RoleAgent:
		path = append(path, id.Pool, id.Host)
	}
	return &url.URL{Scheme: scheme, Host: id.Namespace, Path: strings.Join(path, "/")}
}

// String is the URI as text.
func (id ID) String() string { return id.URI().String() }

// label is a DNS label (RFC 1123), which all our object names are: they become bus subjects, where a dot would separate.
var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// IsLabel says whether name can stand in an identity and in a bus subject.
func IsLabel(name string) bool { return label.MatchString(name) }

// Parse reads an identity back from its URI. Anything that URI would not have written is an error.
func Parse(u *url.URL) (ID, error) {
	parts := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	if u.Scheme != scheme || len(parts) < 2 {
		return ID{}, fmt.Errorf("identity: %q is not a %s:// identity", u, scheme)
	}
	id := ID{Namespace: u.Host, Workspace: parts[0], Role: Role(parts[1])}
	names := parts[2:]
	switch {
	case (id.Role == RoleBroker || id.Role == RoleTicketSigner || id.Role == RoleOperator) && len(names) == 0:
	case id.Role == RoleGateway && len(names) == 1:
		id.Gateway = names[0]
	case id.Role == RoleAgent && len(names) == 2:
		id.Pool, id.Host = names[0], names[1]
	default:
		return ID{}, fmt.Errorf("identity: %q names no known role", u)
	}
	for _, name := range append([]string{id.Namespace, id.Workspace}, names...) {
		if !IsLabel(name) {
			return ID{}, fmt.Errorf("identity: %q in %q is not a DNS label", name, u)
		}
	}
	if id.String() != u.String() {
		return ID{}, fmt.Errorf("identity: %q is not in canonical form", u)
	}
	return id, nil
}

// KeyFingerprint is the SHA-256, in lower-case hex, of a public key in DER: the RawSubjectPublicKeyInfo of a certificate or
// of a certificate request.
func KeyFingerprint(subjectPublicKeyInfo []byte) string {
	sum := sha256.Sum256(subjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// FromCertificate reads the identity of a certificate. A certificate with none or several is an error.
func FromCertificate(cert *x509.Certificate) (ID, error) {
	if len(cert.URIs) != 1 {
		return ID{}, fmt.Errorf("identity: the certificate of %q carries %d URI names, want exactly one", cert.Subject, len(cert.URIs))
	}
	return Parse(cert.URIs[0])
}
