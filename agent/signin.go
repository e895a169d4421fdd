package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/account"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

const (
	// recordsFile in the state folder says whose accounts are whose.
	recordsFile = "accounts.json"
	// pamService is the name under which xrdp's session manager asks PAM.
	pamService = "xrdp-sesman"
)

// signIn is the agent's part in login by connection.
type signIn struct {
	book     *login.Book
	records  *login.Records
	listener net.Listener
	shared   *login.AccountList // where the desktops are in a container beside this one
	making   sync.Mutex         // useradd and its like lock their files, and give up on each other

	mu      sync.Mutex
	refused map[login.Reason]uint64 // since the agent's start
}

// Close stops answering PAM.
func (s *signIn) Close() error { return s.listener.Close() }

// refusals gives the counters by reason, for the report.
func (s *signIn) refusals() map[string]uint64 {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	counts := map[string]uint64{}
	for r, n := range s.refused {
		counts[string(r)] = n
	}
	return counts
}

// serveLogins opens the login folder for PAM.
func (a *Agent) serveLogins() (*signIn, error) {
	records, err := login.LoadRecords(filepath.Join(a.opts.StateDir, recordsFile))
	if err != nil {
		return nil, fmt.Errorf("--state-dir: %w", err)
	}
	if err := os.MkdirAll(a.opts.LoginDir, 0o755); err != nil {
		return nil, fmt.Errorf("--login-dir: %w", err)
	}
	var shared *login.AccountList
	if a.opts.LoginShared {
		if err := copyProgram(filepath.Join(a.opts.LoginDir, login.HelperName)); err != nil {
			return nil, fmt.Errorf("--login-dir: %w", err)
		}
		if shared, err = login.NewAccountList(a.opts.LoginDir, records); err != nil {
			return nil, fmt.Errorf("--login-dir: %w", err)
		}
	}
	l, err := listenPrivate(filepath.Join(a.opts.LoginDir, login.SocketName))
	if err != nil {
		return nil, fmt.Errorf("--login-dir: %w", err)
	}
	s := &signIn{book: login.NewBook(login.Options{UID: uint32(os.Geteuid())}), records: records, shared: shared, listener: l, refused: map[login.Reason]uint64{}}
	server := login.NewServer(login.ServerOptions{
		Book: s.book, Records: records, Caller: login.PeerUID, Service: pamService, Log: a.log,
		LoggedIn: func(session login.Session, uid uint32, took time.Duration) {
			a.ledger.loggedIn(session.ID, session.Account.Name, uid)
			a.traceLogin(trace.Event{
				ActivityID: session.Activity, Duration: took, User: session.Person,
				Detail: fmt.Sprintf("%s is logged in as %s (user id %d)", session.Person, session.Account.Name, uid),
			})
			signal(a.changed)
		},
		Refused: func(r *login.Refused) {
			s.mu.Lock()
			s.refused[r.Reason]++
			s.mu.Unlock()
			if r.Activity != "" {
				a.traceLogin(trace.Event{ActivityID: r.Activity, Detail: "login refused: " + r.Message, Error: "login-refused"})
			}
			signal(a.changed)
		},
	})
	go func() {
		if err := server.Serve(l); err != nil {
			a.log.Error("login socket", "error", err)
		}
	}()
	return s, nil
}

// prepare sees to it that the host knows the account before the session dials, and says why the person can't have it.
func (s *signIn) prepare(ctx context.Context, host string, req bus.HostConnect) *refusal.Error {
	a := *req.Account
	refused := func(err error) *refusal.Error {
		return refusal.New(refusal.AccountRefused, "Session host %s can't log %s in as %q: %v.", host, req.User, a.Name, err).With(req.ActivityID)
	}
	err := account.CheckName(a.Name)
	if err == nil && a.Create {
		err = account.CheckUID(a.UID)
	}
	if err == nil {
		err = s.records.Check(a.Name, req.User, a.UID)
	}
	if err != nil {
		return refused(err)
	}
	switch {
	case !a.Create:
		return nil // the host knows it, or PAM's question finds that it doesn't
	case s.shared != nil:
		err = s.shared.Add(a, req.User)
	default:
		s.making.Lock()
		_, err = login.Ensure(ctx, a, req.User)
		s.making.Unlock()
	}
	if err != nil {
		return refused(err)
	}
	return nil
}

// traceLogin tells of a login in the timeline of the connect that it belongs to.
func (a *Agent) traceLogin(e trace.Event) {
	e.Step, e.At = trace.StepRDP, time.Now().Add(-e.Duration)
	a.trace(e)
}

// dialRDP connects a session to the RDP server, from an address of its own where it logs in by that. release is to be
// called when the session has ended.
func (a *Agent) dialRDP(ctx context.Context, req bus.HostConnect) (conn *net.TCPConn, release func(), err error) {
	release = func() {}
	if req.Account == nil || a.signIn == nil {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", a.opts.RDPAddr)
		if err != nil {
			return nil, release, err
		}
		return c.(*net.TCPConn), release, nil
	}
	lease, err := a.signIn.book.Lease(login.Session{
		ID: req.SessionID, Activity: req.ActivityID, Person: req.User, Account: *req.Account, Resource: req.Resource, Proof: req.Proof,
	})
	if err != nil {
		return nil, release, err
	}
	conn, err = lease.Dial(ctx, a.opts.RDPAddr)
	return conn, lease.Release, err
}

// copyProgram puts this program at path, whole or not at all.
func copyProgram(path string) error {
	if err := writeProgram(path + ".new"); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// writeProgram writes this program to path.
func writeProgram(path string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	in, err := os.Open(self)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(0o755), out.Sync(), out.Close())
}
