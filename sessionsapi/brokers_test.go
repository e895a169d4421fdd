package sessionsapi_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/sessionsapi"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// objects is a cluster with some Workspaces and Secrets.
type objects struct {
	workspaces []rdv.Workspace
	secrets    map[client.ObjectKey]corev1.Secret
}

func (o objects) Get(_ context.Context, key client.ObjectKey, obj client.Object, _ ...client.GetOption) error {
	s, ok := o.secrets[key]
	if !ok {
		return errors.New("there is no Secret " + key.String())
	}
	*obj.(*corev1.Secret) = s
	return nil
}

func (o objects) List(_ context.Context, list client.ObjectList, _ ...client.ListOption) error {
	list.(*rdv.WorkspaceList).Items = o.workspaces
	return nil
}

// TestWorkspaceBrokers asks over mutual TLS: a broker is known by its identity in the workspace's CA, and so is the
// operator. One workspace that can't be asked keeps no other from being listed.
func TestWorkspaceBrokers(t *testing.T) {
	ca, caPEM, _ := issue(t, nil, "internal CA", func(c *x509.Certificate) { c.ExtKeyUsage = nil })
	pair := func(id identity.ID) (tls.Certificate, corev1.Secret) {
		certPEM, keyPEM := issueFor(t, ca, id)
		cert, err := tls.X509KeyPair(certPEM, keyPEM)
		if err != nil {
			t.Fatal(err)
		}
		return cert, corev1.Secret{Data: map[string][]byte{"tls.crt": certPEM, "tls.key": keyPEM, "ca.crt": caPEM}}
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	serve := func(as, takes identity.ID) string {
		cert, _ := pair(as)
		allow := mtls.AllowRole(takes.Namespace, takes.Workspace, takes.Role)
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet {
				json.NewEncoder(w).Encode(brokerapi.Sessions{Sessions: []brokerapi.Session{{ID: "s1", User: "alice", Proven: true}}})
				return
			}
			var req brokerapi.ActRequest
			json.NewDecoder(r.Body).Decode(&req)
			if req.SessionID != "s1" || req.By != "eddie" {
				w.WriteHeader(http.StatusNotFound)
				json.NewEncoder(w).Encode(brokerapi.ErrorBody{Error: refusal.New(refusal.UnknownSession, "There is no session %s.", req.SessionID)})
				return
			}
			json.NewEncoder(w).Encode(brokerapi.ActResponse{Detail: req.Act})
		}))
		s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := identity.FromCertificate(cs.PeerCertificates[0])
			if err != nil {
				return err
			}
			return allow(id)
		}}
		s.StartTLS()
		t.Cleanup(s.Close)
		return s.URL
	}
	urls := map[string]string{
		"good":     serve(identity.Broker("ns", "good"), identity.Operator("ns", "good")),
		"impostor": serve(identity.Agent("ns", "impostor", "pool", "h"), identity.Operator("ns", "impostor")), // a host that poses as a broker
		"stranger": serve(identity.Broker("ns", "stranger"), identity.Operator("ns", "good")),                 // takes another workspace's alone
		"keyless":  "https://127.0.0.1:1",
	}
	o := objects{secrets: map[client.ObjectKey]corev1.Secret{}}
	for name := range urls {
		o.workspaces = append(o.workspaces, rdv.Workspace{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}})
		if name != "keyless" {
			_, o.secrets[client.ObjectKey{Namespace: "ns", Name: name + "-operator-identity"}] = pair(identity.Operator("ns", name))
		}
	}
	b := &sessionsapi.WorkspaceBrokers{Workspaces: o, Secrets: o, Secret: func(ws string) string { return ws + "-operator-identity" }, URL: func(_, ws string) string { return urls[ws] }}
	found, missing, err := b.Sessions(t.Context(), "ns")
	if err != nil || len(found) != 1 || found[0].Workspace != "good" || found[0].User != "alice" {
		t.Errorf("found %+v, %v", found, err)
	}
	if all := strings.Join(missing, "\n"); len(missing) != 3 || !strings.Contains(all, "ns/impostor") || !strings.Contains(all, `takes role "broker"`) || !strings.Contains(all, "ns/stranger") || !strings.Contains(all, "ns/keyless") {
		t.Errorf("missing:\n%s", all)
	}
	if detail, err := b.Act(t.Context(), "ns", "good", brokerapi.ActRequest{SessionID: "s1", Act: bus.ActEnd, By: "eddie"}); err != nil || detail != "end" {
		t.Errorf("act: %q, %v", detail, err)
	}
	var refused *refusal.Error
	if _, err := b.Act(t.Context(), "ns", "good", brokerapi.ActRequest{SessionID: "s2", Act: bus.ActEnd, By: "eddie"}); !errors.As(err, &refused) || refused.Code != refusal.UnknownSession {
		t.Errorf("an unknown session: %v", err)
	}
}

// issueFor makes a certificate that carries an identity.
func issueFor(t *testing.T, ca *authority, id identity.ID) (certPEM, keyPEM []byte) {
	t.Helper()
	leaf, _, keyPEM := issue(t, ca, "x", func(c *x509.Certificate) {
		c.URIs = []*url.URL{id.URI()}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	})
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.cert.Raw}), keyPEM
}
