// Package engset says how many servers (addresses, or port sets) a number of sources (hosts) needs, when each of them
// uses one now and then and a request that finds none free is refused: the Engset loss formula. Standard library only.
//
// The model: a source that holds nothing asks after a time of its own, gets a server if one is free, and holds it for a
// time of its own; refused, it asks again after another such time. Only the means of both times matter, not how they are
// distributed (insensitivity of the Engset model, Cohen 1957). Sources are finite in number: those that hold a server do
// not ask for another. With more and more sources of less and less use it becomes Erlang's B formula, which is always a
// little above.
package engset

import (
	"fmt"
	"math/bits"
)

// MaxSources is the largest number of sources that Check allows: a million steps of the recursion, about 10 ms.
const MaxSources = 1_000_000

// Load is what a number of sources asks for.
type Load struct {
	Sources int     // 1..MaxSources
	Busy    float64 // share of its time that a source holds a server if it is never refused; above 0, at most 1
}

// Check says what is wrong with l.
func (l Load) Check() error {
	switch {
	case l.Sources < 1 || l.Sources > MaxSources:
		return fmt.Errorf("%d sources: want 1 to %d", l.Sources, MaxSources)
	case !(l.Busy > 0 && l.Busy <= 1): // NaN is refused too
		return fmt.Errorf("busy share %g: want more than 0 and at most 1", l.Busy)
	}
	return nil
}

// Mean returns how many servers are held on average if nobody is refused.
func (l Load) Mean() float64 { return float64(l.Sources) * l.Busy }

// Blocking returns the share of requests that find all servers held (call congestion), 0..1.
func (l Load) Blocking(servers int) float64 {
	b := 1.0
	for c := 1; c <= servers && b > 0; c++ {
		b = l.step(c, b)
	}
	return b
}

// Servers returns the smallest number of servers at which at most target (above 0) of the requests are refused, and the
// share that is. With one for every source nobody is.
func (l Load) Servers(target float64) (servers int, blocking float64) {
	b := 1.0
	for b > target {
		servers++
		b = l.step(servers, b)
	}
	return servers, b
}

// step returns the blocking with c servers from the one with c-1:
//
//	B(0) = 1,  B(c) = x / (c + x),  x = (M-c+1) · a · B(c-1)
//
// a is the load that an idle source offers, M the number of other sources: whoever asks meets what those hold (the
// arrival theorem), so that the share of refused requests of N sources is the share of time that all servers are held by
// N-1.
//
// This is the stable direction. It multiplies, adds and divides positive numbers and subtracts none: an error of B(c-1)
// reaches B(c) times 1-B(c), and each step adds at most four roundings. After 10^6 steps the relative error is below
// 10^6 · 4 · 2^-53 < 5e-10. The sums of binomial terms of the textbook overflow at some hundred sources.
func (l Load) step(c int, b float64) float64 {
	others := l.Sources - 1
	switch {
	case c > others:
		return 0 // a server is left for whoever asks
	case l.Busy >= 1:
		return 1 // the limit of a without bound: nobody gives a server back
	}
	x := float64(others-c+1) * l.offered() * b
	return x / (float64(c) + x)
}

// offered is the load of a source while it holds nothing: mean time of holding over mean time between.
func (l Load) offered() float64 { return l.Busy / (1 - l.Busy) }

// Addresses returns how many IPv4 addresses hold that many leases when 2^psidLen hosts share one by port sets; 0 =
// whole addresses. Any free port set serves any host.
func Addresses(leases, psidLen int) int { return (leases + 1<<psidLen - 1) >> psidLen }

// PrefixBits returns the length of the longest IPv4 prefix with room for that many addresses.
func PrefixBits(addresses int) int {
	return 32 - bits.Len(uint(max(addresses, 1)-1))
}
