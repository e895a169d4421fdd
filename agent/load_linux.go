package agent

import (
	"os"
	"runtime"
	"strconv"
	"strings"
)

// load is the 1-minute load average per CPU.
func load() float64 {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(data), " ")
	avg, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return 0
	}
	return avg / float64(runtime.NumCPU())
}
