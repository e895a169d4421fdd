package imagetar

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// entry is a tar entry as the tests compare it.
type entry struct {
	*tar.Header
	data string
}

func read(t *testing.T, archive []byte) map[string]entry {
	t.Helper()
	out := map[string]entry{}
	for tr := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := out[h.Name]; twice {
			t.Errorf("%s is in the archive twice", h.Name)
		}
		out[h.Name] = entry{h, string(data)}
	}
}

func write(t *testing.T, img Image) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := Write(&buf, img); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestArchiveNamesLayerAndConfigByDigest(t *testing.T) {
	archive := read(t, write(t, Image{
		Ref:        "rendezvous/relay",
		Files:      []File{{Path: "/relay", Data: []byte("program"), Mode: 0o755}},
		Entrypoint: []string{"/relay"},
		Env:        []string{"A=b"},
		User:       "65532",
	}))
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal([]byte(archive["manifest.json"].data), &manifest); err != nil {
		t.Fatal(err)
	}
	if got := manifest[0].RepoTags; len(got) != 1 || got[0] != "rendezvous/relay:latest" {
		t.Errorf("RepoTags = %q, want the reference with its implied tag", got)
	}
	config := archive[manifest[0].Config]
	if digest(config.data)+".json" != manifest[0].Config {
		t.Errorf("the configuration's name %s is not its digest", manifest[0].Config)
	}
	var parsed struct {
		Config struct {
			Entrypoint, Env []string
			User            string
		}
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal([]byte(config.data), &parsed); err != nil {
		t.Fatal(err)
	}
	if want := "sha256:" + digest(archive["layer.tar"].data); parsed.Rootfs.DiffIDs[0] != want {
		t.Errorf("diff id = %s, want %s", parsed.Rootfs.DiffIDs[0], want)
	}
	if parsed.Config.User != "65532" || parsed.Config.Entrypoint[0] != "/relay" || parsed.Config.Env[0] != "A=b" {
		t.Errorf("run configuration = %+v", parsed.Config)
	}
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

func TestLayerKeepsModesOwnersAndLinks(t *testing.T) {
	source := filepath.Join(t.TempDir(), "binary")
	must(t, os.WriteFile(source, []byte("bytes"), 0o600))
	layer := read(t, []byte(read(t, write(t, Image{Ref: "x:1", Files: []File{
		{Path: "/usr/bin/tool", Source: source, Mode: 0o755 | fs.ModeSetuid, UID: 7, GID: 8},
		{Path: "/bin", Link: "usr/bin"},
		{Path: "/tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
		{Path: "/etc/motd", Data: []byte("hi")},
	}}))["layer.tar"].data))

	for _, tc := range []struct {
		name string
		typ  byte
		mode int64
		uid  int
		data string
	}{
		{"usr/", tar.TypeDir, 0o755, 0, ""},
		{"usr/bin/", tar.TypeDir, 0o755, 0, ""},
		{"usr/bin/tool", tar.TypeReg, 0o4755, 7, "bytes"},
		{"bin", tar.TypeSymlink, 0o777, 0, ""},
		{"tmp/", tar.TypeDir, 0o1777, 0, ""},
		{"etc/motd", tar.TypeReg, 0o644, 0, "hi"},
	} {
		got, ok := layer[tc.name]
		if !ok {
			t.Errorf("%s is not in the layer", tc.name)
			continue
		}
		if got.Typeflag != tc.typ || got.Mode != tc.mode || got.Uid != tc.uid || got.data != tc.data {
			t.Errorf("%s: type %c mode %o uid %d data %q; want %c %o %d %q", tc.name, got.Typeflag, got.Mode, got.Uid, got.data, tc.typ, tc.mode, tc.uid, tc.data)
		}
	}
	if layer["bin"].Linkname != "usr/bin" {
		t.Errorf("bin links to %q", layer["bin"].Linkname)
	}
}

func TestRootIsPackedWhole(t *testing.T) {
	root := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(root, "usr/bin"), 0o755))
	must(t, os.WriteFile(filepath.Join(root, "usr/bin/a"), []byte("one"), 0o755))
	must(t, os.Link(filepath.Join(root, "usr/bin/a"), filepath.Join(root, "usr/bin/b")))
	must(t, os.Symlink("usr/bin", filepath.Join(root, "bin")))
	must(t, os.WriteFile(filepath.Join(root, "replaced"), []byte("old"), 0o644))

	layer := read(t, []byte(read(t, write(t, Image{Ref: "x:1", Root: root, Files: []File{
		{Path: "/replaced", Data: []byte("new")},
		{Path: "/bin/extra", Data: []byte("through the symlink")},
	}}))["layer.tar"].data))

	if got := layer["usr/bin/b"]; got.Typeflag != tar.TypeLink || got.Linkname != "usr/bin/a" {
		t.Errorf("second name of a file: type %c to %q, want a hard link to usr/bin/a", got.Typeflag, got.Linkname)
	}
	if got := layer["replaced"].data; got != "new" {
		t.Errorf("replaced = %q, want the file over the root's", got)
	}
	if got := layer["bin"]; got.Typeflag != tar.TypeSymlink {
		t.Errorf("bin has type %c: the root's symlink must stay", got.Typeflag)
	}
	if _, ok := layer["bin/"]; ok {
		t.Error("a directory bin/ hides the root's symlink")
	}
}

func TestSameInputSameBytes(t *testing.T) {
	root := t.TempDir()
	must(t, os.WriteFile(filepath.Join(root, "f"), []byte("x"), 0o644))
	img := Image{Ref: "x:1", Root: root, Files: []File{{Path: "/b"}, {Path: "/a"}}}
	first := write(t, img)
	must(t, os.Chtimes(filepath.Join(root, "f"), time.Unix(1e9, 0), time.Unix(1e9, 0)))
	img.Files[0], img.Files[1] = img.Files[1], img.Files[0]
	if !bytes.Equal(first, write(t, img)) {
		t.Error("another modification time or order of files gives other bytes")
	}
}

func TestWriteRefuses(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		img        Image
	}{
		{"no reference", "no reference", Image{}},
		{"relative path", "absolute", Image{Ref: "x:1", Files: []File{{Path: "a"}}}},
		{"path outside", "absolute", Image{Ref: "x:1", Files: []File{{Path: "/../a"}}}},
		{"same path twice", "twice", Image{Ref: "x:1", Files: []File{{Path: "/a"}, {Path: "/a"}}}},
		{"source missing", "no such file", Image{Ref: "x:1", Files: []File{{Path: "/a", Source: "/does/not/exist"}}}},
	} {
		if err := Write(io.Discard, tc.img); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want one with %q", tc.name, err, tc.want)
		}
	}
}

func TestWriteFileLeavesNothingOnFailure(t *testing.T) {
	dir := t.TempDir()
	if err := WriteFile(filepath.Join(dir, "image.tar"), Image{}); err == nil {
		t.Fatal("no error")
	}
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
