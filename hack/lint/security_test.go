package lint

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Each row of docs/security.md names the test that shows it, behind its package; every one of them exists there.
func TestSecurityNamesTests(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("git", "grep", "--untracked", "-E", "^func (Test|Fuzz)", "--", "*_test.go")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	folders := map[string][]string{} // of each test
	for line := range strings.Lines(string(out)) {
		file, rest, _ := strings.Cut(line, ":")
		name, _, _ := strings.Cut(strings.TrimPrefix(rest, "func "), "(")
		folders[name] = append(folders[name], filepath.Dir(file))
	}
	checked := 0
	for line := range strings.Lines(string(text)) {
		folder := "" // the package that was named last in the row
		for _, n := range regexp.MustCompile("([^ (|]+)? ?`((?:Test|Fuzz)[A-Za-z0-9_]+)`").FindAllStringSubmatch(line, -1) {
			if stat, err := os.Stat(filepath.Join(root, n[1])); n[1] != "" && err == nil && stat.IsDir() {
				folder = n[1]
			}
			checked++
			switch have := folders[n[2]]; {
			case len(have) == 0:
				t.Errorf("docs/security.md names %s, and there is no such test", n[2])
			case folder != "" && !slices.Contains(have, folder):
				t.Errorf("docs/security.md names %s of %s, and it is in %s", n[2], folder, strings.Join(have, ", "))
			}
		}
	}
	if checked < 20 {
		t.Fatalf("docs/security.md names %d tests: this check sees nothing", checked)
	}
}
