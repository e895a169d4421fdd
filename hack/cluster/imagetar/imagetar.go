// Package imagetar packs files into a one-layer container image, as a
// docker-archive tar that "ctr images import" reads. There is no image registry
// and no build daemon on the machines that this project is developed on; a
// static Go binary or a debootstrap root needs neither.
//
// Output is deterministic: the same files give the same bytes, whatever their
// modification times, so a tar's hash can tell whether an import is due.
//
// Layout of the archive:
//
//	layer.tar      the file system, one layer
//	<sha256>.json  the image's configuration, named by its digest
//	manifest.json  which of these make the image, and its reference
package imagetar

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Image says what goes into one image.
type Image struct {
	// Ref is the full reference, such as "rendezvous/relay:dev". Containerd
	// completes short names the way the kubelet does.
	Ref string

	// Root, when not empty, is a directory whose whole content becomes the
	// image's file system: owners, modes, symlinks, hard links, device nodes and
	// file capabilities are kept; sockets are left out.
	Root string
	// Files come on top of Root and win over it. Parent directories that are
	// missing are made, root-owned, mode 0755.
	Files []File

	Entrypoint []string
	Cmd        []string
	Env        []string // each NAME=value
	User       string   // "uid", "uid:gid" or a name of the image's /etc/passwd
	WorkingDir string   // "/" when empty
	Labels     map[string]string
}

// File is one entry of an image. Its content is Data, or else the file named
// Source. With Link it is a symlink; with fs.ModeDir in Mode, a directory.
type File struct {
	Path   string // absolute, in the image
	Source string // on this machine
	Data   []byte
	Link   string
	Mode   fs.FileMode // permissions, setuid, setgid and sticky; 0 means 0644 (directories: 0755)
	UID    int
	GID    int
}

// epoch is every entry's modification time.
var epoch = time.Unix(0, 0).UTC()

// WriteFile writes img to the file name, which appears whole or not at all.
func WriteFile(name string, img Image) (err error) {
	out, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			out.Close()
			os.Remove(out.Name())
		}
	}()
	if err := Write(out, img); err != nil {
		return err
	}
	if err := out.Chmod(0o644); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Rename(out.Name(), name)
}

// Write writes img to w. The layer goes through a temporary file first, as its
// size and digest have to be known before it is written.
func Write(w io.Writer, img Image) error {
	if img.Ref == "" {
		return errors.New("imagetar: the image has no reference")
	}
	layer, err := os.CreateTemp("", "imagetar-layer-*")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()

	sum := sha256.New()
	buffered := bufio.NewWriterSize(io.MultiWriter(layer, sum), 1<<20)
	if err := writeLayer(buffered, img); err != nil {
		return fmt.Errorf("imagetar: image %s: %w", img.Ref, err)
	}
	if err := buffered.Flush(); err != nil {
		return err
	}
	size, err := layer.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}

	config, err := json.Marshal(configOf(img, "sha256:"+hex.EncodeToString(sum.Sum(nil))))
	if err != nil {
		return err
	}
	configSum := sha256.Sum256(config)
	configName := hex.EncodeToString(configSum[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{familiar(img.Ref)}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}

	tw := tar.NewWriter(w)
	for _, part := range []struct {
		name string
		size int64
		r    io.Reader
	}{
		{"layer.tar", size, layer},
		{configName, int64(len(config)), bytes.NewReader(config)},
		{"manifest.json", int64(len(manifest)), bytes.NewReader(manifest)},
	} {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: part.name, Size: part.size, Mode: 0o644, ModTime: epoch}); err != nil {
			return err
		}
		if _, err := io.Copy(tw, part.r); err != nil {
			return err
		}
	}
	return tw.Close()
}

// familiar adds the tag that a reference without one means.
func familiar(ref string) string {
	if !strings.Contains(ref[strings.LastIndex(ref, "/")+1:], ":") {
		return ref + ":latest"
	}
	return ref
}

// configOf is the image's configuration as the OCI image specification has it.
func configOf(img Image, diffID string) any {
	type runConfig struct {
		User       string            `json:",omitempty"`
		Env        []string          `json:",omitempty"`
		Entrypoint []string          `json:",omitempty"`
		Cmd        []string          `json:",omitempty"`
		WorkingDir string            `json:",omitempty"`
		Labels     map[string]string `json:",omitempty"`
	}
	return map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"created":      epoch.Format(time.RFC3339),
		"config":       runConfig{img.User, img.Env, img.Entrypoint, img.Cmd, img.WorkingDir, img.Labels},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{diffID}},
		"history":      []map[string]any{{"created": epoch.Format(time.RFC3339), "created_by": "imagetar"}},
	}
}

// layerWriter writes one layer's tar.
type layerWriter struct {
	tw    *tar.Writer
	seen  map[string]bool      // names written, without the leading slash
	links map[[2]uint64]string // (device, inode) of a file with several names → the name it was written under
}

func writeLayer(w io.Writer, img Image) error {
	lw := &layerWriter{tw: tar.NewWriter(w), seen: map[string]bool{}, links: map[[2]uint64]string{}}
	files := slices.Clone(img.Files)
	slices.SortStableFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	over := map[string]bool{}
	for _, f := range files {
		name, err := nameOf(f)
		if err != nil {
			return err
		}
		if over[name] {
			return fmt.Errorf("%s is given twice", f.Path)
		}
		over[name] = true
	}
	if img.Root != "" {
		if err := lw.addRoot(img.Root, over); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := lw.addFile(f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return lw.tw.Close()
}

func nameOf(f File) (string, error) {
	if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" {
		return "", fmt.Errorf("path %q: want a clean absolute path below /", f.Path)
	}
	return f.Path[1:], nil
}

func (lw *layerWriter) addFile(f File) error {
	name, err := nameOf(f)
	if err != nil {
		return err
	}
	if err := lw.addParents(name); err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: modeBits(f.Mode), Uid: f.UID, Gid: f.GID, ModTime: epoch}
	lw.seen[name] = true
	switch {
	case f.Mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		return lw.tw.WriteHeader(h)
	case f.Link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
		return lw.tw.WriteHeader(h)
	}
	h.Typeflag = tar.TypeReg
	if h.Mode == 0 {
		h.Mode = 0o644
	}
	if f.Source == "" {
		h.Size = int64(len(f.Data))
		if err := lw.tw.WriteHeader(h); err != nil {
			return err
		}
		_, err := lw.tw.Write(f.Data)
		return err
	}
	return lw.writeRegular(h, f.Source)
}

// addParents makes the directories above name that the layer does not have.
func (lw *layerWriter) addParents(name string) error {
	dir := path.Dir(name)
	if dir == "." || lw.seen[dir] {
		return nil
	}
	if err := lw.addParents(dir); err != nil {
		return err
	}
	lw.seen[dir] = true
	return lw.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch})
}

// addRoot adds everything below root, in lexical order, except the names in over.
func (lw *layerWriter) addRoot(root string, over map[string]bool) error {
	return filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || file == root {
			return err
		}
		name, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSocket != 0 || over[name] {
			return nil // a directory in over keeps its content
		}
		lw.seen[name] = true
		return lw.addEntry(name, file, info)
	})
}

func (lw *layerWriter) addEntry(name, file string, info fs.FileInfo) error {
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(file); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	h.Name = name
	if info.IsDir() {
		h.Name += "/"
	}
	h.ModTime, h.AccessTime, h.ChangeTime = epoch, time.Time{}, time.Time{}
	h.Uname, h.Gname = "", "" // numbers only: names are this machine's
	h.Format = tar.FormatPAX
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && !info.IsDir() && stat.Nlink > 1 {
		inode := [2]uint64{uint64(stat.Dev), stat.Ino}
		if first, ok := lw.links[inode]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return lw.tw.WriteHeader(h)
		}
		lw.links[inode] = name
	}
	if h.Typeflag != tar.TypeReg {
		return lw.tw.WriteHeader(h)
	}
	if value := capability(file); value != "" {
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": value}
	}
	return lw.writeRegular(h, file)
}

// writeRegular writes h with the size and the content of source.
func (lw *layerWriter) writeRegular(h *tar.Header, source string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	h.Size = info.Size()
	if err := lw.tw.WriteHeader(h); err != nil {
		return err
	}
	if _, err := io.Copy(lw.tw, in); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	return nil
}

// capability is a file's capabilities attribute, empty when it has none.
func capability(file string) string {
	var buf [64]byte // the kernel's largest is 24 bytes
	n, err := syscall.Getxattr(file, "security.capability", buf[:])
	if err != nil || n <= 0 {
		return ""
	}
	return string(buf[:n])
}

// modeBits turns Go's mode into the tar header's.
func modeBits(m fs.FileMode) int64 {
	bits := int64(m.Perm())
	if m&fs.ModeSetuid != 0 {
		bits |= 0o4000
	}
	if m&fs.ModeSetgid != 0 {
		bits |= 0o2000
	}
	if m&fs.ModeSticky != 0 {
		bits |= 0o1000
	}
	return bits
}
