package tepd

import (
	"fmt"
	"math"
	"net/netip"
	"slices"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
)

const (
	// poolMetric is the metric of a pool's route into the tunnel device.
	poolMetric = 1024
	// blackholeMetric is the worst there is: the route that remains when the device is gone, so that packets to a leased
	// address never follow the default route back to where they came from.
	blackholeMetric = math.MaxUint32
)

// served returns the pools whose tunnels end at this gateway, and a sentence for each other one.
func served(c *Config, pools []lease.Pool) (ours []lease.Pool, notes []string) {
	for _, p := range pools {
		if p.TEP == c.Tunnel.Address {
			ours = append(ours, p)
			continue
		}
		notes = append(notes, fmt.Sprintf("pool %s (%s) ends at %s, this gateway's tunnel.address is %s: it is not served here",
			p.Name, p.Prefix, p.TEP, c.Tunnel.Address))
	}
	return ours, notes
}

// prefixes returns the prefixes of pools, in order, each once.
func prefixes(pools []lease.Pool) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(pools))
	for _, p := range pools {
		out = append(out, p.Prefix)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

// desiredPath is what the packet path is configured with, given the pools served here.
func desiredPath(c *Config, pools []netip.Prefix) dataplane.GatewayConfig {
	t := c.Tunnel
	return dataplane.GatewayConfig{
		Device: t.Device, Uplinks: slices.Clone(t.Uplinks), TEPs: []netip.Addr{t.Address}, Pools: pools,
		HopLimit: t.HopLimit, MTU: t.MTU, Hairpin: t.Hairpin, PinDir: c.Paths.BPF,
	}
}

// desiredKernel is what the kernel is to have because of this gateway, given the pools served here.
func desiredKernel(c *Config, pools []netip.Prefix) netcfg.Desired {
	t := c.Tunnel
	d := netcfg.Desired{
		Addrs: []netcfg.Addr{
			// Anycast: another machine has it too, so neither is duplicate detection of use, nor may it be a source.
			{Link: "lo", Prefix: hostPrefix(t.Address), NoDAD: true, Deprecated: true},
			{Link: t.Device, Prefix: hostPrefix(t.IPv4Address)},
		},
		Sysctls: map[string]string{
			"net/ipv4/ip_forward": "1",
			// The only interface with this flag: the way out is looked up from the device, and router advertisements
			// stay in force for the machine.
			"net/ipv6/conf/" + t.Device + "/forwarding": "1",
			// A TUN without a reader has no carrier; the pool's route must outlive the daemon all the same.
			"net/ipv4/conf/" + t.Device + "/ignore_routes_with_linkdown": "0",
			// From host to host a packet leaves by the interface that it came in by, which calls for no redirect. The kernel
			// joins the two by "or"; other interfaces keep their own.
			"net/ipv4/conf/all/send_redirects":              "0",
			"net/ipv4/conf/" + t.Device + "/send_redirects": "0",
		},
	}
	for _, p := range pools {
		d.Routes = append(d.Routes,
			netcfg.Route{Prefix: p, Link: t.Device, Metric: poolMetric},
			netcfg.Route{Prefix: p, Blackhole: true, Metric: blackholeMetric})
	}
	return d
}

// announcement is what BGP is to say, and why not more.
type announcement struct {
	routes  []bgp.Route // pools or leases first, the tunnel address last
	refused []bgp.Refused
	capped  int // leases that went over max_host_routes, so that none has its own route
}

// desiredRoutes is what to announce for the pools served here and the leased addresses in them (only looked at in lease
// mode; leases is their number, which counts even when the list was cut short). Nothing outside of allow_advertise is in it
// (I11).
func desiredRoutes(c *Config, pools []lease.Pool, addrs []netip.Addr, leases int) announcement {
	var a announcement
	allow := c.BGP.AllowAdvertise
	var want []netip.Prefix
	for _, p := range pools {
		in := intersect(p.Prefix, allow)
		switch {
		case len(in) == 0:
			a.refused = append(a.refused, bgp.Refused{Prefix: p.Prefix, Reason: fmt.Sprintf(
				"pool %s (%s) is outside of allow_advertise %v: it is not announced, so nothing can answer to its addresses; add the prefix or remove the pool",
				p.Name, p.Prefix, allow)})
		case len(in) > 1 || in[0] != p.Prefix:
			a.refused = append(a.refused, bgp.Refused{Prefix: p.Prefix, Reason: fmt.Sprintf(
				"pool %s (%s) is only partly inside of allow_advertise: announced are %v", p.Name, p.Prefix, in)})
		}
		want = append(want, in...)
	}
	if c.BGP.Announce.Pool == PoolLease {
		if leases > c.BGP.Announce.MaxHostRoutes {
			a.capped = leases // the aggregates stand in
		} else {
			want = hostRoutes(want, addrs)
		}
	}
	slices.SortFunc(want, netip.Prefix.Compare)
	for _, p := range slices.Compact(want) {
		a.routes = append(a.routes, bgp.Route{Prefix: p, Communities: c.BGP.Announce.Community})
	}
	if tep := hostPrefix(c.Tunnel.Address); c.BGP.Announce.TEP {
		if bgp.Covered(tep, allow) {
			a.routes = append(a.routes, bgp.Route{Prefix: tep, Communities: c.BGP.Announce.Community})
		} else {
			a.refused = append(a.refused, bgp.Refused{Prefix: tep, Reason: fmt.Sprintf(
				"tunnel address %s is outside of allow_advertise %v", tep, allow)})
		}
	}
	return a
}

// hostRoutes returns the addresses inside of allowed as /32s.
func hostRoutes(allowed []netip.Prefix, addrs []netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range addrs {
		if p := hostPrefix(a); bgp.Covered(p, allowed) {
			out = append(out, p)
		}
	}
	return out
}

// intersect returns the parts of p that allow has: p itself, or what of it is listed.
func intersect(p netip.Prefix, allow []netip.Prefix) []netip.Prefix {
	if bgp.Covered(p, allow) {
		return []netip.Prefix{p}
	}
	var out []netip.Prefix
	for _, a := range allow {
		if p.Overlaps(a) {
			out = append(out, a)
		}
	}
	return out
}
