package setup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
)

// defaultLoginDir is what `agent pam` takes where it is given none.
const defaultLoginDir = "/run/rendezvous-login"

// Check says why an agent that serves loginDir must not let xrdp's sessions begin on this machine: somebody who
// isn't sent by a broker could log in, or everybody's login would fail.
func Check(loginDir string) error { return tree{root: "/"}.check(loginDir) }

func (t tree) check(loginDir string) error {
	text, fi, err := t.read(pamFile)
	if err != nil {
		return err
	}
	if fi == nil {
		return fmt.Errorf("%s is missing", pamFile)
	}
	program, err := guarded(text, loginDir, defaultLoginDir)
	if err != nil {
		return err
	}
	if _, err := t.checkFile(program); err != nil {
		return fmt.Errorf("PAM runs %s as root: %w", program, err)
	}
	return t.checkSocket()
}

// checkSocket says why users of this machine could speak to xrdp's session manager, which takes their word for where
// a login comes from.
func (t tree) checkSocket() error {
	p := socketLink
	for range 4 {
		fi, err := os.Lstat(t.at(p))
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is missing: xrdp-sesman does not run, or listens elsewhere", p)
		}
		if err != nil {
			return err
		}
		if err := t.checkFolders(p); err != nil {
			return err
		}
		if fi.Mode().Type() != fs.ModeSymlink {
			return t.closed(p, fi)
		}
		target, err := os.Readlink(t.at(p))
		if err != nil {
			return err
		}
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(p), target)
		}
		p = path.Clean(target)
	}
	return fmt.Errorf("%s leads nowhere", socketLink)
}

// closed says why others than root and xrdp reach a socket. Its folders are root's.
func (t tree) closed(p string, fi fs.FileInfo) error {
	s, ok := fi.Sys().(*syscall.Stat_t)
	if fi.Mode().Type() != fs.ModeSocket || !ok || s.Uid != t.owner {
		return fmt.Errorf("%s is not a socket of root's", p)
	}
	xrdp := t.gid("xrdp")
	private := func(fi fs.FileInfo, others, group fs.FileMode) bool {
		s, ok := fi.Sys().(*syscall.Stat_t)
		return ok && fi.Mode().Perm()&others == 0 && (fi.Mode().Perm()&group == 0 || s.Gid == t.owner || int(s.Gid) == xrdp)
	}
	if private(fi, 0o002, 0o020) {
		return nil
	}
	for dir := path.Dir(p); dir != "/"; dir = path.Dir(dir) {
		fi, err := os.Lstat(t.at(dir))
		if err != nil {
			return err
		}
		if private(fi, 0o001, 0o010) {
			return nil
		}
	}
	return fmt.Errorf("every user of this machine can speak to xrdp's session manager (%s), and log in as anybody with that", p)
}

// checkRuntime says what of the socket's folder and link is missing. sesman need not run.
func (t tree) checkRuntime(group string) error {
	fi, err := os.Lstat(t.at(socketDir))
	if err != nil {
		return err
	}
	s, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.IsDir() || fi.Mode().Perm() != 0o750 || s.Uid != t.owner || int(s.Gid) != t.gid(group) && t.owner == 0 {
		return fmt.Errorf("%s is not root's, of group %s and mode 0750", socketDir, group)
	}
	if target, err := os.Readlink(t.at(socketLink)); err != nil || target != socketPath {
		return fmt.Errorf("%s does not lead to %s", socketLink, socketPath)
	}
	return nil
}

// makeRuntime does now what tmpfilesFile does at each boot.
func (t tree) makeRuntime(group string) error {
	if t.checkRuntime(group) == nil {
		return nil
	}
	for _, dir := range []string{path.Dir(sockets), sockets, socketDir} {
		if err := os.Mkdir(t.at(dir), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := t.checkFolders(socketPath); err != nil {
		return err
	}
	if err := t.checkFolders(socketLink); err != nil {
		return err
	}
	gid := t.gid(group)
	if t.owner != 0 { // a test
		gid = -1
	}
	if err := errors.Join(os.Chown(t.at(socketDir), int(t.owner), gid), os.Chmod(t.at(socketDir), 0o750)); err != nil {
		return err
	}
	// In one step, so that xrdp finds either its old socket or the new one's place.
	tmp := t.at(socketLink) + "." + strconv.Itoa(os.Getpid())
	if err := os.Symlink(socketPath, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, t.at(socketLink)); err != nil {
		os.Remove(tmp)
		return err
	}
	return nil
}

// removeLink gives sesman's own place back to it.
func (t tree) removeLink() error {
	if target, err := os.Readlink(t.at(socketLink)); err != nil || target != socketPath {
		return nil
	}
	return os.Remove(t.at(socketLink))
}

// removeSocketDir removes the folder that no sesman uses any more. It is gone at the next boot in any case.
func (t tree) removeSocketDir() {
	files, _ := os.ReadDir(t.at(socketDir))
	for _, f := range files {
		if strings.Contains(f.Name(), "sesman.socket") {
			os.Remove(path.Join(t.at(socketDir), f.Name()))
		}
	}
	os.Remove(t.at(socketDir))
}
