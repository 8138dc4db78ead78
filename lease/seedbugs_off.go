//go:build !seedbugs

package lease

// seeded reports whether a mistake is planted, for the simulation in lease/leasesim to find. Without the build tag seedbugs
// none is, and what stands behind the condition is not compiled.
func seeded(string) bool { return false }
