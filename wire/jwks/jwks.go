// Package jwks reads the key set that an identity provider publishes (RFC 7517), as brokers use it and the operator checks
// it. A provider may publish keys of kinds that aren't known here, or for encryption, beside those that sign its tokens:
// they are skipped.
package jwks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"rendezvous.dev/rendezvous/wire/idpurl"
)

const (
	// maxDocument bounds a key set, in bytes; maxKeys the keys in it.
	maxDocument = 1 << 20
	maxKeys     = 256
	// maxNamed bounds a key's name in Skipped, in bytes.
	maxNamed = 64
)

// Set is a key set.
type Set struct {
	// Keys verify signatures.
	Keys []jose.JSONWebKey
	// Skipped names the others by kind and key id, sorted: they become a line in a log.
	Skipped []string
}

// Fetch reads the set at an address.
func Fetch(ctx context.Context, client *http.Client, address string) (Set, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return Set{}, err
	}
	res, err := client.Do(req)
	if err != nil {
		return Set{}, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return Set{}, fmt.Errorf("%s answers %s", address, idpurl.Status(res))
	}
	data, err := io.ReadAll(io.LimitReader(res.Body, maxDocument))
	if err != nil {
		return Set{}, err
	}
	set, err := Parse(data)
	if err != nil {
		return Set{}, fmt.Errorf("%s %w", address, err)
	}
	return set, nil
}

// Parse reads a set. Its errors follow on the set's address.
func Parse(data []byte) (Set, error) {
	var raw struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if json.Unmarshal(data, &raw) != nil {
		return Set{}, errors.New("is no key set: it is not the JSON of RFC 7517")
	}
	if len(raw.Keys) > maxKeys {
		return Set{}, fmt.Errorf("lists %d keys, more than %d", len(raw.Keys), maxKeys)
	}
	var s Set
	for _, data := range raw.Keys {
		var k jose.JSONWebKey
		if json.Unmarshal(data, &k) == nil && k.Use != "enc" && k.IsPublic() && k.Valid() {
			s.Keys = append(s.Keys, k)
			continue
		}
		s.Skipped = append(s.Skipped, describe(data))
	}
	slices.Sort(s.Skipped)
	if len(s.Keys) == 0 {
		return Set{}, errors.New("lists no key that this software can verify signatures with")
	}
	return s, nil
}

// describe names a key that is not used.
func describe(data []byte) string {
	var k struct {
		Kty, Crv, Use, Alg, Kid string
	}
	if json.Unmarshal(data, &k) != nil {
		return "not a key"
	}
	var parts []string
	for _, p := range []string{k.Kty, k.Crv, k.Alg, k.Use, k.Kid} {
		if p != "" {
			parts = append(parts, fmt.Sprintf("%.*s", maxNamed, p))
		}
	}
	return strings.Join(parts, " ")
}
