package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// WorkspaceSpec is what people of one identity provider may use, and how they find it.
type WorkspaceSpec struct {
	// displayName is what users see as the workspace's name. Defaults to the object's name.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	DisplayName string `json:"displayName,omitempty"`
	// hostname is the DNS name at which users and enrolling agents reach the broker, port 443: they subscribe to
	// https://HOSTNAME. It is up to you to point it at the Service <workspace>-broker.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="hostname must be a DNS name in lower case, without scheme, port or path"
	Hostname string `json:"hostname"`
	// identity says who the users are.
	// +required
	Identity Identity `json:"identity"`
	// resources are the desktops and apps of this workspace, and who may use each. At most 256.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=256
	Resources []Resource `json:"resources,omitempty"`
	// signing is what signs connection files, so that clients show your name as their publisher.
	// +required
	Signing Signing `json:"signing"`
	// certificates is where the workspace's TLS certificates come from.
	// +required
	Certificates WorkspaceCertificates `json:"certificates"`
	// tickets bounds the secrets in connection files.
	// +optional
	Tickets Tickets `json:"tickets,omitempty,omitzero"`
	// revocations take back what users have been given: each entry names a user or a ticket. They act within seconds, on live
	// sessions too: these end, their desktops stay on their hosts, and nobody gets back with what was taken back. Entries are
	// told apart by user and ticket, so that several people can each add one by server-side apply. At most 256; remove those
	// of tickets that have expired.
	// +optional
	// +listType=map
	// +listMapKey=user
	// +listMapKey=ticket
	// +kubebuilder:validation:MaxItems=256
	Revocations []Revocation `json:"revocations,omitempty"`
	// gatewaySelector picks the Gateways in this namespace through which the workspace's resources are reached. Unset
	// picks all of them.
	// +optional
	GatewaySelector *metav1.LabelSelector `json:"gatewaySelector,omitempty"`
	// broker sizes and exposes the broker pods.
	// +optional
	Broker Broker `json:"broker,omitempty,omitzero"`
	// drainDeadlineSeconds is how long the workspace, once it is being deleted, waits for the sessions on its hosts to end, 0 to
	// 604800 (a week). The condition Draining says who is waited for; the annotation rendezvous.dev/skip-drain=true ends the
	// wait. Defaults to 28800 (8 hours).
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=604800
	DrainDeadlineSeconds *int32 `json:"drainDeadlineSeconds,omitempty"`
}

// Identity says who the users are.
type Identity struct {
	// oidc is the OpenID Connect provider that signs users in.
	// +required
	OIDC OIDC `json:"oidc"`
}

// OIDC is an OpenID Connect provider.
// +kubebuilder:validation:XValidation:rule="!(has(self.caBundle) && has(self.caBundleRef))",message="set caBundle or caBundleRef, not both"
type OIDC struct {
	// issuerURL is the provider's issuer, exactly as in its tokens' iss claim. HTTPS only.
	// +required
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="isURL(self) && url(self).getScheme() == 'https' && url(self).getQuery().size() == 0",message="issuerURL must be an https:// URL without a query"
	IssuerURL string `json:"issuerURL"`
	// clientID is the public client that rdv and other clients sign in with.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	ClientID string `json:"clientID"`
	// audiences are the values of a token's aud claim that the feed accepts. Defaults to clientID alone.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=256
	Audiences []string `json:"audiences,omitempty"`
	// usernameClaim is the claim that names the user in grants, tickets and assignments: its name, or a path with dots
	// between names. Names that differ in case alone are one user's, wherever they are written, except for claim sub. A user
	// whose email_verified is false is refused where the claim is email; a token without email_verified is taken, since many
	// providers never say: name another claim where people choose their own addresses. Defaults to email.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	UsernameClaim string `json:"usernameClaim,omitempty"`
	// groupsClaim is the claim that lists the user's groups: its name, whatever dots and slashes are in it, or a path with dots
	// between names (realm_access.roles). It holds a list of texts, of numbers or of objects with a name, one text (which is one
	// group, and never cut at commas or blanks), or an object of objects, whose keys are the groups. `rdv whoami` shows what
	// is read. Defaults to groups.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	GroupsClaim string `json:"groupsClaim,omitempty"`
	// scopes that clients ask for. Defaults to openid, profile, email, groups, offline_access.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=128
	Scopes []string `json:"scopes,omitempty"`
	// caBundle (PEM) verifies the provider's certificate. Defaults to the system's roots.
	// +optional
	// +kubebuilder:validation:MaxLength=65536
	CABundle string `json:"caBundle,omitempty"`
	// caBundleRef names the ConfigMap or Secret key that holds caBundle instead.
	// +optional
	CABundleRef *KeyReference `json:"caBundleRef,omitempty"`
}

// ResourceType is what a user gets.
// +kubebuilder:validation:Enum=Desktop;RemoteApp
type ResourceType string

// The resource types.
const (
	ResourceDesktop   ResourceType = "Desktop"
	ResourceRemoteApp ResourceType = "RemoteApp"
)

// Resource is one desktop or app in the feed.
// +kubebuilder:validation:XValidation:rule="self.type != 'RemoteApp' || has(self.program)",message="a RemoteApp needs program: the alias or path of the program to start"
// +kubebuilder:validation:XValidation:rule="self.type != 'Desktop' || !has(self.program)",message="a Desktop takes no program; use type RemoteApp"
type Resource struct {
	// name of the resource in URLs and tickets, a DNS label.
	// +required
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="name must be a DNS label: lower-case letters, digits and hyphens"
	Name string `json:"name"`
	// displayName is what users see. Defaults to name.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	DisplayName string `json:"displayName,omitempty"`
	// type is Desktop (a whole desktop) or RemoteApp (one program's windows).
	// +required
	Type ResourceType `json:"type"`
	// hostPoolRef names the HostPool whose session hosts serve it. That HostPool must name this Workspace.
	// +required
	HostPoolRef LocalReference `json:"hostPoolRef"`
	// program to start, for a RemoteApp.
	// +optional
	Program *Program `json:"program,omitempty"`
	// access says who may use the resource. Nobody may until it names a user or a group.
	// +optional
	Access Access `json:"access,omitempty,omitzero"`
	// redirection says what of the user's own machine a session may reach.
	// +optional
	Redirection Redirection `json:"redirection,omitempty,omitzero"`
	// icon is a square PNG, up to 48 KiB, base64-encoded.
	// +optional
	// +kubebuilder:validation:MaxLength=65536
	Icon []byte `json:"icon,omitempty"`
}

// Program is what a RemoteApp starts.
type Program struct {
	// path is the program's path on the session host, or ||ALIAS for a published alias.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Path string `json:"path"`
	// arguments is the program's command line.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Arguments string `json:"arguments,omitempty"`
}

// Access names users and groups, as the identity provider's claims spell them.
type Access struct {
	// users by usernameClaim.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=1024
	// +kubebuilder:validation:items:MaxLength=256
	Users []string `json:"users,omitempty"`
	// groups by groupsClaim.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=256
	Groups []string `json:"groups,omitempty"`
}

// Switch is Enabled or Disabled.
// +kubebuilder:validation:Enum=Enabled;Disabled
type Switch string

// The switch's positions.
const (
	Enabled  Switch = "Enabled"
	Disabled Switch = "Disabled"
)

// Redirection is a policy on the user's devices. Each defaults to Disabled, but clipboard and audio to Enabled.
type Redirection struct {
	// clipboard is shared with the session.
	// +optional
	Clipboard Switch `json:"clipboard,omitempty"`
	// audio of the session plays on the user's machine.
	// +optional
	Audio Switch `json:"audio,omitempty"`
	// microphone of the user's machine is heard in the session.
	// +optional
	Microphone Switch `json:"microphone,omitempty"`
	// drives of the user's machine appear in the session.
	// +optional
	Drives Switch `json:"drives,omitempty"`
	// printers of the user's machine appear in the session.
	// +optional
	Printers Switch `json:"printers,omitempty"`
	// smartCards of the user's machine work in the session.
	// +optional
	SmartCards Switch `json:"smartCards,omitempty"`
	// ports (serial) of the user's machine appear in the session.
	// +optional
	Ports Switch `json:"ports,omitempty"`
}

// Signing is what signs connection files.
type Signing struct {
	// issuerRef names the cert-manager issuer of the signing certificate. Clients trust its files where they trust its CA.
	// +required
	IssuerRef IssuerReference `json:"issuerRef"`
	// commonName of the signing certificate, which clients show as the publisher. Defaults to displayName.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	CommonName string `json:"commonName,omitempty"`
}

// WorkspaceCertificates is where TLS certificates come from.
type WorkspaceCertificates struct {
	// issuerRef names the issuer of the broker's public certificate, for hostname and for the names of the Service
	// <workspace>-broker inside the cluster, which enrolling pods dial: a public ACME issuer can't sign those.
	// +required
	IssuerRef IssuerReference `json:"issuerRef"`
	// internalIssuerRef names the issuer of the identities that brokers, gateways and agents show each other: a CA that
	// signs URI names as requested. Unset, the operator makes a CA for this workspace alone, which is best.
	// +optional
	InternalIssuerRef *IssuerReference `json:"internalIssuerRef,omitempty"`
}

// Tickets bounds the secrets in connection files.
type Tickets struct {
	// lifetimeSeconds of a ticket, from the download of its file. A client that keeps its file can connect and reconnect
	// for so long, as long as the Workspace still grants it. 60 to 604800 (a week); defaults to 28800 (8 hours).
	// +optional
	// +kubebuilder:validation:Minimum=60
	// +kubebuilder:validation:Maximum=604800
	LifetimeSeconds *int32 `json:"lifetimeSeconds,omitempty"`
}

// Revocation takes back what a user has, or one ticket.
// +kubebuilder:validation:XValidation:rule="(self.user.size() > 0) != (self.ticket.size() > 0)",message="a revocation names a user or a ticket, one of them"
// +kubebuilder:validation:XValidation:rule="!has(self.before) || self.ticket.size() == 0",message="before goes with user: a ticket is taken back whenever it was made"
type Revocation struct {
	// user, as usernameClaim spells it; upper and lower case are the same here. Without before the user is disabled: no feed,
	// no download, no connect, and no session goes on.
	// +optional
	// +kubebuilder:default=""
	// +kubebuilder:validation:MaxLength=256
	User string `json:"user"`
	// ticket is the id of one ticket, that is, of one downloaded connection file: 26 letters and digits. Brokers log it at
	// download and connect, `rdv explain` shows it, and refusals name it.
	// +optional
	// +kubebuilder:default=""
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="self.size() == 0 || self.matches('^[A-Z2-7]{26}$')",message="ticket must be the id of a ticket, as brokers log it: 26 upper-case letters and digits"
	Ticket string `json:"ticket"`
	// reason is shown to the user.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	// +kubebuilder:validation:XValidation:rule="!self.matches('[\\x00-\\x1f\\x7f]')",message="reason must be one line"
	Reason string `json:"reason,omitempty"`
	// before takes back only what the user signed in to before this time, with the tickets and sessions that rest on it: the
	// user may sign in again. What counts is when the identity provider issued the token (iat). A time to come disables the
	// user until then.
	// +optional
	Before *metav1.Time `json:"before,omitempty"`
}

// Broker sizes and exposes the broker pods.
type Broker struct {
	// replicas of the broker, 1 to 9. Defaults to 2.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=9
	Replicas *int32 `json:"replicas,omitempty"`
	// image of the broker. Defaults to the one that the operator was released with.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	Image string `json:"image,omitempty"`
	// resources of the broker container.
	// +optional
	Resources corev1.ResourceRequirements `json:"resources,omitempty,omitzero"`
	// pod places and dresses the broker pods.
	// +optional
	Pod PodSettings `json:"pod,omitempty,omitzero"`
	// service exposes the feed and enrolment, port 443. Its port is named https.
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.nodePorts) || self.nodePorts.all(p, p.name == 'https')",message="the Service of feed and enrolment has one port: name it https in nodePorts"
	Service Service `json:"service,omitempty,omitzero"`
	// bus exposes the agents' control channel.
	// +optional
	Bus BusExposure `json:"bus,omitempty,omitzero"`
	// network rules what the broker pods may reach, and who may read their metrics.
	// +optional
	Network ServerNetworkAccess `json:"network,omitempty,omitzero"`
}

// BusExposure says how agents outside the cluster reach the control channel.
type BusExposure struct {
	// hostname at which agents outside the cluster reach the Service <workspace>-bus. Unset, only agents that can resolve
	// cluster names reach it.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="hostname must be a DNS name in lower case, without scheme, port or path"
	Hostname string `json:"hostname,omitempty"`
	// service exposes it: port 443 (WebSocket), named wss, and 4222, named nats.
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.nodePorts) || self.nodePorts.all(p, p.name in ['nats', 'wss'])",message="the bus's Service has the ports nats and wss: name these in nodePorts"
	Service Service `json:"service,omitempty,omitzero"`
}

// WorkspaceStatus is how the workspace stands.
type WorkspaceStatus struct {
	// conditions: Ready, ReferencesResolved, CertificatesReady, IdentityReady, Available, Reconciling, Stalled.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec that the status speaks of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// url is what users subscribe to.
	// +optional
	URL string `json:"url,omitempty"`
	// brokers is ready/wanted broker pods.
	// +optional
	Brokers string `json:"brokers,omitempty"`
	// resources counts the resources that can be served (their HostPool exists and fits).
	// +optional
	Resources int32 `json:"resources,omitempty"`
	// gateways are the names of the Gateways that the selector picks.
	// +optional
	// +listType=set
	Gateways []string `json:"gateways,omitempty"`
}

// Workspace is a set of desktops and apps for the users of one identity provider: the thing that a user subscribes to.
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=ws,categories=rdv
// +kubebuilder:printcolumn:name="URL",type=string,JSONPath=`.status.url`
// +kubebuilder:printcolumn:name="Brokers",type=string,JSONPath=`.status.brokers`
// +kubebuilder:printcolumn:name="Resources",type=integer,JSONPath=`.status.resources`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Status",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 40 && !self.metadata.name.contains('.')",message="metadata.name must be a DNS label of at most 40 characters: it becomes part of other names"
type Workspace struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec is what you declare.
	// +required
	Spec WorkspaceSpec `json:"spec"`
	// status is what the operator sees.
	// +optional
	Status WorkspaceStatus `json:"status,omitempty,omitzero"`
}

// WorkspaceList is a list of Workspaces.
// +kubebuilder:object:root=true
type WorkspaceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Workspace `json:"items"`
}
