// Package render builds the objects that the operator keeps: one pure function per object, from what people declared
// and from nothing else. It has no client, no context and no clock, so that each object can be compared with a golden
// file. Defaults live here.
package render

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"unicode/utf8"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/config"
)

// Options are what the operator itself was started with.
type Options struct {
	// Images of the release; a spec may name others.
	BrokerImage, GatewayImage, RelayImage, AgentImage string
	// ClusterDomain ends the cluster's DNS names. Empty means cluster.local.
	ClusterDomain string
	// OperatorNamespace is where the operator's pods run. Empty means that it runs elsewhere, or nobody knows where.
	OperatorNamespace string
}

// serviceHost is the full DNS name of a Service in the cluster.
func (o Options) serviceHost(namespace, service string) string {
	domain := o.ClusterDomain
	if domain == "" {
		domain = "cluster.local"
	}
	return fmt.Sprintf("%s.%s.svc.%s", service, namespace, domain)
}

// serviceNames are all the DNS names under which pods may dial a Service.
func (o Options) serviceNames(namespace, service string) []string {
	return []string{service, service + "." + namespace, service + "." + namespace + ".svc", o.serviceHost(namespace, service)}
}

// Components, in the label rendezvous.dev/component.
const (
	componentBroker      = "broker"
	componentBrokerScope = "broker-scope" // config/policy picks by it
	componentGateway     = "gateway"
	componentSessionHost = "sessionhost"
)

// nonRoot is the user that our images run as.
const nonRoot int64 = 65532

// The labels that Kubernetes recommends, as far as ours tell things apart by them.
const (
	appName           = "rendezvous"
	labelAppName      = "app.kubernetes.io/name"
	labelAppComponent = "app.kubernetes.io/component"
)

// labels of everything that the operator makes for the object that ownerLabel names.
func labels(ownerLabel, owner, component string) map[string]string {
	l := map[string]string{
		rdv.LabelManagedBy: rdv.ManagedBy,
		labelAppName:       appName,
		ownerLabel:         owner,
	}
	if component != "" {
		l[rdv.LabelComponent] = component
		l[labelAppComponent] = component
	}
	return l
}

// selector of the pods of one owner and component: no more labels than tell them apart, for a selector can't change.
func selector(ownerLabel, owner, component string) map[string]string {
	return map[string]string{ownerLabel: owner, rdv.LabelComponent: component}
}

func meta(namespace, name string, labels map[string]string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels}
}

func typeMeta(apiVersion, kind string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: apiVersion, Kind: kind}
}

// or is v, or the default where v is nil.
func or[T any](v *T, fallback T) T {
	if v == nil {
		return fallback
	}
	return *v
}

func orString(v, fallback string) string {
	if v == "" {
		return fallback
	}
	return v
}

// atMost cuts s to n bytes, at a rune's edge.
func atMost(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// issuerRef spells cert-manager's defaults out, so that it compares equal to what the API server holds.
func issuerRef(ref rdv.IssuerReference) cmmeta.IssuerReference {
	return cmmeta.IssuerReference{
		Name:  ref.Name,
		Kind:  orString(ref.Kind, certmanager.IssuerKind),
		Group: orString(ref.Group, certmanager.SchemeGroupVersion.Group),
	}
}

// certificate is the frame of every Certificate: its Secret has its name, and its labels so that it can be found again.
func certificate(namespace, name string, labels map[string]string, spec certmanager.CertificateSpec) *certmanager.Certificate {
	spec.SecretName = name
	secretLabels := maps.Clone(labels)
	spec.SecretTemplate = &certmanager.CertificateSecretTemplate{Labels: secretLabels}
	return &certmanager.Certificate{
		TypeMeta:   typeMeta(certmanager.SchemeGroupVersion.String(), certmanager.CertificateKind),
		ObjectMeta: meta(namespace, name, labels),
		Spec:       spec,
	}
}

// commonName is the name that clients show in their questions about a certificate; without one FreeRDP and Remmina ask about
// "(null)". It has at most 64 characters (X.520), and public CAs want it to be one of the certificate's DNS names: a longer
// host name goes without.
func commonName(hostname string) string {
	const most = 64
	if len(hostname) > most {
		return ""
	}
	return hostname
}

func ecdsaKey() *certmanager.CertificatePrivateKey {
	return &certmanager.CertificatePrivateKey{
		Algorithm:      certmanager.ECDSAKeyAlgorithm,
		Size:           256,
		RotationPolicy: certmanager.RotationPolicyAlways,
	}
}

// service is the frame of every Service that people can expose.
func service(namespace, name string, labels, selector map[string]string, exposed rdv.Service, ports ...corev1.ServicePort) *corev1.Service {
	s := &corev1.Service{
		TypeMeta:   typeMeta("v1", "Service"),
		ObjectMeta: meta(namespace, name, labels),
		Spec: corev1.ServiceSpec{
			Type:                          exposed.Type,
			Selector:                      selector,
			Ports:                         ports,
			LoadBalancerClass:             exposed.LoadBalancerClass,
			ExternalTrafficPolicy:         exposed.ExternalTrafficPolicy,
			HealthCheckNodePort:           or(exposed.HealthCheckNodePort, 0),
			AllocateLoadBalancerNodePorts: exposed.AllocateLoadBalancerNodePorts,
			IPFamilyPolicy:                exposed.IPFamilyPolicy,
			IPFamilies:                    exposed.IPFamilies,
		},
	}
	if s.Spec.Type == "" {
		s.Spec.Type = corev1.ServiceTypeClusterIP
	}
	for _, network := range exposed.LoadBalancerSourceRanges {
		s.Spec.LoadBalancerSourceRanges = append(s.Spec.LoadBalancerSourceRanges, string(network))
	}
	for _, fixed := range exposed.NodePorts {
		for i := range s.Spec.Ports {
			if s.Spec.Ports[i].Name == fixed.Name {
				s.Spec.Ports[i].NodePort = fixed.NodePort
			}
		}
	}
	s.Annotations = exposed.Annotations
	return s
}

// callers says what a pod behind an exposed Service can know of who calls.
func callers(exposed rdv.Service) (c config.Callers) {
	if p := exposed.ProxyProtocol; p != nil {
		for _, network := range p.Networks {
			c.ProxyNetworks = append(c.ProxyNetworks, string(network))
		}
	}
	c.AddressesHidden = exposedByNodes(exposed) && c.ProxyNetworks == nil
	return c
}

// exposedByNodes says that a Service's connections from outside may come with a node's address in place of the client's.
func exposedByNodes(exposed rdv.Service) bool {
	return exposed.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal &&
		(exposed.Type == corev1.ServiceTypeNodePort || exposed.Type == corev1.ServiceTypeLoadBalancer)
}

// headless is a Service for finding each pod, ready or not: peers meet before they serve, and a pod that drains still
// takes the join of a session that it holds.
func headless(namespace, name string, labels, selector map[string]string, ports ...corev1.ServicePort) *corev1.Service {
	return &corev1.Service{
		TypeMeta:   typeMeta("v1", "Service"),
		ObjectMeta: meta(namespace, name, labels),
		Spec: corev1.ServiceSpec{
			Type:                     corev1.ServiceTypeClusterIP,
			ClusterIP:                corev1.ClusterIPNone,
			PublishNotReadyAddresses: true,
			Selector:                 selector,
			Ports:                    ports,
		},
	}
}

func servicePort(name string, port int32, target string) corev1.ServicePort {
	return corev1.ServicePort{Name: name, Port: port, TargetPort: intstr.FromString(target), Protocol: corev1.ProtocolTCP}
}

func containerPort(name string, port int32) corev1.ContainerPort {
	return corev1.ContainerPort{Name: name, ContainerPort: port, Protocol: corev1.ProtocolTCP}
}

// hardenedPod is the security context of our own pods.
func hardenedPod() *corev1.PodSecurityContext {
	return &corev1.PodSecurityContext{
		RunAsNonRoot:   new(true),
		RunAsUser:      new(nonRoot),
		RunAsGroup:     new(nonRoot),
		FSGroup:        new(nonRoot),
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}

// hardenedContainer is the security context of our own containers.
func hardenedContainer() *corev1.SecurityContext {
	return &corev1.SecurityContext{
		AllowPrivilegeEscalation: new(false),
		ReadOnlyRootFilesystem:   new(true),
		RunAsNonRoot:             new(true),
		RunAsUser:                new(nonRoot),
		RunAsGroup:               new(nonRoot),
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}

// spread keeps pods apart where the cluster has room for it, and does not hold them back where it has not.
func spread(selector map[string]string) []corev1.TopologySpreadConstraint {
	over := func(key string) corev1.TopologySpreadConstraint {
		return corev1.TopologySpreadConstraint{
			MaxSkew:           1,
			TopologyKey:       key,
			WhenUnsatisfiable: corev1.ScheduleAnyway,
			LabelSelector:     &metav1.LabelSelector{MatchLabels: selector},
		}
	}
	return []corev1.TopologySpreadConstraint{over(corev1.LabelHostname), over(corev1.LabelTopologyZone)}
}

// dress gives pods of ours, whose selector is sel, what people set for them.
func dress(template *corev1.PodTemplateSpec, sel map[string]string, settings *rdv.PodSettings) {
	template.Labels = merged(settings.Labels, template.Labels)
	template.Annotations = merged(settings.Annotations, template.Annotations)
	spec := &template.Spec
	spec.NodeSelector = maps.Clone(settings.NodeSelector)
	spec.Tolerations = settings.Tolerations
	spec.Affinity = settings.Affinity
	spec.PriorityClassName = settings.PriorityClassName
	for _, secret := range settings.ImagePullSecrets {
		spec.ImagePullSecrets = append(spec.ImagePullSecrets, corev1.LocalObjectReference{Name: secret.Name})
	}
	if len(settings.TopologySpreadConstraints) > 0 {
		spec.TopologySpreadConstraints = nil
		for _, c := range settings.TopologySpreadConstraints {
			if c.LabelSelector == nil {
				c.LabelSelector = &metav1.LabelSelector{MatchLabels: sel}
			}
			spec.TopologySpreadConstraints = append(spec.TopologySpreadConstraints, c)
		}
	}
	for _, list := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i := range list {
			for _, env := range settings.Env {
				list[i].Env = append(list[i].Env, corev1.EnvVar{Name: env.Name, Value: env.Value})
			}
		}
	}
}

// merged is both maps in one; of a key in both, that of over counts. It is nil where there is neither.
func merged(under, over map[string]string) map[string]string {
	if len(under)+len(over) == 0 {
		return nil
	}
	m := maps.Clone(under)
	if m == nil {
		m = map[string]string{}
	}
	maps.Copy(m, over)
	return m
}

// downwardEnv is an environment variable from a field of the pod.
func downwardEnv(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
}

func podName() corev1.EnvVar      { return downwardEnv("POD_NAME", "metadata.name") }
func podNamespace() corev1.EnvVar { return downwardEnv("POD_NAMESPACE", "metadata.namespace") }
func podIP() corev1.EnvVar        { return downwardEnv("POD_IP", "status.podIP") }

// probe asks path on the named port every period seconds; failures of them in a row count.
func probe(path, port string, period, failures int32) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromString(port), Scheme: corev1.URISchemeHTTP}},
		PeriodSeconds:    period,
		TimeoutSeconds:   3,
		FailureThreshold: failures,
	}
}

// resourcesOr are the spec's resources, or the default ones where it names none.
func resourcesOr(given corev1.ResourceRequirements, cpu, memory, memoryLimit string) corev1.ResourceRequirements {
	if len(given.Requests) > 0 || len(given.Limits) > 0 || len(given.Claims) > 0 {
		return given
	}
	return corev1.ResourceRequirements{
		Requests: corev1.ResourceList{
			corev1.ResourceCPU:    resource.MustParse(cpu),
			corev1.ResourceMemory: resource.MustParse(memory),
		},
		Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(memoryLimit)},
	}
}

func configMapVolume(name, configMap string) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
		LocalObjectReference: corev1.LocalObjectReference{Name: configMap},
		DefaultMode:          new(int32(0o444)),
	}}}
}

// secretVolume shows keys of a Secret, readable for our group alone.
func secretVolume(name, secret string, keys ...string) corev1.Volume {
	items := make([]corev1.KeyToPath, len(keys))
	for i, key := range keys {
		items[i] = corev1.KeyToPath{Key: key, Path: key}
	}
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{
		SecretName:  secret,
		Items:       items,
		DefaultMode: new(int32(0o440)),
	}}}
}

// memoryVolume is a small folder that never reaches a disk.
func memoryVolume(name, limit string) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{
		Medium:    corev1.StorageMediumMemory,
		SizeLimit: new(resource.MustParse(limit)),
	}}}
}

func readOnly(volume, path string) corev1.VolumeMount {
	return corev1.VolumeMount{Name: volume, MountPath: path, ReadOnly: true}
}

// configMap holds a configuration file, and more keys beside it.
func configMap(namespace, name string, labels map[string]string, file any, more map[string]string) (*corev1.ConfigMap, error) {
	text, err := config.Render(file)
	if err != nil {
		return nil, fmt.Errorf("render: ConfigMap %q: %w", name, err)
	}
	data := map[string]string{"config.json": text}
	maps.Copy(data, more)
	return &corev1.ConfigMap{
		TypeMeta:   typeMeta("v1", "ConfigMap"),
		ObjectMeta: meta(namespace, name, labels),
		Data:       data,
	}, nil
}

// hashOf tells two values apart by their JSON.
func hashOf(v any) (string, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("render: hash of %T: %w", v, err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8]), nil
}
