package lint

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Release builds name the patch release of Go, the same in go.mod and in the Dockerfile, and the Dockerfile copies every folder
// that the binaries are made of.
func TestReleaseBuilds(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	toolchain := regexp.MustCompile(`(?m)^toolchain go(\d+\.\d+\.\d+)$`).FindStringSubmatch(read("go.mod"))
	if toolchain == nil {
		t.Fatal("go.mod names no patch release of Go: toolchain goX.Y.Z")
	}
	dockerfile := read("Dockerfile")
	if from := "FROM golang:" + toolchain[1] + " AS build\n"; !strings.Contains(dockerfile, from) {
		t.Errorf("the Dockerfile has no line %q, as go.mod's toolchain says", from)
	}
	cmd := exec.Command("go", "list", "-deps", "./cmd/...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for path := range strings.FieldsSeq(string(out)) {
		folder, ok := strings.CutPrefix(path, module+"/")
		if !ok {
			continue
		}
		folder, _, _ = strings.Cut(folder, "/")
		if copied := "COPY " + folder + "/ " + folder + "/\n"; !seen[folder] && !strings.Contains(dockerfile, copied) {
			t.Errorf("the Dockerfile lacks %q, of which %s is made", copied, path)
		}
		seen[folder] = true
	}
	if len(seen) < 5 {
		t.Fatalf("the binaries are made of %v: this check sees nothing", seen)
	}
}
