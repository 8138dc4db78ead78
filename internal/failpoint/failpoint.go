//go:build !failpoints

// Package failpoint lets tests of real processes break them at named points. Without the build tag failpoints, which no
// release has, a point does nothing and costs nothing.
package failpoint

import "time"

// Hit is a point. With the tag it does what the environment asks for there; an error is to be returned as that of the
// operation at the point.
func Hit(string) error { return nil }

// Wall returns the wall-clock time. With the tag it is off by what a file says.
func Wall() time.Time { return time.Now() }
