package lint

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Each row of docs/security.md names the test that shows it; every one of them exists.
func TestSecurityNamesTests(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z]+)`").FindAllStringSubmatch(string(text), -1)
	if len(named) < 20 {
		t.Fatalf("docs/security.md names %d tests: this check sees nothing", len(named))
	}
	cmd := exec.Command("git", "grep", "-h", "-E", "^func (Test|Fuzz)", "--", "*_test.go")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range named {
		if !strings.Contains(string(out), "func "+n[1]+"(") {
			t.Errorf("docs/security.md names %s, and there is no such test", n[1])
		}
	}
}
