package hostd

import (
	"net/netip"
	"slices"

	"github.com/dstm-project/dstm/internal/netcfg"
)

// tunnelOverhead is the outer IPv6 header, in bytes (RFC 2473 section 3).
const tunnelOverhead = 40

// minTunnelMTU is what fits through every IPv6 link (RFC 8200 section 5) behind the outer header.
const minTunnelMTU = 1280 - tunnelOverhead

// sources returns the addresses that the host reports: those it can be asked from, at most MaxSources. Preferred ones
// come first, so that a host with many keeps those that matter.
func sources(addrs []netcfg.GlobalAddr, device string) []netip.Addr {
	var preferred, deprecated []netip.Addr
	for _, a := range addrs {
		switch {
		case a.Tentative || a.Link == device:
		case a.Deprecated:
			deprecated = append(deprecated, a.Addr)
		default:
			preferred = append(preferred, a.Addr)
		}
	}
	all := append(preferred, deprecated...)
	slices.SortStableFunc(all[:len(preferred)], netip.Addr.Compare)
	if len(all) > MaxSources {
		all = all[:MaxSources]
	}
	return all
}

// tunnelSource chooses the address that tunnel packets come from, on the way hop towards the gateway: stable, that is
// neither temporary (RFC 8981) nor deprecated, and the current one as long as it is one of these. The kernel's own choice
// (RFC 6724) comes next, then its /64, then its interface. Not valid: there is none.
func tunnelSource(addrs []netcfg.GlobalAddr, hop netcfg.Hop, current netip.Addr) netip.Addr {
	best, bestRank := netip.Addr{}, 0
	for _, a := range addrs {
		if a.Temporary || a.Deprecated || a.Tentative {
			continue
		}
		if r := rank(a, hop, current); r > bestRank {
			best, bestRank = a.Addr, r
		}
	}
	return best
}

func rank(a netcfg.GlobalAddr, hop netcfg.Hop, current netip.Addr) int {
	sameNet := func(x netip.Addr) bool {
		p, err := x.Prefix(64)
		return err == nil && p.Contains(a.Addr)
	}
	switch {
	case a.Addr == current:
		return 4
	case a.Addr == hop.Source:
		return 3
	case sameNet(hop.Source):
		return 2
	case a.Link == hop.Link:
		return 1
	}
	return 0
}

// tunnelMTU returns the inner bytes that fit through the tunnel on the way hop.
func tunnelMTU(hop netcfg.Hop) uint16 {
	return uint16(min(max(hop.MTU-tunnelOverhead, minTunnelMTU), 65535))
}
