package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestVolume(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pvc-1")
	if err := run([]string{"-p", dir, "-s", "1", "-m", "Filesystem", "-a", "create"}); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("made %v, %v", info, err)
	}
	if err := run([]string{"-p", dir, "-s", "1", "-m", "Filesystem", "-a", "delete"}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	for _, args := range [][]string{{"-p", "/", "-a", "delete"}, {"-p", "/etc", "-a", "delete"}, {"-p", "x/y", "-a", "create"}, {"-p", dir, "-a", "format"}} {
		if run(args) == nil {
			t.Errorf("%q was done", args)
		}
	}
}
