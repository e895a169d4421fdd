package control

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"
)

// ErrNoHelper is of a desktop's container that runs no helper; it names the way out.
var ErrNoHelper = errors.New("the desktop's container has no session helper: its entrypoint must run `login session-helper` from the login folder, as root; see hack/desktop/rdpkit/recipe/desktop")

// Remote tells the helper in the desktop's container. The newest helper counts. Safe for concurrent use.
type Remote struct {
	// Caller gives the user id of a connection's other end.
	Caller func(net.Conn) (uint32, error)
	Log    *slog.Logger

	mu     sync.Mutex
	conn   net.Conn // guarded by mu; nil while there is none
	lastID uint64
	wait   map[uint64]chan result
}

// Serve takes helpers on l until it is closed.
func (r *Remote) Serve(l net.Listener) error {
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			r.Log.Error("session helper's socket", "error", err)
			time.Sleep(time.Second)
			continue
		}
		if uid, err := r.Caller(conn); err != nil || uid != 0 {
			r.Log.Warn("session helper refused: root alone may be one", "uid", uid, "error", err)
			conn.Close()
			continue
		}
		r.replace(conn)
		go r.read(conn)
	}
}

func (r *Remote) replace(conn net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn != nil {
		r.conn.Close()
	}
	r.conn = conn
}

// read hands the helper's answers to those who wait for them.
func (r *Remote) read(conn net.Conn) {
	in := bufio.NewReaderSize(conn, maxMessage)
	for {
		var res result
		if err := readLine(in, &res); err != nil {
			break
		}
		r.mu.Lock()
		if c := r.wait[res.ID]; c != nil {
			c <- res // it has a place
			delete(r.wait, res.ID)
		}
		r.mu.Unlock()
	}
	conn.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == conn {
		r.conn = nil
	}
}

func (r *Remote) tell(ctx context.Context, c command) error {
	ctx, cancel := context.WithTimeout(ctx, actTimeout+time.Second)
	defer cancel()
	answer := make(chan result, 1)
	r.mu.Lock()
	conn := r.conn
	if conn == nil {
		r.mu.Unlock()
		return ErrNoHelper
	}
	if r.wait == nil {
		r.wait = map[uint64]chan result{}
	}
	r.lastID++
	c.ID = r.lastID
	r.wait[c.ID] = answer
	conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
	err := writeLine(conn, c)
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.wait, c.ID)
		r.mu.Unlock()
	}()
	if err != nil {
		conn.Close()
		return err
	}
	select {
	case res := <-answer:
		switch {
		case res.Gone:
			return ErrNoDesktop
		case res.Error != "":
			return errors.New(res.Error)
		}
		return nil
	case <-ctx.Done():
		return errors.New("the desktop's session helper gave no answer")
	}
}

// LogOff implements Control.
func (r *Remote) LogOff(ctx context.Context, d Desktop) error {
	return r.tell(ctx, command{Act: actLogOff, UID: d.UID, Display: d.Display})
}

// Message implements Control.
func (r *Remote) Message(ctx context.Context, d Desktop, text string) error {
	return r.tell(ctx, command{Act: actMessage, UID: d.UID, Display: d.Display, Text: text})
}
