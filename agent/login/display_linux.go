package login

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// screens is where X servers have their sockets; root has to own it, or its owner could move another user's away.
const screens = "/tmp/.X11-unix"

// CheckDisplay says why a session must not begin on an X display ($DISPLAY): the programs' input and output could go to
// another user of this machine. Programs reach their X server by two sockets, and whoever had bound the name of either
// before would be the session's screen and keyboard.
func CheckDisplay(display string) error {
	number, _, _ := strings.Cut(strings.TrimPrefix(display, ":"), ".")
	if _, err := strconv.ParseUint(number, 10, 16); err != nil || !strings.HasPrefix(display, ":") {
		return fmt.Errorf("%q is not the name of an X display of this machine", clip(display))
	}
	fi, err := os.Lstat(screens)
	if err != nil {
		return err
	}
	if s, ok := fi.Sys().(*syscall.Stat_t); !ok || s.Uid != 0 || !fi.IsDir() || fi.Mode()&os.ModeSticky == 0 {
		return fmt.Errorf("%s is not a folder of root's with the sticky bit", screens)
	}
	mine, err := ownSockets()
	if err != nil {
		return err
	}
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return err
	}
	for _, prefix := range []string{"", "@"} {
		if err := checkListeners(string(table), prefix+screens+"/X"+number, mine); err != nil {
			return err
		}
	}
	if out, err := exec.Command("xauth", "list", display).Output(); err != nil || len(out) == 0 {
		return fmt.Errorf("there is no X cookie for %s, so every user of this machine could see and steer the session: is xauth installed? (%v)", display, err)
	}
	return nil
}

// ownSockets are the inodes of the sockets that this user's processes have open.
func ownSockets() (map[string]bool, error) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	mine := map[string]bool{}
	for _, l := range links { // others' folders can't be read, so they aren't among these
		if target, err := os.Readlink(l); err == nil {
			if inode, ok := strings.CutPrefix(target, "socket:["); ok {
				mine[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	return mine, err
}

// checkListeners looks into the kernel's table of Unix sockets (Num RefCount Protocol Flags Type St Inode Path): somebody
// listens at path, and nobody does but with a socket of mine.
func checkListeners(table, path string, mine map[string]bool) error {
	found := false
	for lines := bufio.NewScanner(strings.NewReader(table)); lines.Scan(); {
		f := strings.SplitN(strings.Join(strings.Fields(lines.Text()), " "), " ", 8)
		if len(f) < 8 || f[3] != "00010000" || f[7] != path {
			continue
		}
		if !mine[f[6]] {
			return fmt.Errorf("%s is not this user's X server alone: another user of this machine poses as it", path)
		}
		found = true
	}
	if !found {
		return errors.New("no X server listens at " + path)
	}
	return nil
}

// BeginSession becomes the program that starts a user's desktop, if the display is the user's own.
func BeginSession(program string) error {
	if err := CheckDisplay(os.Getenv("DISPLAY")); err != nil {
		return fmt.Errorf("the session does not begin: %w", err)
	}
	return syscall.Exec(program, []string{program}, os.Environ())
}
