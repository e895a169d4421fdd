package controllers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// admissionPolicies puts config/policy into the cluster.
func admissionPolicies(t *testing.T, w *world) {
	t.Helper()
	file, err := os.Open(filepath.Join("..", "config", "policy", "brokers.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for dec := yaml.NewYAMLOrJSONDecoder(file, 4096); ; {
		obj := &unstructured.Unstructured{}
		if err := dec.Decode(obj); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		w.create(t, obj)
		t.Cleanup(func() { _ = w.Delete(context.Background(), obj) })
	}
}

// broker is a client with a Workspace's brokers' service account, and so with the Role that the operator made for it.
func (w *world) broker(t *testing.T, ns, workspace string) client.Client {
	t.Helper()
	config := rest.CopyConfig(w.config)
	config.Impersonate = rest.ImpersonationConfig{
		UserName: fmt.Sprintf("system:serviceaccount:%s:%s-broker", ns, workspace),
		Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:" + ns, "system:authenticated"},
	}
	c, err := client.New(config, client.Options{Scheme: NewScheme()})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A Role says which kinds brokers may write, for all that is in the namespace; the admission policies, whose.
func TestBrokersKeepToTheirWorkspace(t *testing.T) {
	w, ns := start(t)
	w.issuer(t, ns)
	admissionPolicies(t, w)
	other := newWorkspace(ns, ns)
	other.Name = "other"
	others := newPool(ns)
	others.Name, others.Spec.WorkspaceRef.Name = "windows", "other"
	others.Spec.RDPCertificate = &rdv.RDPCertificate{IssuerRef: clusterIssuer("company")}
	host := func(name, pool string) *rdv.SessionHost {
		return &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: pool}}}
	}
	w.create(t, newWorkspace(ns, ns), other, newPool(ns), others, host("mine", "linux"), host("theirs", "windows"), host("early", "none-yet"))
	eventually(t, func() error { // the operator says what is whose
		for workspace, pools := range map[string]string{"demo": "linux", "other": "windows"} {
			got := &unstructured.Unstructured{}
			got.SetAPIVersion("v1")
			got.SetKind("ConfigMap")
			if err := w.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: workspace + "-broker-scope"}, got); err != nil {
				return err
			}
			if list, _, _ := unstructured.NestedString(got.Object, "data", "hostPools"); list != pools {
				return fmt.Errorf("%s: pools %q", workspace, list)
			}
		}
		return nil
	})
	broker := w.broker(t, ns, "demo")

	request := func(workspace string, edit func(*certmanager.CertificateRequest)) *certmanager.CertificateRequest {
		r := &certmanager.CertificateRequest{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "mine-", Labels: map[string]string{rdv.LabelWorkspace: workspace}},
			Spec: certmanager.CertificateRequestSpec{
				Request: []byte("x"), Duration: &metav1.Duration{Duration: time.Hour}, Usages: []certmanager.KeyUsage{certmanager.UsageDigitalSignature, certmanager.UsageClientAuth},
				IssuerRef: cmmeta.IssuerReference{Name: "demo-internal", Kind: "Issuer", Group: "cert-manager.io"},
			},
		}
		if edit != nil {
			edit(r)
		}
		return r
	}
	status := func(name string) func() error {
		return func() error {
			return broker.Status().Patch(t.Context(), host(name, ""), client.RawPatch(types.MergePatchType, []byte(`{"status":{"agent":{"connected":true,"sessions":0,"rdpReady":true,"drainAcknowledged":false}}}`)))
		}
	}
	assign := func(name string) func() error {
		return func() error {
			return broker.Patch(t.Context(), host(name, ""), client.RawPatch(types.MergePatchType, []byte(`{"spec":{"assignedUser":"mallory"}}`)))
		}
	}
	create := func(obj client.Object) func() error {
		return func() error { return broker.Create(t.Context(), obj) }
	}
	mine, theirs := request("demo", nil), request("other", func(r *certmanager.CertificateRequest) { r.Spec.IssuerRef.Name = "other-internal" })
	w.create(t, theirs)
	// Role and policies take a moment to count.
	eventually(t, create(host("made", "linux")))
	for _, probe := range []func() client.Object{
		func() client.Object { return host("probe", "windows") },
		func() client.Object { return request("other", nil) },
	} {
		eventually(t, func() error {
			obj := probe()
			err := broker.Create(t.Context(), obj)
			if err == nil {
				return errors.Join(fmt.Errorf("%T of another Workspace was made", obj), w.Delete(t.Context(), obj))
			}
			return nil
		})
	}
	for _, tc := range []struct {
		what   string
		do     func() error
		denied string // part of the message, empty where it is allowed
	}{
		{"make a host in a pool of its own", create(host("made-1", "linux")), ""},
		{"write the status of its own host", status("mine"), ""},
		{"assign its own host", assign("mine"), ""},
		{"make a host in another Workspace's pool", create(host("made-2", "windows")), "SessionHost made-2 is of HostPool windows, which is not of this broker's Workspace"},
		{"write the status of another's host", status("theirs"), "HostPool windows"},
		{"assign another's host", assign("theirs"), "HostPool windows"},
		{"enrol a host of a pool that somebody may make one day", status("early"), "HostPool none-yet"},
		{"make one", create(host("made-3", "none-yet")), "HostPool none-yet"},

		{"ask its issuer", create(mine), ""},
		{"ask another Workspace's internal CA", create(request("demo", func(r *certmanager.CertificateRequest) { r.Spec.IssuerRef.Name = "other-internal" })), "issuer cert-manager.io/Issuer/other-internal is not one of"},
		{"ask another pool's issuer", create(request("demo", func(r *certmanager.CertificateRequest) {
			r.Spec.IssuerRef = cmmeta.IssuerReference{Name: "company", Kind: "ClusterIssuer"}
		})), "issuer cert-manager.io/ClusterIssuer/company"},
		{"ask for a CA", create(request("demo", func(r *certmanager.CertificateRequest) { r.Spec.IsCA = true })), "no CA's certificate"},
		{"ask for the right to sign code", create(request("demo", func(r *certmanager.CertificateRequest) {
			r.Spec.Usages = []certmanager.KeyUsage{certmanager.UsageCodeSigning}
		})), "clients and servers alone"},
		{"ask in another Workspace's name", create(request("other", nil)), "of their own Workspace alone"},
		{"delete another's request", func() error { return broker.Delete(t.Context(), theirs) }, "of their own Workspace alone"},
		{"delete its own", func() error { return broker.Delete(t.Context(), mine) }, ""},
	} {
		switch err := tc.do(); {
		case tc.denied == "" && err != nil:
			t.Errorf("%s: %v", tc.what, err)
		case tc.denied != "" && (err == nil || !strings.Contains(err.Error(), tc.denied)):
			t.Errorf("%s: got %v, want it denied with %q", tc.what, err, tc.denied)
		}
	}

	// A pool that is added, and its issuer, are the brokers' once the operator has seen it.
	added := newPool(ns)
	added.Name, added.Spec.RDPCertificate = "added", &rdv.RDPCertificate{IssuerRef: clusterIssuer("company")}
	w.create(t, added)
	eventually(t, create(request("demo", func(r *certmanager.CertificateRequest) {
		r.Spec.IssuerRef = cmmeta.IssuerReference{Name: "company", Kind: "ClusterIssuer", Group: "cert-manager.io"}
	})))
	eventually(t, create(host("made-4", "added")))
	// Who isn't a broker is held to RBAC alone.
	w.create(t, host("an-administrator", "windows"))
}
