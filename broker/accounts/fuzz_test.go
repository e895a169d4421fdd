package accounts

import (
	"errors"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/account"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Whatever stands on a pool's list, which people edit, nobody is given an account that is another's, or a user id that is.
func FuzzList(f *testing.F) {
	f.Add("alice", "10001 bob", "bob", "alice", "")
	f.Add("alice", "- alice", "x", "alice", "20000")
	f.Add("alice", "10001  alice", "bob", "bob", "10001")
	f.Add("alice", "0 alice", "alice", "alice", "-1")
	f.Fuzz(func(t *testing.T, name, entry, person, other, uid string) {
		p := &model.Pool{Name: "linux", Accounts: &model.Accounts{Create: true, FirstUID: 10000, LastUID: 10009}}
		claims := map[string]string{}
		if uid != "" {
			p.Accounts.UIDClaim, claims["uid"] = "uid", uid
		}
		list := fake.New(&model.Snapshot{})
		edited := map[string]string{name: entry, "somebody": "10003 " + other}
		for at, text := range edited {
			_, version, _ := list.ReadAccounts(t.Context(), p.Name)
			if err := list.AddAccount(t.Context(), p.Name, version, at, text); err != nil {
				t.Fatal(err)
			}
		}
		got, err := New(list, nil).Account(t.Context(), p, Person{Name: person, Claims: claims})
		if err != nil {
			var r *refusal.Error
			if !errors.As(err, &r) || r.Code != refusal.AccountRefused {
				t.Fatalf("refused by no name: %v", err)
			}
			return
		}
		wanted, err := account.Name(person)
		if err != nil || got.Name != wanted || !got.Create || got.UID == 0 {
			t.Fatalf("%q is logged in as %+v: %v", person, got, err)
		}
		entries, _, err := list.ReadAccounts(t.Context(), p.Name)
		if err != nil {
			t.Fatal(err)
		}
		_, owner, ok := strings.Cut(entries[got.Name], " ")
		if !ok || owner != person {
			t.Fatalf("%q is logged in as %q, which is %q's", person, got.Name, owner)
		}
		if edited[got.Name] != "" {
			return // what people wrote counts, as they wrote it
		}
		for at, text := range entries {
			if id, _, ok := parse(text); ok && id == got.UID && at != got.Name {
				t.Fatalf("user id %d is %q's and %q's", id, at, got.Name)
			}
		}
	})
}
