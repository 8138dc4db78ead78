package daemon

import "runtime/debug"

// version is set by the linker (-X). Without it the module's own version is shown.
var version string

// Version returns what `--version` prints.
func Version() string {
	if version != "" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "unknown"
}
