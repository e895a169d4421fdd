package main

import (
	"slices"
	"testing"

	"github.com/dexidp/dex/connector"
)

func TestDirectoryLogin(t *testing.T) {
	d := directory{
		{ID: "alice", Name: "Alice", Email: "alice@example.test", Password: "secret", Groups: []string{"engineers"}},
		{ID: "open", Name: "Open", Email: "open@example.test"},
	}
	for _, tc := range []struct {
		name, email, password string
		scopes                connector.Scopes
		ok                    bool
		groups                []string
	}{
		{"right", "Alice@Example.test", "secret", connector.Scopes{Groups: true}, true, []string{"engineers"}},
		{"groups not asked for", "alice@example.test", "secret", connector.Scopes{}, true, nil},
		{"wrong password", "alice@example.test", "Secret", connector.Scopes{Groups: true}, false, nil},
		{"unknown user", "mallory@example.test", "secret", connector.Scopes{}, false, nil},
		{"unknown user, empty password", "mallory@example.test", "", connector.Scopes{}, false, nil},
	} {
		id, ok, err := d.Login(t.Context(), tc.scopes, tc.email, tc.password)
		if err != nil || ok != tc.ok || !slices.Equal(id.Groups, tc.groups) {
			t.Errorf("%s: ok %v, groups %v, error %v; want %v, %v", tc.name, ok, id.Groups, err, tc.ok, tc.groups)
		}
		if ok && (id.UserID != "alice" || !id.EmailVerified) {
			t.Errorf("%s: identity %+v", tc.name, id)
		}
	}
}

func TestDirectoryRefreshReadsGroupsAnew(t *testing.T) {
	scopes := connector.Scopes{Groups: true}
	before := directory{{ID: "alice", Email: "a@example.test", Password: "p", Groups: []string{"engineers"}}}
	id, _, err := before.Login(t.Context(), scopes, "a@example.test", "p")
	if err != nil {
		t.Fatal(err)
	}
	after := directory{{ID: "alice", Groups: []string{"finance"}}}
	if id, err = after.Refresh(t.Context(), scopes, id); err != nil || !slices.Equal(id.Groups, []string{"finance"}) {
		t.Errorf("groups %v, error %v", id.Groups, err)
	}
	if _, err := (directory{}).Refresh(t.Context(), scopes, id); err == nil {
		t.Error("a person who has left the directory keeps a session")
	}
}
