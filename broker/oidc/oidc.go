// Package oidc validates the bearer tokens that users bring from the workspace's identity provider: signature by the
// provider's published keys, issuer, audience, times, and the claims that name the user and the user's groups.
//
// The provider need not answer while a token is checked: its keys are kept, read again now and then, and used for up to
// MaxStale after the provider was last heard. A change of issuer or CA takes effect with the next token.
package oidc

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	gooidc "github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/idpurl"
	"rendezvous.dev/rendezvous/wire/jwks"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const (
	// MaxStale is how long keys serve after the provider was last heard. A key that the provider withdrew meanwhile is
	// trusted for so long at most.
	MaxStale = 24 * time.Hour
	// refreshAfter is the age at which keys are read again: soon, since that is also how it is noticed that the provider
	// is away.
	refreshAfter = time.Minute
	// retryAfter holds off the next attempt, also where a token names a key that the provider doesn't have.
	retryAfter   = 5 * time.Second
	fetchTimeout = 10 * time.Second
	// maxToken bounds a token before anything parses it: one of 1,000 groups by GUID has 52 KiB.
	maxToken    = 64 << 10
	maxUsername = 256
)

// algorithms that a provider may sign with: those with public keys only.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// User is whom a token names.
type User struct {
	// Name in the spelling that everything compares (model.OIDC.User).
	Name   string
	Groups []string
	// GroupsProblem is why Groups are none, or not all: GroupsAbsent and so on, empty where they are read.
	GroupsProblem string
	// Expires is when the token does.
	Expires time.Time
	// SignedIn is when the token was issued, as far as it isn't in the future; zero where it doesn't say. User and groups
	// are as of then.
	SignedIn time.Time

	claims map[string]json.RawMessage
}

// maxClaim bounds a claim's value that Claims gives, in bytes.
const maxClaim = 256

// GroupsComplete says that a group that isn't in Groups is one that the user is not in.
func (u User) GroupsComplete() bool {
	return u.GroupsProblem == "" || u.GroupsProblem == GroupsAbsent
}

// Claims gives those of the token's claims that are texts or whole numbers, of the named ones.
func (u User) Claims(names []string) map[string]string {
	values := map[string]string{}
	for _, name := range names {
		raw := find(u.claims, name)
		var text string
		if json.Unmarshal(raw, &text) != nil {
			text = wholeNumber(raw)
		}
		if text != "" && len(text) <= maxClaim {
			values[name] = text
		}
	}
	return values
}

// Options of a Validator.
type Options struct {
	// Config gives the provider as the Workspace declares it now; false while there is no Workspace.
	Config func() (model.OIDC, bool)
	// CAFile holds the CA of the provider (PEM). Where it doesn't exist, the system's roots verify the provider.
	CAFile string
	Log    *slog.Logger
	Now    func() time.Time // time.Now if nil
}

// Validator checks tokens. Safe for concurrent use.
type Validator struct {
	o Options

	fetching sync.Mutex // held while the provider is asked, so that one asks for all

	mu   sync.Mutex
	keys keyring
}

// keyring is what is known of one provider.
type keyring struct {
	issuer string
	ca     string
	keys   []jose.JSONWebKey
	// skipped are those that were told of.
	skipped []string
	doc     []byte    // the discovery document
	heard   time.Time // when the keys were read
	tried   time.Time // when they were last asked for
	err     error     // of that attempt
}

// New makes a Validator. It asks nobody yet.
func New(o Options) *Validator {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Validator{o: o}
}

// Run reads the keys ahead of need until ctx ends.
func (v *Validator) Run(ctx context.Context) {
	tick := time.NewTicker(refreshAfter / 4)
	defer tick.Stop()
	for {
		if cfg, ok := v.o.Config(); ok && cfg.IssuerURL != "" {
			if k := v.known(cfg.IssuerURL); v.o.Now().Sub(k.heard) > refreshAfter {
				v.refresh(ctx, cfg.IssuerURL)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Heard says when the provider last answered, zero for never, and why its last attempt failed.
func (v *Validator) Heard() (time.Time, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.keys.heard, v.keys.err
}

// Discovery gives the provider's discovery document as it was last read, nil where it never was.
func (v *Validator) Discovery() []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.keys.doc
}

// CA gives the provider's CA (PEM), empty where the system's roots serve.
func (v *Validator) CA() string {
	data, err := os.ReadFile(v.o.CAFile)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(data))
}

// Validate checks a token. Its errors are *refusal.Error.
func (v *Validator) Validate(ctx context.Context, raw string) (User, error) {
	cfg, ok := v.o.Config()
	if !ok {
		return User{}, refusal.New(refusal.IdentityAway, "The workspace does not exist (any more), so nobody can sign in to it.")
	}
	if raw == "" {
		return User{}, refusal.New(refusal.TokenMissing, "The request carries no token: sign in at %s first (`rdv login`).", cfg.IssuerURL)
	}
	if len(raw) > maxToken {
		return User{}, invalid(cfg, "it is longer than %d bytes", maxToken)
	}
	keys := &keySet{v: v, issuer: cfg.IssuerURL}
	verifier := gooidc.NewVerifier(cfg.IssuerURL, keys, &gooidc.Config{
		// These are checked below, each with its own refusal.
		SkipIssuerCheck: true, SkipClientIDCheck: true, SkipExpiryCheck: true,
		SupportedSigningAlgs: names(algorithms),
	})
	t, err := verifier.Verify(ctx, raw)
	if err != nil {
		if keys.away != nil {
			return User{}, keys.away
		}
		return User{}, invalid(cfg, "its form or signature is not right")
	}
	if t.Issuer != cfg.IssuerURL {
		return User{}, invalid(cfg, "%q issued it", t.Issuer)
	}
	if !slices.ContainsFunc(t.Audience, func(a string) bool { return slices.Contains(cfg.Audiences, a) }) {
		return User{}, refusal.New(refusal.TokenWrongAudience, "The token is for %q, and this workspace takes tokens for %q: sign in with that client.", t.Audience, cfg.Audiences)
	}
	now := v.o.Now()
	if !now.Before(t.Expiry) {
		return User{}, refusal.New(refusal.TokenExpired, "The token expired at %s: sign in again (`rdv login`).", t.Expiry.UTC().Format(time.RFC3339))
	}
	return user(t, cfg, now)
}

func user(t *gooidc.IDToken, cfg model.OIDC, now time.Time) (User, error) {
	var claims map[string]json.RawMessage
	if err := t.Claims(&claims); err != nil {
		return User{}, invalid(cfg, "its claims can't be read")
	}
	var notBefore float64
	if raw, ok := claims["nbf"]; ok && json.Unmarshal(raw, &notBefore) == nil && now.Add(time.Minute).Before(time.Unix(int64(notBefore), 0)) {
		return User{}, invalid(cfg, "it is not valid yet; compare the clocks")
	}
	u := User{claims: claims, Expires: t.Expiry}
	var name string
	if json.Unmarshal(find(claims, cfg.UsernameClaim), &name) != nil || name == "" || len(name) > maxUsername {
		return User{}, invalid(cfg, "it has no claim %q, which names the user; its claims are: %s", cfg.UsernameClaim, strings.Join(u.ClaimNames(), ", "))
	}
	u.Name = cfg.User(name)
	// An address that the provider did not verify could be anybody's. Many providers (Entra ID, AD FS) never say: there an
	// administrator gives out the addresses.
	if raw, ok := claims["email_verified"]; ok && cfg.UsernameClaim == "email" && !isTrue(raw) {
		return User{}, invalid(cfg, "the provider has not verified the address %q", u.Name)
	}
	u.Groups, u.GroupsProblem = readGroups(claims, cfg.GroupsClaim)
	if u.SignedIn = t.IssuedAt; u.SignedIn.After(now) {
		u.SignedIn = now.Truncate(time.Second)
	}
	return u, nil
}

// keySet verifies signatures with the current keys of one issuer.
type keySet struct {
	v      *Validator
	issuer string
	// away is set where there are no keys to verify with. (The verifier hides the errors of its key set.)
	away error
}

// VerifySignature implements gooidc.KeySet.
func (s *keySet) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return nil, err
	}
	k := s.v.known(s.issuer)
	payload, ok := k.verify(jws)
	if !ok || s.v.stale(k) {
		k = s.v.refresh(ctx, s.issuer)
		payload, ok = k.verify(jws)
	}
	switch {
	case s.v.stale(k):
		s.away = refusal.New(refusal.IdentityAway, "The identity provider %s can't be reached, so nobody's token can be checked: %v. Try again in a moment; an administrator finds more in the Workspace's condition IdentityReady.", s.issuer, k.err)
		return nil, s.away
	case !ok:
		return nil, errors.New("no key of the provider verifies it")
	}
	return payload, nil
}

// verify tries the keys that the token's header does not rule out.
func (k *keyring) verify(jws *jose.JSONWebSignature) (payload []byte, ok bool) {
	for i := range k.keys {
		key := &k.keys[i]
		if id := jws.Signatures[0].Header.KeyID; id != "" && key.KeyID != "" && id != key.KeyID {
			continue
		}
		if payload, err := jws.Verify(key); err == nil {
			return payload, true
		}
	}
	return nil, false
}

// stale says that keys are too old, or were never read.
func (v *Validator) stale(k keyring) bool {
	return len(k.keys) == 0 || v.o.Now().Sub(k.heard) > MaxStale
}

// known gives what is known of an issuer: nothing yet, where it or its CA is another than before.
func (v *Validator) known(issuer string) keyring {
	ca := v.CA()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keys.issuer != issuer || v.keys.ca != ca {
		v.keys = keyring{issuer: issuer, ca: ca}
	}
	return v.keys
}

// refresh asks the provider, unless somebody did a moment ago, and gives what is known then.
func (v *Validator) refresh(ctx context.Context, issuer string) keyring {
	v.fetching.Lock()
	defer v.fetching.Unlock()
	k := v.known(issuer)
	if v.o.Now().Sub(k.tried) < retryAfter {
		return k
	}
	// Others wait for this answer too, so it does not end with the request that happened to ask.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
	defer cancel()
	doc, set, err := fetch(ctx, issuer, k.ca)
	k.tried, k.err = v.o.Now(), err
	if err != nil {
		v.o.Log.Warn("the identity provider does not answer", "issuer", issuer, "error", err, "lastHeard", k.heard)
	} else {
		if !slices.Equal(k.skipped, set.Skipped) && len(set.Skipped) > 0 {
			v.o.Log.Info("the identity provider publishes keys that verify no signature here: they are skipped", "issuer", issuer, "keys", set.Skipped)
		}
		k.doc, k.keys, k.skipped, k.heard = doc, set.Keys, set.Skipped, k.tried
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keys.issuer == k.issuer && v.keys.ca == k.ca {
		v.keys = k
	}
	return k
}

// fetch reads the provider's discovery document and the keys that it names.
func fetch(ctx context.Context, issuer, ca string) (doc json.RawMessage, set jwks.Set, err error) {
	tc := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		tc.RootCAs = x509.NewCertPool()
		if !tc.RootCAs.AppendCertsFromPEM([]byte(ca)) {
			return nil, jwks.Set{}, errors.New("the CA bundle for the identity provider holds no certificate")
		}
	}
	client := idpurl.Client(issuer, tc) // it keeps no connection: looks are minutes apart
	client.Timeout = fetchTimeout
	doc, where, err := idpurl.Discover(ctx, client, issuer)
	if err != nil {
		return nil, jwks.Set{}, err
	}
	set, err = jwks.Fetch(ctx, client, where.JWKS)
	return doc, set, err
}

func invalid(cfg model.OIDC, why string, args ...any) error {
	return refusal.New(refusal.TokenInvalid, "The token was refused: %s. Sign in at %s again (`rdv login`).", fmt.Sprintf(why, args...), cfg.IssuerURL)
}

func names(algs []jose.SignatureAlgorithm) []string {
	s := make([]string, len(algs))
	for i, a := range algs {
		s[i] = string(a)
	}
	return s
}
