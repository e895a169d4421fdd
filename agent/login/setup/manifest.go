package setup

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Folder is where, in the agent's state folder, the originals are.
const (
	Folder       = "login-setup"
	manifestFile = "manifest.json"
)

// manifest says what was changed. It is written before the first file is, so that a crash leaves nothing that is not in it.
type manifest struct {
	Options Options `json:"options"`
	Files   []entry `json:"files"`
	// Folders were made for the files.
	Folders []string `json:"folders,omitempty"`
	// Pending says that xrdp has yet to be restarted.
	Pending bool `json:"pending,omitempty"`
}

// entry is one changed file.
type entry struct {
	Path string `json:"path"`
	// Original is the name of the copy beside the manifest; empty where there was no file.
	Original    string      `json:"original,omitempty"`
	OriginalSum string      `json:"originalSha256,omitempty"`
	Mode        fs.FileMode `json:"mode"`
	UID         int         `json:"uid"`
	GID         int         `json:"gid"`
	// Written are the SHA-256 sums of what was, or was about to be, written; the last is what the file should be.
	Written []string `json:"writtenSha256"`
	// Edited says that somebody changed the file after us and that we changed it once more: it can't be restored without
	// losing that.
	Edited bool `json:"edited,omitempty"`
}

func sum(text string) string {
	s := sha256.Sum256([]byte(text))
	return hex.EncodeToString(s[:])
}

// state of a changed file.
type state int

const (
	asSetUp  state = iota // as we wrote it
	original              // as it was before
	gone                  // removed
	foreign               // changed by somebody else
)

func (e *entry) stateOf(text string, exists bool) state {
	switch {
	case !exists && e.Original == "":
		return original
	case !exists:
		return gone
	case slices.Contains(e.Written, sum(text)):
		return asSetUp
	case e.Original != "" && e.OriginalSum == sum(text):
		return original
	}
	return foreign
}

func (m *manifest) entry(path string) *entry {
	for i := range m.Files {
		if m.Files[i].Path == path {
			return &m.Files[i]
		}
	}
	return nil
}

// store is the folder with manifest and originals.
type store struct {
	dir   string
	fault func() error // nil but for tests
}

func fail(fault func() error) error {
	if fault == nil {
		return nil
	}
	return fault()
}

// load gives nil where nothing was set up.
func (s store) load() (*manifest, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	m := &manifest{}
	if err == nil {
		err = json.Unmarshal(data, m)
	}
	if err != nil {
		return nil, fmt.Errorf("%s says what was changed on this machine, and can't be read: %w", filepath.Join(s.dir, manifestFile), err)
	}
	return m, nil
}

// keep stores an original under the name that its content gives it: one copy never takes another's place.
func (s store) keep(path, text string) (name string, err error) {
	name = filepath.Base(path) + "-" + sum(text)[:12]
	if old, err := os.ReadFile(filepath.Join(s.dir, name)); err == nil && string(old) == text {
		return name, nil
	}
	return name, s.write(name, []byte(text))
}

func (s store) original(e *entry) (string, error) {
	if e.Original == "" {
		return "", nil
	}
	data, err := os.ReadFile(filepath.Join(s.dir, filepath.Base(e.Original)))
	if err == nil && sum(string(data)) != e.OriginalSum {
		err = errors.New("its content is not what the manifest says")
	}
	if err != nil {
		return "", fmt.Errorf("the original of %s, %s: %w", e.Path, filepath.Join(s.dir, e.Original), err)
	}
	return string(data), nil
}

func (s store) save(m *manifest) error {
	data, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return err
	}
	return s.write(manifestFile, append(data, '\n'))
}

// write replaces a file of the folder, whole or not at all, also over a loss of power.
func (s store) write(name string, data []byte) error {
	if err := fail(s.fault); err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(s.dir, ".new-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.dir, name))
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	return syncDir(s.dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// remove forgets what was set up: first the manifest, without which the originals mean nothing.
func (s store) remove() error {
	if err := os.Remove(filepath.Join(s.dir, manifestFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(s.dir)
}
