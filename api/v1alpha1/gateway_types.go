package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// GatewaySpec is one place where clients and session hosts meet.
// +kubebuilder:validation:XValidation:rule="!(has(self.replicas) && has(self.autoscaling))",message="set replicas or autoscaling, not both"
type GatewaySpec struct {
	// region is a name for where the gateway stands, shown to users and operators.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Region string `json:"region,omitempty"`
	// hostname is the public DNS name that clients and session hosts dial. It is up to you to point it at the Service
	// named like the Gateway.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=200
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="hostname must be a DNS name in lower case, without scheme, port or path"
	Hostname string `json:"hostname"`
	// port that clients and session hosts dial. Defaults to 443.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port *int32 `json:"port,omitempty"`
	// replicas of the gateway, 1 to 100. Defaults to 1.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	Replicas *int32 `json:"replicas,omitempty"`
	// autoscaling by CPU, by sessions, or by both, instead of replicas.
	// +optional
	Autoscaling *Autoscaling `json:"autoscaling,omitempty"`
	// certificates is where the gateway's public certificate comes from.
	// +required
	Certificates GatewayCertificates `json:"certificates"`
	// service exposes the gateway. Its port is named https.
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.nodePorts) || self.nodePorts.all(p, p.name == 'https')",message="a Gateway's Service has one port: name it https in nodePorts"
	Service Service `json:"service,omitempty,omitzero"`
	// pod places and dresses the gateway's pods.
	// +optional
	Pod PodSettings `json:"pod,omitempty,omitzero"`
	// relay is the sidecar that holds the listener and moves the bytes.
	// +optional
	Relay Relay `json:"relay,omitempty,omitzero"`
	// admission is the gateway container, which decides.
	// +optional
	Admission Admission `json:"admission,omitempty,omitzero"`
	// network rules what the gateway's pods may reach, and who may read their metrics.
	// +optional
	Network ServerNetworkAccess `json:"network,omitempty,omitzero"`
}

// Autoscaling of a gateway.
// +kubebuilder:validation:XValidation:rule="!has(self.minReplicas) || self.minReplicas <= self.maxReplicas",message="minReplicas must not be greater than maxReplicas"
type Autoscaling struct {
	// minReplicas, 1 to 100. Defaults to 1.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	MinReplicas *int32 `json:"minReplicas,omitempty"`
	// maxReplicas, 1 to 100.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	MaxReplicas int32 `json:"maxReplicas"`
	// targetCPUUtilizationPercentage of the pods' requests, 1 to 100. Defaults to 70, unless targetSessionsPerPod is set.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	TargetCPUUtilizationPercentage *int32 `json:"targetCPUUtilizationPercentage,omitempty"`
	// targetSessionsPerPod is how many sessions a pod should have on average, 1 to 100000. It needs a metrics adapter that
	// gives the relays' metric rendezvous_relay_sessions to autoscalers: docs/operations.md has its rule.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	TargetSessionsPerPod *int32 `json:"targetSessionsPerPod,omitempty"`
}

// GatewayCertificates is where the gateway's public certificate comes from.
type GatewayCertificates struct {
	// issuerRef names the issuer. Clients and session hosts must trust its CA.
	// +required
	IssuerRef IssuerReference `json:"issuerRef"`
}

// Relay is the data path.
type Relay struct {
	// image of the relay. Defaults to the one that the operator was released with.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	Image string `json:"image,omitempty"`
	// resources of the relay container.
	// +optional
	Resources corev1.ResourceRequirements `json:"resources,omitempty,omitzero"`
	// limits of one relay pod.
	// +optional
	Limits RelayLimits `json:"limits,omitempty,omitzero"`
	// idleTimeoutSeconds ends a session in which no byte has moved either way, 60 to 604800; 0 never does. Defaults to 0.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self == 0 || (self >= 60 && self <= 604800)",message="idleTimeoutSeconds must be 0 (never) or 60 to 604800"
	IdleTimeoutSeconds *int32 `json:"idleTimeoutSeconds,omitempty"`
	// drain says how a pod that must go lets its sessions end.
	// +optional
	Drain RelayDrain `json:"drain,omitempty,omitzero"`
}

// RelayLimits bound one relay pod.
type RelayLimits struct {
	// maxSessions of one pod, 1 to 100000. Defaults to 5000.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	MaxSessions *int32 `json:"maxSessions,omitempty"`
	// maxPending connections of one pod that are not joined yet, 1 to 100000. One user, and one address that opens
	// connections and says nothing, has a quarter of them at most. Defaults to 1000.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	MaxPending *int32 `json:"maxPending,omitempty"`
}

// RelayDrain says how a pod that must go lets its sessions end.
type RelayDrain struct {
	// deadlineSeconds is how long a terminating pod waits for its last session, 0 to 604800. Defaults to 28800 (8 hours).
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=604800
	DeadlineSeconds *int32 `json:"deadlineSeconds,omitempty"`
}

// Admission is the gateway container.
type Admission struct {
	// image of the gateway container. Defaults to the one that the operator was released with.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	Image string `json:"image,omitempty"`
	// resources of the gateway container.
	// +optional
	Resources corev1.ResourceRequirements `json:"resources,omitempty,omitzero"`
}

// GatewayStatus is how the gateway stands.
type GatewayStatus struct {
	// conditions: Ready, ReferencesResolved, CertificatesReady, Available, Reconciling, Stalled.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec that the status speaks of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// address is the Service's address inside the cluster or at its load balancer.
	// +optional
	Address string `json:"address,omitempty"`
	// pods is ready/wanted gateway pods.
	// +optional
	Pods string `json:"pods,omitempty"`
	// sessions through the gateway, as its brokers last heard.
	// +optional
	Sessions int32 `json:"sessions"`
	// instances are the gateway's pods as the brokers of its workspaces know them. The brokers write it, at most every 30
	// seconds: an entry may be of a pod that has just gone.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +listMapKey=workspace
	// +kubebuilder:validation:MaxItems=512
	Instances []GatewayInstance `json:"instances,omitempty"`
	// rollout tells of the pods that are on their way in or out. Unset while there are none.
	// +optional
	Rollout *GatewayRollout `json:"rollout,omitempty"`
	// certificateExpires is when the public certificate does.
	// +optional
	CertificateExpires *metav1.Time `json:"certificateExpires,omitempty"`
	// caBundle (PEM) is the CA of the public certificate, as its issuer gave it: session hosts verify the gateway with it.
	// +optional
	// +kubebuilder:validation:MaxLength=65536
	CABundle string `json:"caBundle,omitempty"`
	// workspaces are the names of the Workspaces that the gateway serves.
	// +optional
	// +listType=set
	Workspaces []string `json:"workspaces,omitempty"`
}

// GatewayInstance is one pod of a gateway, as the brokers of one workspace know it.
type GatewayInstance struct {
	// name of the instance: the pod's address with dashes, as in 10-244-0-7.
	// +required
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// workspace whose sessions are counted.
	// +required
	// +kubebuilder:validation:MaxLength=63
	Workspace string `json:"workspace"`
	// sessions of that workspace on the pod.
	// +optional
	Sessions int32 `json:"sessions"`
	// draining says that the pod takes no new session.
	// +optional
	Draining bool `json:"draining,omitempty"`
}

// GatewayRollout tells of pods that are on their way in or out: because the spec has changed, because there are to be
// fewer, or because a node is drained.
type GatewayRollout struct {
	// summary in a few words, for a table.
	// +optional
	Summary string `json:"summary,omitempty"`
	// relayImage and gatewayImage are what the pods' containers are to run.
	// +optional
	RelayImage string `json:"relayImage,omitempty"`
	// +optional
	GatewayImage string `json:"gatewayImage,omitempty"`
	// inPlace says that only the gateway container of each pod is replaced: the pods, their relays and sessions stay.
	// +optional
	InPlace bool `json:"inPlace,omitempty"`
	// updatedPods are as the spec says.
	// +optional
	UpdatedPods int32 `json:"updatedPods"`
	// oldPods still serve as an earlier spec said.
	// +optional
	OldPods int32 `json:"oldPods"`
	// draining are the pods that take no new session and go with their last one, or at their deadline. At most 32 are
	// listed, those with the latest deadline first.
	// +optional
	// +listType=map
	// +listMapKey=pod
	// +kubebuilder:validation:MaxItems=32
	Draining []DrainingPod `json:"draining,omitempty"`
}

// DrainingPod is a gateway pod that waits for its last session.
type DrainingPod struct {
	// pod is its name.
	// +required
	// +kubebuilder:validation:MaxLength=253
	Pod string `json:"pod"`
	// sessions that are left on it, as brokers last heard.
	// +optional
	Sessions int32 `json:"sessions"`
	// until is when those that are still there are ended.
	// +required
	Until metav1.Time `json:"until"`
}

// Gateway is one place where clients and session hosts meet: a public listener, and the pods behind it.
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=rgw,categories=rdv
// +kubebuilder:printcolumn:name="Hostname",type=string,JSONPath=`.spec.hostname`
// +kubebuilder:printcolumn:name="Region",type=string,JSONPath=`.spec.region`
// +kubebuilder:printcolumn:name="Address",type=string,JSONPath=`.status.address`
// +kubebuilder:printcolumn:name="Pods",type=string,JSONPath=`.status.pods`
// +kubebuilder:printcolumn:name="Sessions",type=integer,JSONPath=`.status.sessions`
// +kubebuilder:printcolumn:name="Rollout",type=string,JSONPath=`.status.rollout.summary`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Status",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 40 && !self.metadata.name.contains('.')",message="metadata.name must be a DNS label of at most 40 characters: it becomes part of other names"
type Gateway struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec is what you declare.
	// +required
	Spec GatewaySpec `json:"spec"`
	// status is what the operator sees.
	// +optional
	Status GatewayStatus `json:"status,omitempty,omitzero"`
}

// GatewayList is a list of Gateways.
// +kubebuilder:object:root=true
type GatewayList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Gateway `json:"items"`
}
