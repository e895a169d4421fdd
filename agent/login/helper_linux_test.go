package login

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLookUpInFiles(t *testing.T) {
	const own, shared = "root:x:0:0:root:/root:/bin/bash\nalice:x:4711:4711::/home/alice:/bin/bash\n", "alice:*:10001:10001::/home/alice:/bin/bash\nbob:*:10002:10002::/home/bob:/bin/bash\nbroken\n"
	for _, c := range []struct {
		name, conf, key string
		want            *entry // nil: there is none
		sure            bool
	}{
		{"the first source counts", "passwd: files extrausers\n", "alice", &entry{"alice", 4711}, true},
		{"and then the next", "hosts: dns\npasswd:\tfiles extrausers # ours\n", "bob", &entry{"bob", 10002}, true},
		{"by number", "passwd: files extrausers\n", "10002", &entry{"bob", 10002}, true},
		{"nowhere", "passwd: files extrausers\n", "carol", nil, true},
		{"a number that only begins so", "passwd: files\n", "47", nil, true},
		{"found before a directory", "passwd: files sss\n", "alice", &entry{"alice", 4711}, true},
		{"a directory may have it", "passwd: files sss\n", "bob", nil, false},
		{"a directory comes first", "passwd: sss files\n", "alice", nil, false},
		{"a rule", "passwd: files [!NOTFOUND=return] extrausers\n", "bob", nil, false},
		{"commented out", "# passwd: files\n", "alice", nil, false},
		{"no configuration", "", "alice", nil, false},
	} {
		got, sure := lookUpInFiles(c.key, func(path string) ([]byte, error) {
			switch path {
			case "/etc/nsswitch.conf":
				return []byte(c.conf), nil
			case "/etc/passwd":
				return []byte(own), nil
			case "/var/lib/extrausers/passwd":
				return []byte(shared), nil
			}
			return nil, os.ErrNotExist
		})
		if sure != c.sure || (got == nil) != (c.want == nil) || got != nil && *got != *c.want {
			t.Errorf("%s: %+v, %v", c.name, got, sure)
		}
	}
	if _, sure := lookUpInFiles("alice", func(string) ([]byte, error) { return nil, os.ErrPermission }); sure {
		t.Error("sure without having read anything")
	}
}

// Netlink and /proc/net tell of the same sockets.
func TestBothTables(t *testing.T) {
	l, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		if l, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	own := netip.MustParseAddr("127.91.92.93")
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: own.AsSlice()}}
	c, err := d.Dial("tcp4", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	proc, err := procSockets([]netip.Addr{own})
	if err != nil {
		t.Fatal(err)
	}
	var diag []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		some, err := diagSockets(family, []netip.Addr{own})
		if err != nil {
			t.Skip("no netlink for this: ", err)
		}
		diag = append(diag, some...)
	}
	byLocal := func(a, b Socket) int { return a.Local.Compare(b.Local) }
	slices.SortFunc(proc, byLocal)
	slices.SortFunc(diag, byLocal)
	if len(diag) != 2 || !slices.Equal(proc, diag) {
		t.Errorf("netlink: %v, /proc: %v", diag, proc)
	}
}

// Who listens is seen without a connection; and what a server has not accepted yet.
func TestListeners(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("%s: %v", address, err)
			continue
		}
		at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(l.Addr().(*net.TCPAddr).Port))
		before, err := Listeners(at)
		if err != nil {
			t.Skip("no netlink for this: ", err)
		}
		if len(before.Sockets) != 1 || before.Waiting != 0 {
			t.Errorf("%s: %+v, want one socket", address, before)
		}
		c, err := net.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		if now, err := Listeners(at); err != nil || !slices.Equal(now.Sockets, before.Sockets) || now.Waiting != 1 {
			t.Errorf("%s: with a connection that waits: %+v, %v", address, now, err)
		}
		c.Close()
		l.Close()
		if now, err := Listeners(at); err != nil || len(now.Sockets) != 0 {
			t.Errorf("%s: closed: %+v, %v", address, now, err)
		}
	}
}

func FuzzParseDiag(f *testing.F) {
	f.Add(append([]byte{88, 0, 0, 0, 20, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1}, make([]byte, 70)...))
	f.Add([]byte{20, 0, 0, 0, 3, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		found := 0
		parseDiag(data, func(body []byte) {
			if found++; len(body) < diagMessage {
				t.Errorf("a socket in %d bytes", len(body))
			}
		})
		if found > len(data)/diagMessage {
			t.Errorf("%d sockets in %d bytes", found, len(data))
		}
	})
}
