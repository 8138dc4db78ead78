package netcfg

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpTries bounds the repeats of a dump that the kernel reports as interrupted by a change.
const dumpTries = 8

// dump calls list until it is not interrupted.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for try := 1; ; try++ {
		v, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == dumpTries {
			return v, err
		}
	}
}

// kernelRoute is a route as the kernel has it.
type kernelRoute struct {
	Route
	protocol int
}

// kernel is what a full read found.
type kernel struct {
	addrs  map[addrKey]Addr
	routes map[routeKey]kernelRoute
}

func (c *Config) read() (kernel, error) {
	k := kernel{addrs: map[addrKey]Addr{}, routes: map[routeKey]kernelRoute{}}
	names, err := c.linkNames()
	if err != nil {
		return k, err
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return c.h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return k, fmt.Errorf("list addresses: %w", err)
	}
	for _, na := range addrs {
		if a, ok := fromAddr(na, names); ok {
			k.addrs[addrKey{a.Link, a.Prefix}] = a
		}
	}
	routes, err := c.routes(names)
	for _, r := range routes {
		// One key can hold a stranger's route beside ours (IPv6); ours is the one to compare with.
		if have, ok := k.routes[r.key()]; !ok || have.protocol != Protocol {
			k.routes[r.key()] = r
		}
	}
	return k, err
}

// routes returns the unicast and blackhole routes of every table.
func (c *Config) routes(names map[int]string) ([]kernelRoute, error) {
	var out []kernelRoute
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return c.h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, nr := range routes {
			if nr.Type == unix.RTN_UNICAST || nr.Type == unix.RTN_BLACKHOLE {
				out = append(out, fromRoute(nr, family, names))
			}
		}
	}
	return out, nil
}

func (c *Config) linkNames() (map[int]string, error) {
	links, err := dump(c.h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

// normal fills in what the kernel fills in, so that a desired route equals the same route read back.
func (r Route) normal() Route {
	if r.Table == unix.RT_TABLE_MAIN {
		r.Table = 0
	}
	if r.Metric == 0 && r.Prefix.Addr().Is6() {
		r.Metric = 1024 // IP6_RT_PRIO_USER
	}
	return r
}

func (r Route) key() routeKey { return routeKey{r.Prefix, r.Metric, r.Table} }

func fromRoute(nr netlink.Route, family int, names map[int]string) kernelRoute {
	r := Route{
		Prefix:    toPrefix(nr.Dst),
		Blackhole: nr.Type == unix.RTN_BLACKHOLE,
		Metric:    uint32(nr.Priority),
		MTU:       uint32(nr.MTU),
		MTULock:   nr.MTULock,
		Table:     uint32(nr.Table),
		Src:       toIP(nr.Src),
		Gateway:   toIP(nr.Gw),
	}
	if !r.Prefix.IsValid() {
		r.Prefix = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if family == netlink.FAMILY_V6 {
			r.Prefix = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	if !r.Blackhole { // an IPv6 blackhole reads back as being on lo
		r.Link = names[nr.LinkIndex]
	}
	return kernelRoute{r.normal(), int(nr.Protocol)}
}

func (c *Config) toRoute(r Route) (*netlink.Route, error) {
	nr := &netlink.Route{
		Dst:      toNet(r.Prefix),
		Protocol: Protocol,
		Priority: int(r.Metric),
		Table:    int(r.Table),
		MTU:      int(r.MTU),
		MTULock:  r.MTULock,
		Type:     unix.RTN_UNICAST,
	}
	if r.Table == 0 {
		nr.Table = unix.RT_TABLE_MAIN
	}
	if r.Src.IsValid() {
		nr.Src = r.Src.AsSlice()
	}
	if r.Blackhole {
		nr.Type = unix.RTN_BLACKHOLE
		return nr, nil
	}
	link, err := c.h.LinkByName(r.Link)
	if err != nil {
		return nil, err
	}
	nr.LinkIndex = link.Attrs().Index
	switch {
	case r.Gateway.IsValid():
		nr.Gw = r.Gateway.AsSlice()
	case r.Prefix.Addr().Is4():
		// IPv4 only: the scope is part of the key on removal, and a direct route has scope link.
		nr.Scope = netlink.SCOPE_LINK
	}
	return nr, nil
}

func fromAddr(na netlink.Addr, names map[int]string) (Addr, bool) {
	p := toPrefix(na.IPNet)
	return Addr{
		Link:       names[na.LinkIndex],
		Prefix:     p,
		NoDAD:      na.Flags&unix.IFA_F_NODAD != 0,
		Deprecated: p.Addr().Is6() && na.Flags&unix.IFA_F_DEPRECATED != 0,
	}, p.IsValid() && names[na.LinkIndex] != ""
}

func toAddr(a Addr) *netlink.Addr {
	na := &netlink.Addr{IPNet: toNet(a.Prefix)}
	if a.NoDAD {
		na.Flags |= unix.IFA_F_NODAD
	}
	switch {
	case a.Prefix.Addr().Is6():
		// Valid for ever; a preferred lifetime of 0 is what makes an address deprecated (RFC 4862 section 5.5.4).
		na.ValidLft, na.PreferedLft = math.MaxUint32, math.MaxUint32
		if a.Deprecated {
			na.PreferedLft = 0
		}
	default:
		na.Broadcast = net.IPv4zero // the library's way to say: none
	}
	return na
}

func toNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func toPrefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a := toIP(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a, bits)
}

func toIP(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	if len(ip) == net.IPv6len && a.Is4In6() && ip.To4() != nil {
		return a.Unmap()
	}
	return a
}
