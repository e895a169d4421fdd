// Command intruder is what a local user of a session host does who wants to be somebody else there. The end-to-end tests
// run it on a host as such a user, beside the victim's sessions.
//
//	intruder forward PORT ADDRESS   brings connections to 127.0.0.1:PORT to the RDP server, from ADDRESS
//	intruder lurk PORT SECONDS      the same, from whatever address the agent dials next; says which it was
//	intruder ask SOCKET JSON        speaks to a Unix socket, and says what is answered
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

const rdp = "127.0.0.1:3389"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "forward":
		return forward(args[1], func() (string, error) { return args[2], nil })
	case len(args) == 3 && args[0] == "lurk":
		seconds, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return forward(args[1], func() (string, error) { return lurk(time.Duration(seconds) * time.Second) })
	case len(args) == 3 && args[0] == "ask":
		return ask(args[1], args[2])
	}
	return fmt.Errorf("usage: intruder forward|lurk|ask …")
}

// forward takes one connection after the other, each from the address that from gives once it has come.
func forward(port string, from func() (string, error)) error {
	l, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			address, err := from()
			if err != nil {
				fmt.Println("error:", err)
				return
			}
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
			s, err := d.Dial("tcp", rdp)
			if err != nil {
				fmt.Println("error:", err)
				return
			}
			defer s.Close()
			fmt.Println("from", address)
			go func() { io.Copy(s, c); s.(*net.TCPConn).CloseWrite() }()
			io.Copy(c, s)
		}()
	}
}

// victims are the addresses from which somebody else has connections to the RDP server.
func victims() ([]string, error) {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, line := range strings.Split(string(table), "\n") {
		f := strings.Fields(line)
		if len(f) < 8 || f[2] != "0100007F:0D3D" || f[3] != "01" || f[7] == strconv.Itoa(os.Getuid()) {
			continue
		}
		n, err := strconv.ParseUint(f[1][:8], 16, 32)
		if err != nil {
			return nil, err
		}
		a := fmt.Sprintf("%d.%d.%d.%d", n&255, n>>8&255, n>>16&255, n>>24)
		if a != "127.0.0.1" {
			found = append(found, a)
		}
	}
	return found, nil
}

// lurk waits for a connection that wasn't there before, and gives its address at once.
func lurk(limit time.Duration) (string, error) {
	before, err := victims()
	if err != nil {
		return "", err
	}
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(200 * time.Microsecond) {
		now, err := victims()
		if err != nil {
			return "", err
		}
		for _, a := range now {
			if !slices.Contains(before, a) {
				return a, nil
			}
		}
	}
	return "", fmt.Errorf("nobody came within %s", limit)
}

func ask(socket, text string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, text+"\n"); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	fmt.Printf("answer: %s\n", strings.TrimSpace(answer))
	return err
}
