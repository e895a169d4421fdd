package login

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"unicode/utf8"

	"rendezvous.dev/rendezvous/wire/account"
)

// Whatever is left of the list of accounts, it is read as a whole or not at all, no account changes hands by it, and what is
// added reads back.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"alice":{"person":"alice@example.com","uid":10001,"at":"2026-01-02T03:04:05Z"}}`), "alice", "mallory", uint32(10001))
	f.Add([]byte(`{"alice":{"person":"alice@example.com","uid":10001}`), "bob", "bob", uint32(10001))
	f.Add([]byte(`null`), "bob", "bob", uint32(0))
	f.Add([]byte(`{"a":{"uid":1},"A":{"uid":1}}{}`), "a", "x", uint32(1))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte, name, person string, uid uint32) {
		path := filepath.Join(dir, "accounts.json")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := LoadRecords(path)
		if (err == nil) != json.Valid(data) && err == nil {
			t.Fatalf("%q was read", data)
		}
		if err != nil {
			return
		}
		before := map[string]Record{}
		for other, rec := range r.accounts {
			before[other] = rec
		}
		if account.CheckName(name) != nil || !utf8.ValidString(person) {
			return // the agent asks for no such account
		}
		if err := r.Put(name, Record{Person: person, UID: uid}); err != nil {
			return
		}
		if old, was := before[name]; was && old.Person != person {
			t.Fatalf("account %q was %q's and is %q's", name, old.Person, person)
		}
		for other, rec := range before {
			if uid != 0 && rec.UID == uid && other != name {
				t.Fatalf("user id %d is %q's and %q's", uid, other, name)
			}
		}
		again, err := LoadRecords(path)
		if err != nil || len(again.accounts) != len(r.accounts) {
			t.Fatalf("%d accounts read back, of %d: %v", len(again.accounts), len(r.accounts), err)
		}
	})
}
