package agent

import (
	"cmp"
	"os"
	"os/user"
)

// readDesktops gives the RDP server's sessions and whether a client is connected to each; nil where it can't be known.
func readDesktops(table string) map[desktop]bool {
	f, err := os.Open(cmp.Or(table, "/proc/net/unix"))
	if err != nil {
		return nil
	}
	defer f.Close()
	attached, err := parseDesktops(f)
	if err != nil {
		return nil
	}
	return attached
}

// osUser names a user of this machine. In a pod the desktop's users are unknown to the agent's container.
func osUser(uid string) string {
	if u, err := user.LookupId(uid); err == nil {
		return u.Username
	}
	return "uid " + uid
}
