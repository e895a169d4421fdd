package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// HostPoolType says whether users share the hosts.
// +kubebuilder:validation:Enum=Pooled;Personal
type HostPoolType string

// The pool types.
const (
	Pooled   HostPoolType = "Pooled"
	Personal HostPoolType = "Personal"
)

// LoadBalancing says how users spread over a Pooled pool's hosts.
// +kubebuilder:validation:Enum=BreadthFirst;DepthFirst
type LoadBalancing string

// The load-balancing rules.
const (
	BreadthFirst LoadBalancing = "BreadthFirst"
	DepthFirst   LoadBalancing = "DepthFirst"
)

// Assignment says how a Personal pool's hosts find their users.
// +kubebuilder:validation:Enum=Automatic;Direct
type Assignment string

// The assignment rules.
const (
	Automatic Assignment = "Automatic"
	Direct    Assignment = "Direct"
)

// HostPoolSpec is a set of session hosts that serve the same resources.
// +kubebuilder:validation:XValidation:rule="!has(self.loadBalancing) || self.type == 'Pooled'",message="loadBalancing is for type Pooled; a Personal pool's users have hosts of their own"
// +kubebuilder:validation:XValidation:rule="!has(self.assignment) || self.type == 'Personal'",message="assignment is for type Personal"
// +kubebuilder:validation:XValidation:rule="!has(self.replicas) || has(self.template)",message="replicas needs template: only hosts that are pods can be made by the pool"
// +kubebuilder:validation:XValidation:rule="!has(self.volumeClaimTemplates) || has(self.template)",message="volumeClaimTemplates needs template: only hosts that are pods mount claims"
// +kubebuilder:validation:XValidation:rule="!has(self.autoscaling) || has(self.template)",message="autoscaling needs template: only hosts that are pods can be made by the pool"
// +kubebuilder:validation:XValidation:rule="!(has(self.replicas) && has(self.autoscaling))",message="set replicas or autoscaling, not both"
// +kubebuilder:validation:XValidation:rule="!has(self.accounts) || !has(self.customRDPProperties) || self.customRDPProperties.all(p, !p.lowerAscii().matches('^(username|domain|prompt +for +credentials) *:'))",message="a pool with accounts logs people in to their own: customRDPProperties can't set username, domain or prompt for credentials"
// +kubebuilder:validation:XValidation:rule="self.type == oldSelf.type",message="type can't be changed; make a new HostPool"
// +kubebuilder:validation:XValidation:rule="self.workspaceRef.name == oldSelf.workspaceRef.name",message="workspaceRef can't be changed, because the hosts' certificates name the workspace; make a new HostPool"
type HostPoolSpec struct {
	// workspaceRef names the Workspace that the pool belongs to. It can't be changed.
	// +required
	WorkspaceRef LocalReference `json:"workspaceRef"`
	// type is Pooled (any host serves any user) or Personal (each user has a host of their own). It can't be changed.
	// +required
	Type HostPoolType `json:"type"`
	// loadBalancing of a Pooled pool: BreadthFirst spreads users over all hosts, DepthFirst fills one host after the
	// other. Defaults to BreadthFirst.
	// +optional
	LoadBalancing LoadBalancing `json:"loadBalancing,omitempty"`
	// maxSessionsPerHost bounds the sessions of one host, 1 to 1000. Defaults to 16 for Pooled, 1 for Personal.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	MaxSessionsPerHost *int32 `json:"maxSessionsPerHost,omitempty"`
	// assignment of a Personal pool: Automatic gives a user the first free host, for good; Direct waits for somebody to
	// set assignedUser on a SessionHost. Defaults to Automatic.
	// +optional
	Assignment Assignment `json:"assignment,omitempty"`
	// registration rules the token with which machines enrol themselves.
	// +optional
	Registration Registration `json:"registration,omitempty,omitzero"`
	// health says when a host is no longer counted on.
	// +optional
	Health Health `json:"health,omitempty,omitzero"`
	// rdpCertificate has cert-manager issue the certificate that each host's RDP server shows, so that clients verify it
	// without a warning. Unset, hosts keep their own.
	// +optional
	RDPCertificate *RDPCertificate `json:"rdpCertificate,omitempty"`
	// customRDPProperties are lines to add to the pool's connection files, such as "use multimon:i:1". Names don't depend on
	// case, nor on how many blanks stand between words. Refused are lines that Rendezvous sets: the gateway, the address, what
	// authenticates, what is started, and the redirections, which are each resource's (spec.resources[].redirection of the
	// Workspace); in a pool with accounts also the user name.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:XValidation:rule="self.all(p, p.matches('^[A-Za-z][A-Za-z0-9 ]*:[ibs]:[^\\r\\n]*$'))",message="each property must read name:type:value, type being i, s or b"
	// +kubebuilder:validation:XValidation:rule="self.all(p, !p.lowerAscii().matches('^(gateway[a-z]*|full +address|alternate +full +address|signature|signscope|password +51|pcb|loadbalanceinfo) *:'))",message="gateway*, full address, signature, signscope, pcb, loadbalanceinfo and password properties are set by Rendezvous"
	// +kubebuilder:validation:XValidation:rule="self.all(p, !p.lowerAscii().matches('^server +port *:'))",message="server port is set by Rendezvous: clients reach hosts through the gateway, and the agent knows its RDP server's port (its flag --rdp-addr)"
	// +kubebuilder:validation:XValidation:rule="self.all(p, !p.lowerAscii().matches('^(audiomode|audiocapturemode|redirectclipboard|redirectdrives|redirectprinters|redirectsmartcards|redirectcomports|redirectposdevices|drivestoredirect|devicestoredirect|usbdevicestoredirect) *:'))",message="redirections are set by the Workspace for each resource: use spec.resources[].redirection there"
	// +kubebuilder:validation:XValidation:rule="self.all(p, !p.lowerAscii().matches('^(authentication +level|enablecredsspsupport|negotiate +security +layer|enablerdsaadauth|kdcproxyname|rdgiskdcproxy|resourceprovider) *:'))",message="authentication level, enablecredsspsupport, negotiate security layer, kdcproxyname and the like are set by Rendezvous, so that clients verify hosts and send credentials nowhere else"
	// +kubebuilder:validation:XValidation:rule="self.all(p, !p.lowerAscii().matches('^(alternate +shell|shell +working +directory|remoteapplication[a-z]*|disableremoteappcapscheck) *:'))",message="what a session starts is set by the Workspace: use a resource of type RemoteApp with program there"
	CustomRDPProperties []string `json:"customRDPProperties,omitempty"`
	// accounts says how a person who signed in becomes an account of the pool's Linux hosts, which then log that person in
	// by the connection, with no password. Every host must be set up for it: pods are, and `agent service install` does it
	// on a machine. Unset, the hosts' RDP servers ask people for credentials, and whose desktop a user meets is theirs to
	// say: for Windows hosts, and for hosts that one person has alone.
	// +optional
	Accounts *Accounts `json:"accounts,omitempty"`
	// replicas is how many hosts the pool keeps from template, 0 to 1000. Defaults to 1 where there is a template. With
	// fewer than before, hosts too many take no new session, and go once nobody is on them.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	Replicas *int32 `json:"replicas,omitempty"`
	// autoscaling by free places, instead of replicas.
	// +optional
	Autoscaling *HostPoolAutoscaling `json:"autoscaling,omitempty"`
	// template is a pod template (core/v1 PodTemplateSpec) for session hosts that are pods. Its container named desktop is
	// the RDP server and listens on 127.0.0.1:3389; the operator adds the agent sidecar, the shared folder /run/rdp-cert
	// with the RDP certificate, and takes care that nothing reaches the pod from outside. A changed template replaces each
	// pod once no session is on it. The operator reads it strictly: a field that it doesn't know shows as a condition.
	// +optional
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=object
	// +kubebuilder:pruning:PreserveUnknownFields
	Template *runtime.RawExtension `json:"template,omitempty"`
	// volumeClaimTemplates give each host that is a pod volumes of its own, as those of a StatefulSet do: claim NAME-HOST of
	// template NAME takes the place of a volume NAME in template, and containers mount it by that name. A claim is kept over
	// pods, images and nodes. In a Personal pool it is its user's from then on: the annotation rendezvous.dev/files-of says
	// whose, and the host is nobody else's while it is there. A changed template counts for claims that are made afterwards.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=8
	// +kubebuilder:validation:XValidation:rule="self.all(a, self.exists_one(b, a.metadata.name == b.metadata.name))",message="each volumeClaimTemplate needs a metadata.name of its own"
	VolumeClaimTemplates []VolumeClaimTemplate `json:"volumeClaimTemplates,omitempty"`
	// persistentVolumeClaimRetentionPolicy says what becomes of claims that volumeClaimTemplates made, as a StatefulSet's does.
	// +optional
	PersistentVolumeClaimRetentionPolicy ClaimRetentionPolicy `json:"persistentVolumeClaimRetentionPolicy,omitempty,omitzero"`
	// agent is the agent sidecar of the hosts that are pods.
	// +optional
	Agent AgentSidecar `json:"agent,omitempty,omitzero"`
	// drainDeadlineSeconds is how long the pool, or one of its SessionHosts, once it is being deleted, waits for the sessions on it to end, 0 to
	// 604800 (a week). The condition Draining says who is waited for; the annotation rendezvous.dev/skip-drain=true ends the
	// wait. Defaults to 28800 (8 hours).
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=604800
	DrainDeadlineSeconds *int32 `json:"drainDeadlineSeconds,omitempty"`
	// network rules what the hosts that are pods may reach. Nothing reaches them, whatever it says.
	// +optional
	Network NetworkAccess `json:"network,omitempty,omitzero"`
}

// VolumeClaimTemplate is a claim that each host of a pool has.
type VolumeClaimTemplate struct {
	// metadata of the claim.
	// +required
	Metadata ClaimMetadata `json:"metadata"`
	// spec of the claim.
	// +required
	Spec corev1.PersistentVolumeClaimSpec `json:"spec"`
}

// ClaimMetadata is what a claim's template says of its metadata.
type ClaimMetadata struct {
	// name of the volume in the pod, and the first part of the claim's.
	// +required
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="name must be a DNS label: lower-case letters, digits and hyphens"
	Name string `json:"name"`
	// labels of the claim.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	Labels map[string]string `json:"labels,omitempty"`
	// annotations of the claim.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	Annotations map[string]string `json:"annotations,omitempty"`
}

// ClaimRetention says whether a claim stays.
// +kubebuilder:validation:Enum=Retain;Delete
type ClaimRetention string

// The retentions.
const (
	RetainClaims ClaimRetention = "Retain"
	DeleteClaims ClaimRetention = "Delete"
)

// ClaimRetentionPolicy says what becomes of a pool's claims.
type ClaimRetentionPolicy struct {
	// whenDeleted is what becomes of all claims when the HostPool is deleted: Retain or Delete. Defaults to Retain.
	// +optional
	WhenDeleted ClaimRetention `json:"whenDeleted,omitempty"`
	// whenScaled is what becomes of the claims of a host that goes because the pool needs fewer: Retain or Delete. A host that
	// is somebody's doesn't go. Defaults to Retain.
	// +optional
	WhenScaled ClaimRetention `json:"whenScaled,omitempty"`
}

// AccountsConfigMap names the ConfigMap in which a pool's brokers keep who was given which account.
func AccountsConfigMap(pool string) string { return pool + "-accounts" }

// AccountPolicy says where accounts come from.
// +kubebuilder:validation:Enum=Create;Existing
type AccountPolicy string

// The account policies.
const (
	// AccountsCreate has hosts make accounts that they lack.
	AccountsCreate AccountPolicy = "Create"
	// AccountsExisting takes the accounts that hosts know, from a directory say.
	AccountsExisting AccountPolicy = "Existing"
)

// Accounts says how a person becomes an account. Which account was given to whom stands in the ConfigMap POOL-accounts:
// two people never share one.
// +kubebuilder:validation:XValidation:rule="self.policy == 'Create' || !has(self.uidClaim)",message="uidClaim is for policy Create; Existing accounts have the user ids that the hosts know"
// +kubebuilder:validation:XValidation:rule="self.policy == 'Create' || !has(self.uidRange)",message="uidRange is for policy Create; Existing accounts have the user ids that the hosts know"
// +kubebuilder:validation:XValidation:rule="!(has(self.uidClaim) && has(self.uidRange))",message="set uidClaim or uidRange, not both: user ids come from the claim, or from the range"
type Accounts struct {
	// policy is Create (a host makes the account when its owner first comes, with a home folder that nobody else may
	// read, and no password) or Existing (the host knows the account: from SSSD, LDAP, Active Directory or its own files).
	// +required
	Policy AccountPolicy `json:"policy"`
	// nameClaim is the claim of the identity provider's token that gives the account's name. Of alice@example.com it takes
	// alice, of EXAMPLElice likewise; capitals and accents go, and what no account's name may have becomes a hyphen. A name
	// that systems use for themselves (root), or with / or :, is refused. Defaults to the user name of the Workspace.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	NameClaim string `json:"nameClaim,omitempty"`
	// uidClaim is the claim that gives the account's numeric user id, 1000 or more. Unset, user ids come from uidRange.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	UIDClaim string `json:"uidClaim,omitempty"`
	// uidRange is where the pool takes user ids from: one per account, the same on every host of the pool for good.
	// Defaults to 10000 to 59999.
	// +optional
	UIDRange *UIDRange `json:"uidRange,omitempty"`
}

// UIDRange is a range of numeric user ids, both ends included.
// +kubebuilder:validation:XValidation:rule="self.first <= self.last",message="first must not be greater than last"
// +kubebuilder:validation:XValidation:rule="self.last < 65534 || self.first > 65535",message="the range must not hold 65534 and 65535, which are nobody's"
type UIDRange struct {
	// first user id of the range.
	// +required
	// +kubebuilder:validation:Minimum=1000
	// +kubebuilder:validation:Maximum=2147483647
	First int32 `json:"first"`
	// last user id of the range.
	// +required
	// +kubebuilder:validation:Minimum=1000
	// +kubebuilder:validation:Maximum=2147483647
	Last int32 `json:"last"`
}

// HostPoolAutoscaling keeps as many hosts as it takes for some places to be free. A place is free on a host that is ready
// and does not drain: in a Pooled pool as many as maxSessionsPerHost leaves, in a Personal pool one per host that is
// nobody's yet.
// +kubebuilder:validation:XValidation:rule="!has(self.minReplicas) || self.minReplicas <= self.maxReplicas",message="minReplicas must not be greater than maxReplicas"
// +kubebuilder:validation:XValidation:rule="has(self.minFreePlaces) != has(self.minFreePercent)",message="set either minFreePlaces or minFreePercent"
type HostPoolAutoscaling struct {
	// minReplicas, 0 to 1000. Defaults to 1.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	MinReplicas *int32 `json:"minReplicas,omitempty"`
	// maxReplicas, 1 to 1000.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	MaxReplicas int32 `json:"maxReplicas"`
	// minFreePlaces that are to be free at any time, 1 to 100000: enough for those who come while a new host starts.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	MinFreePlaces *int32 `json:"minFreePlaces,omitempty"`
	// minFreePercent of all places that are to be free at any time, 1 to 90.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=90
	MinFreePercent *int32 `json:"minFreePercent,omitempty"`
	// scaleDownDelaySeconds is for how long fewer hosts must have been enough before any goes, 0 to 86400. Defaults to
	// 600 (10 minutes).
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=86400
	ScaleDownDelaySeconds *int32 `json:"scaleDownDelaySeconds,omitempty"`
}

// Sessions that one host takes where a pool doesn't say.
const (
	defaultPooledSessions   = 16
	defaultPersonalSessions = 1
)

// MaxSessions is maxSessionsPerHost, or its default.
func (s *HostPoolSpec) MaxSessions() int32 {
	switch {
	case s.MaxSessionsPerHost != nil:
		return *s.MaxSessionsPerHost
	case s.Type == Personal:
		return defaultPersonalSessions
	}
	return defaultPooledSessions
}

// AgentSidecar is the agent container beside a desktop.
type AgentSidecar struct {
	// image of the agent. Defaults to the one that the operator was released with.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	Image string `json:"image,omitempty"`
	// resources of the agent container.
	// +optional
	Resources corev1.ResourceRequirements `json:"resources,omitempty,omitzero"`
}

// RotationPolicy says when a registration token is replaced.
// +kubebuilder:validation:Enum=Automatic;Manual
type RotationPolicy string

// The rotation policies.
const (
	RotateAutomatic RotationPolicy = "Automatic"
	RotateManual    RotationPolicy = "Manual"
)

// Registration rules the pool's registration token, in the Secret <pool>-registration.
type Registration struct {
	// tokenLifetimeSeconds is how long a token enrols hosts, 3600 (an hour) to 2592000 (30 days). Defaults to 86400 (a day).
	// +optional
	// +kubebuilder:validation:Minimum=3600
	// +kubebuilder:validation:Maximum=2592000
	TokenLifetimeSeconds *int32 `json:"tokenLifetimeSeconds,omitempty"`
	// rotation is Automatic (a new token replaces the old at two thirds of its life) or Manual (it expires, until the
	// annotation rendezvous.dev/rotate-registration changes or the Secret is deleted). Either way a replaced token is
	// refused at once. Defaults to Automatic.
	// +optional
	Rotation RotationPolicy `json:"rotation,omitempty"`
	// maxHostsPerToken bounds the SessionHosts that exist because machines enrolled with one and the same token of the
	// pool, 1 to 10000. Once there are as many, further machines are refused until the token is replaced, some are deleted,
	// or this is raised. SessionHosts that you declare, or that template makes, don't count. Defaults to 100.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10000
	MaxHostsPerToken *int32 `json:"maxHostsPerToken,omitempty"`
}

const defaultMaxHostsPerToken = 100

// MaxHosts is maxHostsPerToken, or its default.
func (r *Registration) MaxHosts() int32 {
	if r.MaxHostsPerToken != nil {
		return *r.MaxHostsPerToken
	}
	return defaultMaxHostsPerToken
}

// MadeByToken is the value of LabelMadeByToken for a token with this hash (SHA-256 in hex).
func MadeByToken(hash string) string { return hash[:min(len(hash), 32)] }

// Health says when a host is no longer counted on.
type Health struct {
	// heartbeatTimeoutSeconds without a word from its agent takes a host out of placement, 5 to 600. Defaults to 30.
	// +optional
	// +kubebuilder:validation:Minimum=5
	// +kubebuilder:validation:Maximum=600
	HeartbeatTimeoutSeconds *int32 `json:"heartbeatTimeoutSeconds,omitempty"`
	// connectTimeoutSeconds is how long a host may take to answer a connect request before the broker goes on to the
	// next, 1 to 60. Defaults to 5.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=60
	ConnectTimeoutSeconds *int32 `json:"connectTimeoutSeconds,omitempty"`
}

// RDPCertificate is where hosts' RDP certificates come from.
type RDPCertificate struct {
	// issuerRef names the issuer. Clients verify hosts where they trust its CA.
	// +required
	IssuerRef IssuerReference `json:"issuerRef"`
	// durationSeconds of a certificate, 3600 (an hour) to 31536000 (a year). Agents renew at two thirds. Defaults to
	// 2592000 (30 days).
	// +optional
	// +kubebuilder:validation:Minimum=3600
	// +kubebuilder:validation:Maximum=31536000
	DurationSeconds *int32 `json:"durationSeconds,omitempty"`
}

// HostPoolStatus is how the pool stands.
type HostPoolStatus struct {
	// conditions: Ready, ReferencesResolved, RegistrationReady, Available, Scaled, Reconciling, Stalled.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec that the status speaks of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// hosts counts the pool's SessionHosts.
	// +optional
	Hosts int32 `json:"hosts"`
	// readyHosts counts those that take sessions.
	// +optional
	ReadyHosts int32 `json:"readyHosts"`
	// sessions counts the sessions on them.
	// +optional
	Sessions int32 `json:"sessions"`
	// freePlaces counts the sessions more that they take; in a Personal pool, those of them that are nobody's.
	// +optional
	FreePlaces int32 `json:"freePlaces"`
	// autoscaling tells what was decided, where spec.autoscaling is set.
	// +optional
	Autoscaling *HostPoolScaling `json:"autoscaling,omitempty"`
	// registration tells of the current token, not the token.
	// +optional
	Registration RegistrationStatus `json:"registration,omitempty,omitzero"`
	// registeredHosts counts the SessionHosts that machines made with the current token; spec.registration.maxHostsPerToken
	// bounds it.
	// +optional
	RegisteredHosts int32 `json:"registeredHosts"`
}

// HostPoolScaling tells what autoscaling decided. The condition Scaled says why.
type HostPoolScaling struct {
	// desiredHosts is how many hosts the pool is to make.
	// +optional
	DesiredHosts int32 `json:"desiredHosts"`
	// surplusSince is from when on fewer hosts would have been enough, unset while they would not be.
	// +optional
	SurplusSince *metav1.Time `json:"surplusSince,omitempty"`
	// enoughHosts is how many would have been, at any time since then.
	// +optional
	EnoughHosts int32 `json:"enoughHosts,omitempty"`
}

// RotateFor is what the annotations of a HostPool or SessionHost ask a registration token to be made for. A token whose
// RegistrationStatus.RotatedFor says otherwise enrols nobody.
func RotateFor(annotations map[string]string) string {
	rotate, revoke := annotations[AnnotationRotate], annotations[AnnotationRevoke]
	if revoke == "" {
		return rotate
	}
	return rotate + "/" + revoke
}

// RegistrationStatus tells of the current registration token.
type RegistrationStatus struct {
	// secretName of the Secret that holds it, key token.
	// +optional
	SecretName string `json:"secretName,omitempty"`
	// expires is when it stops enrolling.
	// +optional
	Expires *metav1.Time `json:"expires,omitempty"`
	// tokenHash is the SHA-256, in hex, of the token: brokers compare with it, and need to read no Secret.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	TokenHash string `json:"tokenHash,omitempty"`
	// rotatedFor is the value of the annotation rendezvous.dev/rotate-registration that it was made for. On a SessionHost
	// with the annotation rendezvous.dev/revoke-enrolment, "/" and that one's value follow.
	// +optional
	RotatedFor string `json:"rotatedFor,omitempty"`
}

// HostPool is a set of session hosts that serve the same resources.
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:subresource:scale:specpath=.spec.replicas,statuspath=.status.hosts
// +kubebuilder:resource:shortName=hp,categories=rdv
// +kubebuilder:printcolumn:name="Workspace",type=string,JSONPath=`.spec.workspaceRef.name`
// +kubebuilder:printcolumn:name="Type",type=string,JSONPath=`.spec.type`
// +kubebuilder:printcolumn:name="Hosts",type=integer,JSONPath=`.status.hosts`
// +kubebuilder:printcolumn:name="Serving",type=integer,JSONPath=`.status.readyHosts`
// +kubebuilder:printcolumn:name="Sessions",type=integer,JSONPath=`.status.sessions`
// +kubebuilder:printcolumn:name="Free",type=integer,JSONPath=`.status.freePlaces`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Status",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 40 && !self.metadata.name.contains('.')",message="metadata.name must be a DNS label of at most 40 characters: it becomes part of other names"
type HostPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec is what you declare.
	// +required
	Spec HostPoolSpec `json:"spec"`
	// status is what the operator sees.
	// +optional
	Status HostPoolStatus `json:"status,omitempty,omitzero"`
}

// HostPoolList is a list of HostPools.
// +kubebuilder:object:root=true
type HostPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []HostPool `json:"items"`
}
