package lint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// Finding is one thing that is wrong.
type Finding struct {
	File string
	Line int
	// Object is KIND NAMESPACE/NAME, empty where the file can't be read.
	Object  string
	Message string
	// Warning says that it may be right: what is missing here may be in the cluster.
	Warning bool
}

func (f Finding) String() string {
	level := "error"
	if f.Warning {
		level = "warning"
	}
	where := fmt.Sprintf("%s:%d: %s: ", f.File, f.Line, level)
	if f.Object != "" {
		where += f.Object + ": "
	}
	return where + f.Message
}

// Result is what Check saw.
type Result struct {
	Findings []Finding
	// Checked and Others count objects of our kinds, and of others.
	Checked, Others int
}

// Errors counts the findings that are no warnings.
func (r *Result) Errors() (n int) {
	for _, f := range r.Findings {
		if !f.Warning {
			n++
		}
	}
	return n
}

// Check checks the objects in all sources together. Its error says that it could not.
func Check(ctx context.Context, sources []Source) (*Result, error) {
	kinds, err := definitions(rdv.GroupVersion.Version)
	if err != nil {
		return nil, fmt.Errorf("lint: the definitions that are built in: %w", err)
	}
	s := &set{byKind: map[string][]*entry{}}
	for _, source := range sources {
		objects, findings := parse(source)
		s.findings = append(s.findings, findings...)
		for i := range objects {
			s.add(ctx, kinds, &objects[i])
		}
	}
	s.checkTogether()
	slices.SortStableFunc(s.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
	s.findings = slices.Compact(s.findings)
	return &Result{Findings: s.findings, Checked: s.checked, Others: s.others}, nil
}

// entry is one object of the set.
type entry struct {
	*object
	kind, namespace, name string
	typed                 metav1.Object // of the kinds that are looked into
}

func (e *entry) String() string {
	if e.namespace == "" {
		return e.kind + " " + e.name
	}
	return fmt.Sprintf("%s %s/%s", e.kind, e.namespace, e.name)
}

// set is all objects together.
type set struct {
	byKind          map[string][]*entry
	findings        []Finding
	checked, others int
}

func (s *set) find(e *entry, path, message string, warning bool) {
	s.findings = append(s.findings, Finding{File: e.file, Line: e.at(path), Object: e.String(), Message: message, Warning: warning})
}

var fieldOf = regexp.MustCompile(`^(?:spec|metadata)[A-Za-z0-9._\[\]"/-]*`)

// problem adds a rule's finding, at the field that its message begins with.
func (s *set) problem(e *entry, p rules.Problem) {
	if !p.OK() {
		s.find(e, fieldOf.FindString(p.Message), p.Message, false)
	}
}

// add takes in an object, and checks it by itself.
func (s *set) add(ctx context.Context, kinds map[string]*definition, o *object) {
	u := &unstructured.Unstructured{Object: o.data}
	gvk := u.GroupVersionKind()
	e := &entry{object: o, kind: gvk.Kind, namespace: u.GetNamespace(), name: u.GetName()}
	if gvk.Group != rdv.GroupVersion.Group {
		s.others++
		if into := known(gvk.Group, gvk.Kind); into != nil && runtime.DefaultUnstructuredConverter.FromUnstructured(o.data, into) == nil {
			e.typed = into.(metav1.Object)
			s.byKind[e.kind] = append(s.byKind[e.kind], e)
		}
		return
	}
	s.checked++
	d := kinds[gvk.Kind]
	if d == nil || gvk.Version != rdv.GroupVersion.Version {
		s.find(e, "kind", fmt.Sprintf("%s has no kind %s in version %s: there are %s in %s", gvk.Group, gvk.Kind, gvk.Version,
			strings.Join(slices.Sorted(maps.Keys(kinds)), ", "), rdv.GroupVersion), false)
		return
	}
	for _, twice := range s.byKind[e.kind] {
		if twice.namespace == e.namespace && twice.name == e.name && e.name != "" {
			s.find(e, "metadata.name", fmt.Sprintf("is declared twice, also at %s:%d: the later one would replace the earlier", twice.file, twice.at("metadata.name")), false)
		}
	}
	if e.name == "" {
		s.find(e, "metadata", "metadata.name is missing", false)
		return
	}
	faults := d.check(ctx, o.data)
	for _, f := range faults {
		message := f.message
		if f.path != "" {
			message = f.path + ": " + f.message
		}
		s.find(e, f.path, message, false)
	}
	typed := map[string]metav1.Object{"Workspace": &rdv.Workspace{}, "HostPool": &rdv.HostPool{}, "SessionHost": &rdv.SessionHost{}, "Gateway": &rdv.Gateway{}}[gvk.Kind]
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.data, typed); err == nil { // else a fault says why
		e.typed = typed
	}
	s.byKind[e.kind] = append(s.byKind[e.kind], e)
}

// known is a kind of others' that ours refer to.
func known(group, kind string) any {
	switch group + "/" + kind {
	case "/PersistentVolumeClaim":
		return &corev1.PersistentVolumeClaim{}
	case "/ConfigMap":
		return &corev1.ConfigMap{}
	case "/Secret":
		return &corev1.Secret{}
	case certmanager.SchemeGroupVersion.Group + "/" + certmanager.IssuerKind:
		return &certmanager.Issuer{}
	case certmanager.SchemeGroupVersion.Group + "/" + certmanager.ClusterIssuerKind:
		return &certmanager.ClusterIssuer{}
	}
	return nil
}

// get is an object of the set, nil where it isn't there.
func get[T metav1.Object](s *set, kind, namespace, name string) (found T) {
	for _, e := range s.byKind[kind] {
		if typed, ok := e.typed.(T); ok && e.namespace == namespace && e.name == name {
			return typed
		}
	}
	return found
}

// has says whether the set has an object, whatever is wrong with it.
func (s *set) has(kind, namespace, name string) bool {
	return slices.ContainsFunc(s.byKind[kind], func(e *entry) bool { return e.namespace == namespace && e.name == name })
}

// missing says what there is instead of an object that a reference names. Without any of its kind in the namespace it may well
// be in the cluster: a warning.
func (s *set) missing(e *entry, kind, name string, p rules.Problem) {
	var here, elsewhere []string
	for _, other := range s.byKind[kind] {
		switch {
		case other.namespace == e.namespace:
			here = append(here, other.name)
		case other.name == name:
			elsewhere = append(elsewhere, fmt.Sprintf("%q", other.namespace))
		}
	}
	message, warning := p.Message+"; it is not among these files", false
	switch {
	case len(elsewhere) > 0:
		message += fmt.Sprintf(" in namespace %q, but in %s: references don't cross namespaces", e.namespace, strings.Join(elsewhere, ", "))
	case len(here) > 0:
		slices.Sort(here)
		message += fmt.Sprintf(", which have %s", strings.Join(here, ", "))
	default:
		warning = true
	}
	s.find(e, fieldOf.FindString(p.Message), message, warning)
}

// checkTogether applies the operator's rules, which look at more than one object.
func (s *set) checkTogether() {
	taken := map[string]string{}
	for _, kind := range []string{"Workspace", "Gateway"} {
		for _, e := range s.byKind[kind] {
			if e.typed == nil {
				continue
			}
			for _, h := range rules.Hostnames(e.typed) {
				s.problem(e, rules.HostnameIsAddress(h))
				if by := taken[h.Name]; by != "" && h.Name != "" {
					s.problem(e, rules.HostnameTaken(h, by))
				}
				taken[h.Name] = fmt.Sprintf("%s (%s:%d)", e, e.file, e.at(h.Field))
			}
		}
	}
	for _, kind := range []string{"Workspace", "HostPool", "SessionHost", "Gateway"} {
		for _, e := range s.byKind[kind] {
			if e.typed == nil {
				continue
			}
			for _, service := range rules.Services(e.typed) {
				if p := rules.ProxyProtocol(service); !p.OK() { // by the annotation's name: it may be another cloud's
					s.find(e, fieldOf.FindString(p.Message), p.Message, true)
				}
			}
			for _, issuer := range rules.Issuers(e.typed) {
				s.checkIssuer(e, issuer)
			}
			switch o := e.typed.(type) {
			case *rdv.Workspace:
				s.checkWorkspace(e, o)
			case *rdv.HostPool:
				s.checkPool(e, o)
			case *rdv.SessionHost:
				if !s.has("HostPool", e.namespace, o.Spec.HostPoolRef.Name) {
					s.missing(e, "HostPool", o.Spec.HostPoolRef.Name, rules.HostPool(o, nil))
				}
			}
		}
	}
}

func (s *set) checkIssuer(e *entry, issuer rules.NamedIssuer) {
	problem := rules.IssuerKind(issuer.Field, issuer.Ref)
	if !problem.OK() {
		s.problem(e, problem)
		return
	}
	if issuer.Ref.Group != "" && issuer.Ref.Group != certmanager.SchemeGroupVersion.Group {
		return
	}
	kind, other := cmp.Or(issuer.Ref.Kind, certmanager.IssuerKind), certmanager.ClusterIssuerKind
	inNamespace, inOther := e.namespace, ""
	if kind == certmanager.ClusterIssuerKind {
		other, inNamespace, inOther = certmanager.IssuerKind, "", e.namespace
	}
	if !s.has(kind, inNamespace, issuer.Ref.Name) && s.has(other, inOther, issuer.Ref.Name) {
		s.find(e, issuer.Field, fmt.Sprintf("%s: these files have no %s %q, but a %s of that name: set kind: %s", issuer.Field, kind, issuer.Ref.Name, other, other), false)
	}
}

func (s *set) checkWorkspace(e *entry, ws *rdv.Workspace) {
	for i := range ws.Spec.Resources {
		resource := &ws.Spec.Resources[i]
		pool := get[*rdv.HostPool](s, "HostPool", e.namespace, resource.HostPoolRef.Name)
		problem := rules.ResourcePool(ws, resource, pool)
		switch {
		case pool != nil:
			s.problem(e, problem)
		case !s.has("HostPool", e.namespace, resource.HostPoolRef.Name):
			s.missing(e, "HostPool", resource.HostPoolRef.Name, problem)
		}
	}
	oidc := ws.Spec.Identity.OIDC
	if oidc.CABundle != "" {
		_, problem := rules.Certificates("spec.identity.oidc.caBundle", oidc.CABundle)
		s.problem(e, problem)
	}
	if ref := oidc.CABundleRef; ref != nil {
		s.checkBundle(e, *ref)
	}
	selector, err := rules.GatewaySelector(ws)
	if err != nil {
		s.problem(e, rules.BadSelector(err))
		return
	}
	var seen []string
	for _, gw := range s.byKind["Gateway"] {
		if gw.namespace != e.namespace || gw.typed == nil {
			continue
		}
		if selector.Matches(labels.Set(gw.typed.GetLabels())) {
			return
		}
		seen = append(seen, fmt.Sprintf("%s (%s)", gw.name, cmp.Or(labels.Set(gw.typed.GetLabels()).String(), "no labels")))
	}
	if len(seen) > 0 {
		s.find(e, "spec.gatewaySelector", fmt.Sprintf("spec.gatewaySelector %s picks no Gateway among these files, which have %s", selector, strings.Join(seen, ", ")), false)
	}
}

// checkBundle looks into the ConfigMap or Secret of a CA, where it is among the files.
func (s *set) checkBundle(e *entry, ref rdv.KeyReference) {
	const field = "spec.identity.oidc.caBundleRef"
	values := map[string]string{}
	switch ref.Kind {
	case "ConfigMap":
		m := get[*corev1.ConfigMap](s, "ConfigMap", e.namespace, ref.Name)
		if m == nil {
			return
		}
		values = m.Data
	case "Secret":
		secret := get[*corev1.Secret](s, "Secret", e.namespace, ref.Name)
		if secret == nil {
			return
		}
		maps.Copy(values, secret.StringData)
		for key, value := range secret.Data {
			values[key] = string(value)
		}
	}
	value, ok := values[ref.Key]
	if !ok {
		s.find(e, field, fmt.Sprintf("%s: %s %q has no key %q: add it or name another", field, ref.Kind, ref.Name, ref.Key), false)
		return
	}
	_, problem := rules.Certificates(fmt.Sprintf("%s: key %q of %s %q", field, ref.Key, ref.Kind, ref.Name), value)
	s.problem(e, problem)
}

func (s *set) checkPool(e *entry, pool *rdv.HostPool) {
	if name := pool.Spec.WorkspaceRef.Name; !s.has("Workspace", e.namespace, name) && name != "" {
		s.missing(e, "Workspace", name, rules.PoolWorkspace(pool, nil))
	}
	template, err := render.PodTemplate(pool)
	if err != nil {
		var faults render.TemplateFaults
		if !errors.As(err, &faults) {
			faults = []string{err.Error()}
		}
		for _, one := range faults {
			s.find(e, fieldOf.FindString(one), one, false)
		}
		return
	}
	for _, f := range render.TemplateOverrides(template) {
		s.find(e, "spec.template."+f, fmt.Sprintf("spec.template.%s is set by the operator, whatever stands here", f), true)
	}
	secrets := render.TemplateSecrets(template)
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		if s.isOurs(e.namespace, name) {
			message := render.SecretRefused(secrets[name], name)
			s.find(e, fieldOf.FindString(message), message, false)
		}
	}
	if name := render.TemplateServiceAccount(template); slices.ContainsFunc(s.byKind["Workspace"], func(ws *entry) bool {
		return ws.namespace == e.namespace && name == render.WorkspaceBroker(ws.name)
	}) {
		s.find(e, "spec.template.spec.serviceAccountName", render.ServiceAccountRefused(name), false)
	}
	shared := render.SharedClaims(pool, template)
	for _, volume := range slices.Sorted(maps.Keys(shared)) {
		if claim := get[*corev1.PersistentVolumeClaim](s, "PersistentVolumeClaim", e.namespace, shared[volume]); claim != nil {
			s.problem(e, rules.SharedClaim(volume, shared[volume], claim.Spec.AccessModes))
		}
	}
}

// isOurs says that a Secret is one that the operator makes, or has made, for an object of the set.
func (s *set) isOurs(namespace, secret string) bool {
	for _, kind := range []string{"Workspace", "Gateway", "HostPool", "SessionHost"} {
		for _, e := range s.byKind[kind] {
			if e.namespace != namespace {
				continue
			}
			switch o := e.typed.(type) {
			case *rdv.Workspace:
				if slices.Contains(render.WorkspaceSecrets(o.Name), secret) {
					return true
				}
			case *rdv.Gateway:
				if secret == render.GatewayTLS(o.Name) || strings.HasPrefix(secret, o.Name+".") && strings.HasSuffix(secret, ".identity") {
					return true
				}
			case *rdv.HostPool, *rdv.SessionHost:
				if secret == render.RegistrationSecretName(e.name) {
					return true
				}
			}
		}
	}
	return false
}
