package client

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"rendezvous.dev/rendezvous/wire/trace"
)

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
