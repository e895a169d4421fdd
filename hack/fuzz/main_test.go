package main

import (
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The product's targets are found, and no other's.
func TestFind(t *testing.T) {
	targets, err := find(t.Context(), filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, target := range targets {
		seen[target.String()] = true
		if strings.HasPrefix(target.folder, "hack") {
			t.Errorf("%s is no target of the product", target)
		}
	}
	for _, want := range []string{"broker/enrol.FuzzCSR", "wire/jwks.FuzzParse", "relay.FuzzHead", "agent/login.FuzzSocket"} {
		if !seen[want] {
			t.Errorf("%s is not found among %d", want, len(targets))
		}
	}
}

// A target that fails is named and keeps no other from its turn; of a good one, inputs that reach further are kept.
func TestFuzz(t *testing.T) {
	root, module := t.TempDir(), "example.test/"+strings.ToLower(rand.Text()) // no other run's inputs
	for name, text := range map[string]string{
		"go.mod":       "module " + module + "\n\ngo 1.26\n",
		"bad/bad.go":   "package bad\n",
		"good/good.go": "package good\n\nfunc Of(b byte) int {\n\tif b > 100 {\n\t\treturn 1\n\t}\n\treturn 0\n}\n",
		"bad/bad_test.go": `package bad

import "testing"

func FuzzBad(f *testing.F) {
	f.Add(byte(1))
	f.Fuzz(func(t *testing.T, b byte) {
		if b != 1 {
			t.Fatal("found")
		}
	})
}
`,
		"good/good_test.go": `package good

import "testing"

func FuzzGood(f *testing.F) {
	f.Add(byte(1))
	f.Fuzz(func(t *testing.T, b byte) {
		if n := Of(b); n < 0 {
			t.Fatal(n)
		}
	})
}
`,
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cache, err := output(t.Context(), root, "go", "env", "GOCACHE")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(cache, "fuzz", module)) })
	if out, err := exec.Command("git", "init", "-q", root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	err = fuzz(t.Context(), root, "", "2000x", 4, 1) // tries, not time
	if err == nil || !strings.Contains(err.Error(), "bad.FuzzBad") || strings.Contains(err.Error(), "good.FuzzGood") {
		t.Errorf("got %v", err)
	}
	for name, want := range map[string]int{"bad/testdata/fuzz/FuzzBad": 1, "good/testdata/fuzz/FuzzGood": 1} {
		kept, err := os.ReadDir(filepath.Join(root, name))
		if err != nil || len(kept) != want {
			t.Errorf("%s: %d inputs, %v", name, len(kept), err)
		}
	}
	if err := fuzz(t.Context(), root, "Nothing", "1x", 0, 1); err == nil || !strings.Contains(err.Error(), "no fuzz target") {
		t.Errorf("got %v", err)
	}
}
