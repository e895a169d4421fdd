package login

import (
	"os"
	"testing"
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
