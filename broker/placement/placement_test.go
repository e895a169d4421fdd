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
			name, gone := strings.CutSuffix(name, "-gone")
			name, sent := strings.CutSuffix(name, "-sent")
			name, claimed := strings.CutSuffix(name, "-claimed") // by the host alone
			if claimed {
				name = ""
			}
			s = append(s, Session{User: name, Sent: sent, Disconnected: away || gone, Assumed: gone})
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

// all gives the candidates in the order in which they would be asked, and why the others were out from the start.
func all(pool Pool, hosts []Host, user string) (list []Candidate, why Why) {
	asked := map[string]bool{}
	for {
		c, found, now := Best(pool, slices.Values(hosts), user, func(h string) bool { return asked[h] })
		if len(list) == 0 {
			why = now
		}
		if !found {
			return list, why
		}
		list, asked[c.Host] = append(list, c), true
	}
}

func TestBest(t *testing.T) {
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
		{"an assumed session takes no place", pooled, []Host{host("a", with("x", "y-gone")), host("b", with("x", "y"))}, "a", "2 hosts: 1 full"},
		{"an assumed session draws its user back", pooled, []Host{host("a"), host("b", with("x", "u-gone"), drain)}, "b+ a", ""},
		{"a claimed session takes a place and draws nobody", pooled, []Host{host("a", with("x")), host("b", with("u-claimed-away")), host("c", with("u-claimed-away", "x"))}, "a b", "3 hosts: 1 full"},
		{"also where it is assumed, on a draining host", pooled, []Host{host("a", with("x")), host("b", with("u-claimed-gone"), drain)}, "a", "2 hosts: 1 draining (new image)"},
		{"automatic: a session gives no right to a host of nobody", auto, []Host{host("a", with("x-gone")), host("b", with("u-away")), host("c", with("u-gone"))}, "a= c=", "3 hosts: 1 full"},
		{"automatic: nor a claimed one", auto, []Host{host("a"), host("b", with("u-claimed-gone"))}, "a= b=", ""},
		{"automatic: the assignment is on its way", auto, []Host{host("a"), host("b", with("u-sent"))}, "b+= a=", ""},
		{"automatic: so it is while a broker asks the host", auto, []Host{host("a"), host("b", promise("u-sent"))}, "b+= a=", ""},
		{"personal: one's own session", direct, []Host{host("b", of("u"), with("u"))}, "b+", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, why := all(c.pool, c.hosts, "u")
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
			if c.why != "" && why.String() != c.why {
				t.Errorf("why: got %q, want %q", why.String(), c.why)
			}
		})
	}
}

func randomWorld(r *rand.Rand) (Pool, []Host, string) {
	users := []string{"u", "v", "w", "x"}
	claimed := []string{"u", "v", ""}
	pool := Pool{Name: "p", Personal: r.IntN(2) == 0, Automatic: r.IntN(2) == 0, DepthFirst: r.IntN(2) == 0, MaxSessions: 1 + r.Int32N(3)}
	some := func() (s []Session) {
		for range r.IntN(4) {
			s = append(s, Session{User: claimed[r.IntN(len(claimed))], Sent: r.IntN(3) == 0, Disconnected: r.IntN(2) == 0, Assumed: r.IntN(5) == 0})
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

// Rules that hold in every world, each written down anew here.
func TestProperties(t *testing.T) {
	for seed := range uint64(20000) {
		r := rand.New(rand.NewPCG(seed, 1))
		pool, hosts, user := randomWorld(r)
		got, why := all(pool, hosts, user)

		out := 0
		for _, n := range why.counts {
			out += n
		}
		if len(got)+out != len(hosts) || why.Hosts != len(hosts) {
			t.Fatalf("seed %d: %d candidates and %d reasons for %d hosts", seed, len(got), out, len(hosts))
		}
		shuffled := slices.Clone(hosts)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		again, whyAgain := all(pool, shuffled, user)
		if !reflect.DeepEqual(again, got) || whyAgain.String() != why.String() {
			t.Fatalf("seed %d: the order of the hosts changed the answer", seed)
		}
		byName := map[string]Host{}
		owns := false
		for _, h := range hosts {
			byName[h.Name] = h
			owns = owns || h.AssignedUser == user
		}
		var last Candidate
		for i, c := range got {
			h := byName[c.Host]
			reported, _, mine, _ := h.look(user, c.Assign)
			switch {
			case !h.Connected || !h.Ready:
				t.Fatalf("seed %d: %s can't serve", seed, h.Name)
			case c.Resume != mine:
				t.Fatalf("seed %d: %s resumes %v, has the user's session %v", seed, h.Name, c.Resume, mine)
			case !mine && h.Draining:
				t.Fatalf("seed %d: a new session on draining %s", seed, h.Name)
			case !mine && reported >= int(pool.MaxSessions):
				t.Fatalf("seed %d: a new session on full %s", seed, h.Name)
			case pool.Personal && c.Assign != (h.AssignedUser == "") || !pool.Personal && c.Assign:
				t.Fatalf("seed %d: %s, assigned to %q: assign %v", seed, h.Name, h.AssignedUser, c.Assign)
			case pool.Personal && h.AssignedUser != user && (owns || h.AssignedUser != "" || !pool.Automatic):
				t.Fatalf("seed %d: %s is not the user's", seed, h.Name)
			case i > 0 && !inOrder(pool, byName[last.Host], h, user):
				t.Fatalf("seed %d: %s comes after %s", seed, h.Name, last.Host)
			}
			last = c
		}
	}
}

// inOrder says whether a may be asked before b; both are candidates.
func inOrder(pool Pool, a, b Host, user string) bool {
	assign := pool.Personal && a.AssignedUser == "" // then b is nobody's, too
	_, takenA, mineA, awayA := a.look(user, assign)
	_, takenB, mineB, awayB := b.look(user, assign)
	limit := int(pool.MaxSessions)
	switch {
	case mineA != mineB:
		return mineA
	case mineA && awayA != awayB:
		return awayA
	case mineA:
		return a.Name < b.Name
	case (takenA < limit) != (takenB < limit):
		return takenA < limit
	case takenA != takenB && pool.DepthFirst && !pool.Personal && takenA < limit:
		return takenA > takenB
	case takenA != takenB:
		return takenA < takenB
	}
	return a.Name < b.Name
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
			got, found, _ := Best(pool, slices.Values(hosts), fmt.Sprint("user", n), nil)
			if found != (n < 15) {
				t.Fatalf("session %d: found %v", n, found)
			}
			if !found {
				break
			}
			i := slices.IndexFunc(hosts, func(h Host) bool { return h.Name == got.Host })
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

// A decision over a great pool costs one pass and no memory.
func BenchmarkBest(b *testing.B) {
	for _, n := range []int{100, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			hosts := make([]Host, n)
			for i := range hosts {
				hosts[i] = host(fmt.Sprintf("h%05d", i), with(slices.Repeat([]string{"x"}, 1+i%15)...))
			}
			b.ReportAllocs()
			for b.Loop() {
				if got, _, _ := Best(Pool{Name: "p", MaxSessions: 16}, slices.Values(hosts), "u", nil); got.Host != "h00000" {
					b.Fatal(got)
				}
			}
		})
	}
}

func TestBestKeepsNothing(t *testing.T) {
	hosts := make([]Host, 1000)
	for i := range hosts {
		hosts[i] = host(fmt.Sprintf("h%03d", i), with("x"))
	}
	if n := testing.AllocsPerRun(10, func() { Best(pooled, slices.Values(hosts), "u", nil) }); n > 10 {
		t.Errorf("%v allocations for %d hosts", n, len(hosts))
	}
}
