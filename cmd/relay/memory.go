package main

import (
	"io/fs"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
)

// ballast is the size of a piece of heap that counts for the garbage collector's pace, and is never touched, so that it takes
// no memory. A relay lives on few MiB while it sets up hundreds of sessions a second: left alone, the collector would run
// with every dozen of them.
const ballast = 8 << 20

// limitMemory has the garbage collector work harder before the container's memory limit is reached, instead of being
// killed at it: GOMEMLIMIT at 90 % of the limit, where nobody set it. It returns the bytes, 0 where there is no limit.
func limitMemory(root fs.FS) int64 {
	if os.Getenv("GOMEMLIMIT") != "" {
		return 0
	}
	limit := containerMemory(root) / 10 * 9
	if limit > 0 {
		debug.SetMemoryLimit(limit)
	}
	return limit
}

// containerMemory is the cgroup's memory limit as a container sees it, version 2 or 1; 0 where there is none.
func containerMemory(root fs.FS) int64 {
	const most = 1 << 50 // version 1 says "none" with a huge number
	for _, file := range []string{"sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		text, err := fs.ReadFile(root, file)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && n > 0 && n < most {
			return n
		}
	}
	return 0
}
