package version

import (
	"runtime"
	"strings"
	"testing"
)

func TestLine(t *testing.T) {
	if got := Line("v1.2.3"); !strings.HasPrefix(got, "v1.2.3 (") || !strings.Contains(got, runtime.Version()+" "+runtime.GOOS+"/"+runtime.GOARCH) {
		t.Errorf("got %q", got)
	}
	if got := Line(""); strings.HasPrefix(got, " ") {
		t.Errorf("a plain build says %q", got)
	}
}
