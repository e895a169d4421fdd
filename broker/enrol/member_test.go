package enrol

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/refusal"
)

var linux1 = identity.Agent(ns, ws, "linux", "linux-1")

// machine is one holder of a key.
type machine struct {
	csr, key string
}

func newMachine(t *testing.T, pool, host string) machine {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	csr := makeCSR(t, key, x509.CertificateRequest{URIs: []*url.URL{identity.Agent(ns, ws, pool, host).URI()}})
	return machine{csr, identity.KeyFingerprint(spki)}
}

// at sets the service's clock.
func (f *fixture) at(d time.Duration) { f.o.Now = func() time.Time { return now.Add(d) } }

func (f *fixture) enrol(t *testing.T, token, host string, m machine) {
	t.Helper()
	if _, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: token, Host: host, ClientCSR: m.csr}); err != nil {
		t.Fatal(err)
	}
}

// giveToken gives linux-1 another token of its own, as the operator does.
func (f *fixture) giveToken() string {
	token, hash := newToken("linux", "linux-1")
	f.world.EditHost("linux-1", func(h *model.Host) {
		h.Registration = model.Registration{TokenHash: hash, Expires: f.o.Now().Add(time.Hour)}
	})
	return token
}

// follow records what waits, as Follow does.
func (f *fixture) follow(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	changes := f.changes
	f.changes = map[string]change{}
	f.mu.Unlock()
	for host, c := range changes {
		if err := f.settle(t.Context(), host, c); err != nil {
			t.Fatal(err)
		}
	}
}

func (f *fixture) wantMember(t *testing.T, what string, m machine, issued time.Duration, want bool) {
	t.Helper()
	if err := f.Member(linux1, m.key, now.Add(issued)); (err == nil) != want {
		t.Errorf("%s: %v, want member %v", what, err, want)
	}
}

func TestMachineIsOneKey(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		name string
		do   func(t *testing.T, f *fixture) // puts the first machine out, if it does
		in   bool
	}{
		{"nothing happened", func(*testing.T, *fixture) {}, true},
		{"a person edits the SessionHost", func(t *testing.T, f *fixture) {
			f.world.EditHost("linux-1", func(h *model.Host) { h.Generation++; h.AssignedUser = "alice" })
		}, true},
		{"another machine enrols, a minute later", func(t *testing.T, f *fixture) {
			f.at(time.Minute)
			f.enrol(t, f.giveToken(), "linux-1", newMachine(t, "linux", "linux-1"))
		}, false},
		{"the SessionHost is deleted", func(t *testing.T, f *fixture) {
			f.world.Edit(func(s *model.Snapshot) { delete(s.Hosts, "linux-1") })
		}, false},
		{"it is made again, and nobody has enrolled", func(t *testing.T, f *fixture) {
			f.world.Edit(func(s *model.Snapshot) { delete(s.Hosts, "linux-1") })
			f.world.EditHost("linux-1", func(h *model.Host) { h.Pool = "linux" })
		}, false},
		{"it is made again with the status of before, as by a restore", func(t *testing.T, f *fixture) {
			f.world.EditHost("linux-1", func(h *model.Host) { h.UID = "restored" })
		}, false},
		{"it moved to another pool", func(t *testing.T, f *fixture) {
			f.world.EditHost("linux-1", func(h *model.Host) { h.Pool = "bare" })
		}, false},
		{"it is revoked", func(t *testing.T, f *fixture) {
			f.world.EditHost("linux-1", func(h *model.Host) { h.Revoke = "stolen" })
		}, false},
		{"it is revoked, and the annotation taken back", func(t *testing.T, f *fixture) {
			f.world.EditHost("linux-1", func(h *model.Host) { h.Revoke = "stolen" })
			f.Changed()
			f.follow(t)
			f.world.EditHost("linux-1", func(h *model.Host) { h.Revoke = "" })
		}, false},
		{"it is revoked, and another machine enrols", func(t *testing.T, f *fixture) {
			f.world.EditHost("linux-1", func(h *model.Host) { h.Revoke = "stolen" })
			f.enrol(t, f.giveToken(), "linux-1", newMachine(t, "linux", "linux-1"))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := setUp(t)
			first := newMachine(t, "linux", "linux-1")
			f.enrol(t, f.hostToken, "linux-1", first)
			f.wantMember(t, "enrolled", first, 0, true)
			f.wantMember(t, "another key", newMachine(t, "linux", "linux-1"), 0, false)
			f.at(20 * day)
			c.do(t, f)
			for _, issued := range []time.Duration{-29 * day, 0, 20 * day} {
				f.wantMember(t, fmt.Sprintf("a certificate of %v", issued), first, issued, c.in)
			}
			f.at(21 * day)
			_, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: newMachine(t, "linux", "linux-1").csr})
			if enrolled := f.world.Snapshot().Hosts["linux-1"]; enrolled == nil || enrolled.Enrolment.Key == "" || enrolled.Enrolment.HostUID != enrolled.UID || enrolled.Pool != "linux" {
				wantCode(t, err, refusal.RegistrationInvalid)
			}
		})
	}
}

// A revocation is done once for each value: the machine that enrols after it stays, until there is another value.
func TestRevocationHappensOncePerValue(t *testing.T) {
	f := setUp(t)
	first, second := newMachine(t, "linux", "linux-1"), newMachine(t, "linux", "linux-1")
	f.enrol(t, f.hostToken, "linux-1", first)
	f.world.EditHost("linux-1", func(h *model.Host) { h.Revoke = "stolen" })
	f.wantMember(t, "revoked, before anybody recorded it", first, 0, false)
	f.Changed()
	f.follow(t)
	if e := f.world.Snapshot().Hosts["linux-1"].Enrolment; e.Key != "" || e.RevokedFor != "stolen" || e.TokenHash != f.hostHash {
		t.Errorf("recorded %+v", e)
	}
	_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.hostToken, Host: "linux-1", ClientCSR: first.csr})
	wantCode(t, err, refusal.RegistrationSpent)
	f.enrol(t, f.giveToken(), "linux-1", second)
	for range 2 {
		f.Changed()
		f.follow(t)
		f.wantMember(t, "the second machine", second, 0, true)
		f.wantMember(t, "the first machine", first, 0, false)
	}
	f.world.EditHost("linux-1", func(h *model.Host) { h.Revoke = "stolen again" })
	f.wantMember(t, "the second machine, revoked", second, 0, false)
}

// A renewal moves the host to another key. Whatever is lost on the way, a machine that has either key gets in, and once it
// came with the new one, the old one is out.
func TestRenewalMovesTheKey(t *testing.T) {
	f := setUp(t)
	old := newMachine(t, "linux", "linux-1")
	f.enrol(t, f.hostToken, "linux-1", old)
	renew := func(m machine) error {
		_, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: m.csr})
		return err
	}
	f.at(time.Hour)
	lost, next := newMachine(t, "linux", "linux-1"), newMachine(t, "linux", "linux-1")
	f.wantMember(t, "a key that nobody renewed to", next, time.Hour, false)
	wantCode(t, renew(lost), "")
	f.at(2 * time.Hour)
	f.wantMember(t, "the answer was lost, the machine has the old key", old, 0, true)
	wantCode(t, renew(next), "")
	f.wantMember(t, "a renewal that another has replaced", lost, time.Hour, false)
	f.wantMember(t, "the old key, until the agent has come with the next", old, 0, true)
	f.follow(t)
	f.wantMember(t, "the next key", next, 2*time.Hour, true)
	f.wantMember(t, "the old key, until that is recorded", old, 0, true)
	f.follow(t)
	f.wantMember(t, "the old key, after it was", old, 0, false)
	f.wantMember(t, "the next key, after it was", next, 2*time.Hour, true)
	e := f.world.Snapshot().Hosts["linux-1"].Enrolment
	if e.Key != next.key || e.NextKey != "" || !e.At.Equal(now) || e.TokenHash != f.hostHash {
		t.Errorf("recorded %+v", e)
	}
	// The RDP certificate alone leaves the key.
	f.at(3 * time.Hour)
	if _, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{RDPCSR: rdpCSR(t, "linux", "linux-1")}); err != nil {
		t.Error(err)
	}
	f.wantMember(t, "the key in force", next, 2*time.Hour, true)
}

// A machine that came with its next key keeps it, though the API server was away and nobody could record that, also when it
// renews again and the answer is lost.
func TestRenewalKeepsTheKeyThatCame(t *testing.T) {
	f := setUp(t)
	old, next, lost := newMachine(t, "linux", "linux-1"), newMachine(t, "linux", "linux-1"), newMachine(t, "linux", "linux-1")
	f.enrol(t, f.hostToken, "linux-1", old)
	f.at(time.Hour)
	if _, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: next.csr}); err != nil {
		t.Fatal(err)
	}
	f.wantMember(t, "the next key", next, time.Hour, true)
	f.world.Away = errors.New("connection refused")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); f.Follow(ctx) }()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		f.mu.Lock()
		waiting := len(f.changes)
		f.mu.Unlock()
		if waiting == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody tried to record it")
		}
	}
	cancel()
	<-done
	f.world.Away = nil
	f.at(2 * time.Hour)
	if _, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: lost.csr}); err != nil {
		t.Fatal(err)
	}
	f.wantMember(t, "the key that came", next, time.Hour, true)
	f.wantMember(t, "the key before", old, 0, false)
	f.wantMember(t, "the newest key", lost, 2*time.Hour, true)
}

// A certificate that can't be recorded is not handed out: it would lock its machine out.
func TestRenewalThatCantBeRecorded(t *testing.T) {
	f := setUp(t)
	old, next := newMachine(t, "linux", "linux-1"), newMachine(t, "linux", "linux-1")
	f.enrol(t, f.hostToken, "linux-1", old)
	f.at(time.Hour)
	f.world.BeforeMark = func() { f.world.EditHost("linux-1", func(h *model.Host) { h.Generation++ }) }
	certs, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: next.csr})
	wantCode(t, err, refusal.IssuerAway)
	if certs.ClientCertificate != "" {
		t.Error("a certificate was handed out")
	}
	// Nor one that was overtaken by another enrolment.
	f.world.BeforeMark = nil
	sign := f.world.Signer
	f.world.Signer = func(r model.CertificateRequest) ([]byte, error) {
		f.world.EditHost("linux-1", func(h *model.Host) { h.Enrolment.Key, h.Enrolment.At = "another", now.Add(time.Hour) })
		return sign(r)
	}
	certs, err = f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: next.csr})
	wantCode(t, err, refusal.RegistrationInvalid)
	if certs.ClientCertificate != "" {
		t.Error("a certificate was handed out")
	}
}

func TestRenewalsKeepAnInterval(t *testing.T) {
	f := setUp(t)
	f.enrol(t, f.hostToken, "linux-1", newMachine(t, "linux", "linux-1"))
	other := New(f.o) // another broker
	for _, c := range []struct {
		at   time.Duration
		want refusal.Code
	}{
		{0, refusal.IssuerAway}, {renewAfter - 1, refusal.IssuerAway}, {renewAfter, ""}, {renewAfter, refusal.IssuerAway},
		{renewAfter + renewEvery - 1, refusal.IssuerAway}, {renewAfter + renewEvery, ""},
	} {
		f.at(c.at)
		for i, broker := range []*Service{f.Service, other} {
			broker.o.Now = f.o.Now
			want := c.want
			if i == 1 { // it was renewed just now
				want = refusal.IssuerAway
			}
			signed := f.world.Signed()
			_, err := broker.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: newMachine(t, "linux", "linux-1").csr})
			wantCode(t, err, want)
			if want != "" && f.world.Signed() != signed {
				t.Errorf("at %v a certificate was asked for all the same", c.at)
			}
		}
	}
}

// Hosts that a release enrolled which kept no key are the first machine that comes with a certificate issued since.
func TestUpgradePinsTheKey(t *testing.T) {
	f := setUp(t)
	f.world.EditHost("linux-1", func(h *model.Host) { h.Enrolment = model.Enrolment{TokenHash: "t", Serial: "1", At: now} })
	first, second := newMachine(t, "linux", "linux-1"), newMachine(t, "linux", "linux-1")
	f.wantMember(t, "a certificate from before the enrolment", second, -2*time.Hour, false)
	_, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: newMachine(t, "linux", "linux-1").csr})
	wantCode(t, err, refusal.IssuerAway) // the key comes first
	f.wantMember(t, "one of this enrolment", first, -time.Minute, true)
	f.wantMember(t, "one that comes later", second, time.Hour, true) // nothing is recorded yet
	f.follow(t)
	f.wantMember(t, "the first", first, -time.Minute, true)
	f.wantMember(t, "another one", second, time.Hour, false)
	if e := f.world.Snapshot().Hosts["linux-1"].Enrolment; e.Key != first.key || e.HostUID == "" || e.Serial != "1" {
		t.Errorf("recorded %+v", e)
	}
	// An enrolment that overtakes it is not undone.
	f.world.EditHost("linux-1", func(h *model.Host) { h.Enrolment = model.Enrolment{TokenHash: "t", At: now} })
	f.wantMember(t, "the first, of before", first, -time.Minute, true)
	f.world.EditHost("linux-1", func(h *model.Host) { h.Enrolment = model.Enrolment{TokenHash: "t2", At: now.Add(time.Hour * 2)} })
	f.follow(t)
	if e := f.world.Snapshot().Hosts["linux-1"].Enrolment; e.Key != "" {
		t.Errorf("a certificate of the enrolment before was recorded: %+v", e)
	}
}

func TestMember(t *testing.T) {
	f := setUp(t)
	m := newMachine(t, "linux", "linux-1")
	f.enrol(t, f.hostToken, "linux-1", m)
	for _, c := range []struct {
		name string
		id   identity.ID
		ok   bool
		says string
	}{
		{"itself", linux1, true, ""},
		{"in another pool", identity.Agent(ns, ws, "machines", "linux-1"), false, "does not exist"},
		{"without a SessionHost", identity.Agent(ns, ws, "linux", "gone"), false, "does not exist"},
		{"a host that has not enrolled", identity.Agent(ns, ws, "machines", "unheard"), false, "has not enrolled"},
		{"a gateway", identity.Gateway(ns, ws, "gw"), true, ""},
	} {
		if err := f.Member(c.id, m.key, now); (err == nil) != c.ok || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	f.world.Edit(func(s *model.Snapshot) { *s = model.Snapshot{} })
	if err := f.Member(identity.Agent(ns, ws, "linux", "gone"), m.key, now); err != nil {
		t.Errorf("while nothing is known: %v", err)
	}
}

func TestFollow(t *testing.T) {
	f := setUp(t)
	old, next := newMachine(t, "linux", "linux-1"), newMachine(t, "linux", "linux-1")
	f.enrol(t, f.hostToken, "linux-1", old)
	f.at(time.Hour)
	if _, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: next.csr}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); f.Follow(ctx) }()
	f.wantMember(t, "the next key", next, time.Hour, true)
	for deadline := time.Now().Add(20 * time.Second); f.world.Snapshot().Hosts["linux-1"].Enrolment.Key != next.key; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the key was not recorded")
		}
	}
	cancel()
	<-done
}

// The holder of a pool's token enrols as nobody whom somebody declared.
func TestPoolTokenEnrolsWhatNobodyDeclared(t *testing.T) {
	for _, c := range []struct {
		name string
		host func(*model.Host)
		want refusal.Code
		says string
	}{
		{"made by the token, and not enrolled", func(h *model.Host) { h.MadeByToken = true }, "", ""},
		{"declared", func(h *model.Host) {}, refusal.BadRequest, "own token"},
		{"declared, with a token of its own", func(h *model.Host) {
			h.Registration = model.Registration{TokenHash: "own", Expires: now.Add(time.Hour)}
		}, refusal.BadRequest, "Secret x-registration"},
		{"declared for a user", func(h *model.Host) { h.AssignedUser = "bob" }, refusal.BadRequest, "own token"},
		{"made by the token, and assigned since", func(h *model.Host) { h.MadeByToken, h.AssignedUser = true, "bob" }, refusal.BadRequest, "own token"},
		{"from a template", func(h *model.Host) { h.Pod = true }, refusal.BadRequest, "own token"},
		{"from a template, labelled by somebody", func(h *model.Host) { h.Pod, h.MadeByToken = true, true }, refusal.BadRequest, "own token"},
		{"enrolled, and not heard of yet", func(h *model.Host) {
			h.MadeByToken, h.Enrolment = true, model.Enrolment{TokenHash: "old", Key: "k"}
		}, refusal.BadRequest, "another machine's"},
		{"enrolled and heard of", func(h *model.Host) {
			h.MadeByToken, h.Enrolment, h.Agent = true, model.Enrolment{TokenHash: "old", Key: "k"}, &model.AgentStatus{}
		}, refusal.BadRequest, "another machine's"},
		{"revoked", func(h *model.Host) {
			h.MadeByToken, h.Revoke, h.Enrolment = true, "v", model.Enrolment{TokenHash: "old", RevokedFor: "v"}
		}, refusal.BadRequest, "another machine's"},
		{"in another pool", func(h *model.Host) { h.Pool, h.MadeByToken = "linux", true }, refusal.BadRequest, "another pool"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := setUp(t)
			f.world.EditHost("x", func(h *model.Host) { h.Pool = "machines"; c.host(h) })
			_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: "x", ClientCSR: clientCSR(t, "machines", "x")})
			wantCode(t, err, c.want)
			if err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q does not say %q", err, c.says)
			}
			if err != nil && f.world.Signed() != 0 {
				t.Error("a certificate was made all the same")
			}
		})
	}
}

// A machine whose answer was lost asks again with the same key, and gets in; one with another key doesn't.
func TestPoolTokenAnswerLost(t *testing.T) {
	f := setUp(t)
	m, other := newMachine(t, "machines", "m1"), newMachine(t, "machines", "m1")
	f.enrol(t, f.poolToken, "m1", m)
	f.enrol(t, f.poolToken, "m1", m)
	_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: "m1", ClientCSR: other.csr})
	wantCode(t, err, refusal.BadRequest)
	f.world.EditHost("m1", func(h *model.Host) { h.Agent = &model.AgentStatus{} })
	_, err = f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: "m1", ClientCSR: m.csr})
	wantCode(t, err, refusal.BadRequest)
}

// Two machines that take one free name at one moment, at two brokers: one is the host, and the other has no certificate.
func TestRacingPoolToken(t *testing.T) {
	f := setUp(t)
	both := make(chan struct{})
	sign := f.world.Signer
	f.world.Signer = func(r model.CertificateRequest) ([]byte, error) {
		select {
		case both <- struct{}{}:
		case <-both:
		}
		return sign(r)
	}
	errs := make(chan error, 2)
	for _, broker := range []*Service{f.Service, New(f.o)} {
		csr := clientCSR(t, "machines", "m1")
		go func() {
			_, err := broker.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: "m1", ClientCSR: csr})
			errs <- err
		}()
	}
	first, second := <-errs, <-errs
	if first != nil {
		first, second = second, first
	}
	wantCode(t, first, "")
	wantCode(t, second, refusal.BadRequest)
}

func TestPoolTokenIsBounded(t *testing.T) {
	f := setUp(t)
	f.world.Edit(func(s *model.Snapshot) {
		p := *s.Pools["machines"]
		p.MaxHosts = makesBurst + 10
		s.Pools["machines"] = &p
	})
	at, made := time.Duration(0), 0
	enrol := func() error {
		f.at(at)
		host := fmt.Sprint("m", made)
		_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: f.poolToken, Host: host, ClientCSR: clientCSR(t, "machines", host)})
		if err == nil {
			made++
		}
		return err
	}
	for enrol() == nil {
	}
	if made != makesBurst {
		t.Errorf("%d hosts were made at once, want %d", made, makesBurst)
	}
	wantCode(t, enrol(), refusal.IssuerAway)
	for range 20 {
		at += time.Second
		enrol()
	}
	err := enrol()
	wantCode(t, err, refusal.RegistrationSpent)
	if made != makesBurst+10 || !strings.Contains(err.Error(), "spec.registration.maxHostsPerToken") {
		t.Errorf("%d hosts, then %v", made, err)
	}
	// One is deleted: there is room for another.
	f.world.Edit(func(s *model.Snapshot) { delete(s.Hosts, "m0") })
	at += time.Second
	wantCode(t, enrol(), "")
	// Another token starts anew.
	at += time.Second
	var hash string
	f.poolToken, hash = newToken("machines", "-")
	f.world.Edit(func(s *model.Snapshot) {
		p := *s.Pools["machines"]
		p.Registration.TokenHash = hash
		s.Pools["machines"] = &p
	})
	wantCode(t, enrol(), "")
}

// However many renewals of one host are asked for, an issuer works for one of them; and however many hosts renew, machines
// enrol.
func TestRenewalsLeaveIssuersToOthers(t *testing.T) {
	f := setUp(t)
	f.enrol(t, f.hostToken, "linux-1", newMachine(t, "linux", "linux-1"))
	block, sign := make(chan struct{}), f.world.Signer
	f.world.Signer = func(r model.CertificateRequest) ([]byte, error) {
		if strings.HasPrefix(r.Host, "linux-") {
			<-block
		}
		return sign(r)
	}
	f.at(30 * time.Minute)
	done := make(chan error)
	const storm = 200
	csr := clientCSR(t, "linux", "linux-1")
	for range storm {
		go func() {
			_, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: csr})
			done <- err
		}()
	}
	for range storm - 1 { // all but the one that an issuer works for
		wantCode(t, <-done, refusal.IssuerAway)
	}
	if n := len(f.renewing); n != 1 {
		t.Errorf("%d places are taken", n)
	}
	for i := range maxRenewing { // one of these finds no place
		host := fmt.Sprint("linux-x", i)
		f.world.EditHost(host, func(h *model.Host) {
			h.Pool = "linux"
			h.Enrolment = model.Enrolment{TokenHash: "t", Key: "k", HostUID: "u"}
			h.UID = "u"
		})
		csr := clientCSR(t, "linux", host)
		go func() {
			_, err := f.Renew(t.Context(), identity.Agent(ns, ws, "linux", host), brokerapi.RenewRequest{ClientCSR: csr})
			done <- err
		}()
	}
	wantCode(t, <-done, refusal.IssuerAway)
	f.enrol(t, f.poolToken, "honest", newMachine(t, "machines", "honest"))
	close(block)
	for range maxRenewing {
		<-done
	}
}

// A pool whose issuer gives no answer keeps its own machines waiting, and nobody else's, whether they enrol or renew.
func TestPoolsShareIssuing(t *testing.T) {
	f := setUp(t)
	pools := []string{"linux", "windows", "kiosk"} // whose issuers hang
	f.world.Edit(func(s *model.Snapshot) {
		for _, name := range append(pools, "honest") {
			s.Pools[name] = &model.Pool{Name: name, RDPIssuer: &config.Issuer{Name: name, Kind: "ClusterIssuer"}}
		}
	})
	block, sign := make(chan struct{}), f.world.Signer
	asked := make(chan string, 1000)
	f.world.Signer = func(r model.CertificateRequest) ([]byte, error) {
		if slices.Contains(pools, r.Issuer.Name) {
			asked <- r.Issuer.Name
			<-block
		}
		return sign(r)
	}
	member := func(pool string, n int) (host string) { // with a token of its own, and enrolled before
		host = fmt.Sprint(pool, "-m", n)
		f.world.EditHost(host, func(h *model.Host) {
			h.Pool, h.UID = pool, "u"
			h.Enrolment = model.Enrolment{TokenHash: "t", Key: "k", HostUID: "u"}
		})
		return host
	}
	renew := func(pool, host string) error {
		_, err := f.Renew(t.Context(), identity.Agent(ns, ws, pool, host), brokerapi.RenewRequest{RDPCSR: rdpCSR(t, pool, host)})
		return err
	}
	done, waiting := make(chan error), 0
	for _, pool := range pools {
		refused := 0
		for n := range maxRenewing {
			host := member(pool, n)
			go func() { done <- renew(pool, host) }()
			select {
			case <-asked:
				waiting++
			case err := <-done:
				wantCode(t, err, refusal.IssuerAway)
				if !strings.Contains(err.Error(), "HostPool "+pool) {
					t.Error(err)
				}
				refused++
			}
		}
		if refused == 0 {
			t.Errorf("all of pool %s wait", pool)
		}
	}
	if waiting < maxRenewing*3/4 {
		t.Errorf("%d places of %d are used", waiting, maxRenewing)
	}
	if err := renew("honest", member("honest", 0)); err != nil {
		t.Errorf("another pool's host: %v", err)
	}
	// Machines that enrol: the same.
	machines := 0
	for _, pool := range pools {
		for n := range maxEnrolling {
			host := fmt.Sprint(pool, "-e", n)
			token, hash := newToken(pool, host)
			f.world.EditHost(host, func(h *model.Host) {
				h.Pool, h.UID, h.Registration = pool, "u", model.Registration{TokenHash: hash, Expires: now.Add(time.Hour)}
			})
			go func() {
				_, err := f.Enroll(t.Context(), brokerapi.EnrollRequest{Token: token, Host: host, ClientCSR: clientCSR(t, pool, host), RDPCSR: rdpCSR(t, pool, host)})
				done <- err
			}()
			select {
			case <-asked:
				machines++
			case err := <-done:
				wantCode(t, err, refusal.IssuerAway)
			}
		}
	}
	if machines >= maxEnrolling {
		t.Errorf("%d machines wait", machines)
	}
	f.enrol(t, f.poolToken, "honest-1", newMachine(t, "machines", "honest-1"))
	close(block)
	for range waiting + machines {
		<-done
	}
	if len(f.enrolling)+len(f.renewing)+len(f.waiting) != 0 {
		t.Error("places were not given back")
	}
}

func TestRenew(t *testing.T) {
	f := setUp(t)
	f.enrol(t, f.hostToken, "linux-1", newMachine(t, "linux", "linux-1"))
	f.at(time.Hour)
	certs, err := f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: clientCSR(t, "linux", "linux-1"), RDPCSR: rdpCSR(t, "linux", "linux-1")})
	if err != nil || certs.ClientCertificate == "" || certs.RDPCertificate == "" {
		t.Fatalf("%+v %v", certs, err)
	}
	f.at(2 * time.Hour)
	certs, err = f.Renew(t.Context(), linux1, brokerapi.RenewRequest{RDPCSR: rdpCSR(t, "linux", "linux-1")})
	if err != nil || certs.ClientCertificate != "" || certs.RDPCertificate == "" {
		t.Fatalf("the RDP certificate alone: %+v %v", certs, err)
	}
	f.at(3 * time.Hour)
	_, err = f.Renew(t.Context(), linux1, brokerapi.RenewRequest{})
	wantCode(t, err, refusal.BadRequest)
	_, err = f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: clientCSR(t, "linux", "linux-2")})
	wantCode(t, err, refusal.BadRequest)
	_, err = f.Renew(t.Context(), identity.Agent(ns, ws, "machines", "linux-1"), brokerapi.RenewRequest{ClientCSR: clientCSR(t, "machines", "linux-1")})
	wantCode(t, err, refusal.RegistrationInvalid)
	f.world.Away = errors.New("connection refused")
	_, err = f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: clientCSR(t, "linux", "linux-1")})
	wantCode(t, err, refusal.IssuerAway)
	f.world.Away = nil
	f.world.Edit(func(s *model.Snapshot) { delete(s.Hosts, "linux-1") })
	_, err = f.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: clientCSR(t, "linux", "linux-1")})
	wantCode(t, err, refusal.RegistrationInvalid)
}

// Whatever is looked up, only the very token is good.
func FuzzLookUp(f *testing.F) {
	poolToken, hostToken := fixedToken("machines", "-"), fixedToken("linux", "linux-1")
	poolHash, hostHash := tokenHash(poolToken), tokenHash(hostToken)
	valid := now.Add(time.Hour)
	s := New(Options{Namespace: ns, Workspace: ws, Now: func() time.Time { return now }, Source: source{&model.Snapshot{
		Workspace: &model.Workspace{Name: ws},
		Pools: map[string]*model.Pool{
			"machines": {Name: "machines", Registration: model.Registration{TokenHash: poolHash, Expires: valid}}, "linux": {Name: "linux"},
		},
		Hosts: map[string]*model.Host{"linux-1": {Name: "linux-1", Pool: "linux", Registration: model.Registration{TokenHash: hostHash, Expires: valid}}},
	}}})
	for _, seed := range []string{poolToken, hostToken, "", "rdvreg....", strings.ToUpper(poolToken), poolToken + "=", hostToken + "\n", "rdvreg.ns.linux.-." + hostToken[len("rdvreg.ns.linux.linux-1."):]} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		g, err := s.lookUp(token)
		if err != nil {
			var r *refusal.Error
			if !errors.As(err, &r) {
				t.Fatalf("%v is no refusal", err)
			}
			return
		}
		if token != poolToken && token != hostToken || (g.host != "") != (token == hostToken) {
			t.Fatalf("%q is good for %+v", token, g)
		}
	})
}

type source struct{ s *model.Snapshot }

func (s source) Snapshot() *model.Snapshot { return s.s }
