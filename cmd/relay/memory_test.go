package main

import (
	"math"
	"runtime/debug"
	"testing"
	"testing/fstest"
)

func TestLimitMemory(t *testing.T) {
	const v2, v1 = "sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"
	for name, c := range map[string]struct {
		file, text, env string
		want            int64
	}{
		"version 2":         {v2, "268435456\n", "", 241591905},
		"version 2, none":   {v2, "max\n", "", 0},
		"version 1":         {v1, "1000\n", "", 900},
		"version 1, none":   {v1, "9223372036854771712\n", "", 0},
		"no cgroup":         {"proc/x", "", "", 0},
		"the user's choice": {v2, "1000\n", "2GiB", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("GOMEMLIMIT", c.env)
			defer debug.SetMemoryLimit(debug.SetMemoryLimit(math.MaxInt64))
			if got := limitMemory(fstest.MapFS{c.file: {Data: []byte(c.text)}}); got/10 != c.want/10 {
				t.Errorf("limit %d, want %d", got, c.want)
			}
			want := int64(math.MaxInt64)
			if c.want > 0 {
				want = c.want
			}
			if got := debug.SetMemoryLimit(-1); got/10 != want/10 {
				t.Errorf("the runtime's limit is %d, want %d", got, want)
			}
		})
	}
}
