package accounts

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/broker/internal/fake"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/refusal"
)

func pooled(a model.Accounts) *model.Pool {
	if a.LastUID == 0 {
		a.FirstUID, a.LastUID = 10000, 59999
	}
	return &model.Pool{Name: "linux", Accounts: &a}
}

func TestAccount(t *testing.T) {
	type step struct {
		user   string
		claims string // name=value, separated by blanks
		want   string // NAME, or NAME:UID; what is wrong begins with !
	}
	for name, c := range map[string]struct {
		rule  model.Accounts
		steps []step
	}{
		"by user name": {model.Accounts{Create: true}, []step{
			{"alice@example.com", "", "alice"}, {"bob@example.com", "", "bob"}, {"alice@example.com", "", "alice"},
		}},
		"two people of one name": {model.Accounts{Create: true}, []step{
			{"alice@a.example", "", "alice"}, {"alice@b.example", "", "!the account is alice@a.example's, and alice@a.example and alice@b.example would both"},
			{"Alice@A.example", "", "!would both have it"}, {"alice@a.example", "", "alice"},
		}},
		"names that come out alike": {model.Accounts{Create: true}, []step{
			{"anna.bär@example.com", "", "anna.bar"}, {"anna.bar@example.com", "", "!is anna.bär@example.com's"},
		}},
		"names for nobody": {model.Accounts{Create: true}, []step{
			{"root@example.com", "", "!systems use for themselves"}, {"a/b", "", "!it has a '/'"}, {strings.Repeat("x", 40), "", "!spec.accounts.nameClaim"},
		}},
		"by claim": {model.Accounts{Create: true, NameClaim: "preferred_username"}, []step{
			{"alice@example.com", "preferred_username=ali", "ali"}, {"bob@example.com", "", "!nothing of claim preferred_username"},
			{"carol@example.com", "preferred_username=ali", "!is alice@example.com's"},
		}},
		"user id by claim": {model.Accounts{Create: true, UIDClaim: "uidNumber"}, []step{
			{"alice@example.com", "uidNumber=4711", "alice:4711"}, {"bob@example.com", "uidNumber=4711", `!which is account "alice"'s`},
			{"bob@example.com", "uidNumber=0", "!is the system's"}, {"bob@example.com", "uidNumber=x", "!not a user id"}, {"bob@example.com", "", "!nothing of claim uidNumber"},
			{"alice@example.com", "uidNumber=4712", "!was given user id 4711"},
		}},
		"a small range": {model.Accounts{Create: true, FirstUID: 2000, LastUID: 2001}, []step{
			{"a1", "", "a1"}, {"a2", "", "a2"}, {"a3", "", "!widen spec.accounts.uidRange"}, {"a1", "", "a1"},
		}},
		"existing": {model.Accounts{}, []step{
			{"alice@a.example", "", "alice:0"}, {"alice@b.example", "", "!is alice@a.example's"},
		}},
	} {
		b, p := New(fake.New(&model.Snapshot{}), nil), pooled(c.rule)
		uids := map[uint32]string{}
		for _, s := range c.steps {
			claims := map[string]string{}
			for _, f := range strings.Fields(s.claims) {
				k, v, _ := strings.Cut(f, "=")
				claims[k] = v
			}
			a, err := b.Account(context.Background(), p, Person{Name: s.user, Claims: claims})
			if why, refused := strings.CutPrefix(s.want, "!"); refused {
				if r := refusal.From(err); err == nil || r.Code != refusal.AccountRefused || !strings.Contains(r.Message, why) {
					t.Errorf("%s: %s: %v, %v, want %q", name, s.user, a, err, why)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %s: %v", name, s.user, err)
				continue
			}
			got := a.Name
			if strings.Contains(s.want, ":") {
				got = fmt.Sprintf("%s:%d", a.Name, a.UID)
			}
			if got != s.want || a.Create != c.rule.Create {
				t.Errorf("%s: %s: %+v, want %s", name, s.user, a, s.want)
			}
			if c.rule.Create {
				if a.UID < 1000 || uids[a.UID] != "" && uids[a.UID] != s.user {
					t.Errorf("%s: user id %d of %s is %q's", name, a.UID, s.user, uids[a.UID])
				}
				uids[a.UID] = s.user
			}
		}
	}
}

// Brokers that meet the same new people at one time give each of them one account, and no user id twice.
func TestAtOneTime(t *testing.T) {
	world, p := fake.New(&model.Snapshot{}), pooled(model.Accounts{Create: true, FirstUID: 2000, LastUID: 2999})
	books := []*Book{New(world, nil), New(world, nil)}
	var mu sync.Mutex
	uids := map[uint32]string{}
	var wg sync.WaitGroup
	for n := range 40 {
		for _, b := range books {
			wg.Go(func() {
				user := fmt.Sprintf("u%d@example.com", n)
				a, err := b.Account(context.Background(), p, Person{Name: user})
				for err != nil && strings.Contains(err.Error(), "changed by somebody else") { // as a client would
					a, err = b.Account(context.Background(), p, Person{Name: user})
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if other, ok := uids[a.UID]; ok && other != user {
					t.Errorf("user id %d is %s's and %s's", a.UID, other, user)
				}
				uids[a.UID] = user
			})
		}
	}
	wg.Wait()
	if len(uids) != 40 {
		t.Errorf("%d user ids for 40 people", len(uids))
	}
}

// A pool that begins to create accounts gives user ids to those who had Existing ones, and to nobody else.
func TestPolicyChanges(t *testing.T) {
	b, ctx := New(fake.New(&model.Snapshot{}), nil), context.Background()
	if a, err := b.Account(ctx, pooled(model.Accounts{}), Person{Name: "alice@a.example"}); err != nil || a.UID != 0 {
		t.Fatalf("%+v %v", a, err)
	}
	create := pooled(model.Accounts{Create: true})
	if _, err := b.Account(ctx, create, Person{Name: "alice@b.example"}); err == nil {
		t.Error("the account went to somebody else")
	}
	if a, err := b.Account(ctx, create, Person{Name: "alice@a.example"}); err != nil || a.UID < 10000 || !a.Create {
		t.Errorf("%+v %v", a, err)
	}
	if a, err := b.Account(ctx, pooled(model.Accounts{}), Person{Name: "alice@a.example"}); err != nil || a.Create {
		t.Errorf("back to Existing: %+v %v", a, err)
	}
}

// While the API server is away, those who have accounts are logged in, and newcomers are told.
func TestListAway(t *testing.T) {
	now := time.Unix(0, 0)
	world, p := fake.New(&model.Snapshot{}), pooled(model.Accounts{Create: true})
	b := New(world, func() time.Time { return now })
	ctx := context.Background()
	was, err := b.Account(ctx, p, Person{Name: "alice"})
	if err != nil {
		t.Fatal(err)
	}
	world.Away = errors.New("the API server is away")
	now = now.Add(time.Hour)
	if a, err := b.Account(ctx, p, Person{Name: "alice"}); err != nil || *a != *was {
		t.Errorf("alice: %+v %v, want %+v", a, err, was)
	}
	if _, err := b.Account(ctx, p, Person{Name: "bob"}); err == nil || !strings.Contains(err.Error(), "API server is away") {
		t.Errorf("bob: %v", err)
	}
}

// An account that an administrator frees is somebody else's soon after.
func TestFreed(t *testing.T) {
	now := time.Unix(0, 0)
	list := &edited{accounts: map[string]string{"alice": "4711 alice@a.example"}}
	b, p := New(list, func() time.Time { return now }), pooled(model.Accounts{Create: true})
	ctx := context.Background()
	if _, err := b.Account(ctx, p, Person{Name: "alice@b.example"}); err == nil {
		t.Fatal("it was taken over")
	}
	if a, err := b.Account(ctx, p, Person{Name: "alice@a.example"}); err != nil || a.UID != 4711 {
		t.Fatalf("%+v %v", a, err)
	}
	list.accounts = map[string]string{"alice": "4711 alice@b.example", "odd": "what"}
	now = now.Add(believeFor)
	if _, err := b.Account(ctx, p, Person{Name: "alice@a.example"}); err == nil {
		t.Error("the old owner still has it")
	}
	if _, err := b.Account(ctx, p, Person{Name: "alice@b.example"}); err != nil {
		t.Error(err)
	}
	if _, err := b.Account(ctx, p, Person{Name: "odd"}); err == nil || !strings.Contains(err.Error(), "UID PERSON") {
		t.Errorf("an entry that can't be read: %v", err)
	}
}

type edited struct{ accounts map[string]string }

func (e *edited) ReadAccounts(context.Context, string) (map[string]string, string, error) {
	return e.accounts, "1", nil
}
func (e *edited) AddAccount(context.Context, string, string, string, string) error {
	return model.ErrConflict
}

// A list that an older broker wrote, or a person edited, may spell people otherwise than their tokens are read now.
func TestSpelling(t *testing.T) {
	w := fake.New(&model.Snapshot{})
	p := pooled(model.Accounts{Create: true})
	ctx := context.Background()
	old, err := New(w, nil).Account(ctx, p, Person{Name: "Alice@Example.com"})
	if err != nil {
		t.Fatal(err)
	}
	b := New(w, nil)
	if a, err := b.Account(ctx, p, Person{Name: "alice@example.com", Spelling: strings.ToLower}); err != nil || *a != *old {
		t.Errorf("got %v, %v, want %v", a, err, old)
	}
	if _, err := b.Account(ctx, p, Person{Name: "alice@example.com"}); err == nil {
		t.Error("names that count exactly are two persons")
	}
	if _, err := b.Account(ctx, p, Person{Name: "alice@other.example", Spelling: strings.ToLower}); err == nil {
		t.Error("another person has the account")
	}
}
