// Package brokerapi is the broker's HTTPS interface: what rdv, feed readers and enrolling agents send and get.
//
//	GET  /api/v1/workspace                    Workspace; no sign-in: where to sign in
//	GET  /api/v1/resources                    Resources; bearer token
//	GET  /api/v1/whoami                       Identity: the token as the workspace reads it; bearer token
//	GET  /api/v1/resources/NAME.rdp           a signed .rdp file; bearer token; ?gateway=NAME ?activity=GUID ?form=arm
//	GET  /RDWeb/Feed/webfeed.aspx             the same list as MS-TSWP XML; bearer token
//	GET  /api/v1/activities/ID                []trace.Event; bearer token of the activity's user
//	GET  /api/v1/activities/                  []trace.Summary, the latest first; bearer token
//	POST /api/v1/activities/ID                []trace.Event from rdv, for its own steps; bearer token
//	GET  /api/v1/sessions                     Sessions; bearer token: the user's own
//	POST /api/v1/sessions                     ActRequest -> ActResponse; bearer token of the session's user
//	GET, POST /api/v1/all-sessions            the same for all sessions; a listener and a certificate of the operator's own
//	GET  /TENANT/v2.0/.well-known/openid-configuration   the identity provider's discovery document, for FreeRDP's type:arm
//	POST /api/v1/enroll                       EnrollRequest -> EnrollResponse; the registration token is the credential
//
// A refusal is the fitting HTTP status with {"error": refusal.Error}. Every answer carries the header Activity-Id.
package brokerapi

import (
	"time"

	"rendezvous.dev/rendezvous/wire/rdpkey"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Paths.
const (
	PathWorkspace  = "/api/v1/workspace"
	PathResources  = "/api/v1/resources"
	PathWhoAmI     = "/api/v1/whoami"
	PathWebFeed    = "/RDWeb/Feed/webfeed.aspx"
	PathActivities = "/api/v1/activities/"
	PathEnroll     = "/api/v1/enroll"
	// PathDiscovery stands behind a tenant of any name.
	PathDiscovery = "/v2.0/.well-known/openid-configuration"
)

// FormARM, as the parameter form of a connection file, makes one for FreeRDP 3's type:arm.
const FormARM = "arm"

// NotAPassword goes where a client won't log in without a password, or asks for one, and the host knows the user by the
// connection: it logs in whoever the broker sends, and looks at no password.
const NotAPassword = "by-connection"

// HeaderActivity carries the activity id both ways.
const HeaderActivity = "Activity-Id"

// ErrorBody is every refusal's body.
type ErrorBody struct {
	Error *refusal.Error `json:"error"`
}

// Workspace is what a client needs before it signs in.
type Workspace struct {
	Name        string   `json:"name"`
	DisplayName string   `json:"displayName"`
	IssuerURL   string   `json:"issuerUrl"`
	ClientID    string   `json:"clientId"`
	Scopes      []string `json:"scopes"`
	// IssuerCA (PEM) verifies the issuer, where the Workspace carries one.
	IssuerCA string `json:"issuerCA,omitempty"`
}

// Resources is what one user may use, and the gateways to choose from.
type Resources struct {
	User      string     `json:"user"`
	Resources []Resource `json:"resources"`
	Gateways  []Gateway  `json:"gateways"`
	// Notice is for the user, where something about the sign-in is not as it should be.
	Notice string `json:"notice,omitempty"`
}

// Identity is a user's token as the workspace reads it.
type Identity struct {
	// User is the name in grants, tickets and assignments, from the claim UserClaim.
	User      string   `json:"user"`
	UserClaim string   `json:"userClaim"`
	Groups    []string `json:"groups"`
	// GroupsClaim is where groups are read from; GroupsNotice says why there are none, or not all.
	GroupsClaim  string `json:"groupsClaim"`
	GroupsNotice string `json:"groupsNotice,omitempty"`
	// Claims are the names of what is in the token.
	Claims   []string  `json:"claims"`
	SignedIn time.Time `json:"signedIn,omitzero"`
	Expires  time.Time `json:"expires,omitzero"`
	// Resources are those that the user may use.
	Resources []IdentityResource `json:"resources"`
}

// IdentityResource is who the user is on the hosts of one resource.
type IdentityResource struct {
	Name     string `json:"name"`
	HostPool string `json:"hostPool"`
	// Account is what the user is logged in to, empty where hosts ask for credentials; Problem is why there is none.
	// AccountClaim is the claim that names the account, empty where the user's name does.
	Account      string `json:"account,omitempty"`
	AccountClaim string `json:"accountClaim,omitempty"`
	Problem      string `json:"problem,omitempty"`
}

// Resource is one desktop or app.
type Resource struct {
	Name        string `json:"name"`
	DisplayName string `json:"displayName"`
	Type        string `json:"type"` // Desktop or RemoteApp
	HostPool    string `json:"hostPool"`
	// Account is what the user is logged in to on the host, without a password; empty where the host asks for credentials.
	Account string `json:"account,omitempty"`
	RDPFile string `json:"rdpFile"` // path of the signed file
}

// Gateway is one gateway to measure and choose from (step 7).
type Gateway struct {
	Name     string `json:"name"`
	Region   string `json:"region,omitempty"`
	Hostname string `json:"hostname"`
	Port     int32  `json:"port"`
	// PingPath answers 204 on the gateway's own listener, for measuring.
	PingPath string `json:"pingPath"`
	// Connections counts live sessions and those on their way.
	Connections int32 `json:"connections"`
}

// EnrollRequest makes a machine a session host.
type EnrollRequest struct {
	// Token is the registration token: a pool's (many hosts, until it expires or is rotated) or one host's (once).
	Token string `json:"token"`
	// Host is the session host's name, a DNS label. A host's own token fixes it.
	Host string `json:"host"`
	// ClientCSR (PEM) asks for the bus identity. Its URI name must be identity.Agent of this host.
	ClientCSR string `json:"clientCSR"`
	// RDPCSR (PEM) asks for the certificate that the RDP server shows. Its names must be those of RDPNames. Empty where
	// the host keeps its own certificate.
	RDPCSR string `json:"rdpCSR,omitempty"`
}

// EnrollResponse is the host's membership.
type EnrollResponse struct {
	Namespace string `json:"namespace"`
	Workspace string `json:"workspace"`
	Pool      string `json:"pool"`
	Host      string `json:"host"`
	Certificates
	// BusURLs says where the control channel is, best first: tls://host:4222, wss://host:443.
	BusURLs []string `json:"busUrls"`
	// BusCA (PEM) verifies the bus.
	BusCA string `json:"busCA"`
}

// Certificates is what the issuers answered (PEM, leaf first, then the chain).
type Certificates struct {
	ClientCertificate string `json:"clientCertificate"`
	RDPCertificate    string `json:"rdpCertificate,omitempty"`
}

// PreEnroll is the answer to GET /api/v1/enroll with the token in the Authorization header: the names that the CSRs
// must carry.
type PreEnroll struct {
	Namespace string `json:"namespace"`
	Workspace string `json:"workspace"`
	Pool      string `json:"pool"`
	// Host is fixed where the token is one host's own, else empty.
	Host string `json:"host,omitempty"`
	// RDPCertificate says that the pool issues RDP certificates, so that an RDPCSR is wanted.
	RDPCertificate bool `json:"rdpCertificate"`
	// RDPKey is the kind of key that it is to be over; brokers of before say none.
	RDPKey rdpkey.Kind `json:"rdpKey,omitzero"`
}

// RenewRequest asks, over the bus, for the next certificates of the host that the connection belongs to.
type RenewRequest struct {
	ClientCSR string `json:"clientCSR,omitempty"`
	RDPCSR    string `json:"rdpCSR,omitempty"`
}

// RenewResponse answers it. Err set means refused.
type RenewResponse struct {
	Err *refusal.Error `json:"error,omitempty"`
	Certificates
	BusCA string `json:"busCA,omitempty"`
}

// PoolName is the name that a client verifies: every host of the pool may serve it, so every host's RDP certificate
// carries it. It stands as the full address in the signed file.
func PoolName(namespace, pool string) string { return pool + "." + namespace + ".rdv.internal" }

// RDPNames are the DNS names of one host's RDP certificate.
func RDPNames(namespace, pool, host string) []string {
	return []string{PoolName(namespace, pool), host + "." + PoolName(namespace, pool)}
}
