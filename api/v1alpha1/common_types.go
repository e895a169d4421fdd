package v1alpha1

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Condition types. Ready sums up the others of its object; each is always set, Unknown included.
const (
	// ConditionReady says that the object does its work. Its message is that of the first condition that is not true.
	ConditionReady = "Ready"
	// ConditionReconciling is true while the operator is still on its way to the declared state (kstatus).
	ConditionReconciling = "Reconciling"
	// ConditionStalled is true where only a person can help: the message says how (kstatus).
	ConditionStalled = "Stalled"
	// ConditionReferencesResolved says that every object that the spec names exists and fits, that the names of the
	// children are free, and that the API server took them.
	ConditionReferencesResolved = "ReferencesResolved"
	// ConditionCertificatesReady says that cert-manager has issued every certificate that the object needs.
	ConditionCertificatesReady = "CertificatesReady"
	// ConditionIdentityReady says that the Workspace's OIDC provider answers with a discovery document and keys.
	ConditionIdentityReady = "IdentityReady"
	// ConditionAvailable says that enough pods are ready.
	ConditionAvailable = "Available"
	// ConditionRegistrationReady says that the HostPool's registration token exists and has not expired.
	ConditionRegistrationReady = "RegistrationReady"
	// ConditionScaled says that the HostPool has as many hosts as its autoscaling asks for.
	ConditionScaled = "Scaled"
	// ConditionEnrolled says that the SessionHost's agent holds a certificate.
	ConditionEnrolled = "Enrolled"
	// ConditionOneMachine says that one machine alone connects with the SessionHost's key.
	ConditionOneMachine = "OneMachine"
	// ConditionConnected says that the SessionHost's agent is on the control channel.
	ConditionConnected = "Connected"
	// ConditionHealthy says that the RDP server on the SessionHost answers its agent.
	ConditionHealthy = "Healthy"
	// ConditionDraining says whether the SessionHost refuses new sessions, and that the host has acknowledged it. An object of
	// any kind that is being deleted has it too: it says which sessions are waited for, until when, and how not to wait.
	ConditionDraining = "Draining"
)

// Condition reasons.
const (
	ReasonReady             = "Ready"
	ReasonProgressing       = "Progressing"
	ReasonPending           = "Pending"
	ReasonReferenceNotFound = "ReferenceNotFound"
	ReasonReferenceInvalid  = "ReferenceInvalid"
	ReasonIssuerNotFound    = "IssuerNotFound"
	ReasonIssuerNotReady    = "IssuerNotReady"
	ReasonCertificatePend   = "CertificatePending"
	ReasonCertificateFailed = "CertificateFailed"
	ReasonDiscoveryFailed   = "DiscoveryFailed"
	ReasonTokenExpired      = "TokenExpired"
	ReasonPodsNotReady      = "PodsNotReady"
	ReasonPodInvalid        = "PodInvalid"
	ReasonConflict          = "NameTaken"
	ReasonRejected          = "Rejected"
	ReasonNotEnrolled       = "NotEnrolled"
	ReasonNotConnected      = "NotConnected"
	ReasonHeartbeatLost     = "HeartbeatLost"
	ReasonRDPNotReady       = "RDPNotReady"
	ReasonDrainRequested    = "DrainRequested"
	ReasonDrained           = "Drained"
	ReasonNotDraining       = "NotDraining"
	ReasonNoHosts           = "NoHosts"
	ReasonTerminating       = "Terminating"
	ReasonRetiring          = "Retiring"
	ReasonEnoughPlaces      = "EnoughPlaces"
	ReasonTooFewPlaces      = "TooFewPlaces"
	ReasonTooManyPlaces     = "TooManyPlaces"
	ReasonAtMaximum         = "AtMaximum"
	ReasonRevoked           = "Revoked"
	ReasonSecondMachine     = "SecondMachine"
	ReasonTokenUsedUp       = "TokenUsedUp"
)

// Labels and annotations on what the operator makes.
const (
	// LabelWorkspace, LabelHostPool, LabelSessionHost and LabelGateway name the owner of a child object.
	LabelWorkspace   = "rendezvous.dev/workspace"
	LabelHostPool    = "rendezvous.dev/hostpool"
	LabelSessionHost = "rendezvous.dev/sessionhost"
	LabelGateway     = "rendezvous.dev/gateway"
	// LabelComponent says what a pod is: broker, gateway or sessionhost.
	LabelComponent = "rendezvous.dev/component"
	// LabelManagedBy with the value ManagedBy is on everything that the operator makes.
	LabelManagedBy = "app.kubernetes.io/managed-by"
	ManagedBy      = "rendezvous"
	// LabelRegistration marks a registration-token Secret: "pool" or "host".
	LabelRegistration = "rendezvous.dev/registration"
	// AnnotationRotate on a HostPool or a SessionHost, with a new value, has its registration token replaced; the old one
	// is revoked.
	AnnotationRotate = "rendezvous.dev/rotate-registration"
	// AnnotationRevoke on a SessionHost, with a new value, ends its enrolment: the machine's key is refused at once, its
	// registration token is replaced, and it has to enrol again. A pod is replaced.
	AnnotationRevoke = "rendezvous.dev/revoke-enrolment"
	// AnnotationSkipDrain with the value true on an object that is being deleted, or is to be, ends the wait for its sessions:
	// the object goes at once, and they end. On a HostPool it counts for its SessionHosts too.
	AnnotationSkipDrain = "rendezvous.dev/skip-drain"
	// AnnotationFilesOf on a PersistentVolumeClaim of a Personal pool says whose files are in it.
	AnnotationFilesOf = "rendezvous.dev/files-of"
	// Finalizer on each of the four kinds keeps an object that is being deleted until nobody is on it.
	Finalizer = "rendezvous.dev/drain"
	// LabelMadeByToken on a SessionHost says that a machine made it with its pool's registration token: the first 32 hex
	// digits of the token's SHA-256. Such a token enrols no other SessionHost that exists.
	LabelMadeByToken = "rendezvous.dev/made-by-token"
)

// DefaultDrainDeadline is how long an object that is being deleted waits for its sessions where nothing else is said.
const DefaultDrainDeadline = 8 * time.Hour

// Leaving says that an object is being deleted and still waits for its sessions.
func Leaving(obj metav1.Object) bool {
	return obj.GetDeletionTimestamp() != nil && slices.Contains(obj.GetFinalizers(), Finalizer)
}

// Gone says that an object is being deleted and waits for nobody: whoever reads it should take it for deleted.
func Gone(obj metav1.Object) bool { return obj.GetDeletionTimestamp() != nil && !Leaving(obj) }

// PodSettings place and dress pods of ours: brokers, and gateways with their relays.
type PodSettings struct {
	// labels to put on the pods, beside those by which the operator finds them.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	// +kubebuilder:validation:XValidation:rule="self.all(k, !k.startsWith('rendezvous.dev/') && !k.startsWith('app.kubernetes.io/'))",message="labels of rendezvous.dev and app.kubernetes.io are set by Rendezvous; leave them out"
	Labels map[string]string `json:"labels,omitempty"`
	// annotations to put on the pods, for a service mesh or a log collector.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	// +kubebuilder:validation:XValidation:rule="self.all(k, !k.startsWith('rendezvous.dev/'))",message="annotations of rendezvous.dev are set by Rendezvous; leave them out"
	Annotations map[string]string `json:"annotations,omitempty"`
	// nodeSelector that a node's labels must match.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`
	// tolerations of nodes' taints.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Tolerations []corev1.Toleration `json:"tolerations,omitempty"`
	// affinity to nodes and to other pods.
	// +optional
	Affinity *corev1.Affinity `json:"affinity,omitempty"`
	// topologySpreadConstraints take the place of the default, which spreads over nodes and zones where the cluster has
	// room. One without labelSelector counts the pods that it is set for.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=8
	TopologySpreadConstraints []corev1.TopologySpreadConstraint `json:"topologySpreadConstraints,omitempty"`
	// priorityClassName of the pods.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	PriorityClassName string `json:"priorityClassName,omitempty"`
	// imagePullSecrets are the Secrets, in this namespace, by which the images are pulled.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=8
	ImagePullSecrets []LocalSecret `json:"imagePullSecrets,omitempty"`
	// env of every container of ours in the pods: HTTPS_PROXY, GOMEMLIMIT. Values stand here as they are; none comes from a
	// Secret.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=32
	Env []EnvValue `json:"env,omitempty"`
}

// LocalSecret names a Secret in the same namespace.
type LocalSecret struct {
	// name of the Secret.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// EnvValue is an environment variable.
type EnvValue struct {
	// name of the variable.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:XValidation:rule="self.matches('^[A-Za-z_][A-Za-z0-9_]*$') && !(self in ['POD_NAME', 'POD_NAMESPACE', 'POD_IP'])",message="name must be letters, digits and underscores, and POD_NAME, POD_NAMESPACE and POD_IP are set by Rendezvous"
	Name string `json:"name"`
	// value of the variable.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Value string `json:"value,omitempty"`
}

// IssuerReference names a cert-manager issuer.
type IssuerReference struct {
	// name of the issuer.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// kind of the issuer: Issuer (in the object's namespace) or ClusterIssuer, or a kind of an external issuer's group.
	// Defaults to Issuer.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Kind string `json:"kind,omitempty"`
	// group of the issuer's kind. Defaults to cert-manager.io.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Group string `json:"group,omitempty"`
}

// LocalReference names an object of a known kind in the same namespace.
type LocalReference struct {
	// name of the object.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
}

// KeyReference names one key of a ConfigMap or Secret in the same namespace.
// +kubebuilder:validation:XValidation:rule="self.kind in ['ConfigMap', 'Secret']",message="kind must be ConfigMap or Secret"
type KeyReference struct {
	// kind is ConfigMap or Secret.
	// +required
	// +kubebuilder:validation:MaxLength=16
	Kind string `json:"kind"`
	// name of the ConfigMap or Secret.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// key in its data.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Key string `json:"key"`
}

// Service says how a Service that the operator makes is exposed.
// +kubebuilder:validation:XValidation:rule="!has(self.loadBalancerClass) || (has(self.type) && self.type == 'LoadBalancer')",message="loadBalancerClass needs type: LoadBalancer"
// +kubebuilder:validation:XValidation:rule="!has(self.loadBalancerSourceRanges) || (has(self.type) && self.type == 'LoadBalancer')",message="loadBalancerSourceRanges needs type: LoadBalancer"
// +kubebuilder:validation:XValidation:rule="!has(self.allocateLoadBalancerNodePorts) || (has(self.type) && self.type == 'LoadBalancer')",message="allocateLoadBalancerNodePorts needs type: LoadBalancer"
// +kubebuilder:validation:XValidation:rule="!has(self.externalTrafficPolicy) || (has(self.type) && self.type in ['NodePort', 'LoadBalancer'])",message="externalTrafficPolicy needs type: NodePort or LoadBalancer"
// +kubebuilder:validation:XValidation:rule="!has(self.nodePorts) || (has(self.type) && self.type in ['NodePort', 'LoadBalancer'])",message="nodePorts needs type: NodePort or LoadBalancer"
// +kubebuilder:validation:XValidation:rule="!has(self.healthCheckNodePort) || (has(self.type) && self.type == 'LoadBalancer' && has(self.externalTrafficPolicy) && self.externalTrafficPolicy == 'Local')",message="healthCheckNodePort needs type: LoadBalancer and externalTrafficPolicy: Local"
// +kubebuilder:validation:XValidation:rule="!has(self.ipFamilies) || self.ipFamilies.size() < 2 || (has(self.ipFamilyPolicy) && self.ipFamilyPolicy != 'SingleStack')",message="two ipFamilies need ipFamilyPolicy: PreferDualStack or RequireDualStack"
// +kubebuilder:validation:XValidation:rule="!has(self.nodePorts) || self.nodePorts.all(p, self.nodePorts.exists_one(q, q.nodePort == p.nodePort))",message="nodePorts must differ from each other"
// +kubebuilder:validation:XValidation:rule="!has(self.nodePorts) || !has(self.healthCheckNodePort) || self.nodePorts.all(p, p.nodePort != self.healthCheckNodePort)",message="healthCheckNodePort must differ from nodePorts"
type Service struct {
	// type of the Service: ClusterIP, NodePort or LoadBalancer. Defaults to ClusterIP.
	// +optional
	// +kubebuilder:validation:Enum=ClusterIP;NodePort;LoadBalancer
	Type corev1.ServiceType `json:"type,omitempty"`
	// annotations to put on the Service, for the cloud's load balancer or for external-dns.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	Annotations map[string]string `json:"annotations,omitempty"`
	// loadBalancerClass of the Service, where type is LoadBalancer. Kubernetes lets nobody change it while the Service exists
	// with that type: delete the Service, and it is made again.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	LoadBalancerClass *string `json:"loadBalancerClass,omitempty"`
	// loadBalancerSourceRanges are the networks (CIDR) that may reach the load balancer, where it can tell. At most 64. Unset,
	// all may. Where type is LoadBalancer.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	LoadBalancerSourceRanges []Network `json:"loadBalancerSourceRanges,omitempty"`
	// externalTrafficPolicy of the Service, where type is NodePort or LoadBalancer. Cluster: each node passes connections on
	// to any pod, and pods see a node's address for the client's. Local: a node passes them to its own pods alone, and pods
	// see the client's address, unless a load balancer puts its own in place. Defaults to Cluster.
	// +optional
	// +kubebuilder:validation:Enum=Cluster;Local
	ExternalTrafficPolicy corev1.ServiceExternalTrafficPolicy `json:"externalTrafficPolicy,omitempty"`
	// healthCheckNodePort is where load balancers ask nodes whether they have pods, where externalTrafficPolicy is Local.
	// Unset, Kubernetes picks one. It can't be changed while the Service exists.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	HealthCheckNodePort *int32 `json:"healthCheckNodePort,omitempty"`
	// nodePorts fixes the node ports of the Service's ports, where type is NodePort or LoadBalancer. They must be in the
	// cluster's range, by default 30000 to 32767, and free. Kubernetes picks those that are not listed.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=4
	NodePorts []NodePort `json:"nodePorts,omitempty"`
	// allocateLoadBalancerNodePorts says whether the Service has node ports at all, where type is LoadBalancer. Defaults to
	// true; false is for load balancers that reach pods without them.
	// +optional
	AllocateLoadBalancerNodePorts *bool `json:"allocateLoadBalancerNodePorts,omitempty"`
	// ipFamilyPolicy is SingleStack, PreferDualStack or RequireDualStack. Unset, Kubernetes decides: SingleStack.
	// +optional
	// +kubebuilder:validation:Enum=SingleStack;PreferDualStack;RequireDualStack
	IPFamilyPolicy *corev1.IPFamilyPolicy `json:"ipFamilyPolicy,omitempty"`
	// ipFamilies are IPv4, IPv6 or both, the preferred one first. Kubernetes lets nobody change the first while the Service
	// exists: delete the Service, and it is made again. Unset, the cluster's default.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=2
	// +kubebuilder:validation:XValidation:rule="self.all(f, f in ['IPv4', 'IPv6'])",message="ipFamilies are IPv4 and IPv6"
	// +kubebuilder:validation:XValidation:rule="self.size() < 2 || self[0] != self[1]",message="ipFamilies must differ from each other"
	IPFamilies []corev1.IPFamily `json:"ipFamilies,omitempty"`
	// proxyProtocol is for a load balancer that begins each connection with a PROXY protocol header, version 1 or 2. Unset,
	// such headers are not believed: connections that begin with one are refused, and the pod's log says so.
	// +optional
	ProxyProtocol *ProxyProtocol `json:"proxyProtocol,omitempty"`
}

// ProxyProtocol says whose PROXY protocol headers are believed.
type ProxyProtocol struct {
	// networks (CIDR) that the load balancer's connections come from, as pods see them: the load balancer's own addresses or,
	// where externalTrafficPolicy is Cluster, also the nodes'. A header from there gives the client's address to logs, traces
	// and limits; from elsewhere it is refused. Connections without a header are served everywhere, so that it can be set
	// before the load balancer's own setting. Whoever can connect from such a network, other than through the load balancer,
	// can claim any address. At most 64.
	// +required
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:XValidation:rule="self.all(n, !isCIDR(n) || cidr(n).prefixLength() > 0)",message="a network of all addresses would let every client claim any address: name the load balancer's networks alone"
	Networks []Network `json:"networks"`
}

// Network is a network in CIDR notation, such as 10.0.0.0/8 or 2001:db8::/32.
// +kubebuilder:validation:MaxLength=43
// +kubebuilder:validation:XValidation:rule="isCIDR(self) && cidr(self) == cidr(self).masked()",message="write the network as ADDRESS/BITS with no bit set beyond BITS, such as 10.0.0.0/8 or 2001:db8::/32; a single address ends in /32 or /128"
type Network string

// NodePort fixes the node port of one of a Service's ports.
type NodePort struct {
	// name of the Service's port.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// nodePort, 1 to 65535.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	NodePort int32 `json:"nodePort"`
}
