// Package rules holds what the operator checks in objects beyond what their definitions do, as pure functions: the
// reconcilers report by them what they see in the cluster, and package lint what it sees in files.
package rules

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// Problem is what is wrong with one field: a condition's reason, and a message that names the field and says what to do. The
// zero Problem is none.
type Problem struct{ Reason, Message string }

// OK says that nothing is wrong.
func (p Problem) OK() bool { return p.Reason == "" }

func invalid(format string, args ...any) Problem {
	return Problem{rdv.ReasonReferenceInvalid, fmt.Sprintf(format, args...)}
}

func notFound(format string, args ...any) Problem {
	return Problem{rdv.ReasonReferenceNotFound, fmt.Sprintf(format, args...)}
}

// ResourcePool checks the pool that a Workspace's resource names; pool is nil where there is none.
func ResourcePool(ws *rdv.Workspace, resource *rdv.Resource, pool *rdv.HostPool) Problem {
	field := fmt.Sprintf("spec.resources[%s].hostPoolRef: HostPool %q", resource.Name, resource.HostPoolRef.Name)
	switch {
	case pool == nil:
		return notFound("%s not found: create it or name another", field)
	case pool.Spec.WorkspaceRef.Name != ws.Name:
		return invalid("%s belongs to Workspace %q: name a pool of this workspace", field, pool.Spec.WorkspaceRef.Name)
	}
	return Problem{}
}

// PoolWorkspace checks the Workspace that a pool names.
func PoolWorkspace(pool *rdv.HostPool, ws *rdv.Workspace) Problem {
	if ws == nil {
		return notFound("spec.workspaceRef: Workspace %q not found: create it", pool.Spec.WorkspaceRef.Name)
	}
	return Problem{}
}

// HostPool checks the pool that a SessionHost names.
func HostPool(host *rdv.SessionHost, pool *rdv.HostPool) Problem {
	if pool == nil {
		return notFound("spec.hostPoolRef: HostPool %q not found: create it, or delete this SessionHost", host.Spec.HostPoolRef.Name)
	}
	return Problem{}
}

// IssuerKind checks the kind of an issuer that field names. Of other groups than cert-manager's own nothing is known.
func IssuerKind(field string, ref rdv.IssuerReference) Problem {
	if ref.Group != "" && ref.Group != certmanager.SchemeGroupVersion.Group {
		return Problem{}
	}
	switch ref.Kind {
	case "", certmanager.IssuerKind, certmanager.ClusterIssuerKind:
		return Problem{}
	}
	return invalid("%s.kind: %q is no kind of cert-manager.io: write Issuer or ClusterIssuer, or set group", field, ref.Kind)
}

// NamedIssuer is an issuer that people name in an object.
type NamedIssuer struct {
	Field string
	Ref   rdv.IssuerReference
}

// WorkspaceIssuers are those of a Workspace.
func WorkspaceIssuers(ws *rdv.Workspace) []NamedIssuer {
	named := []NamedIssuer{
		{"spec.certificates.issuerRef", ws.Spec.Certificates.IssuerRef},
		{"spec.signing.issuerRef", ws.Spec.Signing.IssuerRef},
	}
	if ref := ws.Spec.Certificates.InternalIssuerRef; ref != nil {
		named = append(named, NamedIssuer{"spec.certificates.internalIssuerRef", *ref})
	}
	return named
}

// Issuers are those of any of the four kinds.
func Issuers(obj metav1.Object) []NamedIssuer {
	switch o := obj.(type) {
	case *rdv.Workspace:
		return WorkspaceIssuers(o)
	case *rdv.Gateway:
		return []NamedIssuer{{"spec.certificates.issuerRef", o.Spec.Certificates.IssuerRef}}
	case *rdv.HostPool:
		if c := o.Spec.RDPCertificate; c != nil {
			return []NamedIssuer{{"spec.rdpCertificate.issuerRef", c.IssuerRef}}
		}
	}
	return nil
}

// GatewaySelector is which Gateways a Workspace picks: all where it says nothing.
func GatewaySelector(ws *rdv.Workspace) (labels.Selector, error) {
	if ws.Spec.GatewaySelector == nil {
		return labels.Everything(), nil
	}
	return metav1.LabelSelectorAsSelector(ws.Spec.GatewaySelector)
}

// BadSelector says what is wrong with a Workspace's gatewaySelector.
func BadSelector(err error) Problem { return invalid("spec.gatewaySelector: %v", err) }

// Certificates is the PEM certificates in a CA bundle, and nothing else that may stand there: it is copied to where more people
// may read it, and what is named might be any Secret.
func Certificates(field, text string) (string, Problem) {
	var out strings.Builder
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if _, err := x509.ParseCertificate(block.Bytes); block.Type == "CERTIFICATE" && err == nil {
			out.Write(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes}))
		}
	}
	if out.Len() == 0 {
		return "", invalid("%s holds no PEM certificate: put the CA of the provider's certificate there", field)
	}
	return out.String(), Problem{}
}

// SharedClaim checks a claim that all hosts of a pool would mount as volume, by its access modes.
func SharedClaim(volume, claim string, modes []corev1.PersistentVolumeAccessMode) Problem {
	if slices.Contains(modes, corev1.ReadWriteMany) || slices.Contains(modes, corev1.ReadOnlyMany) {
		return Problem{}
	}
	var texts []string
	for _, m := range modes {
		texts = append(texts, string(m))
	}
	return invalid("%s is %s, but all hosts of the pool would share it: those on one node have one another's files, the others don't start. Use spec.volumeClaimTemplates, which gives each host a claim of its own, or a claim that is ReadWriteMany",
		ClaimField(volume, claim), strings.Join(texts, ", "))
}

// ClaimField names a claim of a template in messages.
func ClaimField(volume, claim string) string {
	return fmt.Sprintf("spec.template.spec.volumes[%s]: PersistentVolumeClaim %q", volume, claim)
}

// Hostname is a name that clients or agents dial, with the field that it stands in.
type Hostname struct{ Field, Name string }

// Hostnames are those of a Workspace or a Gateway.
func Hostnames(obj metav1.Object) (names []Hostname) {
	switch o := obj.(type) {
	case *rdv.Workspace:
		names = append(names, Hostname{"spec.hostname", o.Spec.Hostname})
		if bus := o.Spec.Broker.Bus.Hostname; bus != "" {
			names = append(names, Hostname{"spec.broker.bus.hostname", bus})
		}
	case *rdv.Gateway:
		names = append(names, Hostname{"spec.hostname", o.Spec.Hostname})
	}
	return names
}

// HostnameIsAddress checks that a hostname is a name: TLS and the names of joins need one.
func HostnameIsAddress(h Hostname) Problem {
	if _, err := netip.ParseAddr(h.Name); err != nil {
		return Problem{}
	}
	return invalid("%s: %s is an IP address: use a DNS name that leads there, since certificates and gateways' join names need one", h.Field, h.Name)
}

// HostnameTaken says that another object has a hostname already.
func HostnameTaken(h Hostname, by string) Problem {
	return invalid("%s: %s is the hostname of %s, too: each needs one of its own, as both listen on the same port", h.Field, h.Name, by)
}
