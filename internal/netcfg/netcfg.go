// Package netcfg puts addresses, routes and sysctls into the kernel by whole desired value, and takes back exactly what
// it put there.
//
// What is ours: routes of protocol 213 that the state file names, addresses that the state file names, sysctls whose old
// value the state file keeps. The state file is written before the kernel is touched, so a crash in between leaves
// nothing that the next start would not know. Everything else belongs to strangers and is never changed or removed.
package netcfg

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Protocol is the route protocol number of every route that DSTM adds ("proto 213" in ip route).
const Protocol = 213

// Addr is an address on an interface. It is comparable.
type Addr struct {
	Link       string       // interface name
	Prefix     netip.Prefix // the address with its prefix length, not masked
	NoDAD      bool         // IPv6: usable at once, no duplicate address detection
	Deprecated bool         // IPv6: preferred lifetime 0, so that it is never chosen as a source
}

// String returns the address as the golden dumps show it.
func (a Addr) String() string {
	s := fmt.Sprintf("addr %s dev %s", a.Prefix, a.Link)
	if a.NoDAD {
		s += " nodad"
	}
	if a.Deprecated {
		s += " deprecated"
	}
	return s
}

// Route is a route. Prefix, Metric and Table name it, as in the kernel. It is comparable.
type Route struct {
	Prefix    netip.Prefix // masked
	Link      string       // out of this interface; must be empty with Blackhole
	Blackhole bool
	Gateway   netip.Addr // optional
	Metric    uint32     // 0 = the kernel's default: 0 for IPv4, 1024 for IPv6
	Src       netip.Addr // preferred source, optional
	MTU       uint32     // bytes, 0 = of the interface
	MTULock   bool       // no path MTU discovery above or below MTU
	Table     uint32     // 0 = main
}

// String returns the route as the golden dumps show it.
func (r Route) String() string {
	s := "route " + r.Prefix.String()
	if r.Blackhole {
		s = "blackhole " + r.Prefix.String()
	}
	if r.Gateway.IsValid() {
		s += " via " + r.Gateway.String()
	}
	if r.Link != "" {
		s += " dev " + r.Link
	}
	s += fmt.Sprintf(" metric %d", r.Metric)
	if r.Src.IsValid() {
		s += " src " + r.Src.String()
	}
	if r.MTU != 0 {
		s += " mtu "
		if r.MTULock {
			s += "lock "
		}
		s += fmt.Sprint(r.MTU)
	}
	if r.Table != 0 {
		s += fmt.Sprintf(" table %d", r.Table)
	}
	return s
}

// Desired is everything that is to be in the kernel because of us.
type Desired struct {
	Addrs   []Addr
	Routes  []Route
	Sysctls map[string]string // name as in sysctl(8) with slashes, e.g. net/ipv6/conf/dstm0/forwarding
}

// Check says what cannot be put into a kernel.
func (d Desired) Check() error {
	var errs []error
	for _, a := range d.Addrs {
		if a.Link == "" || !a.Prefix.IsValid() {
			errs = append(errs, fmt.Errorf("%s: want an interface and an address", a))
		}
	}
	seen := map[routeKey]bool{}
	for _, r := range d.Routes {
		r = r.normal()
		switch k := r.key(); {
		case !r.Prefix.IsValid() || r.Prefix != r.Prefix.Masked():
			errs = append(errs, fmt.Errorf("%s: want a masked prefix", r))
		case r.Blackhole == (r.Link != ""):
			errs = append(errs, fmt.Errorf("%s: want an interface or blackhole, not both and not neither", r))
		case seen[k]:
			errs = append(errs, fmt.Errorf("%s: prefix, metric and table are given twice", r))
		default:
			seen[k] = true
		}
	}
	for name := range d.Sysctls {
		if err := checkSysctl(name); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Config is our hold on the kernel's network state. Its methods may be called from several goroutines; it stays in the
// network namespace of the thread that called Open, sysctls excepted, which are those of the calling thread.
type Config struct {
	h     *netlink.Handle
	log   *slog.Logger
	state stateFile

	mu  sync.Mutex
	rec record // what the state file says
}

// Open opens a netlink handle and reads the state file, which need not exist. One state file belongs to one daemon.
func Open(statePath string, log *slog.Logger) (*Config, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	c := &Config{h: h, log: log, state: stateFile{statePath}}
	if c.rec, err = c.state.load(); err != nil {
		h.Close()
		return nil, err
	}
	return c, nil
}

// Close gives up the handle and leaves the kernel as it is.
func (c *Config) Close() { c.h.Close() }

// Set makes the kernel hold d: sysctls, addresses and routes are added before what is ours and no longer desired is
// removed. It goes on after a failure and returns all of them. Calling it again is cheap and right.
func (c *Config) Set(d Desired) error {
	if err := d.Check(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.set(d)
}

// Cleanup removes everything that is ours, restores the sysctls and removes the state file.
func (c *Config) Cleanup() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.set(Desired{}); err != nil {
		return err
	}
	return c.state.remove()
}

func (c *Config) set(d Desired) error {
	k, err := c.read()
	if err != nil {
		return err
	}
	next, err := c.intent(d, k)
	if err != nil {
		return err
	}
	if err := c.save(next); err != nil {
		return err
	}
	keep := record{Sysctls: maps.Clone(next.Sysctls)}
	errs := []error{c.applySysctls(d, &keep)}
	errs = append(errs, c.addAddrs(d, k, &keep), c.addRoutes(d, k, &keep))
	errs = append(errs, c.delRoutes(d, k, next, &keep), c.delAddrs(d, k, next, &keep))
	if len(keep.Addrs) < len(next.Addrs) {
		// With the last IPv4 address of an interface the kernel removes its IPv4 routes as well: put ours back.
		if k, err = c.read(); err == nil {
			err = c.addRoutes(d, k, &keep)
		}
		errs = append(errs, err)
	}
	errs = append(errs, c.save(keep))
	return errors.Join(errs...)
}

// intent returns the record of what may be in the kernel while d is being applied: the old, and what d will add.
func (c *Config) intent(d Desired, k kernel) (record, error) {
	next := record{Addrs: slices.Clone(c.rec.Addrs), Routes: slices.Clone(c.rec.Routes), Sysctls: map[string]string{}}
	maps.Copy(next.Sysctls, c.rec.Sysctls)
	for _, a := range d.Addrs {
		if _, there := k.addrs[addrKey{a.Link, a.Prefix}]; !there {
			next.Addrs = append(next.Addrs, addrKey{a.Link, a.Prefix})
		}
	}
	for _, r := range d.Routes {
		next.Routes = append(next.Routes, r.normal().key())
	}
	for name := range d.Sysctls {
		if _, known := next.Sysctls[name]; known {
			continue
		}
		old, err := readSysctl(name)
		if err != nil {
			return record{}, err
		}
		next.Sysctls[name] = old
	}
	next.sort()
	return next, nil
}

func (c *Config) save(r record) error {
	r.sort()
	if r.equal(c.rec) {
		return nil
	}
	if err := c.state.save(r); err != nil {
		return err
	}
	c.rec = r
	return nil
}

func (c *Config) addAddrs(d Desired, k kernel, keep *record) error {
	var errs []error
	for _, a := range d.Addrs {
		key := addrKey{a.Link, a.Prefix}
		ours := slices.Contains(c.rec.Addrs, key)
		if ours {
			keep.Addrs = append(keep.Addrs, key)
		}
		if have, there := k.addrs[key]; there && (!ours || have.Deprecated == a.Deprecated) {
			continue
		}
		link, err := c.h.LinkByName(a.Link)
		if err == nil {
			err = c.h.AddrReplace(link, toAddr(a))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("add %s: %w", a, err))
			continue
		}
		c.log.Debug("address added", "addr", a.String())
	}
	return errors.Join(errs...)
}

func (c *Config) addRoutes(d Desired, k kernel, keep *record) error {
	var errs []error
	for _, r := range d.Routes {
		r = r.normal()
		have, there := k.routes[r.key()]
		if there && have.protocol != Protocol {
			errs = append(errs, fmt.Errorf("add %s: the kernel has %s of protocol %d there, which is not ours", r, have.Route, have.protocol))
			continue
		}
		keep.Routes = append(keep.Routes, r.key())
		if there && have.Route == r {
			continue
		}
		nr, err := c.toRoute(r)
		if err == nil {
			err = c.h.RouteReplace(nr)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("add %s: %w", r, err))
			continue
		}
		c.log.Debug("route added", "route", r.String())
	}
	return errors.Join(errs...)
}

func (c *Config) delRoutes(d Desired, k kernel, old record, keep *record) error {
	want := map[routeKey]bool{}
	for _, r := range d.Routes {
		want[r.normal().key()] = true
	}
	var errs []error
	for _, key := range old.Routes {
		have, there := k.routes[key]
		if want[key] || !there || have.protocol != Protocol {
			continue
		}
		nr, err := c.toRoute(have.Route)
		if err == nil {
			err = c.h.RouteDel(nr)
		}
		if err != nil && !gone(err) {
			keep.Routes = append(keep.Routes, key)
			errs = append(errs, fmt.Errorf("remove %s: %w", have.Route, err))
			continue
		}
		c.log.Debug("route removed", "route", have.Route.String())
	}
	return errors.Join(errs...)
}

func (c *Config) delAddrs(d Desired, k kernel, old record, keep *record) error {
	want := map[addrKey]bool{}
	for _, a := range d.Addrs {
		want[addrKey{a.Link, a.Prefix}] = true
	}
	var errs []error
	for _, key := range old.Addrs {
		have, there := k.addrs[key]
		if want[key] || !there {
			continue
		}
		link, err := c.h.LinkByName(key.Link)
		if err == nil {
			err = c.h.AddrDel(link, toAddr(have))
		}
		if err != nil && !gone(err) {
			keep.Addrs = append(keep.Addrs, key)
			errs = append(errs, fmt.Errorf("remove %s: %w", have, err))
			continue
		}
		c.log.Debug("address removed", "addr", have.String())
	}
	return errors.Join(errs...)
}

// gone reports whether err says that what was to be removed is not there.
func gone(err error) bool {
	var noLink netlink.LinkNotFoundError
	return errors.As(err, &noLink) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV)
}

func compareAddrKey(a, b addrKey) int {
	return cmp.Or(cmp.Compare(a.Link, b.Link), a.Prefix.Compare(b.Prefix))
}

func compareRouteKey(a, b routeKey) int {
	return cmp.Or(a.Prefix.Compare(b.Prefix), cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Table, b.Table))
}
