package bgp

import (
	"fmt"
	"net/netip"
	"slices"
)

// Guard splits routes into those that may leave and those that may not, with the sentence that says why (invariant I11).
// It stands on both sides of the wire to a speaker: neither side trusts the other with somebody else's prefixes.
func Guard(allow []netip.Prefix, routes []Route) (pass []Route, refused []Refused) {
	seen := map[netip.Prefix]bool{}
	for _, r := range routes {
		why := unfit(allow, r)
		if why == "" && seen[r.Prefix] {
			why = fmt.Sprintf("%s is there twice: want each prefix once", r.Prefix)
		}
		if why != "" {
			refused = append(refused, Refused{Prefix: r.Prefix, Reason: why})
			continue
		}
		seen[r.Prefix] = true
		pass = append(pass, r)
	}
	return pass, refused
}

func unfit(allow []netip.Prefix, r Route) string {
	switch p := r.Prefix; {
	case !p.IsValid() || p.Addr().Is4In6():
		return "not a prefix"
	case p != p.Masked():
		return fmt.Sprintf("%s has host bits set: want %s", p, p.Masked())
	case !Covered(p, allow):
		return fmt.Sprintf("%s is outside of allow_advertise %v", p, allow)
	case r.NextHop.IsValid() && p.Addr().Is6() && !r.NextHop.Is6():
		// The other way round, IPv4 by an IPv6 next hop, is what RFC 8950 is for.
		return fmt.Sprintf("%s with next hop %s: want an IPv6 one", p, r.NextHop)
	}
	return ""
}

// Covered reports whether p lies inside of one prefix of allow.
func Covered(p netip.Prefix, allow []netip.Prefix) bool {
	return slices.ContainsFunc(allow, func(a netip.Prefix) bool {
		return a.Bits() <= p.Bits() && a.Contains(p.Addr())
	})
}
