package refusal

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// Whatever another process refuses with, what is passed on is of the closed set, on one printable line, and stays so.
func FuzzReceived(f *testing.F) {
	f.Add([]byte(`{"code":"host-full","message":"full"}`))
	f.Add([]byte(`{"code":"HOST-FULL","message":"a\u001b[2J\u202e\n` + strings.Repeat("é", 600) + `"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var e *Error
		if json.Unmarshal(data, &e) != nil {
			return
		}
		got := Received(e, HostRefused)
		if (got == nil) != (e == nil) {
			t.Fatalf("%v of %v", got, e)
		}
		if got == nil {
			return
		}
		if !codes[got.Code] || got.ActivityID != "" || len(got.Message) > MaxMessage || !utf8.ValidString(got.Message) ||
			strings.ContainsFunc(got.Message, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Fatalf("passed on: %+v", got)
		}
		if again := Received(got, Internal); *again != *got {
			t.Fatalf("%+v becomes %+v", got, again)
		}
	})
}
