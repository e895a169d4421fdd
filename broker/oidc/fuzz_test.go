package oidc

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"rendezvous.dev/rendezvous/wire/refusal"
)

// Whatever is shown as a token, what is taken was signed by the provider, for this workspace and user.
func FuzzValidate(f *testing.F) {
	// Key and issuer are the same in each process: a fuzzer's inputs come from another one.
	fix := setUp(f)
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{7}, 32))
	if err != nil {
		f.Fatal(err)
	}
	fix.idp.key, fix.idp.URL, fix.cfg.IssuerURL = key, "https://idp.test", "https://idp.test"
	fix.keys = keyring{issuer: fix.cfg.IssuerURL, ca: fix.CA(), keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}, heard: fix.now, tried: fix.now}
	good := fix.idp.token(fix.claims(nil))
	enc := base64.RawURLEncoding
	parts := strings.Split(good, ".")
	for _, seed := range []string{
		good, fix.idp.token(fix.claims(map[string]any{"aud": "else"})), "", "..", parts[0] + ".." + parts[2], good + "=", good + "." + parts[2],
		enc.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".",
		enc.EncodeToString([]byte(`{"alg":"HS256","kid":"k1","jwk":{}}`)) + "." + parts[1] + "." + parts[2],
	} {
		f.Add(seed)
	}
	if _, err := fix.Validate(f.Context(), good); err != nil {
		f.Fatal(err)
	}
	valid := func(token string) bool {
		at := strings.LastIndexByte(token, '.')
		signature, err := enc.DecodeString(token[at+1:])
		sum := sha256.Sum256([]byte(token[:at]))
		return err == nil && len(signature) == 64 && ecdsa.Verify(&key.PublicKey, sum[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
	}
	f.Fuzz(func(t *testing.T, token string) {
		u, err := fix.Validate(t.Context(), token)
		var r *refusal.Error
		if err != nil {
			if !errors.As(err, &r) || r.Code == refusal.Internal || len(r.Message) > 64<<10 {
				t.Fatalf("refused by no name: %v", err)
			}
			return
		}
		// Seeds of another process are signed anew, so what was signed isn't one text; but only the key can have signed it.
		_, payload, _ := strings.Cut(token, ".")
		payload, _, _ = strings.Cut(payload, ".")
		var claims struct {
			Email string `json:"email"`
		}
		data, err := enc.DecodeString(payload)
		if err != nil || json.Unmarshal(data, &claims) != nil || u.Name != "alice@example.com" || claims.Email != u.Name || !valid(token) {
			t.Fatalf("%q is %+v", token, u)
		}
	})
}
