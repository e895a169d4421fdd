// Package accounts says into which account of a pool's hosts a person is logged in, and sees to it that nobody ever gets
// another person's.
//
// The account's name follows from a claim by wire/account. Who was given it stands in one list per pool, which brokers
// share: the first who comes has it for good. The list is the ConfigMap POOL-accounts, one entry per account, for people
// to read and, to take an account back, to edit:
//
//	alice: 10345 alice@example.com
//	bob:   - bob@example.com          an Existing account, whose user id the hosts know
package accounts

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/account"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
)

const (
	// believeFor is how long a read list counts where it says that an account is the person's: it may have been edited.
	believeFor = 10 * time.Second
	// readTimeout bounds one read; a connect waits for it.
	readTimeout = 3 * time.Second
	// tries of an addition, where several brokers add at one time.
	tries = 8
	// maxAccounts bounds one list: a ConfigMap holds 1 MiB.
	maxAccounts = 12_000
)

// List is the store of a pool's accounts: model.Writer is one.
type List interface {
	ReadAccounts(ctx context.Context, pool string) (accounts map[string]string, version string, err error)
	AddAccount(ctx context.Context, pool, version, name, value string) error
}

// Book gives out accounts. Safe for concurrent use.
type Book struct {
	list List
	now  func() time.Time

	mu    sync.Mutex
	pools map[string]*pool
}

type pool struct {
	mu      sync.Mutex // held while the list is read or written, so that one does it for all
	entries map[string]string
	at      time.Time // of the read; zero for never
}

// New makes a Book over a list. now may be nil.
func New(list List, now func() time.Time) *Book {
	if now == nil {
		now = time.Now
	}
	return &Book{list: list, now: now, pools: map[string]*pool{}}
}

// Person is somebody who signed in.
type Person struct {
	// Name in the workspace.
	Name string
	// Claims of the token, those that Accounts.Claims names, where the token has them.
	Claims map[string]string
	// Spelling gives the spelling that Name has to a name on the list, which people edit and older brokers wrote. Nil leaves
	// names as they are.
	Spelling func(string) string
}

// Name gives the account's name by the pool's rule, without asking anybody. Its errors are *refusal.Error.
func Name(p *model.Pool, person Person) (string, error) {
	value, from := person.Name, "the workspace's user name"
	if c := p.Accounts.NameClaim; c != "" {
		var err error
		if value, err = claim(p, person, "nameClaim", c); err != nil {
			return "", err
		}
		from = "claim " + c
	}
	name, err := account.Name(value)
	if err != nil {
		return "", refusal.New(refusal.AccountRefused, "%s has no account on the hosts of pool %s: %s %v. An administrator can take the name from another claim: spec.accounts.nameClaim of HostPool %s.", person.Name, p.Name, from, err, p.Name)
	}
	return name, nil
}

func claim(p *model.Pool, person Person, field, name string) (string, error) {
	if v, ok := person.Claims[name]; ok {
		return v, nil
	}
	return "", refusal.New(refusal.AccountRefused, "The sign-in of %s says nothing of claim %s, which HostPool %s takes accounts from (spec.accounts.%s). Sign in again (`rdv login`) and download the connection file anew; if it stays so, an administrator must have the identity provider send the claim, or name another.", person.Name, name, p.Name, field)
}

// Account gives the account that a person is logged in to, which is theirs from then on. The pool must have Accounts. Its
// errors are *refusal.Error.
func (b *Book) Account(ctx context.Context, p *model.Pool, person Person) (*bus.Account, error) {
	name, err := Name(p, person)
	if err != nil {
		return nil, err
	}
	uid := uint32(0)
	if c := p.Accounts.UIDClaim; c != "" {
		text, err := claim(p, person, "uidClaim", c)
		if err != nil {
			return nil, err
		}
		if uid, err = account.ParseUID(text); err != nil {
			return nil, refusal.New(refusal.AccountRefused, "%s has no account on the hosts of pool %s: in claim %s, %v.", person.Name, p.Name, c, err)
		}
	}
	w := &want{p: p, person: person.Name, name: name, uid: uid, spelling: person.Spelling}
	l := b.pool(p.Name)
	l.mu.Lock()
	defer l.mu.Unlock()
	young := !l.at.IsZero() && b.now().Sub(l.at) < believeFor
	if a, err := w.in(l.entries); young && err == nil && a != nil {
		return a, nil
	}
	return b.settle(ctx, l, w)
}

func (b *Book) pool(name string) *pool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pools[name] == nil {
		b.pools[name] = &pool{}
	}
	return b.pools[name]
}

// settle reads the list, and adds to it where the person is not on it. While it can't be read, what was read before
// counts for those who were on it. l.mu is held.
func (b *Book) settle(ctx context.Context, l *pool, w *want) (*bus.Account, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	var err error
	for range tries {
		var entries map[string]string
		var version string
		if entries, version, err = b.list.ReadAccounts(ctx, w.p.Name); err != nil {
			if a, werr := w.in(l.entries); a != nil && werr == nil {
				return a, nil
			}
			break
		}
		l.entries, l.at = entries, b.now()
		a, refused := w.in(entries)
		if refused != nil || a != nil {
			return a, refused
		}
		if refused := w.choose(entries); refused != nil {
			return nil, refused
		}
		if err = b.list.AddAccount(ctx, w.p.Name, version, w.name, w.entry()); err == nil {
			l.entries = maps.Clone(entries)
			if l.entries == nil {
				l.entries = map[string]string{}
			}
			l.entries[w.name] = w.entry()
			return w.account(), nil
		}
		if !errors.Is(err, model.ErrConflict) {
			break
		}
	}
	return nil, refusal.New(refusal.AccountRefused, "It can't be settled now into which account of pool %s %s is logged in: %v. Try again in a moment.", w.p.Name, w.person, err)
}

// want is one person's wish for an account.
type want struct {
	p            *model.Pool
	person, name string
	uid          uint32 // 0: from the range, or the hosts' own
	spelling     func(string) string
}

// is says whether somebody on the list is the person.
func (w *want) is(owner string) bool {
	return owner == w.person || w.spelling != nil && w.spelling(owner) == w.person
}

func (w *want) account() *bus.Account {
	return &bus.Account{Name: w.name, Create: w.p.Accounts.Create, UID: w.uid}
}

func (w *want) entry() string {
	if !w.p.Accounts.Create {
		return "- " + w.person
	}
	return strconv.FormatUint(uint64(w.uid), 10) + " " + w.person
}

func (w *want) refuse(why string) error {
	return refusal.New(refusal.AccountRefused, "%s can't be logged in to hosts of pool %s as %q: %s. An administrator can take names from a claim that tells the two apart (spec.accounts.nameClaim of HostPool %s), or free the account: remove its entry from ConfigMap %s-accounts, and from each host its home folder and its entry in the agent's accounts.json.",
		w.person, w.p.Name, w.name, why, w.p.Name, w.p.Name)
}

// in finds the person on the list: nil where the name is free, or the person's without a user id.
func (w *want) in(entries map[string]string) (*bus.Account, error) {
	text, ok := entries[w.name]
	if !ok {
		return nil, nil
	}
	uid, owner, ok := parse(text)
	switch {
	case !ok:
		return nil, w.refuse(fmt.Sprintf("its entry reads %q, which is not `UID PERSON`", text))
	case !w.is(owner):
		return nil, w.refuse(fmt.Sprintf("the account is %s's, and %s and %s would both have it", owner, owner, w.person))
	case !w.p.Accounts.Create:
		return &bus.Account{Name: w.name}, nil
	case uid == 0: // it was Existing before, and gets a user id now
		return nil, nil
	case w.uid != 0 && w.uid != uid:
		return nil, w.refuse(fmt.Sprintf("the account was given user id %d, and claim %s now says %d", uid, w.p.Accounts.UIDClaim, w.uid))
	}
	return &bus.Account{Name: w.name, Create: true, UID: uid}, nil
}

// choose settles the user id of a new entry.
func (w *want) choose(entries map[string]string) error {
	if len(entries) >= maxAccounts {
		return refusal.New(refusal.AccountRefused, "Pool %s has given out %d accounts, which is the most that it keeps: %s needs another HostPool, or entries of people who left must go from ConfigMap %s-accounts.", w.p.Name, maxAccounts, w.person, w.p.Name)
	}
	if !w.p.Accounts.Create {
		return nil
	}
	taken := map[uint32]string{}
	for name, text := range entries {
		if uid, _, ok := parse(text); ok && uid != 0 {
			taken[uid] = name
		}
	}
	if w.uid != 0 {
		if other, ok := taken[w.uid]; ok {
			return w.refuse(fmt.Sprintf("claim %s says user id %d, which is account %q's: %s", w.p.Accounts.UIDClaim, w.uid, other, entries[other]))
		}
		return nil
	}
	// The same name begins at the same place in every pool of that range, so that a person's files mostly fit elsewhere.
	first, size := w.p.Accounts.FirstUID, w.p.Accounts.LastUID-w.p.Accounts.FirstUID+1
	h := fnv.New32a()
	h.Write([]byte(w.name))
	at := h.Sum32() % size
	for n := uint32(0); n < size && n <= maxAccounts; n++ {
		uid := first + (at+n)%size
		if _, ok := taken[uid]; !ok {
			w.uid = uid
			return nil
		}
	}
	return refusal.New(refusal.AccountRefused, "Every user id of pool %s is taken: an administrator must widen spec.accounts.uidRange of the HostPool.", w.p.Name)
}

// parse reads an entry. uid is 0 where the hosts know it.
func parse(text string) (uid uint32, person string, ok bool) {
	id, person, ok := strings.Cut(text, " ")
	if !ok || person == "" {
		return 0, "", false
	}
	if id == "-" {
		return 0, person, true
	}
	uid, err := account.ParseUID(id)
	return uid, person, err == nil
}
