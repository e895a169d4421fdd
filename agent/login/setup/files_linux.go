package setup

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
)

// maxFile bounds what is read of one file.
const maxFile = 1 << 20

// tree is the machine's files. Links are never followed, and only files that the owner alone may change are touched.
type tree struct {
	root  string       // "/", but for tests
	owner uint32       // root
	fault func() error // nil but for tests: fails a write as a crash would
}

func (t tree) at(p string) string { return path.Join(t.root, p) }

// checkOwner says why others than root could change what is at p.
func (t tree) checkOwner(p string, fi fs.FileInfo) error {
	s, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !ok || s.Uid != t.owner:
		return refusal("%s belongs to user %d, not to root: look who made it, then chown root it", p, s.Uid)
	case fi.Mode().Perm()&0o022 != 0:
		return refusal("%s may be written by others than root (mode %04o): chmod go-w it", p, fi.Mode().Perm())
	}
	return nil
}

// checkFolders says why others than root could put another file in the place of p.
func (t tree) checkFolders(p string) error {
	for dir := path.Dir(p); ; dir = path.Dir(dir) {
		fi, err := os.Lstat(t.at(dir))
		if err != nil {
			return err
		}
		if !fi.IsDir() {
			return refusal("%s is not a folder but a %s: nothing is changed behind it", dir, fi.Mode().Type())
		}
		if err := t.checkOwner(dir, fi); err != nil {
			return err
		}
		if dir == "/" {
			return nil
		}
	}
}

// checkFile says why p is no plain file that root alone may change.
func (t tree) checkFile(p string) (fs.FileInfo, error) {
	if err := t.checkFolders(p); err != nil {
		return nil, err
	}
	fi, err := os.Lstat(t.at(p))
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, refusal("%s is not a plain file (%s): it is left alone", p, fi.Mode().Type())
	}
	return fi, t.checkOwner(p, fi)
}

// read gives a file's text and attributes; fi is nil where there is none.
func (t tree) read(p string) (text string, fi fs.FileInfo, err error) {
	if fi, err = t.checkFile(p); errors.Is(err, fs.ErrNotExist) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	f, err := os.OpenFile(t.at(p), os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s is larger than %d bytes", p, maxFile)
	}
	return string(data), fi, err
}

// missingFolders are those that p needs, the outermost first.
func (t tree) missingFolders(p string) (dirs []string) {
	for dir := path.Dir(p); dir != "/"; dir = path.Dir(dir) {
		if _, err := os.Lstat(t.at(dir)); errors.Is(err, fs.ErrNotExist) {
			dirs = append([]string{dir}, dirs...)
		}
	}
	return dirs
}

// write replaces a file, whole or not at all, also over a loss of power.
func (t tree) write(p, text string, mode fs.FileMode, uid, gid int) error {
	if err := fail(t.fault); err != nil {
		return err
	}
	if err := t.checkFolders(p); err != nil {
		return err
	}
	tmp := t.at(p) + ".rendezvous-new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	if err = errors.Join(err, f.Chown(uid, gid), f.Chmod(mode), f.Sync(), f.Close()); err == nil {
		err = os.Rename(tmp, t.at(p))
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("%s: %w", p, err)
	}
	return syncDir(path.Dir(t.at(p)))
}

func (t tree) remove(p string) error {
	if err := fail(t.fault); err != nil {
		return err
	}
	if err := t.checkFolders(p); err != nil {
		return err
	}
	if err := os.Remove(t.at(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(path.Dir(t.at(p)))
}

func (t tree) exists(p string) bool {
	_, err := os.Stat(t.at(p))
	return err == nil
}

// lines of a small file; none where it can't be read.
func (t tree) lines(p string) []string {
	data, err := os.ReadFile(t.at(p))
	if err != nil {
		return nil
	}
	return strings.Split(string(data), "\n")
}
