package netcfg

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Hop is where the kernel would send a packet.
type Hop struct {
	Link    string
	Gateway netip.Addr // not valid when the destination is on the link
	Source  netip.Addr // what the kernel would take
	MTU     int        // bytes: the smallest of the interface's, its IPv6 MTU (router advertisements) and the route's
}

// Lookup returns the way to dst. No route is an error that is unix.ENETUNREACH or unix.EHOSTUNREACH.
func (c *Config) Lookup(dst netip.Addr) (Hop, error) {
	routes, err := c.h.RouteGet(dst.AsSlice())
	if err != nil {
		return Hop{}, fmt.Errorf("route to %s: %w", dst, err)
	}
	if len(routes) == 0 {
		return Hop{}, fmt.Errorf("route to %s: %w", dst, unix.ENETUNREACH)
	}
	r := routes[0]
	link, err := c.h.LinkByIndex(r.LinkIndex)
	if err != nil {
		return Hop{}, fmt.Errorf("route to %s: %w", dst, err)
	}
	h := Hop{Link: link.Attrs().Name, Gateway: toIP(r.Gw), Source: toIP(r.Src), MTU: link.Attrs().MTU}
	if dst.Is6() {
		h.MTU = min(h.MTU, ipv6MTU(h.Link, h.MTU))
	}
	if r.MTU > 0 {
		h.MTU = min(h.MTU, r.MTU)
	}
	return h, nil
}

func ipv6MTU(link string, fallback int) int {
	s, err := readSysctl("net/ipv6/conf/" + link + "/mtu")
	if err != nil {
		return fallback // no IPv6 on this interface
	}
	if v, err := strconv.Atoi(s); err == nil && v >= 1280 {
		return v
	}
	return fallback
}

// Link is a network interface.
type Link struct {
	Index int
	Name  string
	Kind  string // tuntap, veth, ...; "device" for hardware
	MTU   int
	Up    bool // administratively
}

// Link returns the interface of that name; ok is false when there is none.
func (c *Config) Link(name string) (l Link, ok bool, err error) {
	nl, err := c.h.LinkByName(name)
	if noLink := (netlink.LinkNotFoundError{}); errors.As(err, &noLink) {
		return Link{}, false, nil
	}
	if err != nil {
		return Link{}, false, fmt.Errorf("interface %s: %w", name, err)
	}
	return fromLink(nl), true, nil
}

// Links returns all interfaces, by index.
func (c *Config) Links() ([]Link, error) {
	links, err := dump(c.h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	out := make([]Link, len(links))
	for i, l := range links {
		out[i] = fromLink(l)
	}
	slices.SortFunc(out, func(a, b Link) int { return a.Index - b.Index })
	return out, nil
}

func fromLink(l netlink.Link) Link {
	a := l.Attrs()
	return Link{Index: a.Index, Name: a.Name, Kind: l.Type(), MTU: a.MTU, Up: a.RawFlags&unix.IFF_UP != 0}
}

// SetUp sets the interface up or down.
func (c *Config) SetUp(name string, up bool) error {
	l, err := c.h.LinkByName(name)
	if err == nil && up {
		err = c.h.LinkSetUp(l)
	} else if err == nil {
		err = c.h.LinkSetDown(l)
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	return nil
}

// SetMTU sets the MTU of the interface, in bytes.
func (c *Config) SetMTU(name string, mtu int) error {
	l, err := c.h.LinkByName(name)
	if err == nil && l.Attrs().MTU != mtu {
		err = c.h.LinkSetMTU(l, mtu)
	}
	if err != nil {
		return fmt.Errorf("interface %s: mtu %d: %w", name, mtu, err)
	}
	return nil
}

// SetDevice sets the MTU of a tunnel interface, in bytes, unless it is 0, takes its multicast flag off and sets it up. A
// tunnel to one gateway carries no multicast, and programs that announce themselves on every interface leave it alone.
func (c *Config) SetDevice(name string, mtu int) error {
	if mtu > 0 {
		if err := c.SetMTU(name, mtu); err != nil {
			return err
		}
	}
	l, err := c.h.LinkByName(name)
	if err == nil && l.Attrs().RawFlags&unix.IFF_MULTICAST != 0 {
		err = c.h.LinkSetMulticastOff(l)
	}
	if err != nil {
		return fmt.Errorf("interface %s: multicast off: %w", name, err)
	}
	return c.SetUp(name, true)
}

// RemoveLink removes the interface; absence is success.
func (c *Config) RemoveLink(name string) error {
	l, err := c.h.LinkByName(name)
	if err == nil {
		err = c.h.LinkDel(l)
	}
	if err != nil && !gone(err) {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

// GlobalAddr is an IPv6 address of global scope with the state that the kernel has for it.
type GlobalAddr struct {
	Link       string
	Addr       netip.Addr
	Temporary  bool // RFC 8981
	Deprecated bool
	Tentative  bool // duplicate address detection is running or failed
}

// GlobalIPv6 returns the IPv6 addresses of global scope, unique local ones included, by interface and address.
func (c *Config) GlobalIPv6() ([]GlobalAddr, error) {
	names, err := c.linkNames()
	if err != nil {
		return nil, err
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return c.h.AddrList(nil, netlink.FAMILY_V6) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []GlobalAddr
	for _, a := range addrs {
		ip := toIP(a.IP)
		if a.Scope != unix.RT_SCOPE_UNIVERSE || !ip.Is6() || !ip.IsGlobalUnicast() {
			continue
		}
		out = append(out, GlobalAddr{
			Link: names[a.LinkIndex], Addr: ip,
			Temporary:  a.Flags&unix.IFA_F_TEMPORARY != 0,
			Deprecated: a.Flags&unix.IFA_F_DEPRECATED != 0,
			Tentative:  a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0,
		})
	}
	slices.SortFunc(out, func(a, b GlobalAddr) int {
		if n := strings.Compare(a.Link, b.Link); n != 0 {
			return n
		}
		return a.Addr.Compare(b.Addr)
	})
	return out, nil
}

// IPv4 is what the host has of IPv4.
type IPv4 struct {
	Addrs      []Addr // of all interfaces, by interface and prefix
	Default    Route  // the best default route of the main table that is not ours
	HasDefault bool
}

// ReadIPv4 returns what the host has of IPv4.
func (c *Config) ReadIPv4() (IPv4, error) {
	k, err := c.read()
	if err != nil {
		return IPv4{}, err
	}
	var v IPv4
	for key, a := range k.addrs {
		if key.Prefix.Addr().Is4() {
			v.Addrs = append(v.Addrs, a)
		}
	}
	slices.SortFunc(v.Addrs, func(a, b Addr) int { return compareAddrKey(addrKey{a.Link, a.Prefix}, addrKey{b.Link, b.Prefix}) })
	for _, r := range k.routes {
		native := r.Prefix.Addr().Is4() && r.Prefix.Bits() == 0 && r.Table == 0 && r.protocol != Protocol && !r.Blackhole
		if native && (!v.HasDefault || r.Metric < v.Default.Metric) {
			v.Default, v.HasDefault = r.Route, true
		}
	}
	return v, nil
}

// Watch returns a channel that gets a value after interfaces, addresses or routes changed, at most one unread. Changes
// by ourselves count. It is closed when ctx ends. Watch first, then read: no change is lost.
func (c *Config) Watch(ctx context.Context) (<-chan struct{}, error) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: subscribe: %w", err)
	}
	ch := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, s.Close)
	go func() {
		defer close(ch)
		defer stop()
		for {
			_, _, err := s.Receive()
			if ctx.Err() != nil {
				return
			}
			// Lost messages (ENOBUFS) are a change too; anything else that lasts ends with the context.
			if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
				c.log.Error("network changes are no longer seen", "err", err)
				<-ctx.Done()
				return
			}
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}()
	return ch, nil
}

// Dump returns what is ours in the kernel as sorted text, one line each, for tests and for people.
func (c *Config) Dump() (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k, err := c.read()
	if err != nil {
		return "", err
	}
	var lines []string
	for _, key := range c.rec.Addrs {
		if a, ok := k.addrs[key]; ok {
			lines = append(lines, a.String())
		}
	}
	for _, r := range k.routes {
		if r.protocol == Protocol {
			lines = append(lines, r.Route.String())
		}
	}
	for name := range c.rec.Sysctls {
		if v, err := readSysctl(name); err == nil {
			lines = append(lines, "sysctl "+name+" = "+v)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n"), nil
}
