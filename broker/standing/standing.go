// Package standing remembers in which groups users were by their newest token, so that what rests on an older token (a
// ticket, a live session, a download with that token) ends with the groups that the user has lost since. It is soft
// state: brokers tell each other what they learn, and what all of them forget counts as never known, until the user's next
// token.
package standing

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// MaxUsers bounds the users that are remembered; beyond, whoever was heard of longest ago is forgotten.
	MaxUsers = 10_000
	// Life is for how long a user is remembered: longer than any ticket lives.
	Life = 8 * 24 * time.Hour
)

// Record is what one user's newest token said.
type Record struct {
	User     string    `json:"user"`
	SignedIn time.Time `json:"signedIn"` // when the token was issued
	// Groups are 64 bits of each group's SHA-256, in order: enough to tell a group that is missing, and small.
	Groups []uint64 `json:"groups"`
}

// NewRecord makes the record of a token with these groups.
func NewRecord(user string, signedIn time.Time, groups []string) Record {
	r := Record{User: user, SignedIn: signedIn, Groups: make([]uint64, 0, len(groups))}
	for _, g := range groups {
		r.Groups = append(r.Groups, hash(g))
	}
	slices.Sort(r.Groups)
	r.Groups = slices.Compact(r.Groups)
	return r
}

func hash(group string) uint64 {
	sum := sha256.Sum256([]byte(group))
	return binary.BigEndian.Uint64(sum[:])
}

func (r *Record) has(group string) bool {
	_, found := slices.BinarySearch(r.Groups, hash(group))
	return found
}

// Table is the records of all users. Safe for concurrent use.
type Table struct {
	now func() time.Time

	mu    sync.Mutex
	users map[string]entry
}

type entry struct {
	Record
	heard time.Time
}

// New makes an empty table.
func New(now func() time.Time) *Table {
	return &Table{now: now, users: map[string]entry{}}
}

// Learn takes in a record, and says whether it is news. Of two tokens of the same second, only what both say counts, so
// that brokers agree whichever they hear first.
func (t *Table) Learn(r Record) (news bool) {
	if r.User == "" || r.SignedIn.IsZero() {
		return false
	}
	slices.Sort(r.Groups) // another broker's word
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	old, known := t.users[r.User]
	switch {
	case known && r.SignedIn.Before(old.SignedIn):
		return false
	case known && r.SignedIn.Equal(old.SignedIn):
		both := slices.DeleteFunc(slices.Clone(old.Groups), func(g uint64) bool {
			_, found := slices.BinarySearch(r.Groups, g)
			return !found
		})
		if len(both) == len(old.Groups) {
			return false
		}
		r.Groups = both
	case !known && len(t.users) >= MaxUsers:
		t.forgetOne()
	}
	t.users[r.User] = entry{r, now}
	return true
}

// forgetOne makes room. mu is held.
func (t *Table) forgetOne() {
	oldest := ""
	for user, e := range t.users {
		if oldest == "" || e.heard.Before(t.users[oldest].heard) {
			oldest = user
		}
	}
	delete(t.users, oldest)
}

// Standing gives those of the groups, which a token or ticket of since says the user is in, that no newer token lacks.
func (t *Table) Standing(user string, since time.Time, groups []string) []string {
	t.mu.Lock()
	e, known := t.users[user]
	t.mu.Unlock()
	if !known || e.SignedIn.Before(since) || !slices.ContainsFunc(groups, func(g string) bool { return !e.has(g) }) {
		return groups
	}
	return slices.DeleteFunc(slices.Clone(groups), func(g string) bool { return !e.has(g) })
}

// All gives every record.
func (t *Table) All() []Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]Record, 0, len(t.users))
	for _, e := range t.users {
		all = append(all, e.Record)
	}
	return all
}

// Prune forgets what is too old to matter.
func (t *Table) Prune() {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	maps.DeleteFunc(t.users, func(_ string, e entry) bool { return now.Sub(e.heard) > Life })
}
