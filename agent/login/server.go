package login

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

const (
	// exchange bounds one login on the socket. Making an account with its home folder is part of it.
	exchange = 30 * time.Second
	// maxExchanges bounds the logins at one time.
	maxExchanges = 32
)

// ServerOptions are what a Server works with. All but Log are required.
type ServerOptions struct {
	Book    *Book
	Records *Records
	// Caller gives the user id of a connection's other end.
	Caller func(net.Conn) (uint32, error)
	// Service is the PAM service that logins come from: xrdp-sesman.
	Service string
	// LoggedIn is told of each login before PAM is, and how long it took since PAM's question.
	LoggedIn func(s Session, uid uint32, took time.Duration)
	// Refused is told of each refusal.
	Refused func(*Refused)
	Log     *slog.Logger
}

// Server answers PAM's helper.
type Server struct {
	o     ServerOptions
	slots chan struct{}
	// making is held while an account is made: tools like useradd lock their files and give up on each other.
	making sync.Mutex
}

// NewServer makes one.
func NewServer(o ServerOptions) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{o: o, slots: make(chan struct{}, maxExchanges)}
}

// Serve answers on l until it is closed.
func (s *Server) Serve(l net.Listener) error {
	for pause := time.Duration(0); ; {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil: // no descriptors, say
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.o.Log.Error("login socket", "error", err)
			time.Sleep(pause)
			continue
		}
		pause = 0
		// Strangers are sent away before they take a place.
		if uid, err := s.o.Caller(conn); err != nil || uid != 0 {
			s.refused(refuse(Caller, "user %d of this host spoke to the login socket, which answers root alone (%v)", uid, err))
			conn.Close()
			continue
		}
		select {
		case s.slots <- struct{}{}:
			go func() {
				defer func() { conn.Close(); <-s.slots }()
				s.exchange(conn)
			}()
		default:
			s.refused(refuse(Busy, "%d logins are under way at once on this host", maxExchanges))
			conn.Close()
		}
	}
}

// exchange is one login.
func (s *Server) exchange(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(exchange))
	began := time.Now()
	session, uid, err := s.login(conn, began)
	if err != nil {
		var r *Refused
		if !errors.As(err, &r) {
			r = refuse(BadRequest, "a login could not be carried out: %v", err)
		}
		s.refused(r)
		writeMessage(conn, answer{Error: r.Message})
		return
	}
	s.o.Log.Info("logged in", "activity", session.Activity, "session", session.ID, "user", session.Person, "account", session.Account.Name, "uid", uid,
		"took", time.Since(began).Round(time.Microsecond).String())
	writeMessage(conn, answer{OK: true})
}

// login checks, has the account made, and checks again.
func (s *Server) login(conn net.Conn, began time.Time) (session Session, uid uint32, err error) {
	r := bufio.NewReaderSize(conn, maxMessage)
	var a ask
	if err := readMessage(r, &a); err != nil {
		return session, 0, refuse(BadRequest, "a request on the login socket can't be read: %v", err)
	}
	if err := a.check(); err != nil {
		return session, 0, refuse(BadRequest, "a request on the login socket is not PAM's: %v", err)
	}
	if a.Service != s.o.Service {
		return session, 0, refuse(BadRequest, "PAM service %q asked, and logins come from %q alone", clip(a.Service), s.o.Service)
	}
	lease, err := s.o.Book.Admit(a.User, a.Remote)
	if err != nil {
		return session, 0, err
	}
	session = lease.Session()
	s.making.Lock()
	defer s.making.Unlock()
	if err := s.o.Records.Check(session.Account.Name, session.Person, session.Account.UID); err != nil {
		return session, 0, refuse(Account, "%v", err).at(lease)
	}
	if err := writeMessage(conn, answer{Account: &session.Account, Comment: session.Person}); err != nil {
		return session, 0, refuse(Account, "the PAM helper went away: %v", err).at(lease)
	}
	var o outcome
	if err := readMessage(r, &o); err != nil {
		return session, 0, refuse(Account, "the PAM helper did not say whether the account is there: %v", err).at(lease)
	}
	if o.Failed != "" || o.UID == 0 || session.Account.Create && o.UID != session.Account.UID {
		why := cmp.Or(o.Failed, fmt.Sprintf("it has user id %d", o.UID))
		return session, 0, refuse(Account, "account %q of %s can't be used: %s", session.Account.Name, session.Person, why).at(lease)
	}
	rec := Record{
		Person: session.Person, UID: o.UID, Resource: session.Resource, Activity: session.Activity, Proof: session.Proof, At: time.Now().UTC(),
	}
	if err := s.o.Records.Check(session.Account.Name, session.Person, o.UID); err != nil {
		return session, 0, refuse(Account, "%v", err).at(lease)
	}
	if _, err := s.o.Book.Commit(a.User, a.Remote); err != nil {
		return session, 0, err
	}
	if err := s.o.Records.Put(session.Account.Name, rec); err != nil {
		return session, 0, refuse(Account, "it can't be kept whose account %q is: %v", session.Account.Name, err).at(lease)
	}
	s.o.LoggedIn(session, o.UID, time.Since(began))
	return session, o.UID, nil
}

func (s *Server) refused(r *Refused) {
	s.o.Log.Warn("login refused", "reason", r.Reason, "activity", r.Activity, "session", r.Session, "why", r.Message)
	s.o.Refused(r)
}
