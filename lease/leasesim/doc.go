// Package leasesim runs the lease core in a simulated world: one lease service, its gateways and its hosts, a network
// that delays, drops, doubles and reorders messages, and parties that crash at any of them. Everything happens in one
// goroutine, in simulated time, and every choice comes from one seed, so a run that fails is run again exactly.
//
// The cores are the real ones, package lease and package lease/replica. The parts around them (leasesvc, tepd, hostd) are
// written anew here as events: what they do between two waits is one event, and what they wait for is another. After each
// event the invariants are looked at. docs/design/simulation.md says what is simulated, what is not, and which planted
// mistake each check has found.
package leasesim
