package login

import (
	"bufio"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"rendezvous.dev/rendezvous/wire/bus"
)

// BenchmarkLogin is what a login by connection adds to an RDP handshake, with the kernel's own tables: PAM's question, both
// looks, the record on disk, and the answer. The start of the helper's process comes on top.
func BenchmarkLogin(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	records, err := LoadRecords(filepath.Join(b.TempDir(), "accounts.json"))
	if err != nil {
		b.Fatal(err)
	}
	book := NewBook(Options{UID: uint32(os.Geteuid())})
	s := NewServer(ServerOptions{
		Book: book, Records: records, Service: "xrdp-sesman", Caller: func(net.Conn) (uint32, error) { return 0, nil },
		LoggedIn: func(Session, uint32, time.Duration) {}, Refused: func(r *Refused) { b.Error(r) },
	})
	for b.Loop() {
		b.StopTimer()
		lease, err := book.Lease(Session{ID: "s", Person: "alice@example.com", Account: bus.Account{Name: "alice", Create: true, UID: 10001}})
		if err != nil {
			b.Fatal(err)
		}
		conn, err := lease.Dial(b.Context(), l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		accepted, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		remote, _, _ := net.SplitHostPort(accepted.RemoteAddr().String())
		mine, its := net.Pipe()
		b.StartTimer()
		done := make(chan struct{})
		go func() { s.exchange(its); close(done) }()
		r := bufio.NewReader(mine)
		var a answer
		if err := writeMessage(mine, ask{"alice", remote, "xrdp-sesman"}); err != nil {
			b.Fatal(err)
		}
		if err := readMessage(r, &a); err != nil || a.Account == nil {
			b.Fatal(err, a.Error)
		}
		if err := writeMessage(mine, outcome{UID: 10001}); err != nil {
			b.Fatal(err)
		}
		a = answer{}
		if err := readMessage(r, &a); err != nil || !a.OK {
			b.Fatal(err, a.Error)
		}
		<-done
		b.StopTimer()
		conn.Close()
		accepted.Close()
		lease.Release()
		b.StartTimer()
	}
}
