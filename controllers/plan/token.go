package plan

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"time"
)

// TokenPolicy is how a registration token lives.
type TokenPolicy struct {
	Lifetime time.Duration
	// Automatic replaces a token at two thirds of its life; else it expires and stays so.
	Automatic bool
	// RotateFor is the value of the rotate annotation; another one than the token was made for replaces it.
	RotateFor string
}

// Token is a registration token as seen: the text in its Secret, and what the status says of it.
type Token struct {
	Text    string // empty where there is no Secret
	Hash    string // in the status, empty where none was recorded
	Expires time.Time
	MadeFor string
}

// TokenDecision is what to do about a token.
type TokenDecision struct {
	Replace bool
	// Expired says that the token enrols nobody any more, and is not replaced by itself.
	Expired bool
	// Next is when to look again; 0 means that time alone changes nothing.
	Next time.Duration
}

// DecideToken plans a registration token. prefix is what the token's text must begin with.
func DecideToken(seen Token, prefix string, policy TokenPolicy, now time.Time) TokenDecision {
	fresh := TokenDecision{Replace: true, Next: renewAfter(policy)}
	switch {
	case seen.Text == "" || !wellFormed(seen.Text, prefix):
		return fresh
	case seen.Hash != HashToken(seen.Text): // somebody wrote into the Secret, or it was never recorded
		return fresh
	case seen.MadeFor != policy.RotateFor:
		return fresh
	}
	left := seen.Expires.Sub(now)
	if !policy.Automatic {
		if left <= 0 {
			return TokenDecision{Expired: true}
		}
		return TokenDecision{Next: left}
	}
	// A third of the life that the policy now asks for, so that a shortened life takes effect on the token at hand.
	untilRenewal := left - policy.Lifetime/3
	if untilRenewal <= 0 || left > policy.Lifetime {
		return fresh
	}
	return TokenDecision{Next: untilRenewal}
}

func renewAfter(policy TokenPolicy) time.Duration {
	if policy.Automatic {
		return policy.Lifetime - policy.Lifetime/3
	}
	return policy.Lifetime
}

// TokenPrefix begins the token of a pool ("-" as host) or of one host.
func TokenPrefix(namespace, pool, host string) string {
	if host == "" {
		host = "-"
	}
	return strings.Join([]string{"rdvreg", namespace, pool, host, ""}, ".")
}

// TokenText is the token for these 32 random bytes.
func TokenText(prefix string, secret [32]byte) string {
	return prefix + base64.RawURLEncoding.EncodeToString(secret[:])
}

// HashToken is what the status says of a token: its SHA-256 in hex.
func HashToken(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

func wellFormed(text, prefix string) bool {
	secret, ok := strings.CutPrefix(text, prefix)
	if !ok {
		return false
	}
	raw, err := base64.RawURLEncoding.DecodeString(secret)
	return err == nil && len(raw) == 32
}

// WantHostToken says whether a host needs a token of its own: until it is enrolled, and again when somebody asks for a new
// one, until that one is spent. spentBy is the hash of the token that it enrolled with, empty where it never did.
func WantHostToken(seen Token, rotateFor, spentBy string) bool {
	if spentBy == "" {
		return true
	}
	return rotateFor != "" && (seen.MadeFor != rotateFor || seen.Hash != spentBy)
}
