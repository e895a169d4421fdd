package proof

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
)

var now = time.Unix(1_900_000_000, 0)

func newKey(t testing.TB) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

func claims(edit ...func(*Claims)) Claims {
	c := Claims{
		Namespace: "ns", Workspace: "ws", Pool: "pool", Host: "h1", HostUID: "uid-1", User: "alice", Resource: "desk",
		Groups: []string{"engineers"}, TicketID: "t1", SessionID: "s1", Gateway: "gw", Instance: "10-0-0-1", Account: "al",
		ActivityID: "a1", Client: "192.0.2.1:9", SignedIn: now.Add(-time.Hour), IssuedAt: now, Expires: now.Add(Lifetime),
	}
	for _, e := range edit {
		e(&c)
	}
	return c
}

func sign(t testing.TB, c Claims, key ed25519.PrivateKey) string {
	t.Helper()
	raw, err := Sign(c, key)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestRoundTrip(t *testing.T) {
	public, private := newKey(t)
	for _, want := range []Claims{
		claims(),
		claims(func(c *Claims) {
			c.Groups, c.TicketID, c.Gateway, c.Instance, c.Account = nil, "", "", "", ""
			c.ActivityID, c.Client, c.SignedIn = "", "", time.Time{}
		}),
	} {
		got, err := Verify(sign(t, want, private), public, "ns", "ws", now)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v %v, want %+v", got, err, want)
		}
	}
}

// resign makes a proof with another first part or payload, signed with the right key.
func resign(key ed25519.PrivateKey, first, payload string) string {
	signed := encoding.EncodeToString([]byte(first)) + "." + encoding.EncodeToString([]byte(payload))
	return signed + "." + encoding.EncodeToString(ed25519.Sign(key, []byte(signed)))
}

func payloadOf(t *testing.T, raw string) string {
	t.Helper()
	data, err := encoding.DecodeString(strings.Split(raw, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestRefusals(t *testing.T) {
	public, private := newKey(t)
	_, other := newKey(t)
	good := sign(t, claims(), private)
	payload := payloadOf(t, good)
	parts := strings.Split(good, ".")
	for _, c := range []struct{ name, raw, says string }{
		{"empty", "", "not of this form"},
		{"no signature", parts[0] + "." + parts[1], "not of this form"},
		{"an empty signature", parts[0] + "." + parts[1] + ".", "signature"},
		{"a part too many", good + "." + parts[2], "signature"},
		{"too long", good + strings.Repeat("A", MaxLength), "longer than"},
		{"another key's", sign(t, claims(), other), "signature"},
		{"altered claims", parts[0] + "." + encoding.EncodeToString([]byte(strings.Replace(payload, "alice", "mallo", 1))) + "." + parts[2], "signature"},
		{"a line break in the signature", good + "\n", "signature"},
		{"a line break in the claims", parts[0] + "." + parts[1] + "\n." + parts[2], "signature"},
		{"padded signature", good + "==", "signature"},
		{"another workspace's", sign(t, claims(func(c *Claims) { c.Workspace = "other" }), private), "another workspace"},
		{"another namespace's", sign(t, claims(func(c *Claims) { c.Namespace = "other" }), private), "another workspace"},
		{"expired", sign(t, claims(func(c *Claims) { c.Expires = now.Add(-time.Minute) }), private), "expired"},
		{"of the future", sign(t, claims(func(c *Claims) { c.IssuedAt = now.Add(time.Minute) }), private), "future"},
		{"no algorithm", resign(private, `{"alg":"none","typ":"rendezvous-session+jwt"}`, payload), "form"},
		{"another type", resign(private, `{"alg":"EdDSA","typ":"JWT"}`, payload), "form"},
		{"another order of the header", resign(private, `{"typ":"rendezvous-session+jwt","alg":"EdDSA"}`, payload), "form"},
		{"a header that names a key", resign(private, `{"alg":"EdDSA","kid":"x","typ":"rendezvous-session+jwt"}`, payload), "form"},
		{"a ticket's audience", resign(private, headerJSON, strings.Replace(payload, Audience, ticket.Audience, 1)), "audience"},
		{"no object", resign(private, headerJSON, `[]`), "can't be read"},
		{"no user", resign(private, headerJSON, strings.Replace(payload, "alice", "", 1)), `"sub"`},
		{"no host UID", resign(private, headerJSON, strings.Replace(payload, "uid-1", "", 1)), `"uid"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Verify(c.raw, public, "ns", "ws", now); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want an error that says %q", err, c.says)
			}
		})
	}
	if _, err := Verify(good, nil, "ns", "ws", now); err == nil {
		t.Error("taken without a key")
	}
}

func TestSignRefusesWhatVerifyWould(t *testing.T) {
	_, private := newKey(t)
	for name, c := range map[string]Claims{
		"no user": claims(func(c *Claims) { c.User = "" }), "no host": claims(func(c *Claims) { c.Host = "" }),
		"no UID": claims(func(c *Claims) { c.HostUID = "" }), "no session": claims(func(c *Claims) { c.SessionID = "" }),
		"too many groups": claims(func(c *Claims) { c.Groups = []string{strings.Repeat("g", MaxLength)} }),
	} {
		if raw, err := Sign(c, private); err == nil {
			t.Errorf("%s: made %q", name, raw)
		}
	}
}

// The same key signs tickets, so each must be refused where the other is wanted.
func TestNeverATicket(t *testing.T) {
	public, private := newKey(t)
	_, err := ticket.Verify(sign(t, claims(), private), public, "ns", "ws", now)
	if err == nil || refusal.From(err).Code != refusal.TicketInvalid {
		t.Errorf("a proof was taken for a ticket: %v", err)
	}
	// Also one that has all of a ticket's own claims: its audience still is not the gateway.
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: private}, (&jose.SignerOptions{}).WithType("rendezvous-session+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	both, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": ticket.Issuer("ns", "ws"), "aud": Audience, "sub": "alice", "jti": "1", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"res": "desk", "tgt": "pool.ns.rdv.internal",
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ticket.Verify(both, public, "ns", "ws", now); err == nil {
		t.Error("a ticket of another audience was taken")
	}
}

func TestTicketIsNeverAProof(t *testing.T) {
	public, private := newKey(t)
	raw, err := ticket.Sign(ticket.Claims{
		ID: "1", Namespace: "ns", Workspace: "ws", User: "alice", Resource: "desk", Target: "t", IssuedAt: now, Expires: now.Add(time.Hour),
	}, private)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(raw, public, "ns", "ws", now); err == nil {
		t.Error("a ticket was taken for a proof")
	}
}

// Whoever alters any one character of a proof has none: there is one text for one proof.
func TestNoCharacterMayChange(t *testing.T) {
	public, private := newKey(t)
	good := sign(t, claims(), private)
	for i := range good {
		for _, b := range []byte{'A', 'B', '.', '-', '=', '\n'} {
			if good[i] == b {
				continue
			}
			if _, err := Verify(good[:i]+string(b)+good[i+1:], public, "ns", "ws", now); err == nil {
				t.Fatalf("byte %d may be %q", i, b)
			}
		}
	}
}

func FuzzVerify(f *testing.F) {
	public, private := newKey(f)
	good := sign(f, claims(), private)
	f.Add(good)
	f.Add("")
	f.Add("..")
	f.Add(header + "." + base64.RawURLEncoding.EncodeToString([]byte("{}")) + ".")
	f.Fuzz(func(t *testing.T, raw string) {
		if _, err := Verify(raw, public, "ns", "ws", now); err == nil && raw != good {
			t.Errorf("taken: %q", raw)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	public, private := newKey(b)
	raw := sign(b, claims(), private)
	for b.Loop() {
		if _, err := Verify(raw, public, "ns", "ws", now); err != nil {
			b.Fatal(err)
		}
	}
}
