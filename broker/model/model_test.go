package model

import (
	"testing"
	"time"
)

func TestRevoked(t *testing.T) {
	noon := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	w := &Workspace{Revocations: []Revocation{{User: "alice"}, {Ticket: "T1"}, {User: "bob", Before: noon}, {User: "dave", Before: noon.Add(time.Hour)}}}
	for name, c := range map[string]struct {
		user, ticket string
		since        time.Time
		want         int // index, -1 for none
	}{
		"a disabled user":               {"alice", "T2", noon, 0},
		"in another spelling":           {"Alice", "T2", noon, 0},
		"who signed in just now":        {"alice", "", noon.Add(time.Hour), 0},
		"a ticket":                      {"carol", "T1", noon, 1},
		"its spelling counts":           {"carol", "t1", noon, -1},
		"as of a time, before":          {"bob", "T2", noon.Add(-time.Second), 2},
		"as of a time, then":            {"bob", "T2", noon, -1},
		"as of a time, sign-in unknown": {"bob", "T2", time.Time{}, 2},
		"as of a time that is to come":  {"dave", "T2", noon, 3},
		"nobody":                        {"", "", noon, -1},
		"somebody else":                 {"carol", "T2", noon, -1},
	} {
		t.Run(name, func(t *testing.T) {
			got := w.Revoked(c.user, c.ticket, c.since)
			switch {
			case c.want < 0 && got != nil, c.want >= 0 && got != &w.Revocations[max(c.want, 0)]:
				t.Errorf("got %+v, want entry %d", got, c.want)
			}
		})
	}
}

func TestUserSpelling(t *testing.T) {
	folds, exact := OIDC{UsernameClaim: "email"}, OIDC{UsernameClaim: "sub"}
	for name, want := range map[string]string{
		"Alice@Example.com": "alice@example.com", "ÄÖ": "äö", "K": "k", "\u212a": "\u212a", "\u0130": "\u0130", "ſ": "ſ", "": "", "\xff": "\ufffd",
	} {
		if got := folds.User(name); got != want || folds.User(got) != got {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
		if name != "\xff" && exact.User(name) != name {
			t.Errorf("sub %q became %q", name, exact.User(name))
		}
	}
}
