package render

import (
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// RegistrationSecretName names the Secret with the token of a HostPool or SessionHost.
func RegistrationSecretName(owner string) string { return owner + "-registration" }

// Keys of a registration Secret.
const (
	KeyToken   = "token"
	KeyExpires = "expires" // RFC 3339
	KeyCA      = "ca.crt"  // what verifies the broker's feed and enrolment; may be empty
	KeyBroker  = "broker"  // https URL
)

// Paths and names inside a session-host pod.
const (
	desktopContainer = "desktop"
	agentContainer   = "agent"
	registrationDir  = "/etc/rendezvous/registration"
	agentCADir       = "/etc/rendezvous/ca"
	agentStateDir    = "/var/lib/rendezvous-agent"
	rdpCertDir       = "/run/rdp-cert"
	loginDir         = "/run/rendezvous-login" // PAM in the desktop's image knows it
	rdpAddr          = "127.0.0.1:3389"
)

// loginVolume is shared by agent and desktop where people are logged in by their connections.
const loginVolume = "login"

// AnnotationPodHash on a session-host pod is the hash of the pod as it was rendered; another one asks for another pod.
const AnnotationPodHash = "rendezvous.dev/pod-hash"

// Registration is what stands in a registration Secret.
type Registration struct {
	Token   string
	Expires time.Time
	CA      string
	Broker  string
}

// PoolRegistrationSecret holds the token that enrols any number of machines in a pool. It is not immutable: ca.crt follows
// the workspace's issuer, and hand-made damage to it is repaired.
func PoolRegistrationSecret(pool *rdv.HostPool, r Registration) *corev1.Secret {
	l := labels(rdv.LabelHostPool, pool.Name, "")
	l[rdv.LabelRegistration] = "pool"
	return registrationSecret(pool.Namespace, pool.Name, l, r)
}

// HostRegistrationSecret holds the token that enrols one host, once.
func HostRegistrationSecret(host *rdv.SessionHost, r Registration) *corev1.Secret {
	l := labels(rdv.LabelSessionHost, host.Name, "")
	l[rdv.LabelHostPool] = host.Spec.HostPoolRef.Name
	l[rdv.LabelRegistration] = "host"
	return registrationSecret(host.Namespace, host.Name, l, r)
}

func registrationSecret(namespace, owner string, labels map[string]string, r Registration) *corev1.Secret {
	return &corev1.Secret{
		TypeMeta:   typeMeta("v1", "Secret"),
		ObjectMeta: meta(namespace, RegistrationSecretName(owner), labels),
		Type:       corev1.SecretTypeOpaque,
		Data: map[string][]byte{
			KeyToken:   []byte(r.Token),
			KeyExpires: []byte(r.Expires.UTC().Format(time.RFC3339)),
			KeyCA:      []byte(r.CA),
			KeyBroker:  []byte(r.Broker),
		},
	}
}

// SessionHost is a host that a pool makes from its template. One that retires takes no new session.
func SessionHost(pool *rdv.HostPool, name string, retiring bool) *rdv.SessionHost {
	return &rdv.SessionHost{
		TypeMeta:   typeMeta(rdv.GroupVersion.String(), "SessionHost"),
		ObjectMeta: meta(pool.Namespace, name, labels(rdv.LabelHostPool, pool.Name, "")),
		Spec:       rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: pool.Name}, Retiring: retiring},
	}
}

// ClaimName names a host's claim of one template, as a StatefulSet would.
func ClaimName(template, host string) string { return template + "-" + host }

// Claims are a host's own. filesOf is whose files they hold, empty for nobody's.
func Claims(host *rdv.SessionHost, pool *rdv.HostPool, filesOf string) (claims []*corev1.PersistentVolumeClaim) {
	for _, t := range pool.Spec.VolumeClaimTemplates {
		l := map[string]string{}
		maps.Copy(l, t.Metadata.Labels)
		maps.Copy(l, labels(rdv.LabelHostPool, pool.Name, componentSessionHost))
		l[rdv.LabelSessionHost] = host.Name
		claim := &corev1.PersistentVolumeClaim{
			TypeMeta:   typeMeta("v1", "PersistentVolumeClaim"),
			ObjectMeta: meta(host.Namespace, ClaimName(t.Metadata.Name, host.Name), l),
			Spec:       *t.Spec.DeepCopy(),
		}
		claim.Annotations = maps.Clone(t.Metadata.Annotations)
		if filesOf != "" {
			if claim.Annotations == nil {
				claim.Annotations = map[string]string{}
			}
			claim.Annotations[rdv.AnnotationFilesOf] = filesOf
		}
		claims = append(claims, claim)
	}
	return claims
}

// mountClaims puts a host's claims into its pod, each in place of a volume of its name.
func mountClaims(spec *corev1.PodSpec, host *rdv.SessionHost, pool *rdv.HostPool) {
	for _, t := range pool.Spec.VolumeClaimTemplates {
		spec.Volumes = slices.DeleteFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == t.Metadata.Name })
		spec.Volumes = append(spec.Volumes, corev1.Volume{Name: t.Metadata.Name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: ClaimName(t.Metadata.Name, host.Name)},
		}})
	}
}

// SharedClaims are the claims that all hosts of a pool would mount, which has or may have more than one: by volume.
func SharedClaims(pool *rdv.HostPool, template *corev1.PodTemplateSpec) map[string]string {
	hosts := or(pool.Spec.Replicas, 1)
	if pool.Spec.Autoscaling != nil {
		hosts = pool.Spec.Autoscaling.MaxReplicas
	}
	if hosts < 2 || template == nil {
		return nil
	}
	shared := map[string]string{}
	for _, v := range template.Spec.Volumes {
		own := slices.ContainsFunc(pool.Spec.VolumeClaimTemplates, func(t rdv.VolumeClaimTemplate) bool { return t.Metadata.Name == v.Name })
		if v.PersistentVolumeClaim != nil && !own {
			shared[v.Name] = v.PersistentVolumeClaim.ClaimName
		}
	}
	return shared
}

// Pod is a session host that is a pod: the pool's template, and the agent beside its desktop.
func (o Options) Pod(host *rdv.SessionHost, pool *rdv.HostPool, template *corev1.PodTemplateSpec) (*corev1.Pod, error) {
	template = template.DeepCopy()
	pod := &corev1.Pod{
		TypeMeta:   typeMeta("v1", "Pod"),
		ObjectMeta: meta(host.Namespace, host.Name, map[string]string{}),
		Spec:       template.Spec,
	}
	maps.Copy(pod.Labels, template.Labels)
	maps.Copy(pod.Labels, labels(rdv.LabelHostPool, pool.Name, componentSessionHost))
	pod.Labels[rdv.LabelSessionHost] = host.Name
	pod.Annotations = maps.Clone(template.Annotations)
	if revoke := host.Annotations[rdv.AnnotationRevoke]; revoke != "" { // another value asks for another pod
		if pod.Annotations == nil {
			pod.Annotations = map[string]string{}
		}
		pod.Annotations[rdv.AnnotationRevoke] = revoke
	}

	spec := &pod.Spec
	spec.RestartPolicy = corev1.RestartPolicyAlways
	spec.AutomountServiceAccountToken = new(false)
	if spec.Hostname == "" {
		spec.Hostname = host.Name
	}
	if spec.EnableServiceLinks == nil {
		spec.EnableServiceLinks = new(false)
	}
	if spec.SecurityContext == nil {
		spec.SecurityContext = &corev1.PodSecurityContext{}
	}
	if spec.SecurityContext.FSGroup == nil {
		// One group for the shared folder, so that a desktop that isn't root reads the key that the agent wrote.
		spec.SecurityContext.FSGroup = new(nonRoot)
	}
	mountClaims(spec, host, pool)
	spec.InitContainers = append(spec.InitContainers, o.agentSidecar(host, pool))
	shared := []corev1.VolumeMount{readOnly("rdp-cert", rdpCertDir)}
	if pool.Spec.Accounts != nil {
		shared = append(shared, readOnly(loginVolume, loginDir))
		// Not in memory, which the program in it would count against.
		spec.Volumes = append(spec.Volumes, corev1.Volume{Name: loginVolume, VolumeSource: corev1.VolumeSource{
			EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: new(resource.MustParse("128Mi"))},
		}})
	}
	for i := range spec.Containers {
		if spec.Containers[i].Name == desktopContainer {
			spec.Containers[i].VolumeMounts = append(spec.Containers[i].VolumeMounts, shared...)
		}
	}
	secret := RegistrationSecretName(host.Name)
	spec.Volumes = append(spec.Volumes,
		memoryVolume("rdp-cert", "1Mi"),
		memoryVolume("agent-state", "16Mi"),
		secretVolume("registration", secret, KeyToken),
		secretVolume("agent-ca", secret, KeyCA),
	)
	hash, err := hashOf(pod)
	if err != nil {
		return nil, err
	}
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	pod.Annotations[AnnotationPodHash] = hash
	return pod, nil
}

func (o Options) agentSidecar(host *rdv.SessionHost, pool *rdv.HostPool) corev1.Container {
	c := corev1.Container{
		Name:            agentContainer,
		Image:           orString(pool.Spec.Agent.Image, o.AgentImage),
		ImagePullPolicy: corev1.PullIfNotPresent,
		RestartPolicy:   new(corev1.ContainerRestartPolicyAlways),
		Args: []string{
			"run",
			"--broker=" + o.BrokerURL(pool.Namespace, pool.Spec.WorkspaceRef.Name),
			"--token-file=" + registrationDir + "/" + KeyToken,
			"--host=" + host.Name,
			"--state-dir=" + agentStateDir,
			"--rdp-addr=" + rdpAddr,
			"--rdp-cert-dir=" + rdpCertDir,
			"--ca-file=" + agentCADir + "/" + KeyCA,
		},
		// Nothing in this pod listens on its address, so the kubelet asks inside it.
		LivenessProbe: &corev1.Probe{
			ProbeHandler:     corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/agent", "healthcheck", "--state-dir=" + agentStateDir}}},
			PeriodSeconds:    30,
			TimeoutSeconds:   5,
			FailureThreshold: 4,
		},
		Resources:       resourcesOr(pool.Spec.Agent.Resources, "10m", "32Mi", "128Mi"),
		SecurityContext: hardenedContainer(),
		VolumeMounts: []corev1.VolumeMount{
			{Name: "rdp-cert", MountPath: rdpCertDir},
			{Name: "agent-state", MountPath: agentStateDir},
			readOnly("registration", registrationDir),
			readOnly("agent-ca", agentCADir),
		},
	}
	if pool.Spec.Accounts != nil {
		c.Args = append(c.Args, "--login-dir="+loginDir, "--login-shared")
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: loginVolume, MountPath: loginDir})
	}
	return c
}

// PoolAccounts is where the pool's brokers keep who was given which account. What is in it is theirs.
func PoolAccounts(pool *rdv.HostPool) *corev1.ConfigMap {
	return &corev1.ConfigMap{TypeMeta: typeMeta("v1", "ConfigMap"), ObjectMeta: accountsMeta(pool)}
}

func accountsMeta(pool *rdv.HostPool) metav1.ObjectMeta {
	return meta(pool.Namespace, rdv.AccountsConfigMap(pool.Name), labels(rdv.LabelHostPool, pool.Name, componentSessionHost))
}

// PoolAccountsRole is the right to keep that list, and to no other ConfigMap.
func PoolAccountsRole(pool *rdv.HostPool) *rbacv1.Role {
	return &rbacv1.Role{
		TypeMeta:   typeMeta(rbacv1.SchemeGroupVersion.String(), "Role"),
		ObjectMeta: accountsMeta(pool),
		Rules: []rbacv1.PolicyRule{{
			APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{rdv.AccountsConfigMap(pool.Name)}, Verbs: []string{"get", "patch"},
		}},
	}
}

// PoolAccountsRoleBinding gives the workspace's brokers that right.
func PoolAccountsRoleBinding(pool *rdv.HostPool) *rbacv1.RoleBinding {
	return &rbacv1.RoleBinding{
		TypeMeta:   typeMeta(rbacv1.SchemeGroupVersion.String(), "RoleBinding"),
		ObjectMeta: accountsMeta(pool),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: rdv.AccountsConfigMap(pool.Name)},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: pool.Namespace, Name: WorkspaceBroker(pool.Spec.WorkspaceRef.Name)}},
	}
}
