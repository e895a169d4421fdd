package controllers

import (
	"context"
	"fmt"
	"sync"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// issuerKey names an issuer for comparison and for the field index; namespace is that of the object that refers to it.
func issuerKey(ref rdv.IssuerReference) string {
	group, kind := ref.Group, ref.Kind
	if group == "" {
		group = certmanager.SchemeGroupVersion.Group
	}
	if kind == "" {
		kind = certmanager.IssuerKind
	}
	return kind + "." + group + "/" + ref.Name
}

// checkIssuer adds what is wrong with the issuer that field names. Issuers of other groups than cert-manager's own can't
// be looked into here: their certificates tell.
func (b *base) checkIssuer(ctx context.Context, namespace, field string, ref rdv.IssuerReference, found *problems) error {
	if ref.Group != "" && ref.Group != certmanager.SchemeGroupVersion.Group {
		return nil
	}
	if p := rules.IssuerKind(field, ref); !p.OK() {
		found.addProblem(p)
		return nil
	}
	var issuer certmanager.GenericIssuer = &certmanager.Issuer{}
	key := types.NamespacedName{Name: ref.Name}
	if ref.Kind == certmanager.ClusterIssuerKind && b.noClusterIssuers {
		return nil
	}
	if ref.Kind == certmanager.ClusterIssuerKind {
		issuer = &certmanager.ClusterIssuer{}
	} else {
		key.Namespace = namespace
	}
	what := fmt.Sprintf("%s: %s %q", field, kindOr(ref.Kind, certmanager.IssuerKind), ref.Name)
	err := b.Client.Get(ctx, key, issuer)
	switch {
	case apierrors.IsNotFound(err):
		found.add(rdv.ReasonIssuerNotFound, what+" not found: create it or name another")
		return nil
	case err != nil:
		return fmt.Errorf("get %s: %w", what, err)
	}
	for _, condition := range issuer.GetStatus().Conditions {
		if condition.Type == certmanager.IssuerConditionReady {
			if condition.Status == cmmeta.ConditionTrue {
				return nil
			}
			if condition.Status == cmmeta.ConditionFalse {
				found.add(rdv.ReasonIssuerNotReady, fmt.Sprintf("%s is not ready: %s", what, condition.Message))
				return nil
			}
		}
	}
	found.add(rdv.ReasonPending, what+" is not ready yet: cert-manager has not looked at it; is cert-manager running?")
	return nil
}

func kindOr(kind, fallback string) string {
	if kind == "" {
		return fallback
	}
	return kind
}

// addProblem adds what a rule found, if anything.
func (p *problems) addProblem(one rules.Problem) {
	if !one.OK() {
		p.add(one.Reason, one.Message)
	}
}

// readKey reads one key of a ConfigMap or Secret, past the cache, which holds no content of either.
func readKey(ctx context.Context, live client.Reader, namespace, field string, ref rdv.KeyReference, found *problems) (string, error) {
	what := fmt.Sprintf("%s: %s %q", field, ref.Kind, ref.Name)
	key := types.NamespacedName{Namespace: namespace, Name: ref.Name}
	var value string
	var ok bool
	var err error
	if ref.Kind == "Secret" {
		secret := &corev1.Secret{}
		err = live.Get(ctx, key, secret)
		var data []byte
		data, ok = secret.Data[ref.Key]
		value = string(data)
	} else {
		configMap := &corev1.ConfigMap{}
		err = live.Get(ctx, key, configMap)
		value, ok = configMap.Data[ref.Key]
	}
	switch {
	case apierrors.IsNotFound(err):
		found.add(rdv.ReasonReferenceNotFound, what+" not found: create it or name another")
		return "", nil
	case err != nil:
		return "", fmt.Errorf("get %s: %w", what, err)
	case !ok:
		found.add(rdv.ReasonReferenceInvalid, fmt.Sprintf("%s has no key %q: add it or name another", what, ref.Key))
	}
	return value, nil
}

// getOrNil reads an object from the cache; nil where there is none.
func getOrNil[T client.Object](ctx context.Context, c client.Reader, namespace, name string, into T) (T, error) {
	err := c.Get(ctx, types.NamespacedName{Namespace: namespace, Name: name}, into)
	if apierrors.IsNotFound(err) {
		var none T
		return none, nil
	}
	if err != nil {
		var none T
		return none, fmt.Errorf("get %T %q: %w", into, name, err)
	}
	return into, nil
}

// secretMetadata is the metadata of a Secret, from the cache; nil where there is none.
func secretMetadata(ctx context.Context, c client.Reader, namespace, name string) (*metav1.PartialObjectMetadata, error) {
	return getOrNil(ctx, c, namespace, name, metadataOf(corev1.SchemeGroupVersion.WithKind("Secret")))
}

// authorities are the CA certificates that stand in certificates' Secrets. They are public, and thousands of hosts ask for
// the same: each is read once per version of its Secret. It is safe for concurrent use.
type authorities struct {
	mu    sync.Mutex
	known map[types.NamespacedName]authority
}

type authority struct {
	of string // UID and version of the Secret
	ca string
}

// caOf is the CA in a certificate's Secret, and whether there is that Secret.
func (b *base) caOf(ctx context.Context, namespace, name string) (ca string, found bool, err error) {
	meta, err := secretMetadata(ctx, b.Client, namespace, name)
	if err != nil || meta == nil {
		return "", false, err
	}
	key, of := client.ObjectKeyFromObject(meta), string(meta.UID)+"/"+meta.ResourceVersion
	a := b.authorities
	a.mu.Lock()
	known, ok := a.known[key]
	a.mu.Unlock()
	if ok && known.of == of {
		return known.ca, true, nil
	}
	secret, err := getOrNil(ctx, b.Live, namespace, name, &corev1.Secret{})
	if err != nil || secret == nil {
		return "", false, err
	}
	ca = string(secret.Data["ca.crt"])
	a.mu.Lock()
	a.known[key] = authority{string(secret.UID) + "/" + secret.ResourceVersion, ca}
	a.mu.Unlock()
	return ca, true, nil
}
