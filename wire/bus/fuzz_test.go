package bus

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// Whatever an administrator's message is, what a user is shown is text that shows as it is written.
func FuzzMessageText(f *testing.F) {
	for _, text := range []string{"Maintenance at 6 pm.\n\tSave your work.", "\x1b[2J", "a\u202eb", "\u2066x", " ", "\xff", strings.Repeat("x", MaxMessageText+1)} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if CheckMessageText(text) != nil {
			return
		}
		if len(text) > MaxMessageText || strings.TrimSpace(text) == "" || !utf8.ValidString(text) || strings.ContainsAny(text, "\x00\x07\x1b\x7f\r\u0085\u009b\u202a\u202e\u2066\u2069") {
			t.Errorf("%q is shown", text)
		}
	})
}
