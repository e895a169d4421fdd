// Package config is the configuration files that the operator renders and the relay, gateway and broker containers
// read: one JSON file each. Both sides share these types, so a field can't be written under one name and read under another.
package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// Where the files and sockets stand inside the pods.
const (
	RelayFile       = "/etc/rendezvous/relay/config.json"
	GatewayFile     = "/etc/rendezvous/gateway/config.json"
	BrokerFile      = "/etc/rendezvous/broker/config.json"
	TLSDir          = "/etc/rendezvous/tls"        // public listener: tls.crt, tls.key
	BusDir          = "/etc/rendezvous/bus"        // broker's bus identity: tls.crt, tls.key, ca.crt
	TicketsDir      = "/etc/rendezvous/tickets"    // ticket signer: tls.crt, tls.key
	SigningDir      = "/etc/rendezvous/signing"    // .rdp signer: tls.crt, tls.key
	WorkspacesDir   = "/etc/rendezvous/workspaces" // per workspace: tls.crt, tls.key, ca.crt, ticket.crt
	AdmissionDir    = "/run/rendezvous"
	AdmissionSocket = AdmissionDir + "/admission.sock"
	TicketCert      = "ticket.crt"
)

// Linger is for how long a pod that is told to stop goes on as if it were not: until kube-proxy, DNS and load balancers
// have heard that it is leaving, clients are sent to it.
const Linger = 4 * time.Second

// Ports inside the pods.
const (
	PortPublic         = 8443 // relay's listener; broker's feed
	PortBusWebSocket   = 8444
	PortBus            = 4222
	PortBusRoutes      = 6222
	PortMetrics        = 9090 // relay, broker, manager
	PortGatewayMetrics = 9091
	PortSessions       = 8445 // broker, for the operator
)

// Relay is the relay container's file.
type Relay struct {
	// Gateway is the Gateway object's name, for logs and metrics.
	Gateway string `json:"gateway"`
	// Hostname is the public name; agents' SNI is INSTANCE.join.Hostname.
	Hostname string `json:"hostname"`
	Callers
	// MaxSessions bounds live sessions of this pod.
	MaxSessions int32 `json:"maxSessions"`
	// MaxPending bounds connections that are not joined yet, each before or in admission.
	MaxPending int32 `json:"maxPending"`
	// HandshakeTimeoutSeconds bounds everything before admission.
	HandshakeTimeoutSeconds int32 `json:"handshakeTimeoutSeconds"`
	// JoinTimeoutSeconds bounds the time from the client's request to the agent's join.
	JoinTimeoutSeconds int32 `json:"joinTimeoutSeconds"`
	// IdleTimeoutSeconds ends a session with no byte either way; 0 never does.
	IdleTimeoutSeconds int32 `json:"idleTimeoutSeconds"`
	// DrainDeadlineSeconds is how long a terminating relay waits for its last session.
	DrainDeadlineSeconds int32 `json:"drainDeadlineSeconds"`
}

// Callers is what a public listener can know of who calls.
type Callers struct {
	// AddressesHidden says that the Service's forwarding may show a node's address for a client's, another for each of its
	// connections: they tell clients apart no more.
	AddressesHidden bool `json:"clientAddressesHidden,omitempty"`
	// ProxyNetworks (CIDR) are those from which PROXY protocol headers are believed. Empty, none is.
	ProxyNetworks []string `json:"proxyNetworks,omitempty"`
}

// Gateway is the gateway container's file.
type Gateway struct {
	Namespace string `json:"namespace"`
	Gateway   string `json:"gateway"`
	Region    string `json:"region,omitempty"`
	Hostname  string `json:"hostname"`
	// PeersHost is the headless Service's DNS name, whose addresses are this gateway's relays.
	PeersHost string `json:"peersHost"`
	// MaxSessions is the relay's bound, for load reports.
	MaxSessions int32              `json:"maxSessions"`
	Workspaces  []GatewayWorkspace `json:"workspaces"`
}

// GatewayWorkspace is one workspace that a gateway serves. Its files are in WorkspacesDir/Name.
type GatewayWorkspace struct {
	Name    string   `json:"name"`
	BusURLs []string `json:"busUrls"`
}

// Broker is the broker container's file. What people declare the broker reads from Kubernetes itself.
type Broker struct {
	Namespace string `json:"namespace"`
	Workspace string `json:"workspace"`
	// Hostname is the feed's public name.
	Hostname string `json:"hostname"`
	// BusURLs is what enrolled agents are told, best first.
	BusURLs []string `json:"busUrls"`
	// PeersHost is the headless Service's DNS name, for routes between brokers.
	PeersHost string `json:"peersHost"`
	// InternalIssuer signs the agents' certificates.
	InternalIssuer Issuer `json:"internalIssuer"`
	// Feed and Bus are of the Services of feed and enrolment, and of the control channel.
	Feed Callers `json:"feed,omitzero"`
	Bus  Callers `json:"bus,omitzero"`
}

// Issuer is a cert-manager issuer.
type Issuer struct {
	Name  string `json:"name"`
	Kind  string `json:"kind"`
	Group string `json:"group"`
}

// Load reads a file into v. Unknown fields are ignored: an operator may be newer than the container it configures.
func Load(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if err := json.NewDecoder(bytes.NewReader(data)).Decode(v); err != nil {
		return fmt.Errorf("config: %s: %w", path, err)
	}
	return nil
}

// Render writes v as the file's text, the same for the same v.
func Render(v any) (string, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return "", fmt.Errorf("config: %w", err)
	}
	return string(data) + "\n", nil
}
