package login

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"rendezvous.dev/rendezvous/wire/account"
	"rendezvous.dev/rendezvous/wire/bus"
)

// Help is what pam_exec runs as root for each login (pam_exec(8) gives it PAM_USER, PAM_RHOST and PAM_SERVICE). It asks
// the agent at socket, makes the account where the agent says so, and returns nil where PAM is to let the user in.
func Help(ctx context.Context, socket string, getenv func(string) string) error {
	ctx, cancel := context.WithTimeout(ctx, exchange)
	defer cancel()
	if kind := getenv("PAM_TYPE"); kind != "auth" {
		return fmt.Errorf("this helper answers PAM's auth, not %q: name it in the auth line alone", kind)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("no agent answers: is rendezvous-agent running, with this --login-dir? %w", err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if err := os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"); err != nil { // PAM gives none
		return err
	}
	if uid, err := PeerUID(conn); err != nil || os.Geteuid() != 0 {
		return fmt.Errorf("the socket's other end is user %d, this is user %d: run by root alone (%v)", uid, os.Geteuid(), err)
	}
	r := bufio.NewReaderSize(conn, maxMessage)
	if err := writeMessage(conn, ask{User: getenv("PAM_USER"), Remote: getenv("PAM_RHOST"), Service: getenv("PAM_SERVICE")}); err != nil {
		return err
	}
	var a answer
	if err := readMessage(r, &a); err != nil {
		return fmt.Errorf("the agent gave no answer: %w", err)
	}
	if a.Account == nil {
		return errors.New(a.Error)
	}
	var o outcome
	if o.UID, err = Ensure(ctx, *a.Account, a.Comment); err != nil {
		o.Failed = err.Error()
	}
	if err := writeMessage(conn, o); err != nil {
		return err
	}
	a = answer{}
	if err := readMessage(r, &a); err != nil {
		return fmt.Errorf("the agent gave no answer: %w", err)
	}
	if !a.OK {
		return errors.New(a.Error)
	}
	return nil
}

// Ensure gives the user id of a person's account, which it makes where the account says so and the host has none. It is
// root's to do. comment, whose the account is, goes into the list of users.
func Ensure(ctx context.Context, a bus.Account, comment string) (uint32, error) {
	if err := account.CheckName(a.Name); err != nil {
		return 0, err
	}
	known, err := lookUp(ctx, a.Name)
	if err != nil {
		return 0, err
	}
	switch {
	case known != nil && known.name != a.Name:
		return 0, fmt.Errorf("the host calls account %q %q: let the pool's claim give the name as the host spells it", a.Name, known.name)
	case known != nil && account.CheckUID(known.uid) != nil:
		return 0, fmt.Errorf("the host's account %q is the system's: %w", a.Name, account.CheckUID(known.uid))
	case !a.Create && known == nil:
		return 0, fmt.Errorf("the host knows no account %q: add it to the directory that the host uses (`getent passwd %s` must find it), or let the pool create accounts (spec.accounts.policy: Create)", a.Name, a.Name)
	case !a.Create:
		return known.uid, nil
	}
	if err := account.CheckUID(a.UID); err != nil {
		return 0, err
	}
	if known == nil {
		if err := create(ctx, a, comment); err != nil {
			return 0, err
		}
	} else if known.uid != a.UID {
		return 0, fmt.Errorf("the host has an account %q of its own, with user id %d, and the pool gives %d: remove it from the host, or use spec.accounts.policy: Existing", a.Name, known.uid, a.UID)
	}
	return a.UID, ownHome(ctx, a.Name, a.UID)
}

func home(name string) string { return filepath.Join("/home", name) }

// create makes the account, with a group of its own and no password.
func create(ctx context.Context, a bus.Account, comment string) error {
	id := strconv.FormatUint(uint64(a.UID), 10)
	if other, err := lookUp(ctx, id); err != nil {
		return err
	} else if other != nil {
		return fmt.Errorf("the host has given user id %s to %q: change spec.accounts.uidRange of the pool", id, other.name)
	}
	// A folder from before would be taken over as it is, with what is in it.
	if fi, err := os.Lstat(home(a.Name)); err == nil && !ownedBy(fi, a.UID) {
		return fmt.Errorf("%s is there already and isn't user %s's: move it away", home(a.Name), id)
	}
	out, err := exec.CommandContext(ctx, "useradd", "--uid", id, "--user-group", "--create-home", "--home-dir", home(a.Name),
		"-K", "HOME_MODE=0700", "--shell", shell(), "--comment", gecos(comment), "--", a.Name).CombinedOutput()
	if err != nil {
		return fmt.Errorf("useradd: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// shell is what new accounts start.
func shell() string {
	if _, err := os.Stat("/bin/bash"); err == nil {
		return "/bin/bash"
	}
	return "/bin/sh"
}

// ownHome makes sure that a home is there, its owner's alone.
func ownHome(ctx context.Context, name string, uid uint32) error {
	dir := home(name)
	fi, err := os.Lstat(dir)
	if errors.Is(err, os.ErrNotExist) { // the account came from a list, or its volume was changed
		// It copies /etc/skel as the new owner, which is subtle enough to be left to PAM's own.
		if out, err := exec.CommandContext(ctx, "mkhomedir_helper", name, "0077").CombinedOutput(); err != nil {
			return fmt.Errorf("mkhomedir_helper: %w: %s", err, strings.TrimSpace(string(out)))
		}
		fi, err = os.Lstat(dir)
	}
	if err != nil {
		return err
	}
	if !fi.IsDir() || !ownedBy(fi, uid) {
		return fmt.Errorf("%s is not a folder of user %d: move it away", dir, uid)
	}
	return nil
}

func ownedBy(fi os.FileInfo, uid uint32) bool {
	s, ok := fi.Sys().(*syscall.Stat_t)
	return ok && s.Uid == uid
}

// entry is one of the host's list of users.
type entry struct {
	name string
	uid  uint32
}

// lookUp asks the host's name service, which may be a directory, for an account by name or by number. nil: there is none.
// What stands in files is read from them: to start another program for it takes longer than all the rest of a login.
func lookUp(ctx context.Context, key string) (*entry, error) {
	if e, sure := lookUpInFiles(key, os.ReadFile); sure {
		return e, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "getent", "passwd", key).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 2 { // getent(1): not found
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("getent passwd %s: %w", key, err)
	}
	e, ok := parseEntry(strings.TrimSpace(string(out)))
	if !ok {
		return nil, fmt.Errorf("getent passwd %s answers %q", key, clip(string(out)))
	}
	return &e, nil
}

// userFiles are the lists of users behind those sources of nsswitch.conf(5) that are files.
var userFiles = map[string]string{"files": "/etc/passwd", "extrausers": "/var/lib/extrausers/passwd"}

// lookUpInFiles looks an account up in the sources that come first and are files. sure is false where a source that must
// be asked in another way could have it.
func lookUpInFiles(key string, read func(string) ([]byte, error)) (e *entry, sure bool) {
	conf, err := read("/etc/nsswitch.conf")
	if err != nil {
		return nil, false
	}
	for _, line := range strings.Split(string(conf), "\n") {
		line, _, _ = strings.Cut(line, "#")
		sources, ok := strings.CutPrefix(strings.TrimSpace(line), "passwd:")
		if !ok {
			continue
		}
		for _, source := range strings.Fields(sources) {
			file, ok := userFiles[source]
			if !ok { // a directory, or a rule in brackets
				return nil, false
			}
			list, err := read(file)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, false
			}
			for _, line := range strings.Split(string(list), "\n") {
				if found, ok := parseEntry(line); ok && (found.name == key || strconv.FormatUint(uint64(found.uid), 10) == key) {
					return &found, true
				}
			}
		}
		return nil, true
	}
	return nil, false
}

// parseEntry reads a line of a list of users (passwd(5)).
func parseEntry(line string) (entry, bool) {
	f := strings.Split(line, ":")
	if len(f) < 7 || f[0] == "" {
		return entry{}, false
	}
	uid, err := strconv.ParseUint(f[2], 10, 32)
	return entry{f[0], uint32(uid)}, err == nil
}
