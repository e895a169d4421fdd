package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// The tables are of xrdp 0.10 on Debian 13: with a client, and after it left.
func TestParseDesktops(t *testing.T) {
	d := desktop{uid: "1000", display: 10}
	for name, want := range map[string]bool{"unix-attached": true, "unix-detached": false} {
		f, err := os.Open(filepath.Join("testdata", name))
		must(t, err)
		defer f.Close()
		got, err := parseDesktops(f)
		if attached, there := got[d]; err != nil || len(got) != 1 || !there || attached != want {
			t.Errorf("%s: %v %v, want display 10 of 1000 attached %v", name, got, err, want)
		}
	}
	line := func(state, path string) string {
		return "Num RefCount Protocol Flags Type St Inode Path\n0000: 00000003 00000000 00000000 0001 " + state + " 1 " + path + "\n"
	}
	for _, c := range []struct {
		table string
		want  map[desktop]bool
	}{
		{line("03", "/run/xrdp/sockdir/1001/xrdp_display_11"), map[desktop]bool{{"1001", 11}: true}},
		{line("03", "/var/run/xrdp/sockdir/xrdp_chansrv_socket_12"), map[desktop]bool{{"", 12}: true}},
		// Whoever may bind there is nobody in particular.
		{line("03", "/tmp/.xrdp/xrdp_chansrv_socket_13"), nil},
		{line("03", "/tmp/run/xrdp/sockdir/1001/xrdp_display_11"), nil},
		{line("03", "/run/xrdp/sockdir/1001/xrdpapi_11"), map[desktop]bool{{"1001", 11}: false}},
		{line("03", "/run/xrdp/sockdir/sesman.socket"), nil},
		{line("03", "@/tmp/.X11-unix/X10"), nil},
		{line("03", "/run/xrdp/sockdir/1001/xrdp_display_99999999999999999999"), nil},
		{"Num\n0000: 1 1\n", nil},
	} {
		got, err := parseDesktops(strings.NewReader(c.table))
		if err != nil || fmt.Sprint(got) != fmt.Sprint(c.want) && len(got)+len(c.want) > 0 {
			t.Errorf("%q: %v %v, want %v", c.table, got, err, c.want)
		}
	}
}

func FuzzParseDesktops(f *testing.F) {
	f.Add("00: 3 0 0 1 03 1 /run/xrdp/sockdir/1001/xrdp_display_11\n")
	f.Fuzz(func(t *testing.T, table string) {
		got, _ := parseDesktops(strings.NewReader(table))
		if n := strings.Count(table, "xrdp"); len(got) > n {
			t.Errorf("%d desktops in a table that names xrdp %d times", len(got), n)
		}
	})
}

// story is a ledger with a clock of its own, told in steps.
type story struct {
	t   *testing.T
	l   *ledger
	now time.Time
}

func newStory(t *testing.T, places int32) *story {
	l := newLedger()
	l.configure(bus.HostConfig{MaxSessions: places})
	l.setReady(true, "")
	return &story{t, l, time.Unix(1000, 0)}
}

func (s *story) join(id, user string) {
	s.t.Helper()
	if _, err := s.l.reserve(bus.HostConnect{SessionID: id, User: user}, "h", s.now); err != nil {
		s.t.Fatalf("%s of %s: %v", id, user, err)
	}
	s.l.activate(id, s.now)
}

// see is one look, a second later: 10+ is display 10 with a client, 10- one without.
func (s *story) see(displays string) {
	s.now = s.now.Add(time.Second)
	attached := map[desktop]bool{}
	for _, f := range strings.Fields(displays) {
		var d desktop
		var sign string
		fmt.Sscanf(f, "%d%s", &d.display, &sign)
		d.uid = fmt.Sprint(100000 + d.display)
		attached[d] = sign == "+"
	}
	s.l.observe(s.now, attached)
}

// expect compares what is reported, in any order: user/state, state by its first letter, ? for an assumed one.
func (s *story) expect(what, want string) {
	s.t.Helper()
	left := strings.Fields(want)
	list := s.l.Sessions()
	var got []string
	for _, e := range list {
		text := e.User + "/" + e.State[:1]
		if e.Assumed {
			text += "?"
		}
		got = append(got, strings.TrimPrefix(text, "uid "))
	}
	ok := len(got) == len(left)
	for _, g := range got {
		i := indexOf(left, g)
		if i < 0 {
			ok = false
			break
		}
		left = append(left[:i:i], left[i+1:]...)
	}
	if !ok {
		s.t.Errorf("%s: reported %v, want %s", what, got, want)
	}
}

func indexOf(list []string, s string) int {
	for i, l := range list {
		if l == s {
			return i
		}
	}
	return -1
}

// signsIn makes the story's host one where people log in by their connections, to the accounts that are named: the user id
// of display N is 100000+N.
func (s *story) signsIn(accounts map[string]int) {
	s.l.owner = func(uid uint32) (string, login.Record, bool) {
		for person, display := range accounts {
			if uid == uint32(100000+display) {
				return person, login.Record{Person: person, UID: uid, Resource: "desk", Activity: "last-" + person, Proof: "proof-" + person}, true
			}
		}
		return "", login.Record{}, false
	}
}

// logIn joins a session and logs it in to the account of a display.
func (s *story) logIn(id, user string, display int) {
	s.t.Helper()
	if _, err := s.l.reserve(bus.HostConnect{SessionID: id, User: user, Account: &bus.Account{Name: user}}, "h", s.now); err != nil {
		s.t.Fatalf("%s of %s: %v", id, user, err)
	}
	s.l.activate(id, s.now)
	s.l.loggedIn(id, user, uint32(100000+display))
}

func TestWhoseDesktop(t *testing.T) {
	s := newStory(t, 9)
	s.signsIn(map[string]int{"alice": 10, "bob": 11, "carol": 12, "dan": 13})
	s.logIn("a1", "alice", 10)
	s.expect("joined", "alice/A")
	s.see("10+")
	s.logIn("b1", "bob", 11)
	s.see("10+ 11+")
	s.expect("one by one", "alice/A bob/A")
	s.l.release("a1", s.now)
	s.expect("at once", "alice/D bob/A")
	s.see("10- 11+")
	s.expect("alice left", "alice/D bob/A")
	s.logIn("a2", "alice", 10)
	s.expect("back", "alice/A bob/A")
	s.see("10+ 11+")
	s.l.release("a2", s.now)
	s.see("10- 11+")
	s.expect("and gone again", "alice/D bob/A")
	s.see("11+")
	s.see("11+")
	s.expect("her desktop was ended", "bob/A")

	// Two at one time, and in whatever order the server shows them.
	s.logIn("c1", "carol", 12)
	s.logIn("d1", "dan", 13)
	s.see("11+ 12+ 13+")
	s.expect("two at one time", "bob/A carol/A dan/A")
	s.l.release("c1", s.now)
	s.l.release("d1", s.now)
	s.see("11+ 12- 13-")
	s.expect("both leave", "bob/A carol/D dan/D")
	for _, e := range s.l.Sessions() {
		if e.User == "carol" && (e.Account != "carol" || e.Proof != "proof-carol" || e.Resource != "desk" || e.ActivityID != "last-carol") {
			t.Errorf("carol's desktop is told without what belongs to it: %+v", e)
		}
	}

	// xrdp hands a desktop to a new connection of the same user without a moment between.
	s.logIn("b2", "bob", 11)
	s.l.release("b1", s.now)
	s.see("11+ 12- 13-")
	s.expect("taken over", "bob/A carol/D dan/D")

	// An account of which nobody has logged in by a connection: the machine's own name for it.
	s.see("11+ 12- 13- 14+")
	s.expect("a stranger", "bob/A carol/D dan/D 100014/A")
	s.see("11+ 12- 13- 14-")
	s.expect("who leaves", "bob/A carol/D dan/D 100014/D?")
}

// After a restart the agent knows desktops by their accounts, and whoever comes back stands for theirs while they log in.
func TestDesktopsFromBeforeARestart(t *testing.T) {
	s := newStory(t, 2)
	s.signsIn(map[string]int{"alice": 10, "bob": 11})
	s.see("10- 11-")
	s.expect("found", "alice/D bob/D")
	if _, err := s.l.reserve(bus.HostConnect{SessionID: "c", User: "carol", Account: &bus.Account{Name: "carol"}}, "h", s.now); err == nil || err.Code != refusal.HostFull {
		t.Errorf("carol gets a place that is taken: %v", err)
	}
	if _, err := s.l.reserve(bus.HostConnect{SessionID: "a", User: "alice", Account: &bus.Account{Name: "alice"}}, "h", s.now); err != nil {
		t.Fatal(err)
	}
	s.expect("alice on her way", "alice/P bob/D")
	s.l.activate("a", s.now)
	s.l.loggedIn("a", "alice", 100010)
	s.see("10+ 11-")
	s.expect("alice is back", "alice/A bob/D")
}

// A session that ends before anybody logged in leaves nothing behind.
func TestNobodyLoggedIn(t *testing.T) {
	s := newStory(t, 1)
	s.signsIn(nil)
	if _, err := s.l.reserve(bus.HostConnect{SessionID: "a", User: "alice", Account: &bus.Account{Name: "alice"}}, "h", s.now); err != nil {
		t.Fatal(err)
	}
	s.l.activate("a", s.now)
	s.l.release("a", s.now)
	s.expect("gone", "")
}

// A host and its pool must agree on how people log in: else somebody would meet a login window, or another's desktop.
func TestLoginMustBeAgreed(t *testing.T) {
	s := newStory(t, 1)
	_, err := s.l.reserve(bus.HostConnect{SessionID: "a", User: "alice", Account: &bus.Account{Name: "alice"}}, "h", s.now)
	if err == nil || err.Code != refusal.HostNotReady || !strings.Contains(err.Message, "--login-dir") {
		t.Errorf("a pool with accounts and a host without: %v", err)
	}
	s.signsIn(nil)
	_, err = s.l.reserve(bus.HostConnect{SessionID: "a", User: "alice"}, "h", s.now)
	if err == nil || err.Code != refusal.HostNotReady || !strings.Contains(err.Message, "spec.accounts") {
		t.Errorf("a host with accounts and a pool without: %v", err)
	}
}

// Where the RDP server asks for credentials itself, whose a desktop is isn't known, and nothing is guessed.
func TestNothingIsGuessed(t *testing.T) {
	s := newStory(t, 9)
	s.join("a1", "alice")
	s.see("10+")
	s.expect("she is connected", "alice/A")
	s.l.release("a1", s.now)
	s.see("10-")
	s.expect("she left", "alice/D? 100010/D?")
	if _, refused := s.l.reserve(bus.HostConnect{SessionID: "b1", User: "bob"}, "h", s.now); refused != nil {
		t.Errorf("bob is kept out: %v", refused)
	}
}

// A desktop that is nobody's, as far as is known, keeps nobody out.
func TestOwnerlessDesktopTakesNoPlace(t *testing.T) {
	s := newStory(t, 1)
	s.see("10-")
	s.expect("found at the start", "100010/D?")
	if _, refused := s.l.reserve(bus.HostConnect{SessionID: "a1", User: "alice"}, "h", s.now); refused != nil {
		t.Errorf("alice is kept out: %v", refused)
	}
}

func TestPlacesOfDesktops(t *testing.T) {
	s := newStory(t, 2)
	refused := func(user string, want refusal.Code) {
		t.Helper()
		_, err := s.l.reserve(bus.HostConnect{SessionID: "x", User: user, Account: &bus.Account{Name: user}}, "h", s.now)
		got := refusal.Code("")
		if err != nil {
			got = err.Code
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", user, got, want)
		}
		s.l.release("x", s.now)
	}
	s.signsIn(map[string]int{"alice": 10, "bob": 11})
	s.logIn("a1", "alice", 10)
	s.see("10+")
	s.l.release("a1", s.now)
	s.see("10-")
	s.logIn("b1", "bob", 11)
	s.see("10- 11+")
	s.expect("full with a desktop that nobody sits at", "alice/D bob/A")
	refused("carol", refusal.HostFull)
	refused("alice", "")
	refused("bob", "") // in place of his connection
	s.l.configure(bus.HostConfig{MaxSessions: 2, Draining: true})
	refused("carol", refusal.HostDraining)
	refused("alice", "")
	refused("bob", "")
	if _, err := s.l.reserve(bus.HostConnect{SessionID: "b2", User: "bob", Account: &bus.Account{Name: "bob"}}, "h", s.now); err != nil {
		t.Error(err)
	}
	refused("bob", refusal.HostDraining) // a third at one time replaces nothing
	if places, _, _ := s.l.taken("x"); places != 2 {
		t.Errorf("%d places are taken while one connection replaces another, want 2", places)
	}
}

// Where desktops can't be seen, a user is drawn back for a while, and takes no place meanwhile.
func TestAssumed(t *testing.T) {
	s := newStory(t, 1)
	s.join("a1", "alice")
	s.l.release("a1", s.now)
	s.see("")
	s.expect("left", "alice/D?")
	s.join("b1", "bob")
	s.expect("the place is free", "bob/A alice/D?")
	if _, err := s.l.reserve(bus.HostConnect{SessionID: "a2", User: "alice"}, "h", s.now); err == nil || err.Code != refusal.HostFull {
		t.Errorf("an assumed session took a second place: %v", err)
	}
	s.l.release("b1", s.now)
	s.l.configure(bus.HostConfig{MaxSessions: 1, Draining: true})
	s.join("a3", "alice") // may be her own session's
	s.expect("back", "alice/A bob/D?")
	s.l.release("a3", s.now)
	s.now = s.now.Add(assumeFor)
	s.see("")
	s.expect("long gone", "")
}
