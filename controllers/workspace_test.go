package controllers

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/config"
)

func TestWorkspaceFromNothingToReady(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	ws := newWorkspace(ns, ns)
	w.create(t, ws, newGateway(ns, ns))

	// The brokers wait for what they mount.
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionCertificatesReady, metav1.ConditionFalse, rdv.ReasonCertificatePend, `Certificate "demo-tls" is being issued`)
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionAvailable, metav1.ConditionFalse, rdv.ReasonPending, "waits for its certificates")
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "demo-broker"}, &appsv1.Deployment{}); !apierrors.IsNotFound(err) {
		t.Errorf("brokers before their certificates: %v", err)
	}
	w.issueAll(t, ns, "demo")
	w.run(t, ns, "demo-broker")
	w.is(t, ws, ns, "demo", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "https://desk.example.test")
	w.is(t, ws, ns, "demo", rdv.ConditionStalled, metav1.ConditionFalse, rdv.ReasonReady, "")
	w.is(t, ws, ns, "demo", rdv.ConditionReconciling, metav1.ConditionFalse, rdv.ReasonReady, "")
	if ws.Status.Brokers != "2/2" || !slices.Equal(ws.Status.Gateways, []string{"gw"}) {
		t.Errorf("brokers %q, gateways %v", ws.Status.Brokers, ws.Status.Gateways)
	}

	// Garbage collection, which is not here, removes whatever has a controller reference.
	for name, child := range map[string]client.Object{
		"demo-internal-selfsigned": &certmanager.Issuer{},
		"demo-internal":            &certmanager.Issuer{},
		"demo-internal-ca":         &certmanager.Certificate{},
		"demo-tls":                 &certmanager.Certificate{},
		"demo-bus":                 &corev1.Service{},
		"demo-broker-peers":        &corev1.Service{},
	} {
		controlled(t, w, ns, name, child, ws)
	}
	for _, child := range []client.Object{
		&appsv1.Deployment{}, &corev1.Service{}, &corev1.ConfigMap{}, &corev1.ServiceAccount{}, &rbacv1.Role{},
		&rbacv1.RoleBinding{}, &policyv1.PodDisruptionBudget{}, &networkingv1.NetworkPolicy{},
	} {
		controlled(t, w, ns, "demo-broker", child, ws)
	}
	// A Secret goes once both its Certificate and the Workspace are gone.
	cert := read(t, w, ns, "demo-tls", &certmanager.Certificate{})
	secret := read(t, w, ns, "demo-tls", &corev1.Secret{})
	if !refersTo(secret, ws.UID) || !refersTo(secret, cert.UID) || metav1.GetControllerOf(secret) != nil {
		t.Errorf("Secret demo-tls belongs to %+v", secret.OwnerReferences)
	}
}

func controlled(t *testing.T, w *world, ns, name string, child, owner client.Object) {
	t.Helper()
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, child); err != nil {
		t.Error(err)
	} else if !metav1.IsControlledBy(child, owner) {
		t.Errorf("%T %s is not controlled by %s", child, name, owner.GetName())
	}
}

// readyWorkspace makes a Workspace with its brokers and a gateway object.
func readyWorkspace(t *testing.T, w *world, ns string) *rdv.Workspace {
	t.Helper()
	w.issuer(t, ns)
	ws := newWorkspace(ns, ns)
	w.create(t, ws, newGateway(ns, ns))
	w.issueAll(t, ns, "demo")
	w.run(t, ns, "demo-broker")
	w.is(t, ws, ns, "demo", rdv.ConditionReady, metav1.ConditionTrue, rdv.ReasonReady, "")
	return ws
}

func TestWorkspaceEditsChangeWhatDependsOnThem(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	before := w.settled(t, ns)
	for _, step := range []struct {
		name, patch string
		want        []string
	}{
		{"nothing", `{"metadata":{"annotations":{"note":"x"}}}`, nil},
		{"replicas", `{"spec":{"broker":{"replicas":3}}}`, []string{"*v1.Deployment/demo-broker"}},
		{"hostname", `{"spec":{"hostname":"other.example.test"}}`, []string{"*v1.Certificate/demo-tls", "*v1.ConfigMap/demo-broker", "*v1.Deployment/demo-broker"}},
		// The brokers are told that a node's address may stand for the client's.
		{"service", `{"spec":{"broker":{"service":{"type":"NodePort"}}}}`, []string{"*v1.ConfigMap/demo-broker", "*v1.Deployment/demo-broker", "*v1.Service/demo-broker"}},
		{"publisher", `{"spec":{"signing":{"commonName":"Example Corp"}}}`, []string{"*v1.Certificate/demo-signing"}},
		{"who may use what", `{"spec":{"tickets":{"lifetimeSeconds":600}}}`, nil},
	} {
		w.patch(t, &rdv.Workspace{}, ns, "demo", step.patch)
		before = w.onlyChanges(t, step.name, ns, before, "*v1alpha1.Workspace/demo", step.want...)
	}
}

func TestNothingIsWrittenWhenNothingChanged(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	pool := newPool(ns)
	pool.Spec.Template = template("desktop:1")
	w.create(t, pool)
	appears(t, w, ns, "linux-0", &corev1.Pod{})
	w.issue(t, ns, "gw-tls")
	w.issue(t, ns, "gw.demo.identity")
	w.run(t, ns, "gw")
	before := w.settled(t, ns)
	for range 3 {
		w.poke(t, &rdv.Workspace{}, ns, "demo")
		w.poke(t, &rdv.Gateway{}, ns, "gw")
		w.poke(t, &rdv.HostPool{}, ns, "linux")
		w.poke(t, &rdv.SessionHost{}, ns, "linux-0")
		after := w.settled(t, ns)
		diff := changed(before, after)
		for _, poked := range []string{"Workspace/demo", "Gateway/gw", "HostPool/linux", "SessionHost/linux-0"} {
			delete(diff, "*v1alpha1."+poked)
		}
		if len(diff) > 0 {
			t.Errorf("written: %v", slices.Collect(maps.Keys(diff)))
		}
		before = after
	}
	// The pokes themselves: one write each, and no status write on top.
	status := read(t, w, ns, "demo", &rdv.Workspace{})
	w.poke(t, &rdv.Workspace{}, ns, "demo")
	w.settled(t, ns)
	again := read(t, w, ns, "demo", &rdv.Workspace{})
	for _, entry := range again.ManagedFields {
		for _, was := range status.ManagedFields {
			if entry.Manager == FieldManager && was.Manager == FieldManager && !entry.Time.Equal(was.Time) {
				t.Errorf("the operator wrote the status at %s without need", entry.Time)
			}
		}
	}
}

func TestWorkspaceDamageIsRepaired(t *testing.T) {
	w, ns := start(t)
	ws := readyWorkspace(t, w, ns)
	w.settled(t, ns)

	deployment := read(t, w, ns, "demo-broker", &appsv1.Deployment{})
	w.patch(t, deployment, ns, "demo-broker", `{"spec":{"replicas":7,"template":{"spec":{"hostNetwork":false}}},"metadata":{"labels":{"rendezvous.dev/workspace":null}}}`)
	w.patch(t, &corev1.ConfigMap{}, ns, "demo-broker", `{"data":{"config.json":"{}"}}`)
	w.patch(t, &rbacv1.Role{}, ns, "demo-broker", `{"rules":[{"apiGroups":["*"],"resources":["*"],"verbs":["*"]}]}`)
	w.patch(t, &corev1.Service{}, ns, "demo-bus", `{"spec":{"selector":{"rendezvous.dev/workspace":"evil"}}}`)
	for _, gone := range []client.Object{&networkingv1.NetworkPolicy{}, &corev1.ServiceAccount{}, &rbacv1.RoleBinding{}} {
		gone.SetNamespace(ns)
		gone.SetName("demo-broker")
		if err := w.Delete(t.Context(), gone); err != nil {
			t.Fatal(err)
		}
	}
	w.patchStatus(t, &rdv.Workspace{}, ns, "demo", `{"status":{"url":"https://evil.example.test"}}`)

	eventually(t, func() error {
		d := read(t, w, ns, "demo-broker", &appsv1.Deployment{})
		if *d.Spec.Replicas != 2 || d.Labels[rdv.LabelWorkspace] != "demo" {
			return errors.New("Deployment is not repaired")
		}
		if !strings.Contains(read(t, w, ns, "demo-broker", &corev1.ConfigMap{}).Data["config.json"], `"workspace": "demo"`) {
			return errors.New("ConfigMap is not repaired")
		}
		for _, rule := range read(t, w, ns, "demo-broker", &rbacv1.Role{}).Rules {
			if slices.Contains(rule.Verbs, "*") {
				return errors.New("Role is not repaired")
			}
		}
		if read(t, w, ns, "demo-bus", &corev1.Service{}).Spec.Selector[rdv.LabelWorkspace] != "demo" {
			return errors.New("Service is not repaired")
		}
		if url := read(t, w, ns, "demo", &rdv.Workspace{}).Status.URL; url != "https://desk.example.test" {
			return errors.New("status is not repaired: " + url)
		}
		return nil
	})
	for _, child := range []client.Object{&networkingv1.NetworkPolicy{}, &corev1.ServiceAccount{}, &rbacv1.RoleBinding{}} {
		appears(t, w, ns, "demo-broker", child)
		controlled(t, w, ns, "demo-broker", child, ws)
	}
}

func TestWorkspaceWrongReferencesHeal(t *testing.T) {
	w, ns := start(t)
	ws := newWorkspace(ns, ns)
	ws.Spec.Resources = []rdv.Resource{{Name: "desktop", Type: rdv.ResourceDesktop, HostPoolRef: rdv.LocalReference{Name: "linux"}}}
	ws.Spec.Identity.OIDC.CABundleRef = &rdv.KeyReference{Kind: "ConfigMap", Name: "company-ca", Key: "ca.crt"}
	w.create(t, ws)
	problem := func(reason, words string) {
		t.Helper()
		w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionFalse, reason, words)
		w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReady, metav1.ConditionFalse, reason, words)
	}
	problem(rdv.ReasonIssuerNotFound, `spec.certificates.issuerRef: ClusterIssuer "`+ns+`" not found: create it or name another`)
	problem(rdv.ReasonIssuerNotFound, `spec.resources[desktop].hostPoolRef: HostPool "linux" not found: create it or name another`)
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionStalled, metav1.ConditionTrue, rdv.ReasonIssuerNotFound, "not found")

	w.issuer(t, ns)
	problem(rdv.ReasonReferenceNotFound, `spec.identity.oidc.caBundleRef: ConfigMap "company-ca" not found: create it or name another`)
	w.issuerReady(t, ns, cmmeta.ConditionFalse, "the vault is sealed")
	problem(rdv.ReasonIssuerNotReady, `spec.certificates.issuerRef: ClusterIssuer "`+ns+`" is not ready: the vault is sealed`)
	w.issuerReady(t, ns, cmmeta.ConditionTrue, "")

	ca := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "company-ca"}, Data: map[string]string{"ca.pem": "x"}}
	w.create(t, ca)
	problem(rdv.ReasonReferenceInvalid, `ConfigMap "company-ca" has no key "ca.crt": add it or name another`)
	w.patch(t, &corev1.ConfigMap{}, ns, "company-ca", `{"data":{"ca.crt":"a password"}}`)
	problem(rdv.ReasonReferenceInvalid, `key "ca.crt" of ConfigMap "company-ca" holds no PEM certificate`)
	certificate := someCertificate(t)
	bundle, err := json.Marshal("a password\n" + certificate)
	if err != nil {
		t.Fatal(err)
	}
	w.patch(t, &corev1.ConfigMap{}, ns, "company-ca", `{"data":{"ca.crt":`+string(bundle)+`}}`)
	eventually(t, func() error { // certificates alone are passed on
		if got := read(t, w, ns, "demo-broker", &corev1.ConfigMap{}).Data["oidc-ca.crt"]; got != certificate {
			return errors.New("the brokers have the CA bundle " + got)
		}
		return nil
	})
	problem(rdv.ReasonReferenceNotFound, `HostPool "linux" not found`)
	other := newPool(ns)
	other.Spec.WorkspaceRef.Name = "another"
	w.create(t, other)
	problem(rdv.ReasonReferenceInvalid, `HostPool "linux" belongs to Workspace "another": name a pool of this workspace`)
	w.patch(t, &rdv.Workspace{}, ns, "demo", `{"spec":{"resources":null}}`)
	problem(rdv.ReasonPending, "spec.gatewaySelector picks no Gateway in this namespace")
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReconciling, metav1.ConditionTrue, rdv.ReasonPending, "gatewaySelector")
	w.create(t, newGateway(ns, ns))
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")

	// A bundle that is gone for a moment is not taken from the brokers.
	if err := w.Delete(t.Context(), ca); err != nil {
		t.Fatal(err)
	}
	problem(rdv.ReasonReferenceNotFound, "company-ca")
	if got := read(t, w, ns, "demo-broker", &corev1.ConfigMap{}).Data["oidc-ca.crt"]; got != certificate {
		t.Errorf("the brokers' CA bundle became %q", got)
	}
}

// someCertificate is a certificate, in PEM.
func someCertificate(t *testing.T) string {
	t.Helper()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
}

func TestWorkspaceIdentityProvider(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	ws := newWorkspace(ns, ns)
	issuer := ws.Spec.Identity.OIDC.IssuerURL
	w.oidc.answer(issuer, errors.New("the connection is refused"))
	w.create(t, ws)
	w.is(t, ws, ns, "demo", rdv.ConditionIdentityReady, metav1.ConditionFalse, rdv.ReasonDiscoveryFailed, "spec.identity.oidc.issuerURL: "+issuer+": the connection is refused")
	w.oidc.answer(issuer, nil)
	w.clock.advance(discoveryRetry)
	w.poke(t, &rdv.Workspace{}, ns, "demo") // stands for the RequeueAfter, which goes by the real clock
	w.is(t, ws, ns, "demo", rdv.ConditionIdentityReady, metav1.ConditionTrue, rdv.ReasonReady, "answers")
}

func TestForeignObjectIsLeftAlone(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	foreign := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "demo-broker"},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}, Selector: map[string]string{"app": "mine"}},
	}
	w.create(t, foreign, newWorkspace(ns, ns), newGateway(ns, ns))
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonConflict,
		`Service "demo-broker" exists and is not managed by this operator: delete it, or choose another name for this object`)
	appears(t, w, ns, "demo-bus", &corev1.Service{}) // the rest goes on
	w.settled(t, ns)
	if got := read(t, w, ns, "demo-broker", &corev1.Service{}); got.ResourceVersion != foreign.ResourceVersion {
		t.Errorf("the foreign Service was written: %+v", got)
	}
	if err := w.Delete(t.Context(), foreign); err != nil {
		t.Fatal(err)
	}
	w.poke(t, &rdv.Workspace{}, ns, "demo") // or after a minute
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
}

// cert-manager overwrites a Secret that a Certificate names, whoever made it.
func TestForeignSecretIsLeftAlone(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	foreign := map[string]*corev1.Secret{}
	for _, name := range []string{"demo-signing", "gw-tls"} {
		foreign[name] = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, StringData: map[string]string{"password": "somebody's"}}
		w.create(t, foreign[name])
	}
	// What cert-manager made for a Certificate that was deleted since is that Certificate's again.
	w.create(t, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "demo-tls", Annotations: map[string]string{certmanager.CertificateNameKey: "demo-tls"}}})
	w.create(t, newWorkspace(ns, ns), newGateway(ns, ns))
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonConflict,
		`Secret "demo-signing" exists and is not managed by this operator, and Certificate "demo-signing" would overwrite it: delete the Secret`)
	w.is(t, &rdv.Gateway{}, ns, "gw", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonConflict, `Secret "gw-tls" exists`)
	appears(t, w, ns, "demo-tls", &certmanager.Certificate{})
	appears(t, w, ns, "demo-operator-identity", &certmanager.Certificate{}) // the rest goes on
	w.settled(t, ns)
	for name, secret := range foreign {
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, &certmanager.Certificate{}); !apierrors.IsNotFound(err) {
			t.Errorf("Certificate %s was made: %v", name, err)
		}
		if got := read(t, w, ns, name, &corev1.Secret{}); got.ResourceVersion != secret.ResourceVersion {
			t.Errorf("the foreign Secret %s was written: %+v", name, got)
		}
		if err := w.Delete(t.Context(), secret); err != nil {
			t.Fatal(err)
		}
	}
	w.poke(t, &rdv.Workspace{}, ns, "demo") // or after a minute
	w.poke(t, &rdv.Gateway{}, ns, "gw")
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
	appears(t, w, ns, "demo-signing", &certmanager.Certificate{})
	appears(t, w, ns, "gw-tls", &certmanager.Certificate{})
}

func TestRefusedChildShows(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.patch(t, &rdv.Workspace{}, ns, "demo", `{"spec":{"broker":{"resources":{"requests":{"cpu":"2"},"limits":{"cpu":"1"}}}}}`)
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionFalse, rdv.ReasonRejected,
		`Deployment "demo-broker" was refused`)
	w.patch(t, &rdv.Workspace{}, ns, "demo", `{"spec":{"broker":{"resources":null}}}`)
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionReferencesResolved, metav1.ConditionTrue, rdv.ReasonReady, "")
}

func TestWorkspaceOtherInternalIssuer(t *testing.T) {
	w, ns := start(t)
	readyWorkspace(t, w, ns)
	w.patch(t, &rdv.Workspace{}, ns, "demo", `{"spec":{"certificates":{"internalIssuerRef":{"kind":"ClusterIssuer","name":"`+ns+`"}}}}`)
	w.vanishes(t, &certmanager.Issuer{}, ns, "demo-internal")
	w.vanishes(t, &certmanager.Issuer{}, ns, "demo-internal-selfsigned")
	w.vanishes(t, &certmanager.Certificate{}, ns, "demo-internal-ca")
	w.vanishes(t, &corev1.Secret{}, ns, "demo-internal-ca")
	eventually(t, func() error {
		var file config.Broker
		if err := json.Unmarshal([]byte(read(t, w, ns, "demo-broker", &corev1.ConfigMap{}).Data["config.json"]), &file); err != nil {
			return err
		}
		if file.InternalIssuer != (config.Issuer{Name: ns, Kind: "ClusterIssuer", Group: "cert-manager.io"}) {
			return errors.New("the brokers' issuer is " + file.InternalIssuer.Name)
		}
		return nil
	})
	for _, name := range []string{"demo-tls", "demo-broker-identity", "demo-tickets", "demo-signing", "demo-operator-identity"} {
		read(t, w, ns, name, &certmanager.Certificate{})
		read(t, w, ns, name, &corev1.Secret{})
	}
}

func TestFailedIssuanceShows(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	w.create(t, newWorkspace(ns, ns))
	appears(t, w, ns, "demo-tls", &certmanager.Certificate{})
	w.patchStatus(t, &certmanager.Certificate{}, ns, "demo-tls", `{"status":{"failedIssuanceAttempts":1,"lastFailureTime":"`+time.Now().UTC().Format(time.RFC3339)+`",
		"conditions":[{"type":"Ready","status":"False","observedGeneration":1},{"type":"Issuing","status":"False","reason":"Failed","message":"the CA says no"}]}}`)
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionCertificatesReady, metav1.ConditionFalse, rdv.ReasonCertificateFailed, `Certificate "demo-tls" could not be issued: the CA says no`)
	w.issue(t, ns, "demo-tls")
	w.is(t, &rdv.Workspace{}, ns, "demo", rdv.ConditionCertificatesReady, metav1.ConditionFalse, rdv.ReasonCertificatePend, `demo-signing`)
}
