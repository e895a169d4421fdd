package controllers

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
	"rendezvous.dev/rendezvous/controllers/render"
)

const defaultTokenLifetime = 24 * time.Hour

// tokenPolicy is a pool's policy; obj is the object whose annotation asks for rotation.
func tokenPolicy(pool *rdv.HostPool, obj metav1.Object) plan.TokenPolicy {
	policy := plan.TokenPolicy{
		Lifetime:  defaultTokenLifetime,
		Automatic: pool.Spec.Registration.Rotation != rdv.RotateManual,
		RotateFor: rdv.RotateFor(obj.GetAnnotations()),
	}
	if seconds := pool.Spec.Registration.TokenLifetimeSeconds; seconds != nil {
		policy.Lifetime = time.Duration(*seconds) * time.Second
	}
	return policy
}

// seenToken is the token that owner has: its text past the cache, for nobody should hold tokens in memory, and the rest
// from the status. Where the two don't fit, the status is read past the cache too: it may only be late. The UID is the
// Secret's: applied with it, a Secret that somebody deletes meanwhile, to revoke its token, is not made anew with that token.
func (b *base) seenToken(ctx context.Context, owner client.Object, status func(client.Object) rdv.RegistrationStatus) (plan.Token, types.UID, error) {
	secret := &corev1.Secret{}
	err := b.Live.Get(ctx, client.ObjectKey{Namespace: owner.GetNamespace(), Name: render.RegistrationSecretName(owner.GetName())}, secret)
	if err != nil && !apierrors.IsNotFound(err) {
		return plan.Token{}, "", fmt.Errorf("get registration Secret: %w", err)
	}
	var text string
	var uid types.UID
	if metav1.IsControlledBy(secret, owner) {
		text, uid = string(secret.Data[render.KeyToken]), secret.UID
	}
	seen := tokenOf(text, status(owner))
	if text != "" && seen.Hash != plan.HashToken(text) {
		fresh := owner.DeepCopyObject().(client.Object)
		if err := b.Live.Get(ctx, client.ObjectKeyFromObject(owner), fresh); err != nil {
			return plan.Token{}, "", fmt.Errorf("get %s past the cache: %w", owner.GetName(), err)
		}
		seen = tokenOf(text, status(fresh))
	}
	return seen, uid, nil
}

func tokenOf(text string, status rdv.RegistrationStatus) plan.Token {
	seen := plan.Token{Text: text, Hash: status.TokenHash, MadeFor: status.RotatedFor}
	if status.Expires != nil {
		seen.Expires = status.Expires.Time
	}
	return seen
}

// newToken makes a token from the system's random source.
func newToken(prefix string, policy plan.TokenPolicy, now time.Time) plan.Token {
	var secret [32]byte
	rand.Read(secret[:]) // never fails: the runtime would rather end the process
	text := plan.TokenText(prefix, secret)
	return plan.Token{
		Text:    text,
		Hash:    plan.HashToken(text),
		Expires: now.Add(policy.Lifetime).UTC().Truncate(time.Second), // a status holds whole seconds
		MadeFor: policy.RotateFor,
	}
}

func registrationStatus(token plan.Token, secret string) rdv.RegistrationStatus {
	status := rdv.RegistrationStatus{SecretName: secret, TokenHash: token.Hash, RotatedFor: token.MadeFor}
	if !token.Expires.IsZero() {
		status.Expires = &metav1.Time{Time: token.Expires}
	}
	return status
}
