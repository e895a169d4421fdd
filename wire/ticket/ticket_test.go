package ticket

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"rendezvous.dev/rendezvous/wire/refusal"
)

var now = time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)

func claims() Claims {
	return Claims{ID: "id", Namespace: "ns", Workspace: "ws", User: "alice@example.test", Groups: []string{"engineers"}, Resource: "desk",
		Target: "pool.ns.rdv.internal", ActivityID: "act", RedirectFlags: 8, IssuedAt: now, Expires: now.Add(time.Hour)}
}

func newKey(t *testing.T) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return pub, key
}

func TestRoundTrip(t *testing.T) {
	pub, key := newKey(t)
	raw, err := Sign(claims(), key)
	if err != nil {
		t.Fatal(err)
	}
	if tk, err := Parse(raw); err != nil || tk.Namespace != "ns" || tk.Workspace != "ws" {
		t.Errorf("Parse = %+v, %v", tk, err)
	}
	got, err := Verify(raw, pub, "ns", "ws", now.Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	got.IssuedAt, got.Expires = got.IssuedAt.UTC(), got.Expires.UTC()
	if want := claims(); !reflect.DeepEqual(got, want) {
		t.Errorf("Verify = %+v, want %+v", got, want)
	}
}

func guids(n int) (groups []string) {
	for i := range n {
		groups = append(groups, fmt.Sprintf("%08x-1111-2222-3333-%012x", i, i))
	}
	return groups
}

// What is signed can be read, however many groups there are; what can't be read isn't signed.
func TestManyGroups(t *testing.T) {
	pub, key := newKey(t)
	for name, tc := range map[string]struct {
		groups []string
		signed bool
	}{
		"none":                       {nil, true},
		"one of 256 letters":         {FitGroups([]string{strings.Repeat("x", 256)}), true},
		"one of 256 letters of four": {FitGroups([]string{strings.Repeat("\U0001f512", 256)}), true},
		"10 GUIDs":                   {FitGroups(guids(10)), true},
		"500 GUIDs":                  {FitGroups(guids(500)), true},
		"200 GUIDs, as signed by a broker of before": {guids(200), true},
		"500 GUIDs, all of them":                     {guids(500), false},
	} {
		t.Run(name, func(t *testing.T) {
			c := claims()
			c.Groups, c.SignedIn = tc.groups, now.Add(-time.Minute)
			raw, err := Sign(c, key)
			if (err == nil) != tc.signed {
				t.Fatalf("signed: %v, want %v", err, tc.signed)
			}
			if !tc.signed {
				return
			}
			got, err := Verify(raw, pub, "ns", "ws", now)
			if err != nil || !reflect.DeepEqual(got.Groups, tc.groups) || !got.Since().Equal(c.SignedIn) {
				t.Errorf("%d bytes: %v, %d groups, since %v", len(raw), err, len(got.Groups), got.Since())
			}
		})
	}
	if n := len(FitGroups(guids(500))); n < 10 || n > 30 {
		t.Errorf("%d of 500 groups fit", n)
	}
}

func TestRefused(t *testing.T) {
	pub, key := newKey(t)
	_, other := newKey(t)
	sign := func(c Claims, k ed25519.PrivateKey) string {
		raw, err := Sign(c, k)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	good := sign(claims(), key)
	foreign := claims()
	foreign.Workspace = "other"
	unsigned := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + strings.Split(good, ".")[1] + "."
	hmac, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte(pub)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	confused, err := jwt.Signed(hmac).Claims(jwt.Claims{Issuer: Issuer("ns", "ws"), Audience: jwt.Audience{Audience}}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	withoutResource := claims()
	withoutResource.Resource = ""
	flipped := []byte(good)
	flipped[len(flipped)/2] ^= 1

	for name, c := range map[string]struct {
		raw  string
		at   time.Time
		want refusal.Code
	}{
		"none":                     {"", now, refusal.TicketMissing},
		"nonsense":                 {"nonsense", now, refusal.TicketInvalid},
		"huge":                     {strings.Repeat("a", MaxLength+1), now, refusal.TicketInvalid},
		"another key":              {sign(claims(), other), now, refusal.TicketInvalid},
		"another workspace":        {sign(foreign, key), now, refusal.TicketInvalid},
		"altered":                  {string(flipped), now, refusal.TicketInvalid},
		"unsigned":                 {unsigned, now, refusal.TicketInvalid},
		"public key as HMAC key":   {confused, now, refusal.TicketInvalid},
		"no resource":              {sign(withoutResource, key), now, refusal.TicketInvalid},
		"expired":                  {good, now.Add(time.Hour + leeway + time.Second), refusal.TicketExpired},
		"issued in the far future": {good, now.Add(-time.Hour), refusal.TicketInvalid},
	} {
		if _, err := Verify(c.raw, pub, "ns", "ws", c.at); !errors.Is(err, &refusal.Error{Code: c.want}) {
			t.Errorf("%s: Verify says %v, want %s", name, err, c.want)
		}
	}
}

func FuzzVerify(f *testing.F) {
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		f.Fatal(err)
	}
	good, err := Sign(claims(), key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, raw string) {
		if _, err := Verify(raw, pub, "ns", "ws", now); err == nil && raw != good {
			t.Errorf("%q verifies", raw)
		}
	})
}
