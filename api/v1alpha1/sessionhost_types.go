package v1alpha1

import (
	"crypto/sha256"
	"encoding/hex"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// SessionHostSpec is one machine that desktops run on.
// +kubebuilder:validation:XValidation:rule="self.hostPoolRef.name == oldSelf.hostPoolRef.name",message="hostPoolRef can't be changed, because the host's certificate names its pool; enrol the host in the other pool"
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.assignedUser) || oldSelf.assignedUser.size() == 0 || has(self.assignedUser)",message="assignedUser can't be left out once it is set, because the next user would get this person's host: write it as it is, or set it to another user, or to an empty string to free the host"
type SessionHostSpec struct {
	// hostPoolRef names the HostPool that the host belongs to. It can't be changed.
	// +required
	HostPoolRef LocalReference `json:"hostPoolRef"`
	// drain, while it is set, keeps new sessions off the host. Sessions that run go on, and a user's own disconnected
	// session can be taken up again.
	// +optional
	Drain *Drain `json:"drain,omitempty"`
	// retiring keeps new sessions off a host that its pool has too many of, until the host is empty and goes. It is the
	// operator's: to keep sessions off a host yourself, set drain.
	// +optional
	Retiring bool `json:"retiring,omitempty"`
	// assignedUser is whose host it is, in a Personal pool. The broker sets it where assignment is Automatic. Once set, it
	// can't be left out by a later write (kubectl replace): the host holds that person's files. Set it to another user, or
	// to an empty string, which frees the host for anybody. A machine's SessionHost that is deleted and made again under its
	// name is its user's again.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	AssignedUser string `json:"assignedUser,omitempty"`
}

// DrainMode says what a drain does.
// +kubebuilder:validation:Enum=NoNewSessions
type DrainMode string

// DrainNoNewSessions keeps new sessions off and lets running ones go on.
const DrainNoNewSessions DrainMode = "NoNewSessions"

// Drain keeps new sessions off a host.
type Drain struct {
	// mode is NoNewSessions: running sessions go on.
	// +required
	Mode DrainMode `json:"mode"`
	// reason is shown to users whom the drain turns away, and in the status.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	Reason string `json:"reason,omitempty"`
	// until is when the drain ends by itself. Unset, it lasts until drain is removed.
	// +optional
	Until *metav1.Time `json:"until,omitempty"`
}

// SessionHostStatus is how the host stands. It is coarse on purpose: nothing is written per heartbeat.
type SessionHostStatus struct {
	// conditions: Ready, ReferencesResolved, Enrolled, OneMachine, Connected, Healthy, Draining, Reconciling, Stalled.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec that the status speaks of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// registration tells of the host's own token, in the Secret <sessionhost>-registration. It enrols this host, once.
	// +optional
	Registration RegistrationStatus `json:"registration,omitempty,omitzero"`
	// filesOf is the user whose files are in the host's claims, in a Personal pool: the host is that user's, whatever
	// spec.assignedUser says, until the claims are gone.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	FilesOf string `json:"filesOf,omitempty"`
	// enrolment tells how the host became a member. The broker writes it.
	// +optional
	Enrolment *Enrolment `json:"enrolment,omitempty"`
	// agent is what the host's agent reported. The broker writes it.
	// +optional
	Agent *AgentStatus `json:"agent,omitempty"`
}

// Enrolment tells how a host became a member, and which key it is. The host is the machine that holds that key: a
// certificate over another one, or of a SessionHost of this name from before, is refused.
type Enrolment struct {
	// time of the enrolment.
	// +required
	Time metav1.Time `json:"time"`
	// tokenHash is the SHA-256, in hex, of the registration token that was used. A host's own token is spent by it.
	// +required
	// +kubebuilder:validation:MaxLength=64
	TokenHash string `json:"tokenHash"`
	// certificateSerial of the identity that was issued, in hex.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	CertificateSerial string `json:"certificateSerial,omitempty"`
	// hostUID is the metadata.uid of the SessionHost that was enrolled. One that is restored or copied under another UID
	// is not.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	HostUID string `json:"hostUID,omitempty"`
	// keyFingerprint is the SHA-256, in hex, of the enrolled key (its SubjectPublicKeyInfo). It is unset where the
	// enrolment was revoked, and where a release before this field made it: then the first machine that connects with a
	// certificate issued since becomes the host.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	KeyFingerprint string `json:"keyFingerprint,omitempty"`
	// nextKeyFingerprint is that of a renewal whose key the agent has yet to connect with. Until then both count; from
	// then on it is keyFingerprint, and the old key is refused.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	NextKeyFingerprint string `json:"nextKeyFingerprint,omitempty"`
	// renewed is when certificates were last issued to the agent, other than by the enrolment.
	// +optional
	Renewed *metav1.Time `json:"renewed,omitempty"`
	// revokedFor is the value of the annotation rendezvous.dev/revoke-enrolment that was last carried out.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	RevokedFor string `json:"revokedFor,omitempty"`
}

// maxRevokedFor bounds Enrolment.RevokedFor, in bytes.
const maxRevokedFor = 256

// RevokeFor is what is kept of the value of the annotation rendezvous.dev/revoke-enrolment: the value, or its SHA-256 in
// hex where it is longer than 256 bytes. Empty asks for nothing.
func RevokeFor(annotations map[string]string) string {
	value := annotations[AnnotationRevoke]
	if len(value) <= maxRevokedFor {
		return value
	}
	sum := sha256.Sum256([]byte(value))
	return hex.EncodeToString(sum[:])
}

// AgentStatus is what a host's agent reported, to the precision that is worth a write.
type AgentStatus struct {
	// connected says whether the agent is on the control channel.
	// +required
	Connected bool `json:"connected"`
	// lastHeartbeat, at most once in five minutes while nothing else changes.
	// +optional
	LastHeartbeat *metav1.Time `json:"lastHeartbeat,omitempty"`
	// version of the agent.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	Version string `json:"version,omitempty"`
	// os of the host.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	OS string `json:"os,omitempty"`
	// rdpReady says whether the RDP server answers.
	// +optional
	RDPReady bool `json:"rdpReady,omitempty"`
	// message says why it doesn't.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Message string `json:"message,omitempty"`
	// sessions on the host.
	// +optional
	Sessions int32 `json:"sessions,omitempty"`
	// drainAcknowledged says that the agent refuses new sessions because of spec.drain or spec.retiring.
	// +optional
	DrainAcknowledged bool `json:"drainAcknowledged,omitempty"`
	// acknowledgedGeneration is the metadata.generation of the SessionHost whose drain is acknowledged.
	// +optional
	AcknowledgedGeneration int64 `json:"acknowledgedGeneration,omitempty"`
	// certificateFingerprint is the SHA-256, in hex, of the RDP certificate that the host shows.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	CertificateFingerprint string `json:"certificateFingerprint,omitempty"`
	// certificateExpires is when that certificate does.
	// +optional
	CertificateExpires *metav1.Time `json:"certificateExpires,omitempty"`
	// secondMachineSeen is when two machines were last seen to connect as this host by turns: a clone, or a stolen key.
	// The condition OneMachine says what to do. Written at most once in five minutes.
	// +optional
	SecondMachineSeen *metav1.Time `json:"secondMachineSeen,omitempty"`
}

// SessionHost is one machine, or pod, that desktops run on.
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=sh,categories=rdv
// +kubebuilder:printcolumn:name="Pool",type=string,JSONPath=`.spec.hostPoolRef.name`
// +kubebuilder:printcolumn:name="User",type=string,JSONPath=`.spec.assignedUser`
// +kubebuilder:printcolumn:name="Sessions",type=integer,JSONPath=`.status.agent.sessions`
// +kubebuilder:printcolumn:name="Draining",type=string,JSONPath=`.status.conditions[?(@.type=="Draining")].status`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Status",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Agent",type=string,JSONPath=`.status.agent.version`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 52 && !self.metadata.name.contains('.')",message="metadata.name must be a DNS label of at most 52 characters: it becomes part of other names"
type SessionHost struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec is what you declare.
	// +required
	Spec SessionHostSpec `json:"spec"`
	// status is what the operator and the broker see.
	// +optional
	Status SessionHostStatus `json:"status,omitempty,omitzero"`
}

// SessionHostList is a list of SessionHosts.
// +kubebuilder:object:root=true
type SessionHostList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []SessionHost `json:"items"`
}
