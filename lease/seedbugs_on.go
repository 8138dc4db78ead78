//go:build seedbugs

package lease

import "sync/atomic"

// planted is the mistake that this program makes. Such a program is for the simulation in lease/leasesim only.
var planted atomic.Pointer[string]

// PlantBug makes every core of this package make a mistake from now on; "" = none.
func PlantBug(name string) { planted.Store(&name) }

func seeded(name string) bool {
	p := planted.Load()
	return p != nil && *p == name
}
