package plan

import (
	"reflect"
	"testing"
	"time"
)

func TestHosts(t *testing.T) {
	idle := func(names ...string) (hosts []Host) {
		for _, n := range names {
			hosts = append(hosts, Host{Name: n, Serving: true})
		}
		return hosts
	}
	drained := func(name string) Host { return Host{Name: name, Serving: true, Retiring: true, Drained: true} }
	names := func(n ...string) []string { return n }
	for name, tc := range map[string]struct {
		want  int32
		hosts []Host
		taken string
		plan  HostChanges
	}{
		"enough":                            {want: 2, hosts: idle("p-0", "p-1")},
		"first":                             {want: 2, plan: HostChanges{Create: names("p-0", "p-1")}},
		"fills the gap":                     {want: 3, hosts: idle("p-0", "p-2"), plan: HostChanges{Create: names("p-1")}},
		"steps over a name of others":       {want: 2, hosts: idle("p-0"), taken: "p-1", plan: HostChanges{Create: names("p-2")}},
		"is drained first":                  {want: 0, hosts: idle("p-0"), plan: HostChanges{Retire: names("p-0"), Waiting: names("p-0")}},
		"goes once it is":                   {want: 0, hosts: []Host{drained("p-0")}, plan: HostChanges{Retire: names("p-0"), Delete: names("p-0")}},
		"not on an old word":                {want: 0, hosts: []Host{{Name: "p-0", Drained: true}}, plan: HostChanges{Retire: names("p-0"), Waiting: names("p-0")}},
		"not with a session that was later": {want: 0, hosts: []Host{{Name: "p-0", Retiring: true, Drained: true, Sessions: 1}}, plan: HostChanges{Retire: names("p-0"), Waiting: names("p-0")}},
		"undone":                            {want: 2, hosts: []Host{drained("p-0"), drained("p-1")}},
		"undone in part":                    {want: 1, hosts: []Host{drained("p-0"), drained("p-1")}, plan: HostChanges{Retire: names("p-1"), Delete: names("p-1")}},
		"youngest goes, by number":          {want: 1, hosts: idle("p-10", "p-9"), plan: HostChanges{Retire: names("p-10"), Waiting: names("p-10")}},
		"one that serves nobody first":      {want: 1, hosts: []Host{{Name: "p-0"}, {Name: "p-1", Serving: true}}, plan: HostChanges{Retire: names("p-0"), Waiting: names("p-0")}},
		"empty goes before busy":            {want: 1, hosts: []Host{{Name: "p-0", Serving: true}, {Name: "p-1", Serving: true, Sessions: 1}}, plan: HostChanges{Retire: names("p-0"), Waiting: names("p-0")}},
		"and even before one told to go":    {want: 1, hosts: []Host{{Name: "p-0", Serving: true}, {Name: "p-1", Retiring: true, Sessions: 1}}, plan: HostChanges{Retire: names("p-0"), Waiting: names("p-0")}},
		"of the busy, one told to go":       {want: 1, hosts: []Host{{Name: "p-0", Sessions: 1}, {Name: "p-1", Retiring: true, Sessions: 2}}, plan: HostChanges{Retire: names("p-1"), Waiting: names("p-1")}},
		"then the emptiest":                 {want: 1, hosts: []Host{{Name: "p-0", Sessions: 1}, {Name: "p-1", Sessions: 2}}, plan: HostChanges{Retire: names("p-0"), Waiting: names("p-0")}},
		"somebody's own stays, and serves":  {want: 0, hosts: []Host{{Name: "p-0", Assigned: true}, {Name: "p-1", Sessions: 9}}, plan: HostChanges{Retire: names("p-1"), Waiting: names("p-0", "p-1")}},
	} {
		t.Run(name, func(t *testing.T) {
			taken := func(n string) bool { return n == tc.taken }
			if got := Hosts("p", tc.want, tc.hosts, taken); !reflect.DeepEqual(got, tc.plan) {
				t.Errorf("got %+v, want %+v", got, tc.plan)
			}
		})
	}
}

func TestDecideToken(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	prefix := TokenPrefix("ns", "pool", "")
	text := TokenText(prefix, [32]byte{1, 2, 3})
	other := TokenText(TokenPrefix("ns", "another", ""), [32]byte{1, 2, 3})
	day := TokenPolicy{Lifetime: 24 * time.Hour, Automatic: true}
	manual := TokenPolicy{Lifetime: 24 * time.Hour}
	seen := func(left time.Duration) Token {
		return Token{Text: text, Hash: HashToken(text), Expires: now.Add(left)}
	}
	for name, tc := range map[string]struct {
		seen   Token
		policy TokenPolicy
		want   TokenDecision
	}{
		"none yet":                  {Token{}, day, TokenDecision{Replace: true, Next: 16 * time.Hour}},
		"young":                     {seen(20 * time.Hour), day, TokenDecision{Next: 12 * time.Hour}},
		"two thirds old":            {seen(8 * time.Hour), day, TokenDecision{Replace: true, Next: 16 * time.Hour}},
		"expired":                   {seen(-time.Hour), day, TokenDecision{Replace: true, Next: 16 * time.Hour}},
		"life shortened":            {seen(100 * time.Hour), day, TokenDecision{Replace: true, Next: 16 * time.Hour}},
		"manual, old":               {seen(time.Hour), manual, TokenDecision{Next: time.Hour}},
		"manual, expired":           {seen(-time.Hour), manual, TokenDecision{Expired: true}},
		"manual, annotated":         {seen(time.Hour), TokenPolicy{Lifetime: 24 * time.Hour, RotateFor: "x"}, TokenDecision{Replace: true, Next: 24 * time.Hour}},
		"secret edited":             {Token{Text: TokenText(prefix, [32]byte{9}), Hash: HashToken(text), Expires: now.Add(20 * time.Hour)}, day, TokenDecision{Replace: true, Next: 16 * time.Hour}},
		"weak token written":        {Token{Text: prefix + "abc", Hash: HashToken(prefix + "abc"), Expires: now.Add(20 * time.Hour)}, day, TokenDecision{Replace: true, Next: 16 * time.Hour}},
		"token of another pool":     {Token{Text: other, Hash: HashToken(other), Expires: now.Add(20 * time.Hour)}, day, TokenDecision{Replace: true, Next: 16 * time.Hour}},
		"annotation already served": {Token{Text: text, Hash: HashToken(text), Expires: now.Add(20 * time.Hour), MadeFor: "x"}, TokenPolicy{Lifetime: 24 * time.Hour, Automatic: true, RotateFor: "x"}, TokenDecision{Next: 12 * time.Hour}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := DecideToken(tc.seen, prefix, tc.policy, now); got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestTokenText(t *testing.T) {
	text := TokenText(TokenPrefix("ns", "pool", "host"), [32]byte{})
	if want := "rdvreg.ns.pool.host.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"; text != want {
		t.Errorf("got %q, want %q", text, want)
	}
}

func TestWantHostToken(t *testing.T) {
	for name, tc := range map[string]struct {
		seen      Token
		rotateFor string
		spentBy   string
		want      bool
	}{
		"never enrolled":                  {want: true},
		"enrolled with its own":           {seen: Token{Hash: "a"}, spentBy: "a"},
		"enrolled with the pool's":        {seen: Token{Hash: "a"}, spentBy: "b"},
		"asked for anew":                  {seen: Token{Hash: "a"}, spentBy: "a", rotateFor: "x", want: true},
		"made anew, not used yet":         {seen: Token{Hash: "c", MadeFor: "x"}, spentBy: "a", rotateFor: "x", want: true},
		"made anew and used":              {seen: Token{Hash: "c", MadeFor: "x"}, spentBy: "c", rotateFor: "x"},
		"annotation removed, none wanted": {seen: Token{Hash: "c", MadeFor: "x"}, spentBy: "a"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := WantHostToken(tc.seen, tc.rotateFor, tc.spentBy); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

func TestDecidePod(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	long := now.Add(-time.Hour)
	for name, tc := range map[string]struct {
		seen     Pod
		sessions int32
		want     PodDecision
	}{
		"missing":                    {Pod{}, 0, PodDecision{Action: PodCreate}},
		"missing, though reported":   {Pod{}, 3, PodDecision{Action: PodCreate}},
		"as wanted":                  {Pod{Exists: true, Created: long, Hash: "new"}, 0, PodDecision{Action: PodKeep}},
		"outdated and empty":         {Pod{Exists: true, Created: long, Hash: "old"}, 0, PodDecision{Action: PodDelete}},
		"outdated and in use":        {Pod{Exists: true, Created: long, Hash: "old"}, 1, PodDecision{Action: PodWait}},
		"on its way out":             {Pod{Exists: true, Created: long, Hash: "old", Terminating: true}, 0, PodDecision{Action: PodWait}},
		"evicted":                    {Pod{Exists: true, Created: long, Hash: "new", Finished: true}, 1, PodDecision{Action: PodDelete}},
		"failed as soon as it began": {Pod{Exists: true, Created: now.Add(-5 * time.Second), Hash: "new", Finished: true}, 0, PodDecision{Action: PodWait, Next: 10 * time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := DecidePod(tc.seen, "new", tc.sessions, now); got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestReplaceAtOnce(t *testing.T) {
	for hosts, want := range map[int]int{0: 1, 1: 1, 4: 1, 7: 1, 8: 2, 100: 25} {
		if got := ReplaceAtOnce(hosts); got != want {
			t.Errorf("of %d hosts: got %d, want %d", hosts, got, want)
		}
	}
}
