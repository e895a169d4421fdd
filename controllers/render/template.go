package render

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	kjson "sigs.k8s.io/json"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// PodTemplate reads a pool's template, strictly. What can't be honoured in one that can be read is a TemplateFaults. A pool
// without a template has nil.
func PodTemplate(pool *rdv.HostPool) (*corev1.PodTemplateSpec, error) {
	if pool.Spec.Template == nil {
		return nil, nil
	}
	template := &corev1.PodTemplateSpec{}
	strict, err := kjson.UnmarshalStrict(pool.Spec.Template.Raw, template)
	if err != nil {
		return nil, fmt.Errorf("spec.template: %w", err)
	}
	if len(strict) > 0 {
		return nil, fmt.Errorf("spec.template: %w", errors.Join(strict...))
	}
	faults := templateFaults(&template.Spec)
	for _, t := range pool.Spec.VolumeClaimTemplates {
		if isOurVolume(t.Metadata.Name) {
			faults = append(faults, fmt.Sprintf("spec.volumeClaimTemplates: %q is the name of a volume that the operator adds; rename it", t.Metadata.Name))
		}
	}
	if len(faults) > 0 {
		return nil, TemplateFaults(faults)
	}
	return template, nil
}

// TemplateFaults are all that can't be honoured in a template, each with its field first.
type TemplateFaults []string

func (f TemplateFaults) Error() string { return strings.Join(f, "; ") }

// rdpCertVolume alone of the volumes that the operator adds may be mounted by other containers than the desktop.
const rdpCertVolume = "rdp-cert"

func isOurVolume(name string) bool {
	return slices.Contains([]string{rdpCertVolume, "agent-state", "registration", "agent-ca", loginVolume}, name)
}

func allContainers(spec *corev1.PodSpec) []corev1.Container {
	return slices.Concat(spec.InitContainers, spec.Containers)
}

// templateFaults are what would open the pod to others, hand the desktop what is the agent's, or be overridden.
func templateFaults(spec *corev1.PodSpec) (faults []string) {
	const field = "spec.template.spec"
	refuse := func(format string, args ...any) { faults = append(faults, field+fmt.Sprintf(format, args...)) }
	if spec.HostNetwork {
		refuse(".hostNetwork: must not be true, for the node's network is open to the desktop's port; leave it out")
	}
	for name, set := range map[string]bool{"hostPID": spec.HostPID, "hostIPC": spec.HostIPC} {
		if set {
			refuse(".%s: must not be true, for desktops would reach the node's processes, and agents among them; leave it out", name)
		}
	}
	if spec.ShareProcessNamespace != nil && *spec.ShareProcessNamespace {
		refuse(".shareProcessNamespace: must not be true, for a desktop would reach the agent's process and its key; leave it out")
	}
	if p := spec.RestartPolicy; p != "" && p != corev1.RestartPolicyAlways {
		refuse(".restartPolicy: is %s, and a session host's is always Always; leave it out", p)
	}
	if a := spec.AutomountServiceAccountToken; a != nil && *a {
		refuse(".automountServiceAccountToken: must not be true, for users would have the token; leave it out, and mount a projected serviceAccountToken where a desktop needs one")
	}
	if len(spec.EphemeralContainers) > 0 {
		refuse(".ephemeralContainers: can't be in a template; leave them out")
	}
	desktop := false
	for _, c := range spec.Containers {
		desktop = desktop || c.Name == desktopContainer
	}
	if !desktop {
		refuse(".containers: none is named %q; name the one that runs the RDP server so", desktopContainer)
	}
	for _, c := range allContainers(spec) {
		if c.Name == agentContainer {
			refuse(": a container is named %q, which is the name of the sidecar that the operator adds; rename it", agentContainer)
		}
		for _, p := range c.Ports {
			if p.HostPort != 0 {
				refuse(": container %q asks for hostPort %d, but nothing may reach a session host from outside; leave it out", c.Name, p.HostPort)
			}
		}
		for _, m := range c.VolumeMounts {
			if isOurVolume(m.Name) && (m.Name != rdpCertVolume || c.Name == desktopContainer) {
				refuse(": container %q mounts %q, a volume of the agent's; leave the mount out: the desktop has what it needs in %s", c.Name, m.Name, rdpCertDir)
			}
		}
	}
	for _, v := range spec.Volumes {
		if isOurVolume(v.Name) {
			refuse(".volumes: %q is the name of a volume that the operator adds; rename it", v.Name)
		}
	}
	slices.Sort(faults)
	return faults
}

// TemplateOverrides names what stands in a template and is set by the operator, whatever it says.
func TemplateOverrides(template *corev1.PodTemplateSpec) (fields []string) {
	if template == nil {
		return nil
	}
	if template.Name != "" || template.GenerateName != "" {
		fields = append(fields, "metadata.name")
	}
	if template.Namespace != "" {
		fields = append(fields, "metadata.namespace")
	}
	if len(template.OwnerReferences) > 0 {
		fields = append(fields, "metadata.ownerReferences")
	}
	if len(template.Finalizers) > 0 {
		fields = append(fields, "metadata.finalizers")
	}
	for label := range template.Labels {
		if isOurLabel(label) {
			fields = append(fields, fmt.Sprintf("metadata.labels[%s]", label))
		}
	}
	if _, ok := template.Annotations[AnnotationPodHash]; ok {
		fields = append(fields, fmt.Sprintf("metadata.annotations[%s]", AnnotationPodHash))
	}
	slices.Sort(fields)
	return fields
}

func isOurLabel(label string) bool {
	_, ours := labels(rdv.LabelHostPool, "", componentSessionHost)[label]
	return ours || label == rdv.LabelSessionHost
}

// TemplateSecrets are the Secrets that a template's pods read, each with the field that first names it.
func TemplateSecrets(template *corev1.PodTemplateSpec) map[string]string {
	found := map[string]string{}
	if template == nil {
		return found
	}
	add := func(name, format string, args ...any) {
		if _, known := found[name]; name != "" && !known {
			found[name] = "spec.template.spec" + fmt.Sprintf(format, args...)
		}
	}
	for _, v := range template.Spec.Volumes {
		if v.Secret != nil {
			add(v.Secret.SecretName, ".volumes[%s].secret", v.Name)
		}
		if v.Projected != nil {
			for _, source := range v.Projected.Sources {
				if source.Secret != nil {
					add(source.Secret.Name, ".volumes[%s].projected", v.Name)
				}
			}
		}
	}
	for _, c := range allContainers(&template.Spec) {
		for _, from := range c.EnvFrom {
			if from.SecretRef != nil {
				add(from.SecretRef.Name, ": container %q, envFrom", c.Name)
			}
		}
		for _, env := range c.Env {
			if env.ValueFrom != nil && env.ValueFrom.SecretKeyRef != nil {
				add(env.ValueFrom.SecretKeyRef.Name, ": container %q, env %s", c.Name, env.Name)
			}
		}
	}
	return found
}

// TemplateServiceAccount is the ServiceAccount that a template's pods run as; empty means the namespace's default.
func TemplateServiceAccount(template *corev1.PodTemplateSpec) string {
	if template == nil {
		return ""
	}
	return orString(template.Spec.ServiceAccountName, template.Spec.DeprecatedServiceAccount)
}

// ServiceAccountRefused says that a template must not run as a ServiceAccount, because it is the brokers'.
func ServiceAccountRefused(name string) string {
	return fmt.Sprintf("spec.template.spec.serviceAccountName: ServiceAccount %q is a workspace's brokers', whose rights users of a desktop must not have; leave it out, or name another", name)
}

// TemplateClaims are the claims that a template's pods mount, each with its volume.
func TemplateClaims(template *corev1.PodTemplateSpec) map[string]string {
	found := map[string]string{}
	if template == nil {
		return found
	}
	for _, v := range template.Spec.Volumes {
		if v.PersistentVolumeClaim != nil {
			found[v.PersistentVolumeClaim.ClaimName] = v.Name
		}
	}
	return found
}

// SecretRefused says that a template must not read a Secret, because it is one that this project keeps.
func SecretRefused(field, secret string) string {
	return fmt.Sprintf("%s: Secret %q holds keys of a workspace, a gateway or a host, which users of a desktop must not have; leave it out", field, secret)
}
