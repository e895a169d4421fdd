// Package version says which build a binary is.
package version

import "runtime/debug"

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
