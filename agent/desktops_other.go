//go:build !linux

package agent

// readDesktops is nil: the RDP server's sessions can't be known here.
func readDesktops(string) map[desktop]bool { return nil }

func osUser(uid string) string { return "uid " + uid }
