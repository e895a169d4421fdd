// Package version says which build a binary is.
package version

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
)

// String is linked, what the linker set, where that is not empty; else the commit that the binary was built from, or the
// module's version.
func String(linked string) string {
	if linked != "" {
		return linked
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value[:min(12, len(s.Value))]
		}
	}
	return info.Main.Version
}

// Line is String with the Go release that built the binary, for which system: what is to be known where an advisory names
// releases of Go.
func Line(linked string) string {
	return fmt.Sprintf("%s (%s %s/%s)", String(linked), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// AddFlag adds -version, which prints Line and ends the process.
func AddFlag(flags *flag.FlagSet, linked string) {
	flags.BoolFunc("version", "print the version, and the Go release that built it", func(string) error {
		fmt.Println(Line(linked))
		os.Exit(0)
		return nil
	})
}
