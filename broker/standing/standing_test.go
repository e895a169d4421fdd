package standing

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

var noon = time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)

func at(minutes int) time.Time { return noon.Add(time.Duration(minutes) * time.Minute) }

func TestStanding(t *testing.T) {
	for name, c := range map[string]struct {
		learned []Record
		since   time.Time
		groups  []string
		want    []string
	}{
		"nothing is known":             {nil, at(0), []string{"a", "b"}, []string{"a", "b"}},
		"a newer token lacks one":      {[]Record{NewRecord("alice", at(1), []string{"b", "c"})}, at(0), []string{"a", "b"}, []string{"b"}},
		"a newer token lacks all":      {[]Record{NewRecord("alice", at(1), nil)}, at(0), []string{"a", "b"}, nil},
		"an older token lacks one":     {[]Record{NewRecord("alice", at(-1), []string{"b"})}, at(0), []string{"a", "b"}, []string{"a", "b"}},
		"the same token":               {[]Record{NewRecord("alice", at(0), []string{"a", "b"})}, at(0), []string{"a", "b"}, []string{"a", "b"}},
		"somebody else's newer token":  {[]Record{NewRecord("bob", at(1), nil)}, at(0), []string{"a", "b"}, []string{"a", "b"}},
		"the newest counts":            {[]Record{NewRecord("alice", at(2), []string{"a"}), NewRecord("alice", at(1), []string{"b"})}, at(0), []string{"a", "b"}, []string{"a"}},
		"a group that came back":       {[]Record{NewRecord("alice", at(1), nil), NewRecord("alice", at(2), []string{"a"})}, at(0), []string{"a"}, []string{"a"}},
		"two of one second, one order": {[]Record{NewRecord("alice", at(1), []string{"a"}), NewRecord("alice", at(1), []string{"a", "b"})}, at(0), []string{"a", "b"}, []string{"a"}},
		"and the other":                {[]Record{NewRecord("alice", at(1), []string{"a", "b"}), NewRecord("alice", at(1), []string{"a"})}, at(0), []string{"a", "b"}, []string{"a"}},
		"a token without a time":       {[]Record{NewRecord("alice", time.Time{}, nil)}, time.Time{}, []string{"a"}, []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			tab := New(func() time.Time { return noon })
			for _, r := range c.learned {
				tab.Learn(r)
			}
			given := slices.Clone(c.groups)
			if got := tab.Standing("alice", c.since, given); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if !slices.Equal(given, c.groups) {
				t.Error("the caller's groups were changed")
			}
		})
	}
}

func TestIn(t *testing.T) {
	for name, c := range map[string]struct {
		learned []Record
		of      []string // what grants
		want    bool
	}{
		"by the ticket alone":                  {nil, []string{"a"}, true},
		"not by the ticket alone":              {nil, []string{"b"}, false},
		"by the token of the ticket":           {[]Record{NewRecord("alice", at(0), []string{"a", "b"})}, []string{"b"}, true},
		"lost since":                           {[]Record{NewRecord("alice", at(1), []string{"b"})}, []string{"a"}, false},
		"lost since, but in another":           {[]Record{NewRecord("alice", at(1), []string{"b"})}, []string{"a", "b"}, true},
		"an older token says nothing":          {[]Record{NewRecord("alice", at(-1), []string{"b"})}, []string{"b"}, false},
		"an older token takes nothing away":    {[]Record{NewRecord("alice", at(-1), nil)}, []string{"a"}, true},
		"somebody else's token is of no help":  {[]Record{NewRecord("bob", at(1), []string{"b"})}, []string{"b"}, false},
		"no group grants":                      {[]Record{NewRecord("alice", at(1), []string{"a"})}, nil, false},
		"another broker's word, out of order":  {[]Record{{User: "alice", SignedIn: at(1), Groups: append(slices.Clone(second), first...)}}, []string{"a", "b"}, true},
		"another broker's word, cut in pieces": {[]Record{{User: "alice", SignedIn: at(1), Groups: first[:5]}}, []string{"a"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			tab := New(func() time.Time { return noon })
			for _, r := range c.learned {
				tab.Learn(r)
			}
			if got := tab.In(c.of, "alice", at(0), []string{"a"}); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// first and second are the hashes of groups a and b in their order.
var first, second = func() (a, b []byte) {
	r := NewRecord("", noon, []string{"a", "b"})
	return r.Groups[:hashSize], r.Groups[hashSize:]
}()

func TestLearnSaysWhatIsNews(t *testing.T) {
	tab := New(func() time.Time { return noon })
	for _, c := range []struct {
		r    Record
		news bool
	}{
		{NewRecord("alice", at(1), []string{"a", "b"}), true},
		{NewRecord("alice", at(1), []string{"b", "a", "a"}), false},
		{NewRecord("alice", at(0), nil), false},
		{NewRecord("alice", at(1), []string{"b"}), true},
		{NewRecord("alice", at(2), []string{"a", "b"}), true},
		{NewRecord("", at(2), nil), false},
	} {
		if got := tab.Learn(c.r); got != c.news {
			t.Errorf("%+v is news: %v, want %v", c.r, got, c.news)
		}
	}
}

func TestMemoryIsBounded(t *testing.T) {
	now := noon
	tab := New(func() time.Time { return now })
	for i := range MaxUsers + 10 {
		now = now.Add(time.Second)
		tab.Learn(NewRecord(fmt.Sprint("user", i), at(0), nil))
	}
	if n := len(tab.All()); n != MaxUsers {
		t.Errorf("%d users are remembered, want %d", n, MaxUsers)
	}
	if got := tab.Standing("user0", at(-1), []string{"a"}); len(got) != 1 {
		t.Error("whoever was heard of longest ago is remembered in place of the newest")
	}
	if got := tab.Standing(fmt.Sprint("user", MaxUsers+9), at(-1), []string{"a"}); len(got) != 0 {
		t.Error("the newest is not remembered")
	}
	now = now.Add(Life + time.Second)
	tab.Prune()
	if n := len(tab.All()); n != 0 {
		t.Errorf("%d users are remembered for good", n)
	}

	tab.most = 1 << 10
	var groups []string
	for i := range 20 {
		groups = append(groups, fmt.Sprint("group", i))
	}
	for i := range 5 {
		now = now.Add(time.Second)
		tab.Learn(NewRecord(fmt.Sprint("user", i), now, groups))
		size := 0
		for _, r := range tab.All() {
			size += len(r.Groups)
		}
		if size > tab.most || size != tab.size || len(tab.All()) == 0 {
			t.Fatalf("%d bytes of groups are remembered, counted as %d", size, tab.size)
		}
	}
}
