package login

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"rendezvous.dev/rendezvous/wire/bus"
)

// AccountsDir, in a login folder, holds passwd and group for libnss-extrausers in the container that has the desktops:
// xrdp's session manager looks a user up before it asks PAM, and the agent can't write that container's own lists.
const AccountsDir = "accounts"

// AccountList keeps those lists. Safe for concurrent use.
type AccountList struct {
	dir string

	mu    sync.Mutex
	lines map[string]listed // by account name
}

type listed struct {
	uid     uint32
	comment string
}

// NewAccountList keeps the lists in a login folder, and begins with the accounts of records.
func NewAccountList(loginDir string, records *Records) (*AccountList, error) {
	s := &AccountList{dir: filepath.Join(loginDir, AccountsDir), lines: map[string]listed{}}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, err
	}
	records.mu.Lock()
	defer records.mu.Unlock()
	for name, r := range records.accounts {
		s.lines[name] = listed{r.UID, r.Person}
	}
	return s, s.write()
}

// Add lists an account, if it isn't yet.
func (s *AccountList) Add(a bus.Account, comment string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.lines[a.Name]; ok {
		return nil
	}
	s.lines[a.Name] = listed{a.UID, comment}
	return s.write()
}

// write replaces both lists, each whole or not at all. mu is held, or s is new.
func (s *AccountList) write() error {
	names := make([]string, 0, len(s.lines))
	for n := range s.lines {
		names = append(names, n)
	}
	slices.Sort(names)
	var passwd, group strings.Builder
	for _, n := range names {
		l := s.lines[n]
		fmt.Fprintf(&passwd, "%s:*:%d:%d:%s:/home/%s:/bin/bash\n", n, l.uid, l.uid, gecos(l.comment), n)
		fmt.Fprintf(&group, "%s:*:%d:\n", n, l.uid)
	}
	return errors.Join(replace(filepath.Join(s.dir, "group"), group.String()), replace(filepath.Join(s.dir, "passwd"), passwd.String()))
}

func replace(path, text string) error {
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// gecos makes a text fit for the comment of a list of users.
func gecos(text string) string {
	return strings.Map(func(r rune) rune {
		if r == ':' || r == ',' || r == '=' || r < ' ' || r == 0x7f {
			return '-'
		}
		return r
	}, text)
}
