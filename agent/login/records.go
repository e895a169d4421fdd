package login

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Record says whose account one is on this host, and what brought its owner here last: it goes with every desktop that
// runs in the account.
type Record struct {
	Person   string    `json:"person"`
	UID      uint32    `json:"uid"`
	Resource string    `json:"resource,omitempty"`
	Activity string    `json:"activityId,omitempty"`
	Proof    string    `json:"proof,omitempty"`
	At       time.Time `json:"at"`
}

// maxRecords bounds the accounts of one host.
const maxRecords = 20_000

// Records is the accounts that people have logged in to on this host. It outlives the process, so that a desktop is known
// after a restart as whose it is. Safe for concurrent use.
type Records struct {
	path string

	mu       sync.Mutex
	accounts map[string]Record // by account name
}

// LoadRecords reads them from the file, which need not exist.
func LoadRecords(path string) (*Records, error) {
	r := &Records{path: path, accounts: map[string]Record{}}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &r.accounts)
	}
	if err == nil && r.accounts == nil { // null
		err = errors.New("it holds no list")
	}
	if err != nil {
		return nil, fmt.Errorf("%s says whose accounts are whose on this host, and can't be read: %w", path, err)
	}
	return r, nil
}

// Check says why an account can't be a person's here: it is another's, or its user id is another account's. uid 0 is one
// that isn't known yet.
func (r *Records) Check(account, person string, uid uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.check(account, person, uid)
}

func (r *Records) check(account, person string, uid uint32) error {
	if old, ok := r.accounts[account]; ok && old.Person != person {
		return fmt.Errorf("account %q is %s's on this host, so %s can't have it: an administrator must give one of them another account, or stop the agent and remove the entry from %s", account, old.Person, person, r.path)
	}
	if uid == 0 {
		return nil
	}
	for name, old := range r.accounts {
		if old.UID == uid && name != account {
			return fmt.Errorf("user id %d is account %q's (%s) on this host, so account %q of %s can't have it", uid, name, old.Person, account, person)
		}
	}
	return nil
}

// Put keeps that a person has logged in.
func (r *Records) Put(account string, rec Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.check(account, rec.Person, rec.UID); err != nil {
		return err
	}
	old, was := r.accounts[account]
	if !was && len(r.accounts) >= maxRecords {
		return fmt.Errorf("this host has had %d accounts, which is the most that are kept in %s", maxRecords, r.path)
	}
	r.accounts[account] = rec
	if err := r.save(); err != nil {
		delete(r.accounts, account)
		if was {
			r.accounts[account] = old
		}
		return err
	}
	return nil
}

// ByUID finds the account that has a user id.
func (r *Records) ByUID(uid uint32) (account string, rec Record, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, rec := range r.accounts {
		if rec.UID == uid {
			return name, rec, true
		}
	}
	return "", Record{}, false
}

// save replaces the file, whole or not at all. mu is held.
func (r *Records) save() error {
	data, err := json.MarshalIndent(r.accounts, "", " ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(r.path), ".accounts-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), r.path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
