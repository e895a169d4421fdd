package render

import (
	"fmt"
	"slices"
	"strings"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
)

// Names of a Workspace's children.

// WorkspaceSecrets are the Secrets with keys that are a workspace's own.
func WorkspaceSecrets(workspace string) []string {
	return []string{
		WorkspaceTLS(workspace), WorkspaceTickets(workspace), WorkspaceSigning(workspace), WorkspaceBrokerIdentity(workspace),
		WorkspaceOperatorIdentity(workspace), workspaceInternalCA(workspace),
	}
}

// WorkspaceTLS names the Certificate of the feed, and its Secret.
func WorkspaceTLS(workspace string) string { return workspace + "-tls" }

// WorkspaceTickets names the Certificate of the ticket signer, and its Secret.
func WorkspaceTickets(workspace string) string { return workspace + "-tickets" }

// WorkspaceSigning names the Certificate that signs .rdp files, and its Secret.
func WorkspaceSigning(workspace string) string { return workspace + "-signing" }

// WorkspaceBrokerIdentity names the Certificate of the brokers on the bus, and its Secret.
func WorkspaceBrokerIdentity(workspace string) string { return workspace + "-broker-identity" }

// WorkspaceOperatorIdentity names the Certificate by which brokers know the operator, and its Secret.
func WorkspaceOperatorIdentity(workspace string) string { return workspace + "-operator-identity" }

// WorkspaceBroker names the brokers' Deployment, Service, ConfigMap, ServiceAccount, Role, RoleBinding and policies.
func WorkspaceBroker(workspace string) string { return workspace + "-broker" }

// WorkspaceInternal names the Issuer of the workspace's own CA.
func WorkspaceInternal(workspace string) string { return workspace + "-internal" }

func workspaceSessions(workspace string) string   { return workspace + "-sessions" }
func workspaceBus(workspace string) string        { return workspace + "-bus" }
func workspacePeers(workspace string) string      { return workspace + "-broker-peers" }
func workspaceInternalCA(workspace string) string { return workspace + "-internal-ca" }
func workspaceSelfSigned(workspace string) string { return workspace + "-internal-selfsigned" }

const (
	portHTTPS = 443
	// brokerReplicas, when a Workspace says nothing: one may go while the other serves.
	brokerReplicas = 2
	caDuration     = 10 * 365 * 24 * time.Hour
)

func workspaceLabels(ws *rdv.Workspace, component string) map[string]string {
	return labels(rdv.LabelWorkspace, ws.Name, component)
}

func brokerSelector(workspace string) map[string]string {
	return selector(rdv.LabelWorkspace, workspace, componentBroker)
}

// BrokerReplicas is how many brokers the workspace wants.
func BrokerReplicas(ws *rdv.Workspace) int32 { return or(ws.Spec.Broker.Replicas, brokerReplicas) }

// BrokerURL is where pods of the cluster find the workspace's brokers.
func (o Options) BrokerURL(namespace, workspace string) string {
	return "https://" + o.serviceHost(namespace, WorkspaceBroker(workspace))
}

// PublicURL is where users and machines outside the cluster find the workspace's brokers.
func PublicURL(ws *rdv.Workspace) string { return "https://" + ws.Spec.Hostname }

// InternalIssuer signs the identities that brokers, gateways and agents show each other.
func InternalIssuer(ws *rdv.Workspace) rdv.IssuerReference {
	if ref := ws.Spec.Certificates.InternalIssuerRef; ref != nil {
		full := issuerRef(*ref)
		return rdv.IssuerReference{Name: full.Name, Kind: full.Kind, Group: full.Group}
	}
	return rdv.IssuerReference{Name: WorkspaceInternal(ws.Name), Kind: certmanager.IssuerKind, Group: certmanager.SchemeGroupVersion.Group}
}

// InternalSelfSignedIssuer signs the workspace's own CA certificate, and nothing else.
func InternalSelfSignedIssuer(ws *rdv.Workspace) *certmanager.Issuer {
	return &certmanager.Issuer{
		TypeMeta:   typeMeta(certmanager.SchemeGroupVersion.String(), certmanager.IssuerKind),
		ObjectMeta: meta(ws.Namespace, workspaceSelfSigned(ws.Name), workspaceLabels(ws, "")),
		Spec: certmanager.IssuerSpec{IssuerConfig: certmanager.IssuerConfig{
			SelfSigned: &certmanager.SelfSignedIssuer{},
		}},
	}
}

// InternalCACertificate is the workspace's own CA. Its key stays over renewals, so that what was signed before a renewal
// still verifies after it.
func InternalCACertificate(ws *rdv.Workspace) *certmanager.Certificate {
	return certificate(ws.Namespace, workspaceInternalCA(ws.Name), workspaceLabels(ws, ""), certmanager.CertificateSpec{
		IsCA:       true,
		CommonName: "rendezvous internal CA",
		Subject:    &certmanager.X509Subject{OrganizationalUnits: []string{ws.Namespace, ws.Name}},
		Duration:   &metav1.Duration{Duration: caDuration},
		Usages:     []certmanager.KeyUsage{certmanager.UsageCertSign, certmanager.UsageCRLSign, certmanager.UsageDigitalSignature},
		PrivateKey: &certmanager.CertificatePrivateKey{
			Algorithm: certmanager.ECDSAKeyAlgorithm, Size: 256, RotationPolicy: certmanager.RotationPolicyNever,
		},
		IssuerRef: issuerRef(rdv.IssuerReference{Name: workspaceSelfSigned(ws.Name)}),
	})
}

// InternalCAIssuer signs with the workspace's own CA.
func InternalCAIssuer(ws *rdv.Workspace) *certmanager.Issuer {
	return &certmanager.Issuer{
		TypeMeta:   typeMeta(certmanager.SchemeGroupVersion.String(), certmanager.IssuerKind),
		ObjectMeta: meta(ws.Namespace, WorkspaceInternal(ws.Name), workspaceLabels(ws, "")),
		Spec: certmanager.IssuerSpec{IssuerConfig: certmanager.IssuerConfig{
			CA: &certmanager.CAIssuer{SecretName: workspaceInternalCA(ws.Name)},
		}},
	}
}

// FeedCertificate is what the broker's feed and enrolment show, at the public name and inside the cluster.
func (o Options) FeedCertificate(ws *rdv.Workspace) *certmanager.Certificate {
	return certificate(ws.Namespace, WorkspaceTLS(ws.Name), workspaceLabels(ws, ""), certmanager.CertificateSpec{
		CommonName: commonName(ws.Spec.Hostname),
		DNSNames:   append([]string{ws.Spec.Hostname}, o.serviceNames(ws.Namespace, WorkspaceBroker(ws.Name))...),
		Usages:     []certmanager.KeyUsage{certmanager.UsageDigitalSignature, certmanager.UsageServerAuth},
		PrivateKey: ecdsaKey(),
		IssuerRef:  issuerRef(ws.Spec.Certificates.IssuerRef),
	})
}

// BrokerIdentityCertificate is what a broker shows on the bus, both to those who dial it and to the brokers it dials.
func (o Options) BrokerIdentityCertificate(ws *rdv.Workspace) *certmanager.Certificate {
	peers := o.serviceHost(ws.Namespace, workspacePeers(ws.Name))
	names := append(o.serviceNames(ws.Namespace, workspaceBus(ws.Name)), peers, "*."+peers)
	if host := ws.Spec.Broker.Bus.Hostname; host != "" {
		names = append(names, host)
	}
	return certificate(ws.Namespace, WorkspaceBrokerIdentity(ws.Name), workspaceLabels(ws, ""), certmanager.CertificateSpec{
		DNSNames:   names,
		URIs:       []string{identity.Broker(ws.Namespace, ws.Name).String()},
		Usages:     []certmanager.KeyUsage{certmanager.UsageDigitalSignature, certmanager.UsageServerAuth, certmanager.UsageClientAuth},
		PrivateKey: ecdsaKey(),
		IssuerRef:  issuerRef(InternalIssuer(ws)),
	})
}

// OperatorIdentityCertificate is by which the operator, which shows administrators their sessions, asks the brokers.
func OperatorIdentityCertificate(ws *rdv.Workspace) *certmanager.Certificate {
	return certificate(ws.Namespace, WorkspaceOperatorIdentity(ws.Name), workspaceLabels(ws, ""), certmanager.CertificateSpec{
		URIs:       []string{identity.Operator(ws.Namespace, ws.Name).String()},
		Usages:     []certmanager.KeyUsage{certmanager.UsageDigitalSignature, certmanager.UsageClientAuth},
		PrivateKey: ecdsaKey(),
		IssuerRef:  issuerRef(InternalIssuer(ws)),
	})
}

// TicketCertificate holds the key that signs tickets. The key stays over renewals: files that users have already
// downloaded carry its signatures, and a gateway may still hold the older certificate.
func TicketCertificate(ws *rdv.Workspace) *certmanager.Certificate {
	return certificate(ws.Namespace, WorkspaceTickets(ws.Name), workspaceLabels(ws, ""), certmanager.CertificateSpec{
		URIs:   []string{identity.TicketSigner(ws.Namespace, ws.Name).String()},
		Usages: []certmanager.KeyUsage{certmanager.UsageDigitalSignature},
		PrivateKey: &certmanager.CertificatePrivateKey{
			Algorithm: certmanager.Ed25519KeyAlgorithm, Encoding: certmanager.PKCS8, RotationPolicy: certmanager.RotationPolicyNever,
		},
		IssuerRef: issuerRef(InternalIssuer(ws)),
	})
}

// SigningCertificate signs .rdp files. RSA, because mstsc verifies no other signature; code signing for Windows, e-mail
// protection for verifiers of CMS, such as openssl, that ask for it.
func SigningCertificate(ws *rdv.Workspace) *certmanager.Certificate {
	name := orString(ws.Spec.Signing.CommonName, orString(ws.Spec.DisplayName, ws.Name))
	return certificate(ws.Namespace, WorkspaceSigning(ws.Name), workspaceLabels(ws, ""), certmanager.CertificateSpec{
		CommonName: atMost(name, 64), // the bound of X.520
		Usages:     []certmanager.KeyUsage{certmanager.UsageDigitalSignature, certmanager.UsageCodeSigning, certmanager.UsageEmailProtection},
		PrivateKey: &certmanager.CertificatePrivateKey{
			Algorithm: certmanager.RSAKeyAlgorithm, Size: 2048, RotationPolicy: certmanager.RotationPolicyAlways,
		},
		IssuerRef: issuerRef(ws.Spec.Signing.IssuerRef),
	})
}

// busURLs are where agents find the control channel, best first: one that can't resolve the cluster's names goes on to
// the public ones at once.
func (o Options) busURLs(ws *rdv.Workspace) []string {
	urls := []string{o.clusterBusURL(ws)}
	if host := ws.Spec.Broker.Bus.Hostname; host != "" {
		urls = append(urls, fmt.Sprintf("tls://%s:%d", host, config.PortBus), fmt.Sprintf("wss://%s:%d", host, portHTTPS))
	}
	return urls
}

func (o Options) clusterBusURL(ws *rdv.Workspace) string {
	return fmt.Sprintf("tls://%s:%d", o.serviceHost(ws.Namespace, workspaceBus(ws.Name)), config.PortBus)
}

// BrokerConfigMap is the brokers' configuration; oidcCA (PEM) verifies the identity provider, and may be empty.
func (o Options) BrokerConfigMap(ws *rdv.Workspace, oidcCA string) (*corev1.ConfigMap, error) {
	more := map[string]string{}
	if strings.TrimSpace(oidcCA) != "" {
		more["oidc-ca.crt"] = oidcCA
	}
	return configMap(ws.Namespace, WorkspaceBroker(ws.Name), workspaceLabels(ws, componentBroker), o.brokerConfig(ws), more)
}

// BrokerScope is what the workspace's brokers may write to and have certificates signed by, for the admission policies of
// config/policy, which know no more of a request than who makes it: the names of the workspace's pools, and its issuers as
// GROUP/KIND/NAME.
func BrokerScope(ws *rdv.Workspace, pools []rdv.HostPool) *corev1.ConfigMap {
	issuers, names := []string{issuerPath(InternalIssuer(ws))}, []string{}
	for _, pool := range pools {
		names = append(names, pool.Name)
		if c := pool.Spec.RDPCertificate; c != nil {
			issuers = append(issuers, issuerPath(c.IssuerRef))
		}
	}
	slices.Sort(names)
	slices.Sort(issuers)
	return &corev1.ConfigMap{
		TypeMeta:   typeMeta("v1", "ConfigMap"),
		ObjectMeta: meta(ws.Namespace, WorkspaceBroker(ws.Name)+"-scope", workspaceLabels(ws, componentBrokerScope)),
		Data:       map[string]string{"hostPools": strings.Join(names, ","), "issuers": strings.Join(slices.Compact(issuers), ",")},
	}
}

func issuerPath(ref rdv.IssuerReference) string {
	full := issuerRef(ref)
	return full.Group + "/" + full.Kind + "/" + full.Name
}

func (o Options) brokerConfig(ws *rdv.Workspace) config.Broker {
	issuer := InternalIssuer(ws)
	return config.Broker{
		Namespace:      ws.Namespace,
		Workspace:      ws.Name,
		Hostname:       ws.Spec.Hostname,
		BusURLs:        o.busURLs(ws),
		PeersHost:      o.serviceHost(ws.Namespace, workspacePeers(ws.Name)),
		InternalIssuer: config.Issuer{Name: issuer.Name, Kind: issuer.Kind, Group: issuer.Group},
		Feed:           callers(ws.Spec.Broker.Service),
		Bus:            callers(ws.Spec.Broker.Bus.Service),
	}
}

// BrokerServiceAccount is who the brokers are to the API server.
func BrokerServiceAccount(ws *rdv.Workspace) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{
		TypeMeta:   typeMeta("v1", "ServiceAccount"),
		ObjectMeta: meta(ws.Namespace, WorkspaceBroker(ws.Name), workspaceLabels(ws, componentBroker)),
	}
}

// BrokerRole is what the brokers may do: read what people declared, record who enrolled, and ask cert-manager. No
// Secret is among it.
func BrokerRole(ws *rdv.Workspace) *rbacv1.Role {
	rule := func(group string, resources, verbs []string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{group}, Resources: resources, Verbs: verbs}
	}
	return &rbacv1.Role{
		TypeMeta:   typeMeta(rbacv1.SchemeGroupVersion.String(), "Role"),
		ObjectMeta: meta(ws.Namespace, WorkspaceBroker(ws.Name), workspaceLabels(ws, componentBroker)),
		Rules: []rbacv1.PolicyRule{
			rule(rdv.GroupVersion.Group, []string{"gateways", "hostpools", "sessionhosts", "workspaces"}, []string{"get", "list", "watch"}),
			rule(rdv.GroupVersion.Group, []string{"sessionhosts"}, []string{"create", "patch"}),
			rule(rdv.GroupVersion.Group, []string{"gateways/status", "sessionhosts/status"}, []string{"patch"}),
			rule(certmanager.SchemeGroupVersion.Group, []string{"certificaterequests"}, []string{"create", "delete", "get", "list", "watch"}),
		},
	}
}

// BrokerRoleBinding gives the brokers their Role.
func BrokerRoleBinding(ws *rdv.Workspace) *rbacv1.RoleBinding {
	return &rbacv1.RoleBinding{
		TypeMeta:   typeMeta(rbacv1.SchemeGroupVersion.String(), "RoleBinding"),
		ObjectMeta: meta(ws.Namespace, WorkspaceBroker(ws.Name), workspaceLabels(ws, componentBroker)),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: WorkspaceBroker(ws.Name)},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: ws.Namespace, Name: WorkspaceBroker(ws.Name)}},
	}
}

// AnnotationConfigHash on a pod is the hash of the configuration that it reads at its start alone.
const AnnotationConfigHash = "rendezvous.dev/config-hash"

// BrokerDeployment is the brokers. They read config.json once, and it changes seldom, so a change replaces them, one by
// one; all else that they read they follow.
func (o Options) BrokerDeployment(ws *rdv.Workspace) (*appsv1.Deployment, error) {
	hash, err := hashOf(o.brokerConfig(ws))
	if err != nil {
		return nil, err
	}
	sel := brokerSelector(ws.Name)
	podLabels := workspaceLabels(ws, componentBroker)
	d := &appsv1.Deployment{
		TypeMeta:   typeMeta(appsv1.SchemeGroupVersion.String(), "Deployment"),
		ObjectMeta: meta(ws.Namespace, WorkspaceBroker(ws.Name), podLabels),
		Spec: appsv1.DeploymentSpec{
			Replicas: new(BrokerReplicas(ws)),
			Selector: &metav1.LabelSelector{MatchLabels: sel},
			Strategy: surgeFirst(),
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: podLabels, Annotations: map[string]string{AnnotationConfigHash: hash}},
				Spec: corev1.PodSpec{
					ServiceAccountName:            WorkspaceBroker(ws.Name),
					SecurityContext:               hardenedPod(),
					TopologySpreadConstraints:     spread(sel),
					TerminationGracePeriodSeconds: new(int64(60)),
					EnableServiceLinks:            new(false),
					Containers:                    []corev1.Container{o.brokerContainer(ws)},
					Volumes: []corev1.Volume{
						configMapVolume("config", WorkspaceBroker(ws.Name)),
						secretVolume("tls", WorkspaceTLS(ws.Name), corev1.TLSCertKey, corev1.TLSPrivateKeyKey),
						secretVolume("bus", WorkspaceBrokerIdentity(ws.Name), corev1.TLSCertKey, corev1.TLSPrivateKeyKey, "ca.crt"),
						secretVolume("tickets", WorkspaceTickets(ws.Name), corev1.TLSCertKey, corev1.TLSPrivateKeyKey),
						secretVolume("signing", WorkspaceSigning(ws.Name), corev1.TLSCertKey, corev1.TLSPrivateKeyKey),
					},
				},
			},
		},
	}
	dress(&d.Spec.Template, sel, &ws.Spec.Broker.Pod)
	return d, nil
}

func (o Options) brokerContainer(ws *rdv.Workspace) corev1.Container {
	return corev1.Container{
		Name:            "broker",
		Image:           orString(ws.Spec.Broker.Image, o.BrokerImage),
		ImagePullPolicy: corev1.PullIfNotPresent,
		Args:            []string{"--config=" + config.BrokerFile},
		Env:             []corev1.EnvVar{podName(), podNamespace(), podIP()},
		Ports: []corev1.ContainerPort{
			containerPort("feed", config.PortPublic),
			containerPort("bus", config.PortBus),
			containerPort("bus-ws", config.PortBusWebSocket),
			containerPort("routes", config.PortBusRoutes),
			containerPort("metrics", config.PortMetrics),
			containerPort("sessions", config.PortSessions),
		},
		StartupProbe:    probe("/healthz", "metrics", 1, 60),
		LivenessProbe:   probe("/healthz", "metrics", 10, 6),
		ReadinessProbe:  probe("/readyz", "metrics", 2, 3),
		Resources:       resourcesOr(ws.Spec.Broker.Resources, "50m", "96Mi", "512Mi"),
		SecurityContext: hardenedContainer(),
		VolumeMounts: []corev1.VolumeMount{
			readOnly("config", "/etc/rendezvous/broker"),
			readOnly("tls", config.TLSDir),
			readOnly("bus", config.BusDir),
			readOnly("tickets", config.TicketsDir),
			readOnly("signing", config.SigningDir),
		},
	}
}

// surgeFirst starts a new pod before it stops an old one.
func surgeFirst() appsv1.DeploymentStrategy {
	return appsv1.DeploymentStrategy{
		Type: appsv1.RollingUpdateDeploymentStrategyType,
		RollingUpdate: &appsv1.RollingUpdateDeployment{
			MaxSurge:       new(intstr.FromInt32(1)),
			MaxUnavailable: new(intstr.FromInt32(0)),
		},
	}
}

// BrokerService is the feed and enrolment.
func BrokerService(ws *rdv.Workspace) *corev1.Service {
	return service(ws.Namespace, WorkspaceBroker(ws.Name), workspaceLabels(ws, componentBroker), brokerSelector(ws.Name),
		ws.Spec.Broker.Service, servicePort("https", portHTTPS, "feed"))
}

// BusService is the agents' and gateways' control channel.
func BusService(ws *rdv.Workspace) *corev1.Service {
	return service(ws.Namespace, workspaceBus(ws.Name), workspaceLabels(ws, componentBroker), brokerSelector(ws.Name),
		ws.Spec.Broker.Bus.Service, servicePort("nats", config.PortBus, "bus"), servicePort("wss", portHTTPS, "bus-ws"))
}

// SessionsURL is where the operator asks the brokers for sessions.
func (o Options) SessionsURL(namespace, workspace string) string {
	return "https://" + o.serviceHost(namespace, workspaceSessions(workspace))
}

// BrokerSessionsService is how the operator finds a broker to ask for sessions.
func BrokerSessionsService(ws *rdv.Workspace) *corev1.Service {
	return service(ws.Namespace, workspaceSessions(ws.Name), workspaceLabels(ws, componentBroker), brokerSelector(ws.Name),
		rdv.Service{}, servicePort("https", portHTTPS, "sessions"))
}

// BrokerPeersService is how brokers find each other.
func BrokerPeersService(ws *rdv.Workspace) *corev1.Service {
	return headless(ws.Namespace, workspacePeers(ws.Name), workspaceLabels(ws, componentBroker), brokerSelector(ws.Name),
		servicePort("routes", config.PortBusRoutes, "routes"))
}

// BrokerDisruptionBudget lets one broker go at a time.
func BrokerDisruptionBudget(ws *rdv.Workspace) *policyv1.PodDisruptionBudget {
	return disruptionBudget(ws.Namespace, WorkspaceBroker(ws.Name), workspaceLabels(ws, componentBroker), brokerSelector(ws.Name))
}

func disruptionBudget(namespace, name string, labels, selector map[string]string) *policyv1.PodDisruptionBudget {
	return &policyv1.PodDisruptionBudget{
		TypeMeta:   typeMeta(policyv1.SchemeGroupVersion.String(), "PodDisruptionBudget"),
		ObjectMeta: meta(namespace, name, labels),
		Spec: policyv1.PodDisruptionBudgetSpec{
			MaxUnavailable:             new(intstr.FromInt32(1)),
			Selector:                   &metav1.LabelSelector{MatchLabels: selector},
			UnhealthyPodEvictionPolicy: new(policyv1.AlwaysAllow),
		},
	}
}
