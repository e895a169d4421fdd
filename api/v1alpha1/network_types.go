package v1alpha1

import networkingv1 "k8s.io/api/networking/v1"

// NetworkMode says who makes the NetworkPolicies of an object's pods.
// +kubebuilder:validation:Enum=Managed;Unmanaged
type NetworkMode string

// The network modes.
const (
	// NetworkManaged has the operator make them.
	NetworkManaged NetworkMode = "Managed"
	// NetworkUnmanaged leaves them to you.
	NetworkUnmanaged NetworkMode = "Unmanaged"
)

// EgressBase is what pods may reach before allow and deny are looked at.
// +kubebuilder:validation:Enum=Anywhere;Outside;Needed
type EgressBase string

// The egress bases.
const (
	// EgressAnywhere is every address but the cloud's metadata services and link-local ones.
	EgressAnywhere EgressBase = "Anywhere"
	// EgressOutside is Anywhere without the cluster's own addresses: its pods, Services, nodes and API server.
	EgressOutside EgressBase = "Outside"
	// EgressNeeded is what Rendezvous is known to need: DNS, brokers and gateways.
	EgressNeeded EgressBase = "Needed"
)

// NetworkAccess rules the NetworkPolicies of an object's pods. They hold where the cluster's network enforces such.
// +kubebuilder:validation:XValidation:rule="!has(self.mode) || self.mode == 'Managed' || !has(self.egress)",message="egress needs mode Managed: Unmanaged makes no NetworkPolicy"
type NetworkAccess struct {
	// mode is Managed (the operator makes NetworkPolicies) or Unmanaged (it makes none, and deletes its own). Defaults to
	// Managed.
	// +optional
	Mode NetworkMode `json:"mode,omitempty"`
	// egress is what the pods may reach.
	// +optional
	Egress *Egress `json:"egress,omitempty"`
}

// ServerNetworkAccess is NetworkAccess of pods that also serve metrics.
// +kubebuilder:validation:XValidation:rule="!has(self.mode) || self.mode == 'Managed' || !has(self.metricsFrom)",message="metricsFrom needs mode Managed: Unmanaged makes no NetworkPolicy"
type ServerNetworkAccess struct {
	NetworkAccess `json:",inline"`
	// metricsFrom are the pods and addresses that may read the pods' metrics. Defaults to the pods of all namespaces that
	// have the label metrics=enabled.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	MetricsFrom []networkingv1.NetworkPolicyPeer `json:"metricsFrom,omitempty"`
}

// Egress is what pods may reach.
type Egress struct {
	// base is Anywhere (all but link-local addresses and the metadata services of clouds), Outside (Anywhere without the
	// cluster's own pods, Services, nodes and API server) or Needed (DNS, the brokers and the gateways alone). Whatever it
	// is, what is Needed stays open. Defaults to Anywhere for a Workspace's brokers, which need the identity provider and
	// the API server; to Outside for a HostPool's hosts; to Needed for a Gateway.
	// +optional
	Base EgressBase `json:"base,omitempty"`
	// deny are address ranges (CIDR) to leave out of base, at most 64. A rule in allow is not affected.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	Deny []Network `json:"deny,omitempty"`
	// allow are egress rules, as a NetworkPolicy spells them, to open besides. At most 64.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Allow []networkingv1.NetworkPolicyEgressRule `json:"allow,omitempty"`
}
