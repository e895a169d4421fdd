package jwks

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

func TestParse(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwk := func(use string, k any) string {
		data, err := json.Marshal(jose.JSONWebKey{Key: k, KeyID: "k", Algorithm: "ES256", Use: use})
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	good := jwk("sig", key.Public())
	for name, c := range map[string]struct {
		keys    string
		used    int
		skipped []string
		err     string
	}{
		"one":               {good, 1, nil, ""},
		"no use named":      {jwk("", key.Public()), 1, nil, ""},
		"for encryption":    {good + "," + jwk("enc", key.Public()), 1, []string{"EC P-256 ES256 enc k"}, ""},
		"a private one":     {good + "," + jwk("sig", key), 1, []string{"EC P-256 ES256 sig k"}, ""},
		"a shared one":      {good + `,{"kty":"oct","k":"AAAA","kid":"s"}`, 1, []string{"oct s"}, ""},
		"Ed448":             {`{"kty":"OKP","use":"sig","crv":"Ed448","kid":"e","x":"` + strings.Repeat("A", 76) + `"},` + good, 1, []string{"OKP Ed448 sig e"}, ""},
		"X25519":            {good + `,{"kty":"OKP","use":"enc","crv":"X25519","kid":"x","x":"` + strings.Repeat("A", 43) + `"}`, 1, []string{"OKP X25519 enc x"}, ""},
		"another family":    {`{"kty":"AKP","alg":"ML-DSA-44","kid":"m","pub":"AAAA"},` + good, 1, []string{"AKP ML-DSA-44 m"}, ""},
		"not even a key":    {`7,` + good, 1, []string{"not a key"}, ""},
		"a name too long":   {good + `,{"kty":"x","kid":"` + strings.Repeat("k", 9999) + `"}`, 1, []string{"x " + strings.Repeat("k", maxNamed)}, ""},
		"none":              {"", 0, nil, "lists no key"},
		"none that is used": {`{"kty":"AKP"}`, 0, nil, "lists no key"},
		"too many":          {strings.TrimSuffix(strings.Repeat(good+",", maxKeys+1), ","), 0, nil, "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Parse(fmt.Appendf(nil, `{"keys":[%s]}`, c.keys))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if err != nil || len(s.Keys) != c.used || !slices.Equal(s.Skipped, c.skipped) {
				t.Errorf("%d used, skipped %q, %v", len(s.Keys), s.Skipped, err)
			}
		})
	}
	if _, err := Parse([]byte("<html>")); err == nil || !strings.Contains(err.Error(), "is no key set") {
		t.Errorf("a page: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"OKP","crv":"Ed448","x":"AA"},7,{"kty":"EC"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Parse(data)
		if (err == nil) != (len(s.Keys) > 0) {
			t.Errorf("%d keys, %v", len(s.Keys), err)
		}
	})
}
