package placement

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var (
	pooled   = Pool{Name: "p", MaxSessions: 2}
	depth    = Pool{Name: "p", MaxSessions: 2, DepthFirst: true}
	auto     = Pool{Name: "p", MaxSessions: 1, Personal: true, Automatic: true}
	direct   = Pool{Name: "p", MaxSessions: 1, Personal: true}
	sessions = func(users ...string) (s []Session) {
		for _, u := range users {
			name, away := strings.CutSuffix(u, "-away")
			s = append(s, Session{User: name, Disconnected: away})
		}
		return s
	}
)

// host makes a healthy host; edit changes it.
func host(name string, edit ...func(*Host)) Host {
	h := Host{Name: name, Connected: true, Ready: true}
	for _, e := range edit {
		e(&h)
	}
	return h
}

func with(users ...string) func(*Host)    { return func(h *Host) { h.Sessions = sessions(users...) } }
func promise(users ...string) func(*Host) { return func(h *Host) { h.Reserved = sessions(users...) } }
func of(user string) func(*Host)          { return func(h *Host) { h.AssignedUser = user } }
func off(h *Host)                         { h.Connected = false }
func broken(h *Host)                      { h.Ready, h.Message = false, "connection refused" }
func drain(h *Host)                       { h.Draining, h.DrainReason = true, "new image" }

func TestPlace(t *testing.T) {
	for _, c := range []struct {
		name  string
		pool  Pool
		hosts []Host
		want  string // space-separated; + resumes, = assigns
		why   string
	}{
		{"nobody there", pooled, nil, "", "the pool has no hosts"},
		{"breadth first", pooled, []Host{host("a", with("x")), host("b"), host("c")}, "b c a", ""},
		{"depth first", depth, []Host{host("a"), host("b", with("x")), host("c")}, "b a c", ""},
		{"a full host is out", depth, []Host{host("a", with("x", "y")), host("b")}, "b", "2 hosts: 1 full"},
		{"promises count", pooled, []Host{host("a", promise("x")), host("b")}, "b a", ""},
		{"a host full of promises comes last", depth, []Host{host("a", with("x"), promise("y")), host("b")}, "b a", ""},
		{"one's own disconnected session first", pooled, []Host{host("a"), host("b", with("u", "x")), host("c", with("u-away", "x"))}, "c+ b+ a", ""},
		{"one's own session on a draining, full host", pooled, []Host{host("a"), host("b", with("u-away", "x"), drain)}, "b+ a", ""},
		{"but not on a broken one", pooled, []Host{host("a"), host("b", with("u-away"), broken)}, "a", "2 hosts: 1 not ready (connection refused)"},
		{"drain, health and presence are respected", pooled, []Host{host("a", drain), host("b", off), host("c", broken), host("d", with("x", "y"))}, "",
			"4 hosts: 1 not connected, 1 not ready (connection refused), 1 draining (new image), 1 full"},
		{"automatic: one's own", auto, []Host{host("a"), host("b", of("u"))}, "b", ""},
		{"automatic: one's own lasts while it is away", auto, []Host{host("a"), host("b", of("u"), off)}, "", "2 hosts: 1 not connected, 1 not assigned to anybody"},
		{"automatic: the first free", auto, []Host{host("c"), host("b", of("x")), host("a", off)}, "c=", "3 hosts: 1 not connected, 1 assigned to other users"},
		{"direct: one's own", direct, []Host{host("a"), host("b", of("u"))}, "b", ""},
		{"direct: none", direct, []Host{host("a"), host("b", of("x"))}, "", "2 hosts: 1 assigned to other users, 1 not assigned to anybody"},
		{"personal: somebody else sits there", direct, []Host{host("b", of("u"), with("x"))}, "", "1 host: 1 full"},
		{"personal: one's own session", direct, []Host{host("b", of("u"), with("u"))}, "b+", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, why := Place(c.pool, c.hosts, "u")
			var names []string
			for _, g := range got {
				n := g.Host
				if g.Resume {
					n += "+"
				}
				if g.Assign {
					n += "="
				}
				names = append(names, n)
			}
			if s := strings.Join(names, " "); s != c.want {
				t.Errorf("got %q, want %q", s, c.want)
			}
			if c.why != "" && !strings.HasPrefix(why.String(), c.why) {
				t.Errorf("why: got %q, want %q", why, c.why)
			}
		})
	}
}

func randomWorld(r *rand.Rand) (Pool, []Host, string) {
	users := []string{"u", "v", "w", "x"}
	pool := Pool{Name: "p", Personal: r.IntN(2) == 0, Automatic: r.IntN(2) == 0, DepthFirst: r.IntN(2) == 0, MaxSessions: 1 + r.Int32N(3)}
	some := func() (s []Session) {
		for range r.IntN(4) {
			s = append(s, Session{User: users[r.IntN(len(users))], Disconnected: r.IntN(2) == 0})
		}
		return s
	}
	hosts := make([]Host, r.IntN(8))
	for i := range hosts {
		hosts[i] = Host{
			Name: fmt.Sprintf("h%d", i), Connected: r.IntN(5) > 0, Ready: r.IntN(5) > 0, Draining: r.IntN(4) == 0,
			Sessions: some(), Reserved: some(),
		}
		if r.IntN(2) == 0 {
			hosts[i].AssignedUser = users[r.IntN(len(users))]
		}
	}
	return pool, hosts, users[r.IntN(len(users))]
}

// Rules that hold in every world.
func TestProperties(t *testing.T) {
	for seed := range uint64(20000) {
		r := rand.New(rand.NewPCG(seed, 1))
		pool, hosts, user := randomWorld(r)
		got, why := Place(pool, hosts, user)

		if len(got)+len(why.reasons) != len(hosts) {
			t.Fatalf("seed %d: %d candidates and %d reasons for %d hosts", seed, len(got), len(why.reasons), len(hosts))
		}
		shuffled := slices.Clone(hosts)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again, _ := Place(pool, shuffled, user); !reflect.DeepEqual(again, got) {
			t.Fatalf("seed %d: the order of the hosts changed the answer", seed)
		}
		byName := map[string]Host{}
		for _, h := range hosts {
			byName[h.Name] = h
		}
		resumed := true
		for i, c := range got {
			h := byName[c.Host]
			mine, _ := h.sessionOf(user)
			switch {
			case !h.Connected || !h.Ready:
				t.Fatalf("seed %d: %s can't serve", seed, h.Name)
			case c.Resume != mine:
				t.Fatalf("seed %d: %s resumes %v, has the user's session %v", seed, h.Name, c.Resume, mine)
			case !mine && h.Draining:
				t.Fatalf("seed %d: a new session on draining %s", seed, h.Name)
			case !mine && len(h.Sessions) >= int(pool.MaxSessions):
				t.Fatalf("seed %d: a new session on full %s", seed, h.Name)
			case pool.Personal && h.AssignedUser != user && !(c.Assign && h.AssignedUser == "" && pool.Automatic):
				t.Fatalf("seed %d: %s is not the user's", seed, h.Name)
			case c.Resume && !resumed:
				t.Fatalf("seed %d: one's own session on %s comes after another host", seed, h.Name)
			case i > 0 && got[i-1].Host == c.Host:
				t.Fatalf("seed %d: %s twice", seed, h.Name)
			}
			resumed = resumed && c.Resume
		}
	}
}

// Whoever asks hosts one by one, each with the last word, fills a pool to its last place and no further.
func TestFillsExactly(t *testing.T) {
	for _, pool := range []Pool{{Name: "p", MaxSessions: 3}, {Name: "p", MaxSessions: 3, DepthFirst: true}} {
		hosts := make([]Host, 5)
		for i := range hosts {
			hosts[i] = host(fmt.Sprint("h", i))
		}
		spread := 0
		for n := range 16 {
			got, _ := Place(pool, hosts, fmt.Sprint("user", n))
			if (len(got) > 0) != (n < 15) {
				t.Fatalf("session %d: %d candidates", n, len(got))
			}
			if len(got) == 0 {
				break
			}
			i := slices.IndexFunc(hosts, func(h Host) bool { return h.Name == got[0].Host })
			hosts[i].Sessions = append(hosts[i].Sessions, Session{User: fmt.Sprint("user", n)})
			most, least := 0, 3
			for _, h := range hosts {
				most, least = max(most, len(h.Sessions)), min(least, len(h.Sessions))
			}
			spread = max(spread, most-least)
		}
		if want := map[bool]int{false: 1, true: 3}[pool.DepthFirst]; spread != want {
			t.Errorf("depthFirst %v: greatest difference between hosts %d, want %d", pool.DepthFirst, spread, want)
		}
	}
}

func BenchmarkPlace(b *testing.B) {
	hosts := make([]Host, 10000)
	for i := range hosts {
		hosts[i] = host(fmt.Sprintf("h%05d", i), with(slices.Repeat([]string{"x"}, i%16)...))
	}
	for b.Loop() {
		if got, _ := Place(Pool{Name: "p", MaxSessions: 16}, hosts, "u"); len(got) != len(hosts) {
			b.Fatal(len(got))
		}
	}
}
