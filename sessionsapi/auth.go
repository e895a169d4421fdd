package sessionsapi

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// User is who asks, as the API server authenticated them.
type User struct {
	Name   string
	UID    string
	Groups []string
	Extra  map[string][]string
}

// Authenticator believes the API server's front proxy, and nobody else. What it goes by is in a ConfigMap that every
// aggregated API reads: kube-system/extension-apiserver-authentication.
type Authenticator struct {
	Reader client.Reader
	Now    func() time.Time

	mu     sync.Mutex
	read   time.Time
	config *frontProxy
}

// frontProxy is how the API server's front proxy is known, and in which headers it says who asks.
type frontProxy struct {
	roots                    *x509.CertPool
	names                    []string // any where empty
	users, uids, groups, pre []string
}

// rereadAfter is how long what was read of the ConfigMap counts.
const rereadAfter = time.Minute

// ErrUnauthenticated is of requests that didn't come through the API server.
var ErrUnauthenticated = errors.New("this API is asked through the Kubernetes API server alone")

// Authenticate says who asks.
func (a *Authenticator) Authenticate(r *http.Request) (User, error) {
	config, err := a.current(r.Context())
	if err != nil {
		return User{}, err
	}
	return config.user(r, a.now())
}

func (a *Authenticator) now() time.Time {
	if a.Now != nil {
		return a.Now()
	}
	return time.Now()
}

func (a *Authenticator) current(ctx context.Context) (*frontProxy, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.config != nil && a.now().Sub(a.read) < rereadAfter {
		return a.config, nil
	}
	var cm corev1.ConfigMap
	err := a.Reader.Get(ctx, client.ObjectKey{Namespace: "kube-system", Name: "extension-apiserver-authentication"}, &cm)
	var config *frontProxy
	if err == nil {
		config, err = parseFrontProxy(cm.Data)
	}
	if err != nil {
		if a.config != nil { // the last that was good
			return a.config, nil
		}
		return nil, fmt.Errorf("ConfigMap kube-system/extension-apiserver-authentication: %w", err)
	}
	a.read, a.config = a.now(), config
	return config, nil
}

func parseFrontProxy(data map[string]string) (*frontProxy, error) {
	p := &frontProxy{roots: x509.NewCertPool()}
	if !p.roots.AppendCertsFromPEM([]byte(data["requestheader-client-ca-file"])) {
		return nil, errors.New("requestheader-client-ca-file holds no certificate: the API server's aggregation layer is off (--requestheader-client-ca-file)")
	}
	for key, to := range map[string]*[]string{
		"requestheader-allowed-names": &p.names, "requestheader-username-headers": &p.users, "requestheader-uid-headers": &p.uids,
		"requestheader-group-headers": &p.groups, "requestheader-extra-headers-prefix": &p.pre,
	} {
		if data[key] == "" {
			continue
		}
		if err := json.Unmarshal([]byte(data[key]), to); err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	if len(p.users) == 0 {
		return nil, errors.New("requestheader-username-headers is empty")
	}
	return p, nil
}

func (p *frontProxy) user(r *http.Request, now time.Time) (u User, err error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return u, ErrUnauthenticated
	}
	leaf := r.TLS.PeerCertificates[0]
	opts := x509.VerifyOptions{Roots: p.roots, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range r.TLS.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		return u, fmt.Errorf("%w: %v", ErrUnauthenticated, err)
	}
	if len(p.names) > 0 && !slices.Contains(p.names, leaf.Subject.CommonName) {
		return u, fmt.Errorf("%w: %q is not the front proxy's name", ErrUnauthenticated, leaf.Subject.CommonName)
	}
	first := func(names []string) string {
		for _, n := range names {
			if v := r.Header.Get(n); v != "" {
				return v
			}
		}
		return ""
	}
	if u.Name = first(p.users); u.Name == "" {
		return u, ErrUnauthenticated
	}
	u.UID = first(p.uids)
	for _, n := range p.groups {
		u.Groups = append(u.Groups, r.Header.Values(n)...)
	}
	for name, values := range r.Header {
		for _, prefix := range p.pre {
			if len(name) > len(prefix) && strings.EqualFold(name[:len(prefix)], prefix) {
				key, err := url.PathUnescape(strings.ToLower(name[len(prefix):]))
				if err != nil {
					continue
				}
				if u.Extra == nil {
					u.Extra = map[string][]string{}
				}
				u.Extra[key] = append(u.Extra[key], values...)
			}
		}
	}
	return u, nil
}

// Attributes is what somebody wants to do.
type Attributes struct {
	Verb, Namespace, Name, Subresource string
}

// Authorizer asks the API server whether a user may.
type Authorizer struct{ Client client.Client }

// Allowed says whether a user may, and if not, why.
func (a Authorizer) Allowed(ctx context.Context, u User, at Attributes) (bool, string, error) {
	extra := map[string]authorizationv1.ExtraValue{}
	for k, v := range u.Extra {
		extra[k] = v
	}
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: u.Name, UID: u.UID, Groups: u.Groups, Extra: extra,
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: at.Namespace, Verb: at.Verb, Group: Group, Version: Version, Resource: Resource, Subresource: at.Subresource, Name: at.Name,
		},
	}}
	if err := a.Client.Create(ctx, review); err != nil {
		return false, "", fmt.Errorf("SubjectAccessReview: %w", err)
	}
	return review.Status.Allowed, review.Status.Reason, nil
}
