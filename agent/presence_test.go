package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
		{line("03", "/tmp/.xrdp/xrdp_chansrv_socket_13"), map[desktop]bool{{"", 13}: true}},
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

func TestWhoseDesktop(t *testing.T) {
	s := newStory(t, 9)
	s.join("a1", "alice")
	s.expect("joined", "alice/A")
	s.see("10+")
	s.join("b1", "bob")
	s.see("10+")
	s.see("10+ 11+")
	s.expect("one by one", "alice/A bob/A")
	s.l.release("a1", s.now)
	s.expect("at once", "alice/D bob/A")
	s.see("10- 11+")
	s.expect("alice left", "alice/D bob/A")
	s.join("a2", "alice")
	s.expect("on her way back", "alice/A bob/A")
	s.see("10+ 11+")
	s.l.release("a2", s.now)
	s.see("10- 11+")
	s.expect("and gone again", "alice/D bob/A")
	s.see("11+")
	s.see("11+")
	s.expect("her desktop was ended", "bob/A")

	// Two at one time: nothing is guessed until one is known, and nothing is counted twice.
	s.join("c1", "carol")
	s.join("d1", "dan")
	s.see("11+ 12+ 13+")
	s.expect("two at one time", "bob/A carol/A dan/A")
	s.l.release("c1", s.now)
	s.see("11+ 12- 13+")
	s.expect("one of them leaves", "bob/A carol/D dan/A")
	s.l.release("d1", s.now)
	s.see("11+ 12- 13-")
	s.expect("and the other", "bob/A carol/D dan/D")

	// A desktop of somebody who didn't come through here is told by the machine's own name for that person.
	s.see("11+ 12- 13- 14+")
	s.expect("a stranger", "bob/A carol/D dan/D 100014/A")
	s.see("11+ 12- 13- 14-")
	s.expect("who leaves", "bob/A carol/D dan/D 100014/D?")

	// xrdp hands a desktop to a new connection of the same user without a moment between.
	s.join("b2", "bob")
	s.l.release("b1", s.now)
	s.see("11+ 12- 13- 14-")
	s.expect("taken over", "bob/A carol/D dan/D 100014/D?")
	s.l.release("b2", s.now)
	s.see("11- 12- 13- 14-")
	s.expect("left behind", "bob/D carol/D dan/D 100014/D?")
}

// Where two leave desktops that nobody could tell apart, they are told by the machine's own names.
func TestNothingIsGuessed(t *testing.T) {
	s := newStory(t, 9)
	s.join("a1", "alice")
	s.join("b1", "bob")
	s.see("10+ 11+")
	s.l.release("a1", s.now)
	s.l.release("b1", s.now)
	s.see("10- 11-")
	s.expect("both left", "100010/D? 100011/D?")
}

// A user may come and go between two looks: the desktop that is then found is theirs, where only one has left.
func TestBetweenTwoLooks(t *testing.T) {
	s := newStory(t, 1)
	s.join("a1", "alice")
	s.l.release("a1", s.now)
	s.see("10-")
	s.expect("alice's first desktop", "alice/D")
	if _, refused := s.l.reserve(bus.HostConnect{SessionID: "a2", User: "alice"}, "h", s.now); refused != nil {
		t.Errorf("alice does not get back to it: %v", refused)
	}
	if _, refused := s.l.reserve(bus.HostConnect{SessionID: "b1", User: "bob"}, "h", s.now); refused == nil || refused.Code != refusal.HostFull {
		t.Errorf("bob gets alice's place: %v", refused)
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
		_, err := s.l.reserve(bus.HostConnect{SessionID: "x", User: user}, "h", s.now)
		got := refusal.Code("")
		if err != nil {
			got = err.Code
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", user, got, want)
		}
		s.l.release("x", s.now)
	}
	s.join("a1", "alice")
	s.see("10+")
	s.l.release("a1", s.now)
	s.see("10-")
	s.join("b1", "bob")
	s.see("10- 11+")
	s.expect("full with a desktop that nobody sits at", "alice/D bob/A")
	refused("carol", refusal.HostFull)
	refused("alice", "")
	refused("bob", "") // in place of his connection
	s.l.configure(bus.HostConfig{MaxSessions: 2, Draining: true})
	refused("carol", refusal.HostDraining)
	refused("alice", "")
	refused("bob", "")
	if _, err := s.l.reserve(bus.HostConnect{SessionID: "b2", User: "bob"}, "h", s.now); err != nil {
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
