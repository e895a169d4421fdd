package oidc

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"rendezvous.dev/rendezvous/broker/model"
)

// This file reads claims out of a token. What a claim may look like is decided here, and in the comments of the
// Workspace's spec.identity.oidc:
//
//	a name        the claim of that very name, dots and slashes in it included; where there is none, a path of names with
//	              dots between them: realm_access.roles
//	the groups    a list of texts or whole numbers, or of objects that have a name; one text, which is one group whatever is
//	              in it; an object of objects, whose keys are the groups (Zitadel)
//
// A text is never cut at commas or blanks: people may name groups of their own, and one named "x,admins" must not become
// two.

const (
	// maxClaimNames bounds the names that Says tells, and maxClaimName the length of each, in bytes.
	maxClaimNames = 32
	maxClaimName  = 128
	// maxDepth bounds how deep into objects names are told.
	maxDepth = 3
)

// Why the groups of a token can't be read, as metrics have it.
const (
	GroupsAbsent     = "absent"     // the token has no such claim: the user has no groups, or the claim is another
	GroupsElsewhere  = "elsewhere"  // there are too many for the token, or they are to be asked for
	GroupsUnreadable = "unreadable" // the claim's form isn't known
)

// find gives a claim by its name or path, nil where there is none. Of several readings of a path the one with the longest
// names counts.
func find(claims map[string]json.RawMessage, path string) json.RawMessage {
	if raw, ok := claims[path]; ok {
		return raw
	}
	for i := strings.LastIndexByte(path, '.'); i > 0; i = strings.LastIndexByte(path[:i], '.') {
		var inner map[string]json.RawMessage
		if raw, ok := claims[path[:i]]; ok && json.Unmarshal(raw, &inner) == nil {
			if raw := find(inner, path[i+1:]); raw != nil {
				return raw
			}
		}
	}
	return nil
}

// readGroups reads the claim that lists a user's groups. problem is why it can't, or not all of it; empty where it can.
func readGroups(claims map[string]json.RawMessage, path string) (groups []string, problem string) {
	raw := find(claims, path)
	if raw == nil || string(raw) == "null" {
		if elsewhere(claims, path) {
			return nil, GroupsElsewhere
		}
		return nil, GroupsAbsent
	}
	var list []json.RawMessage
	var keys map[string]map[string]json.RawMessage
	switch {
	case json.Unmarshal(raw, &list) == nil:
	case json.Unmarshal(raw, &keys) == nil && len(keys) > 0:
		return slices.Sorted(maps.Keys(keys)), ""
	default:
		list = []json.RawMessage{raw}
	}
	for _, item := range list {
		g := oneGroup(item, raw[0] == '[')
		if g == "" {
			problem = GroupsUnreadable
			continue
		}
		groups = append(groups, g)
	}
	return groups, problem
}

// oneGroup reads one group, empty where its form isn't known. Only in a list it may be a number or an object.
func oneGroup(raw json.RawMessage, listed bool) string {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return text
	}
	if !listed {
		return ""
	}
	var object struct {
		Name string `json:"name"`
	}
	if json.Unmarshal(raw, &object) == nil {
		return object.Name
	}
	return wholeNumber(raw)
}

// wholeNumber gives a number as it is written, empty where it has a fraction or is none.
func wholeNumber(raw json.RawMessage) string {
	var number json.Number
	if json.Unmarshal(raw, &number) != nil {
		return ""
	}
	if _, err := number.Int64(); err != nil {
		return ""
	}
	return number.String()
}

// elsewhere says whether a token points elsewhere for a claim (OpenID Connect Core 1.0, section 5.6.2), or, as one of the
// implicit flow of Entra ID, that there are groups too many for it.
func elsewhere(claims map[string]json.RawMessage, claim string) bool {
	var names map[string]json.RawMessage
	if json.Unmarshal(claims["_claim_names"], &names) == nil {
		if _, ok := names[claim]; ok {
			return true
		}
	}
	return isTrue(claims["hasgroups"])
}

// isTrue reads a boolean; some providers write it as a text.
func isTrue(raw json.RawMessage) bool {
	var yes bool
	var text string
	return json.Unmarshal(raw, &yes) == nil && yes || json.Unmarshal(raw, &text) == nil && strings.EqualFold(text, "true")
}

// ClaimNames tells which claims the token has, as paths, sorted; no values.
func (u User) ClaimNames() []string {
	var names []string
	var walk func(claims map[string]json.RawMessage, prefix string, depth int)
	walk = func(claims map[string]json.RawMessage, prefix string, depth int) {
		for name, raw := range claims {
			var inner map[string]json.RawMessage
			if depth < maxDepth && json.Unmarshal(raw, &inner) == nil && len(inner) > 0 {
				walk(inner, prefix+name+".", depth+1)
				continue
			}
			names = append(names, printable(prefix+name))
		}
	}
	walk(u.claims, "", 1)
	slices.Sort(names)
	if len(names) > maxClaimNames {
		names = append(names[:maxClaimNames], "…")
	}
	return names
}

func printable(name string) string {
	name = strings.ToValidUTF8(name[:min(len(name), maxClaimName)], "")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, name)
}

// GroupsNotice tells a person why the token gives no groups, or not all, and which claims it has; empty where it gives them.
func (u User) GroupsNotice(cfg model.OIDC) string {
	why := ""
	switch u.GroupsProblem {
	case GroupsAbsent:
		why = fmt.Sprintf("has no claim %q, from which this workspace takes groups (some providers leave it out for people without groups)", cfg.GroupsClaim)
	case GroupsElsewhere:
		why = fmt.Sprintf("leaves the groups out because there are too many for it, and says to ask elsewhere, which this workspace does not do: an administrator can have the provider send only the groups that this application needs, or other names (Entra ID: groups assigned to the application, or app roles with groupsClaim %q)", "roles")
	case GroupsUnreadable:
		why = fmt.Sprintf("has a claim %q, from which this workspace takes groups, in a form that it can't read", cfg.GroupsClaim)
	default:
		return ""
	}
	have := "you have no groups"
	if len(u.Groups) > 0 {
		have = "only some of your groups are known"
	}
	return fmt.Sprintf("In this workspace %s: your token %s. Claims in it: %s.", have, why, cmp.Or(strings.Join(u.ClaimNames(), ", "), "none"))
}
