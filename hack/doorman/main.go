// Command doorman stands for an agent that the brokers send people to: it has the agent's login folder, socket and
// accounts, and brings whoever connects to one of its ports to xrdp, as the person whose port it is. Tests of a machine
// run it in the agent's place, in the agent's unit.
//
//	doorman serve [NAME:UID=]ADDRESS...   without a name, connections come from 127.0.0.1 and are nobody's
//	doorman reach SOCKET                  say whether this user can connect to a Unix socket
//	doorman tell FOLDER ACT UID DISPLAY TEXT   have the session helper that comes to the login folder log off or show a message
//	doorman act ACT UID DISPLAY TEXT           log off or show a message here, as an agent does on its own machine
//	doorman pose NAME SERVER              listen at a Unix socket, @… an abstract one, and bring who comes to another
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/agent/control"
	"rendezvous.dev/rendezvous/agent/login"
	"rendezvous.dev/rendezvous/wire/bus"
)

const (
	rdpAddr  = "127.0.0.1:3389"
	stateDir = "/var/lib/rendezvous-agent"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "doorman:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "reach":
		conn, err := net.Dial("unix", args[1])
		if err == nil {
			conn.Close()
		}
		return err
	case len(args) == 3 && args[0] == "pose":
		return pose(args[1], args[2])
	case len(args) == 6 && args[0] == "tell":
		return tell(args[1], args[2], args[3], args[4], args[5])
	case len(args) == 5 && args[0] == "act":
		return carryOut(&control.Local{}, args[1], args[2], args[3], args[4])
	case len(args) > 1 && args[0] == "serve":
		return serve(args[1:])
	}
	return errors.New("usage: doorman serve [NAME:UID=]ADDRESS... | reach SOCKET | tell FOLDER ACT UID DISPLAY TEXT | act ACT UID DISPLAY TEXT | pose NAME SERVER")
}

// tell is what an agent does whose desktops are in the container beside it.
func tell(folder, act, uid, display, text string) error {
	socket := filepath.Join(folder, control.SocketName)
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	defer l.Close()
	remote := &control.Remote{Caller: login.PeerUID, Log: slog.Default()}
	go remote.Serve(l)
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := carryOut(remote, act, uid, display, text)
		if !errors.Is(err, control.ErrNoHelper) || time.Now().After(end) {
			return err
		}
	}
}

func carryOut(by control.Control, act, uid, display, text string) error {
	id, err := strconv.ParseUint(uid, 10, 32)
	if err != nil {
		return err
	}
	number, err := strconv.Atoi(display)
	if err != nil {
		return err
	}
	d := control.Desktop{UID: uint32(id), Display: number}
	if act == "logoff" {
		return by.LogOff(context.Background(), d)
	}
	return by.Message(context.Background(), d, text)
}

func serve(doors []string) error {
	records, err := login.LoadRecords(filepath.Join(stateDir, "accounts.json"))
	if err != nil {
		return err
	}
	book := login.NewBook(login.Options{})
	socket := filepath.Join(login.DefaultDir, login.SocketName)
	os.Remove(socket)
	asked, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return err
	}
	server := login.NewServer(login.ServerOptions{
		Book: book, Records: records, Caller: login.PeerUID, Service: "xrdp-sesman", Log: slog.Default(),
		LoggedIn: func(login.Session, uint32, time.Duration) {}, Refused: func(*login.Refused) {},
	})
	ended := make(chan error)
	go func() { ended <- server.Serve(asked) }()
	for i, door := range doors {
		who, address, ok := strings.Cut(door, "=")
		if !ok {
			who, address = "", door
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		go func() {
			for n := 0; ; n++ {
				conn, err := l.Accept()
				if err != nil {
					ended <- err
					return
				}
				go func() {
					defer conn.Close()
					if err := bring(conn.(*net.TCPConn), book, who, fmt.Sprintf("%d-%d", i, n)); err != nil {
						slog.Error("not brought to xrdp", "who", who, "error", err)
					}
				}()
			}
		}()
	}
	return <-ended
}

// bring joins a connection to xrdp, once there is an account for its person.
func bring(outside *net.TCPConn, book *login.Book, who, id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var inside net.Conn
	var err error
	if who == "" {
		inside, err = net.Dial("tcp", rdpAddr)
	} else {
		name, number, _ := strings.Cut(who, ":")
		uid, uerr := strconv.ParseUint(number, 10, 32)
		if uerr != nil {
			return uerr
		}
		account := bus.Account{Name: name, Create: true, UID: uint32(uid)}
		person := name + "@example.com"
		if _, err := login.Ensure(ctx, account, person); err != nil {
			return err
		}
		lease, lerr := book.Lease(login.Session{ID: id, Activity: id, Person: person, Account: account})
		if lerr != nil {
			return lerr
		}
		defer lease.Release()
		inside, err = lease.Dial(ctx, rdpAddr)
	}
	if err != nil {
		return err
	}
	join(inside, outside)
	return nil
}

// join copies both ways until either end closes.
func join(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{}, 2)
	for _, pair := range [][2]net.Conn{{a, b}, {b, a}} {
		go func() {
			io.Copy(pair[0], pair[1])
			done <- struct{}{}
		}()
	}
	<-done
}

func pose(name, server string) error {
	l, err := net.Listen("unix", name)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		uid, err := login.PeerUID(conn)
		fmt.Println("user", uid, "came", err)
		there, err := net.Dial("unix", server)
		if err != nil {
			return err
		}
		go join(conn, there)
	}
}
