package terminal

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode"
)

// Whatever brokers, gateways and providers write, a terminal gets text, and JSON stays the JSON that it was.
func FuzzClean(f *testing.F) {
	f.Add("plain\ttext\n", true)
	f.Add("\x1b]0;x\x07\u009b31m\u202etxt\u2028\U000e0001", false)
	f.Add("\xff\xc2", true)
	f.Fuzz(func(t *testing.T, text string, _ bool) {
		bad := func(r rune) bool { return unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp) }
		if got := OneLine(text); strings.ContainsFunc(got, bad) {
			t.Fatalf("%q is printed", got)
		}
		var out bytes.Buffer
		if n, err := (cleanWriter{&out}).Write([]byte(text)); n != len(text) || err != nil || strings.ContainsFunc(strings.NewReplacer("\n", "", "\t", "").Replace(out.String()), bad) {
			t.Fatalf("%q is printed: %d, %v", out.String(), n, err)
		}
		data, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		out.Reset()
		if _, err := (jsonWriter{&out}).Write(data); err != nil {
			t.Fatal(err)
		}
		var was, is string
		if json.Unmarshal(data, &was) != nil || json.Unmarshal(out.Bytes(), &is) != nil || was != is || strings.ContainsFunc(out.String(), bad) {
			t.Fatalf("%q became %q as JSON %q", was, is, out.String())
		}
	})
}
