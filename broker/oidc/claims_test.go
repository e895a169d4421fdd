package oidc

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/refusal"
)

func TestGroups(t *testing.T) {
	type object = map[string]any
	f := setUp(t)
	for _, c := range []struct {
		name, claim string
		edit        object
		groups      []string
		problem     string
	}{
		{"a list", "groups", nil, []string{"engineers"}, ""},
		{"an empty list", "groups", object{"groups": []string{}}, nil, ""},
		{"none", "groups", object{"groups": nil}, nil, GroupsAbsent},
		{"null", "groups", object{"groups": (*int)(nil)}, nil, GroupsAbsent},
		{"one text", "groups", object{"groups": "Domain Users"}, []string{"Domain Users"}, ""},
		{"a text with commas is one group", "groups", object{"groups": "x,admins"}, []string{"x,admins"}, ""},
		{"a distinguished name", "groups", object{"groups": []string{"CN=eng,OU=x"}}, []string{"CN=eng,OU=x"}, ""},
		{"an empty text", "groups", object{"groups": ""}, nil, GroupsUnreadable},
		{"Keycloak's roles", "realm_access.roles", object{"realm_access": object{"roles": []string{"engineers", "ops"}}}, []string{"engineers", "ops"}, ""},
		{"of a client with dots in its name", "resource_access.my.app.roles", object{"resource_access": object{"my.app": object{"roles": []string{"engineers"}}}}, []string{"engineers"}, ""},
		{"a name with dots and slashes", "https://example.com/claims.groups", object{"https://example.com/claims.groups": []string{"engineers"}}, []string{"engineers"}, ""},
		{"the name goes before the path", "a.b", object{"a.b": []string{"name"}, "a": object{"b": []string{"path"}}}, []string{"name"}, ""},
		{"a path into nothing", "realm_access.groups", object{"realm_access": object{"roles": []string{"engineers"}}}, nil, GroupsAbsent},
		{"a path into a text", "email.groups", nil, nil, GroupsAbsent},
		{"objects with names", "groups", object{"groups": []object{{"id": 1, "name": "engineers"}, {"name": "ops"}}}, []string{"engineers", "ops"}, ""},
		{"objects without", "groups", object{"groups": []object{{"id": 1}, {"name": "ops"}}}, []string{"ops"}, GroupsUnreadable},
		{"numbers", "groups", object{"groups": []any{12, "ops"}}, []string{"12", "ops"}, ""},
		{"a fraction", "groups", object{"groups": []any{1.5}}, nil, GroupsUnreadable},
		{"a number", "groups", object{"groups": 12}, nil, GroupsUnreadable},
		{"true", "groups", object{"groups": true}, nil, GroupsUnreadable},
		{"Zitadel's roles", "urn:zitadel:iam:org:project:roles", object{"urn:zitadel:iam:org:project:roles": object{"ops": object{"1": "x"}, "engineers": object{"1": "x"}}}, []string{"engineers", "ops"}, ""},
		{"what holds the claim is not the claim", "realm_access", object{"realm_access": object{"roles": []string{"engineers"}}}, nil, GroupsUnreadable},
		{"overage", "groups", object{"groups": nil, "_claim_names": object{"groups": "src1"}, "_claim_sources": object{"src1": object{"endpoint": "https://graph.example"}}}, nil, GroupsElsewhere},
		{"overage of the implicit flow", "groups", object{"groups": nil, "hasgroups": true}, nil, GroupsElsewhere},
		{"as a text", "groups", object{"groups": nil, "hasgroups": "true"}, nil, GroupsElsewhere},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.cfg.GroupsClaim = c.claim
			u, err := f.Validate(t.Context(), f.idp.token(f.claims(c.edit)))
			if err != nil || !slices.Equal(u.Groups, c.groups) || u.GroupsProblem != c.problem {
				t.Fatalf("got %q, problem %q, %v", u.Groups, u.GroupsProblem, err)
			}
			if complete := c.problem == "" || c.problem == GroupsAbsent; u.GroupsComplete() != complete {
				t.Errorf("complete: %t", u.GroupsComplete())
			}
			notice := u.GroupsNotice(f.cfg)
			if (notice != "") != (c.problem != "") || c.problem != "" && !strings.Contains(notice, "Claims in it: ") {
				t.Errorf("notice %q", notice)
			}
			if strings.Contains(notice, "alice@") || strings.Contains(notice, "graph.example") {
				t.Errorf("the notice has values: %q", notice)
			}
		})
	}
}

func TestClaimNames(t *testing.T) {
	f := setUp(t)
	many := map[string]any{"realm_access": map[string]any{"roles": []string{"x"}, "a": map[string]any{"b": map[string]any{"c": 1}}}, "x\x1b[2J": 1}
	u, err := f.Validate(t.Context(), f.idp.token(f.claims(many)))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(u.ClaimNames(), " "), "aud email email_verified exp groups iat iss realm_access.a.b realm_access.roles sub x?[2J"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for i := range 5000 {
		many[fmt.Sprintf("%04d%s", i, strings.Repeat("n", 3))] = 1
	}
	if u, err = f.Validate(t.Context(), f.idp.token(f.claims(many))); err == nil && len(u.ClaimNames()) != maxClaimNames+1 {
		t.Errorf("%d names, %v", len(u.ClaimNames()), err)
	}
}

func TestUserNames(t *testing.T) {
	type object = map[string]any
	f := setUp(t)
	for _, c := range []struct {
		name, claim string
		edit        object
		want        string // or, after a !, what is wrong
	}{
		{"a mail address", "email", object{"email": "Alice@Example.com"}, "alice@example.com"},
		{"a UPN", "upn", object{"upn": "ALICE@EXAMPLE.COM"}, "alice@example.com"},
		{"letters beyond ASCII", "email", object{"email": "JÜRGEN@Example.com"}, "jürgen@example.com"},
		{"the Kelvin sign is no k", "email", object{"email": "bla\u212ae@example.com"}, "bla\u212ae@example.com"},
		{"nor is the dotted I an i", "email", object{"email": "al\u0130ce@example.com"}, "al\u0130ce@example.com"},
		{"sub is exact", "sub", object{"sub": "aB3"}, "aB3"},
		{"a path", "custom.login", object{"custom": object{"login": "Bob"}}, "bob"},
		{"no such claim", "upn", nil, `!no claim "upn", which names the user; its claims are: aud, email, email_verified, exp`},
		{"a list", "email", object{"email": []string{"a"}}, "!no claim"},

		{"email_verified as a text", "email", object{"email_verified": "true"}, "alice@example.com"},
		{"in capitals", "email", object{"email_verified": "True"}, "alice@example.com"},
		{"missing", "email", object{"email_verified": nil}, "alice@example.com"},
		{"false as a text", "email", object{"email_verified": "false"}, "!not verified"},
		{"a number", "email", object{"email_verified": 1}, "!not verified"},
		{"null", "email", object{"email_verified": (*int)(nil)}, "!not verified"},
		{"of another claim", "upn", object{"upn": "alice", "email_verified": false}, "alice"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.cfg.UsernameClaim = c.claim
			u, err := f.Validate(t.Context(), f.idp.token(f.claims(c.edit)))
			if why, refused := strings.CutPrefix(c.want, "!"); refused {
				if code(err) != refusal.TokenInvalid || !strings.Contains(err.Error(), why) {
					t.Errorf("got %v, want %q", err, why)
				}
				return
			}
			if err != nil || u.Name != c.want {
				t.Errorf("got %q, %v, want %q", u.Name, err, c.want)
			}
		})
	}
	u := User{claims: nil}
	if got := u.Claims([]string{"a"}); len(got) != 0 {
		t.Errorf("claims of nothing: %v", got)
	}
	f.cfg.UsernameClaim = "email"
	u, err := f.Validate(t.Context(), f.idp.token(f.claims(object{"unix": object{"uid": 4711, "name": "ali"}})))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(u.Claims([]string{"unix.uid", "unix.name", "unix", "none"})); got != "map[unix.name:ali unix.uid:4711]" {
		t.Errorf("claims by path: %s", got)
	}
}

func FuzzClaims(f *testing.F) {
	f.Add([]byte(`{"realm_access":{"roles":["a",1,{"name":"b"}]},"a.b":"x"}`), "realm_access.roles")
	f.Add([]byte(`{"_claim_names":{"groups":"src"},"hasgroups":"true","email_verified":1}`), "groups")
	f.Add([]byte(`{"urn:x":{"a":{},"b":{}}}`), "urn:x")
	f.Fuzz(func(t *testing.T, data []byte, path string) {
		var claims map[string]json.RawMessage
		if json.Unmarshal(data, &claims) != nil {
			return
		}
		groups, problem := readGroups(claims, path)
		if slices.Contains(groups, "") && !strings.Contains(string(data), `""`) {
			t.Errorf("a group of no name: %q", groups)
		}
		u := User{claims: claims, Groups: groups, GroupsProblem: problem}
		for _, name := range u.ClaimNames() {
			if len(name) > 4*maxClaimName || strings.ContainsAny(name, "\x1b\n\u009b\u202e") {
				t.Errorf("name %q", name)
			}
		}
		u.Claims([]string{path})
		u.GroupsNotice(model.OIDC{GroupsClaim: path})
	})
}
