package login

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
)

// serving is a server over a fixture, which tells what it was told.
type serving struct {
	*fixture
	*Server
	records *Records
	refused []*Refused
	in      []Session
	uid     uint32 // of the caller
}

func serve(t *testing.T) *serving {
	s := &serving{fixture: newFixture(t)}
	var err error
	if s.records, err = LoadRecords(filepath.Join(t.TempDir(), "accounts.json")); err != nil {
		t.Fatal(err)
	}
	s.Server = NewServer(ServerOptions{
		Book: s.Book, Records: s.records, Service: "xrdp-sesman",
		Caller:   func(net.Conn) (uint32, error) { return s.uid, nil },
		LoggedIn: func(in Session, _ uint32, _ time.Duration) { s.in = append(s.in, in) },
		Refused:  func(r *Refused) { s.refused = append(s.refused, r) },
	})
	return s
}

// talk sends lines and gives what is answered to each.
func (s *serving) talk(t *testing.T, lines ...string) (answers []string) {
	t.Helper()
	mine, its := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); s.exchange(its); its.Close() }()
	mine.SetDeadline(time.Now().Add(10 * time.Second))
	r := bufio.NewReader(mine)
	for _, line := range lines {
		go io.WriteString(mine, strings.ReplaceAll(line, "ADDRESS", s.lease.address.String())+"\n")
		answer, err := r.ReadString('\n')
		if err != nil {
			break
		}
		answers = append(answers, strings.TrimSpace(answer))
	}
	mine.Close()
	<-done
	return answers
}

const askAlice = `{"user":"alice","remote":"ADDRESS","service":"xrdp-sesman"}`

func TestExchange(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, s *serving)
		lines  []string
		want   Reason // "" where she is let in
	}{
		"let in":              {nil, []string{askAlice, `{"uid":10001}`}, ""},
		"another service":     {nil, []string{`{"user":"alice","remote":"ADDRESS","service":"su"}`}, BadRequest},
		"nonsense":            {nil, []string{`hello`}, BadRequest},
		"unknown fields":      {nil, []string{`{"user":"alice","remote":"ADDRESS","service":"xrdp-sesman","uid":0}`}, BadRequest},
		"two in one":          {nil, []string{askAlice + askAlice}, BadRequest},
		"too long":            {nil, []string{`{"user":"` + strings.Repeat("a", maxMessage) + `"}`}, BadRequest},
		"control characters":  {nil, []string{`{"user":"al\u0000ice","remote":"ADDRESS","service":"xrdp-sesman"}`}, BadRequest},
		"bob":                 {nil, []string{`{"user":"bob","remote":"ADDRESS","service":"xrdp-sesman"}`}, WrongAccount},
		"from localhost":      {nil, []string{`{"user":"alice","remote":"127.0.0.1","service":"xrdp-sesman"}`}, NotOurs},
		"another user id":     {nil, []string{askAlice, `{"uid":10002}`}, Account},
		"user id 0":           {nil, []string{askAlice, `{"uid":0}`}, Account},
		"no account":          {nil, []string{askAlice, `{"failed":"useradd: full"}`}, Account},
		"helper goes away":    {nil, []string{askAlice}, Account},
		"account is bob's":    {func(t *testing.T, s *serving) { put(t, s, "alice", "bob@example.com", 10001) }, []string{askAlice}, Account},
		"user id is bob's":    {func(t *testing.T, s *serving) { put(t, s, "bob", "bob@example.com", 10001) }, []string{askAlice}, Account},
		"it is hers already":  {func(t *testing.T, s *serving) { put(t, s, "alice", "alice@example.com", 10001) }, []string{askAlice, `{"uid":10001}`}, ""},
		"the host's own user": {func(t *testing.T, s *serving) { s.lease.session.Account = bus.Account{Name: "alice"} }, []string{askAlice, `{"uid":4711}`}, ""},
	} {
		s := serve(t)
		if c.change != nil {
			c.change(t, s)
		}
		answers := s.talk(t, c.lines...)
		if c.want == "" {
			if len(answers) != 2 || answers[1] != `{"ok":true}` || len(s.in) != 1 || len(s.refused) != 0 {
				t.Errorf("%s: %q, told %v %v", name, answers, s.in, s.refused)
			}
			if _, rec, ok := s.records.ByUID(s.recordUID()); !ok || rec.Person != "alice@example.com" {
				t.Errorf("%s: not kept: %+v", name, s.records.accounts)
			}
			continue
		}
		if len(s.refused) != 1 || s.refused[0].Reason != c.want || len(s.in) != 0 || strings.Contains(strings.Join(answers, ""), `"ok"`) {
			t.Errorf("%s: %q, told %v %v, want %s", name, answers, s.in, s.refused, c.want)
		}
	}
}

func (s *serving) recordUID() uint32 { return s.records.accounts["alice"].UID }

func put(t *testing.T, s *serving, account, person string, uid uint32) {
	if err := s.records.Put(account, Record{Person: person, UID: uid}); err != nil {
		t.Fatal(err)
	}
}

// An intruder who comes while the account is being made is seen by the second look.
func TestSecondLook(t *testing.T) {
	s := serve(t)
	mine, its := net.Pipe()
	defer mine.Close()
	done := make(chan struct{})
	go func() { defer close(done); s.exchange(its) }()
	r := bufio.NewReader(mine)
	writeMessage(mine, ask{"alice", s.lease.address.String(), "xrdp-sesman"})
	if _, err := r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.sockets = append(s.sockets, Socket{netip.AddrPortFrom(s.lease.address, 5), rdp, stateEstablished, 10002})
	s.mu.Unlock()
	writeMessage(mine, outcome{UID: 10001})
	var a answer
	if err := readMessage(r, &a); err != nil || a.OK {
		t.Errorf("%+v %v", a, err)
	}
	<-done
	if len(s.refused) != 1 || s.refused[0].Reason != Shared {
		t.Errorf("told %v", s.refused)
	}
}

// What a host counts, brokers know.
func TestReasons(t *testing.T) {
	all := []string{}
	for _, r := range []Reason{NotOurs, Shared, NotConnected, WrongAccount, Used, Late, Caller, BadRequest, Account, Busy} {
		all = append(all, string(r))
	}
	if !slices.Equal(all, bus.LoginReasons) {
		t.Errorf("%q, and the bus has %q", all, bus.LoginReasons)
	}
}

// Only root is answered, by the kernel's word.
func TestCaller(t *testing.T) {
	s := serve(t)
	s.uid = 10002
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if answer, err := io.ReadAll(c); len(answer) != 0 {
		t.Errorf("answered %q, %v", answer, err)
	}
	l.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if len(s.refused) != 1 || s.refused[0].Reason != Caller || !strings.Contains(s.refused[0].Message, "user 10002") {
		t.Errorf("told %v", s.refused)
	}
}

func TestRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "accounts.json")
	r, err := LoadRecords(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Put("alice", Record{Person: "alice@a.example", UID: 10001}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		account, person string
		uid             uint32
		want            string
	}{
		{"alice", "alice@a.example", 10001, ""},
		{"alice", "alice@b.example", 10001, "alice@a.example's"},
		{"alice", "alice@b.example", 0, "alice@a.example's"},
		{"bob", "bob@a.example", 10001, `user id 10001 is account "alice"'s`},
		{"bob", "bob@a.example", 10002, ""},
	} {
		err := r.Check(c.account, c.person, c.uid)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	again, err := LoadRecords(path)
	if err != nil {
		t.Fatal(err)
	}
	if name, rec, ok := again.ByUID(10001); !ok || name != "alice" || rec.Person != "alice@a.example" {
		t.Errorf("after a restart: %q %+v", name, rec)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", fi, err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadRecords(path); err == nil { // to begin with an empty list would let accounts change hands
		t.Error("a broken file was taken")
	}
}

func FuzzSocket(f *testing.F) {
	f.Add([]byte(askAlice + "\n" + `{"uid":10001}` + "\n"))
	f.Add([]byte(`{"user":"bob","remote":"127.0.0.1","service":"xrdp-sesman"}` + "\n"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		r := bufio.NewReaderSize(strings.NewReader(string(sent)), maxMessage)
		var a ask
		if err := readMessage(r, &a); err != nil {
			return
		}
		if err := a.check(); err != nil {
			return
		}
		if len(a.User) > 256 || strings.ContainsAny(a.User+a.Remote+a.Service, "\x00\n\r") {
			t.Errorf("%q was taken", a)
		}
		b := NewBook(Options{Sockets: (&table{}).list})
		if _, err := b.Admit(a.User, a.Remote); err == nil {
			t.Errorf("%+v was let in", a)
		} else if r := (&Refused{}); !errors.As(err, &r) || len(r.Message) > 1000 {
			t.Errorf("%v", err)
		}
		var o outcome
		if err := readMessage(r, &o); err == nil {
			if _, err := json.Marshal(o); err != nil {
				t.Error(err)
			}
		}
	})
}
