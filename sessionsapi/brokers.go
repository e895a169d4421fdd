package sessionsapi

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/mtls"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const (
	// listTimeout is how long one workspace's brokers have to say what sessions there are.
	listTimeout = 5 * time.Second
	// rereadIdentity is how long a workspace's identity, once read, is used.
	rereadIdentity = time.Minute
	maxAnswer      = 32 << 20
	// maxAsked bounds the workspaces that are asked at one time.
	maxAsked = 16
)

// WorkspaceBrokers asks brokers over mutual TLS, with the identity that each workspace's CA gave the operator.
type WorkspaceBrokers struct {
	// Workspaces lists them.
	Workspaces client.Reader
	// Secrets reads the identities, past any cache.
	Secrets client.Reader
	// Secret names a workspace's, and URL where its brokers listen for the operator.
	Secret func(workspace string) string
	URL    func(namespace, workspace string) string

	mu    sync.Mutex
	known map[client.ObjectKey]*member
}

// member is one workspace as the operator asks it.
type member struct {
	read time.Time
	http *http.Client
}

// Sessions implements Brokers.
func (b *WorkspaceBrokers) Sessions(ctx context.Context, namespace string) (found []Found, missing []string, err error) {
	var list rdv.WorkspaceList
	if err := b.Workspaces.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return nil, nil, fmt.Errorf("list Workspaces: %w", err)
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxAsked)
	for i := range list.Items {
		ws := &list.Items[i]
		if rdv.Gone(ws) {
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			var answer brokerapi.Sessions
			err := b.ask(ctx, ws.Namespace, ws.Name, http.MethodGet, nil, &answer)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				missing = append(missing, fmt.Sprintf("sessions of Workspace %s/%s can't be listed now: %v", ws.Namespace, ws.Name, err))
				return
			}
			for _, s := range answer.Sessions {
				found = append(found, Found{ws.Namespace, ws.Name, s})
			}
		})
	}
	wg.Wait()
	slices.Sort(missing)
	slices.SortFunc(found, func(a, b Found) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Workspace, b.Workspace), cmp.Compare(a.Pool, b.Pool), cmp.Compare(a.Host, b.Host), cmp.Compare(a.ID, b.ID))
	})
	return found, missing, nil
}

// Act implements Brokers.
func (b *WorkspaceBrokers) Act(ctx context.Context, namespace, workspace string, req brokerapi.ActRequest) (string, error) {
	var done brokerapi.ActResponse
	err := b.ask(ctx, namespace, workspace, http.MethodPost, req, &done)
	return done.Detail, err
}

func (b *WorkspaceBrokers) ask(ctx context.Context, namespace, workspace, method string, in, out any) error {
	hc, err := b.client(ctx, namespace, workspace)
	if err != nil {
		return err
	}
	var body io.Reader = http.NoBody
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, b.URL(namespace, workspace)+brokerapi.PathAllSessions, body)
	if err != nil {
		return err
	}
	res, err := hc.Do(req)
	if err != nil {
		b.forget(namespace, workspace) // its CA may be another
		return fmt.Errorf("its brokers don't answer: %w", err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		var e brokerapi.ErrorBody
		if json.Unmarshal(data, &e) == nil && e.Error != nil {
			return refusal.Received(e.Error, refusal.Internal)
		}
		return fmt.Errorf("its broker answered %s", res.Status)
	}
	return json.Unmarshal(data, out)
}

func (b *WorkspaceBrokers) forget(namespace, workspace string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.known, client.ObjectKey{Namespace: namespace, Name: workspace})
}

func (b *WorkspaceBrokers) client(ctx context.Context, namespace, workspace string) (*http.Client, error) {
	key := client.ObjectKey{Namespace: namespace, Name: workspace}
	b.mu.Lock()
	m := b.known[key]
	b.mu.Unlock()
	if m != nil && time.Since(m.read) < rereadIdentity {
		return m.http, nil
	}
	name := b.Secret(workspace)
	var secret corev1.Secret
	if err := b.Secrets.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &secret); err != nil {
		return nil, fmt.Errorf("the operator's own identity: %w (cert-manager makes it; see the Workspace's condition CertificatesReady)", err)
	}
	cert, err := tls.X509KeyPair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return nil, fmt.Errorf("the Secret %s: %w", name, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(secret.Data[mtls.CAFile]) {
		return nil, errors.New("the Secret " + name + " has no " + mtls.CAFile)
	}
	m = &member{read: time.Now(), http: &http.Client{Transport: &http.Transport{
		TLSClientConfig: mtls.ClientConfig(cert, roots, "", mtls.AllowRole(namespace, workspace, identity.RoleBroker)),
		IdleConnTimeout: 30 * time.Second, TLSHandshakeTimeout: 5 * time.Second, ForceAttemptHTTP2: true,
	}}}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.known == nil {
		b.known = map[client.ObjectKey]*member{}
	}
	b.known[key] = m
	return m.http, nil
}
