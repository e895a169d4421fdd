package account

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestName(t *testing.T) {
	for _, c := range []struct{ value, want, why string }{
		{"alice@example.com", "alice", ""},
		{"Alice@Example.com", "alice", ""},
		{"Jürgen.Groß@example.de", "jurgen.gross", ""},
		{`EXAMPLE\bob`, "bob", ""},
		{"7of9", "u7of9", ""},
		{"1000", "u1000", ""},
		{"anna maria", "anna-maria", ""},
		{"a+b@example.com", "a-b", ""},
		{"-rf@example.com", "rf", ""},
		{"..", "", "nothing is left"},
		{"", "", "nothing is left"},
		{"@example.com", "", "nothing is left"},
		{"root@example.com", "", "systems use for themselves"},
		{"ROOT", "", "systems use for themselves"},
		{"systemd-network", "", "systems use for themselves"},
		{"_apt@example.com", "", "systems use for themselves"},
		{"www-data", "", "systems use for themselves"},
		{"../../etc/passwd", "", "it has a '/'"},
		{"alice:x:0:0", "", "it has a ':'"},
		{"alice\nroot", "", "control character"},
		{"alice\x00", "", "control character"},
		{"al\xffice", "", "control character"},
		{strings.Repeat("a", 32), strings.Repeat("a", 32), ""},
		{strings.Repeat("a", 33), "", "at most 32"},
		{strings.Repeat("9", 32), "", "at most 32"},
		{strings.Repeat("ü", 500), "", "at most 32"},
	} {
		got, err := Name(c.value)
		switch {
		case c.why == "" && (err != nil || got != c.want):
			t.Errorf("%q: %q, %v, want %q", c.value, got, err, c.want)
		case c.why != "" && (err == nil || !strings.Contains(err.Error(), c.why)):
			t.Errorf("%q: %q, %v, want an error with %q", c.value, got, err, c.why)
		}
	}
}

func TestUID(t *testing.T) {
	for value, ok := range map[string]bool{
		"1000": true, "12345": true, "2147483647": true, "0": false, "999": false, "65534": false, "65535": false, "4294967295": false,
		"4294968296": false, "-1": false, "+1000": false, "01000": false, "1e4": false, "": false,
	} {
		if _, err := ParseUID(value); (err == nil) != ok {
			t.Errorf("%q: %v", value, err)
		}
	}
}

func FuzzName(f *testing.F) {
	f.Add("alice@example.com")
	f.Add(`D\..\x/:`)
	f.Fuzz(func(t *testing.T, value string) {
		name, err := Name(value)
		if err != nil {
			if len(err.Error()) > 1000 || !utf8.ValidString(err.Error()) {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if err := CheckName(name); err != nil {
			t.Errorf("%q became %q: %v", value, name, err)
		}
		if again, err := Name(name); err != nil || again != name {
			t.Errorf("%q became %q, and that %q, %v", value, name, again, err)
		}
	})
}
