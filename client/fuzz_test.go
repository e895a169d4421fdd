package client

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode"

	"rendezvous.dev/rendezvous/wire/trace"
)

// Whatever brokers, gateways and providers write, a terminal gets text, and JSON stays the JSON that it was.
func FuzzClean(f *testing.F) {
	f.Add("plain\ttext\n", true)
	f.Add("\x1b]0;x\x07\u009b31m\u202etxt\u2028\U000e0001", false)
	f.Add("\xff\xc2", true)
	f.Fuzz(func(t *testing.T, text string, _ bool) {
		bad := func(r rune) bool { return unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp) }
		if got := oneLine(text); strings.ContainsFunc(got, bad) {
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

// Whatever steps a broker tells of, explain prints lines of a table.
func FuzzExplain(f *testing.F) {
	f.Add([]byte(`[{"activityId":"a","step":9,"component":"agent/x","at":"2026-01-02T03:04:05Z","durationNs":1,"detail":"d"},{"step":-1,"detail":"\u009b"}]`))
	f.Add([]byte(`[{"step":99,"error":"x\ny","component":"\u202e"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var events []trace.Event
		if json.Unmarshal(data, &events) != nil || len(events) == 0 {
			return
		}
		shown := 0
		for _, e := range events {
			if e.Step >= 0 && e.Step < len(trace.Titles) {
				shown++
			}
		}
		var out bytes.Buffer
		if err := explain(&out, "a", events); err != nil {
			t.Fatal(err)
		}
		if lines := strings.Count(out.String(), "\n"); lines > shown+len(trace.Titles)+6 || strings.ContainsAny(out.String(), "\x1b\u009b\u202e\r") {
			t.Fatalf("%d lines of %d steps:\n%q", lines, shown, out.String())
		}
	})
}
