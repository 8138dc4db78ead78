package tc

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/lease"
)

// routeProtocol marks the routes of DSTM ("proto 213" in ip route), here and in internal/netcfg.
const routeProtocol = 213

// mtuRoutes gives every binding with a narrower tunnel than the device's a route with that MTU. It is the kernel that
// forwards to the device: knowing the MTU it answers "fragmentation needed" (RFC 1191), with its own rate limit and
// source address, and fragments what may be fragmented, super-packets too. Port sets share an address: they have no
// MTU of their own. The routes go with the device.
type mtuRoutes struct {
	nl     *netlink.Handle
	device int    // ifindex
	most   uint16 // MTU of the device
	have   map[netip.Addr]uint16
}

// resetRoutes begins with the routes that the kernel has, of a process before this one or for another MTU of the device, and
// reads the whole table for what they are to be.
func (g *Gateway) resetRoutes() error {
	ix, err := ifindex(g.e.name)
	if err != nil {
		return err
	}
	r := mtuRoutes{nl: g.e.nl, device: int(ix), most: uint16(g.e.mtu)}
	if r.have, err = r.list(); err != nil {
		return err
	}
	g.routes = r
	es, err := g.entries()
	if err != nil {
		return err
	}
	bs := make([]lease.Binding, len(es))
	for i, e := range es {
		bs[i] = e.Binding
	}
	return g.routes.replace(bs)
}

// list returns the routes that the kernel has.
func (m *mtuRoutes) list() (map[netip.Addr]uint16, error) {
	filter := &netlink.Route{LinkIndex: m.device, Protocol: routeProtocol}
	routes, err := m.nl.RouteListFiltered(unix.AF_INET, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("data path tc: routes: %w", err)
	}
	have := map[netip.Addr]uint16{}
	for _, k := range routes {
		if bits, _ := k.Dst.Mask.Size(); bits == 32 && k.MTU != 0 {
			a, _ := netip.AddrFromSlice(k.Dst.IP.To4())
			have[a] = uint16(k.MTU)
		}
	}
	return have, nil
}

// heal brings back what somebody took away, as the kernel does when the device goes down.
func (m *mtuRoutes) heal() error {
	want := m.have
	have, err := m.list()
	if err != nil {
		return err
	}
	m.have = have
	for a, mtu := range want {
		if err := m.set(lease.Whole(a), mtu); err != nil {
			return err
		}
	}
	for a := range have {
		if _, ok := want[a]; !ok {
			if err := m.set(lease.Whole(a), 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// replace makes the routes exactly those of the bindings.
func (m *mtuRoutes) replace(bs []lease.Binding) error {
	gone := make(map[netip.Addr]bool, len(m.have))
	for a := range m.have {
		gone[a] = true
	}
	for _, b := range bs {
		if err := m.set(b.Resource, b.MTU); err != nil {
			return err
		}
		delete(gone, b.Addr)
	}
	for a := range gone {
		if err := m.set(lease.Whole(a), 0); err != nil {
			return err
		}
	}
	return nil
}

// set gives the address a route with this MTU, or none if the MTU is 0 or not below the device's.
func (m *mtuRoutes) set(r lease.Resource, mtu uint16) error {
	if mtu >= m.most || r.PSIDLen != 0 {
		mtu = 0
	}
	if m.have[r.Addr] == mtu {
		return nil
	}
	route := &netlink.Route{
		Dst: &net.IPNet{IP: r.Addr.AsSlice(), Mask: net.CIDRMask(32, 32)}, LinkIndex: m.device,
		Scope: netlink.SCOPE_LINK, Protocol: routeProtocol, MTU: int(mtu),
	}
	if mtu == 0 {
		if err := m.nl.RouteDel(route); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("data path tc: delete the route of %s: %w", r, err)
		}
		delete(m.have, r.Addr)
		return nil
	}
	if err := m.nl.RouteReplace(route); err != nil {
		return fmt.Errorf("data path tc: route of %s with MTU %d: %w", r, mtu, err)
	}
	m.have[r.Addr] = mtu
	return nil
}
