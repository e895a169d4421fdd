// Package standing remembers in which groups users were by their newest token. What rests on an older token (a ticket, a
// live session, a download with that token) ends with the groups that the user has lost since, and goes on where a group
// that the user is in still grants it, whichever the ticket names. It is soft state: brokers tell each other what they
// learn, and what all of them forget counts as never known, until the user's next token.
package standing

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"sync"
	"time"
)

const (
	// MaxUsers bounds the users that are remembered, and maxBytes their groups; beyond, whoever was heard of longest ago is
	// forgotten.
	MaxUsers = 10_000
	maxBytes = 64 << 20
	// Life is for how long a user is remembered: longer than any ticket lives.
	Life = 8 * 24 * time.Hour
)

// hashSize is how much of a group's SHA-256 is kept, in bytes: too much for anybody to find a name that passes for another's.
const hashSize = 16

// Record is what one user's newest token said.
type Record struct {
	User     string    `json:"user"`
	SignedIn time.Time `json:"signedIn"` // when the token was issued
	// Groups are the hashes of all the user's groups, in order, one after the other.
	Groups []byte `json:"groups"`
}

// NewRecord makes the record of a token with these groups.
func NewRecord(user string, signedIn time.Time, groups []string) Record {
	hashes := make([][]byte, 0, len(groups))
	for _, g := range groups {
		hashes = append(hashes, hash(g))
	}
	return Record{User: user, SignedIn: signedIn, Groups: join(hashes)}
}

func hash(group string) []byte {
	sum := sha256.Sum256([]byte(group))
	return sum[:hashSize]
}

func join(hashes [][]byte) []byte {
	slices.SortFunc(hashes, bytes.Compare)
	return bytes.Join(slices.CompactFunc(hashes, bytes.Equal), nil)
}

// hashes gives the groups' hashes, which alias the record.
func (r *Record) hashes() [][]byte {
	var list [][]byte
	for h := range slices.Chunk(r.Groups, hashSize) {
		list = append(list, h)
	}
	return list
}

func (r *Record) has(group string) bool { return r.hasHash(hash(group)) }

func (r *Record) hasHash(h []byte) bool {
	low, high := 0, len(r.Groups)/hashSize
	for low < high {
		mid := (low + high) / 2
		switch c := bytes.Compare(r.Groups[mid*hashSize:(mid+1)*hashSize], h); {
		case c == 0:
			return true
		case c < 0:
			low = mid + 1
		default:
			high = mid
		}
	}
	return false
}

// Table is the records of all users. Safe for concurrent use.
type Table struct {
	now func() time.Time

	mu    sync.Mutex
	users map[string]entry
	size  int // of all groups, in bytes
	most  int // maxBytes, but for a test
}

type entry struct {
	Record
	heard time.Time
}

// New makes an empty table.
func New(now func() time.Time) *Table {
	return &Table{now: now, users: map[string]entry{}, most: maxBytes}
}

// Learn takes in a record, and says whether it is news. Of two tokens of the same second, only what both say counts, so
// that brokers agree whichever they hear first.
func (t *Table) Learn(r Record) (news bool) {
	if r.User == "" || r.SignedIn.IsZero() || len(r.Groups)%hashSize != 0 {
		return false
	}
	r.Groups = join(r.hashes()) // another broker's word
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	old, known := t.users[r.User]
	switch {
	case known && r.SignedIn.Before(old.SignedIn):
		return false
	case known && r.SignedIn.Equal(old.SignedIn):
		both := slices.DeleteFunc(old.hashes(), func(h []byte) bool { return !r.hasHash(h) })
		if len(both)*hashSize == len(old.Groups) {
			return false
		}
		r.Groups = join(both)
	}
	t.forget(r.User)
	for len(t.users) > 0 && (len(t.users) >= MaxUsers || t.size+len(r.Groups) > t.most) {
		t.forgetOldest()
	}
	t.users[r.User] = entry{r, now}
	t.size += len(r.Groups)
	return true
}

// forget drops a user. mu is held.
func (t *Table) forget(user string) {
	t.size -= len(t.users[user].Groups)
	delete(t.users, user)
}

// forgetOldest makes room. mu is held.
func (t *Table) forgetOldest() {
	oldest := ""
	for user, e := range t.users {
		if oldest == "" || e.heard.Before(t.users[oldest].heard) {
			oldest = user
		}
	}
	t.forget(oldest)
}

// newest gives what is known of a user as of since or later.
func (t *Table) newest(user string, since time.Time) (r Record, known bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, known := t.users[user]
	return e.Record, known && !e.SignedIn.Before(since)
}

// Standing gives those of the groups, which a token of since names, that no newer token lacks.
func (t *Table) Standing(user string, since time.Time, groups []string) []string {
	r, known := t.newest(user, since)
	if !known || !slices.ContainsFunc(groups, func(g string) bool { return !r.has(g) }) {
		return groups
	}
	return slices.DeleteFunc(slices.Clone(groups), func(g string) bool { return !r.has(g) })
}

// In says whether a user is in one of these groups: by the newest token, where it is of since or later; otherwise by the
// groups that a ticket of since names.
func (t *Table) In(of []string, user string, since time.Time, named []string) bool {
	r, known := t.newest(user, since)
	granted := func(g string) bool { return slices.Contains(of, g) && (!known || r.has(g)) }
	// The ticket's own groups come first: they are few, and most often still the user's.
	return slices.ContainsFunc(named, granted) || known && slices.ContainsFunc(of, r.has)
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
	for user, e := range t.users {
		if now.Sub(e.heard) > Life {
			t.forget(user)
		}
	}
}
