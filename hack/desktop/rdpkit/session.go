package rdpkit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Session is a desktop that runs on a [Machine], whether a client shows it or not.
type Session struct {
	// User and UID are those of its X server, by the kernel's word; User is empty where the machine has no name for UID.
	User string
	UID  int
	// Display is the X display: ":10".
	Display string
	// Started and Resumed are from the session's own record, ~/.rdv-session: when it began, and how often a client took it
	// over since. Started is zero for as long as there is none.
	Started time.Time
	Resumed int
}

// CommandAs is Command with the ids of a user of the box, by name or number, and nothing of root's.
func (b *Box) CommandAs(ctx context.Context, user string, argv ...string) *exec.Cmd {
	return b.Command(ctx, append([]string{"setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all", "--"}, argv...)...)
}

// Sessions finds the machine's sessions by their X servers, in the order of their displays.
func (m *Machine) Sessions(ctx context.Context) ([]Session, error) {
	comms, err := filepath.Glob(m.Path("/proc/[0-9]*/comm"))
	if err != nil {
		return nil, err
	}
	var all []Session
	for _, comm := range comms {
		name, err := os.ReadFile(comm)
		if err != nil || strings.TrimSpace(string(name)) != "Xorg" {
			continue // nil, or it has just ended
		}
		s, err := m.session(ctx, filepath.Dir(comm))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if s.Display != "" {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b Session) int { return cmp.Compare(a.Display, b.Display) })
	return all, nil
}

// session describes the session of the X server whose folder of /proc dir is. It has no Display if that server ends.
func (m *Machine) session(ctx context.Context, dir string) (Session, error) {
	var s Session
	fi, err := os.Stat(dir)
	if err != nil {
		return s, err
	}
	s.UID = int(fi.Sys().(*syscall.Stat_t).Uid)
	line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return s, err
	}
	for _, arg := range strings.Split(string(line), "\x00") {
		if n, ok := strings.CutPrefix(arg, ":"); ok {
			if _, err := strconv.Atoi(n); err == nil {
				s.Display = arg
				break
			}
		}
	}
	// NAME:x:UID:GID:COMMENT:HOME:SHELL
	out, err := m.Command(ctx, "getent", "passwd", strconv.Itoa(s.UID)).Output()
	entry := strings.Split(strings.TrimSpace(string(out)), ":")
	if err != nil || len(entry) < 7 {
		return s, nil
	}
	s.User = entry[0]
	record, err := m.ReadFile(filepath.Join(entry[5], ".rdv-session"))
	if err != nil {
		return s, nil
	}
	for _, line := range strings.Split(string(record), "\n") {
		switch key, value, _ := strings.Cut(line, "="); key {
		case "display":
			if value != s.Display { // of an earlier session
				s.Started, s.Resumed = time.Time{}, 0
				return s, nil
			}
		case "started":
			if s.Started, err = time.Parse(time.RFC3339, value); err != nil {
				return s, fmt.Errorf("%s/.rdv-session: %w", entry[5], err)
			}
		case "resumed":
			s.Resumed++
		}
	}
	return s, nil
}
