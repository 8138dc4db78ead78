package tc

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane"
)

// layout is part of the pins' path. It changes with every change of a map, so that a new version never reads records of
// another shape.
const layout = "2"

// engine is what both roles share: one collection with pinned maps, and pinned links on uplinks and device.
type engine struct {
	log     *slog.Logger
	role    string // also the name of the pins' directory
	spec    func() (*ebpf.CollectionSpec, error)
	eth, l3 string          // programs for uplinks with and without a link header
	device  string          // program for the device
	nl      *netlink.Handle // of the namespace that it was configured in
	coll    *ebpf.Collection
	dir     string // of the pins
	links   map[string]link.Link
	tun     *os.File
	name    string // of the device
	mtu     int
}

// open opens the device, once.
func (e *engine) open(device string, persistent bool) error {
	if e.tun != nil {
		if device != e.name {
			return fmt.Errorf("data path tc: device is %s: it cannot become %s while it runs", e.name, device)
		}
		return nil
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("data path tc: netlink: %w", err)
	}
	f, err := openTUN(nl, device, persistent)
	if err != nil {
		nl.Close()
		return fmt.Errorf("data path tc: %w", err)
	}
	e.nl, e.tun, e.name = nl, f, device
	return nil
}

// load makes the collection over the pinned maps, if there are any.
func (e *engine) load(pinDir string) error {
	dir := filepath.Join(pinDir, e.role+"-"+layout)
	if e.coll != nil {
		if dir != e.dir {
			return fmt.Errorf("data path tc: pins are in %s: they cannot move to %s while it runs", e.dir, dir)
		}
		return nil
	}
	if err := mountBPF(pinDir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("data path tc: %w", err)
	}
	e.dir = dir // from here on there may be pins
	spec, err := e.spec()
	if err != nil {
		return fmt.Errorf("data path tc: %w", err)
	}
	for _, m := range spec.Maps {
		if !strings.HasPrefix(m.Name, ".") { // not sections such as .rodata
			m.Pinning = ebpf.PinByName
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: dir}})
	if err != nil {
		return fmt.Errorf("data path tc: %w", err)
	}
	e.coll, e.links = coll, map[string]link.Link{}
	return nil
}

// mountBPF makes sure that dir lies on a bpffs.
func mountBPF(dir string) error {
	const bpffs = "/sys/fs/bpf"
	if !strings.HasPrefix(dir, bpffs) {
		return fmt.Errorf("data path tc: pin directory %s: want one below %s", dir, bpffs)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(bpffs, &st); err != nil {
		return fmt.Errorf("data path tc: %s: %w", bpffs, err)
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, ""); err != nil {
		return fmt.Errorf("data path tc: mount a bpffs on %s: %w", bpffs, err)
	}
	return nil
}

// attach puts the programs on the device and on every uplink, and takes them off interfaces that are uplinks no more.
// A link that is pinned already gets the new program in one step.
func (e *engine) attach(uplinks []string) error {
	want := map[string]bool{}
	var errs error
	one := func(name, prog string, typ ebpf.AttachType) {
		pin := typ.String() + "-" + name
		want[pin] = true
		if err := e.attachOne(pin, name, prog, typ); err != nil {
			errs = errors.Join(errs, fmt.Errorf("data path tc: %s: %w", name, err))
		}
	}
	one(e.name, e.device, ebpf.AttachTCXEgress)
	for _, u := range uplinks {
		prog := e.eth
		l, err := e.nl.LinkByName(u)
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("data path tc: uplink %s: %w", u, err))
			continue
		}
		if len(l.Attrs().HardwareAddr) == 0 {
			prog = e.l3
		}
		one(u, prog, ebpf.AttachTCXIngress)
	}
	pins, err := os.ReadDir(e.dir)
	if err != nil {
		return errors.Join(errs, fmt.Errorf("data path tc: %w", err))
	}
	for _, p := range pins {
		if strings.HasPrefix(p.Name(), "TCX") && !want[p.Name()] {
			errs = errors.Join(errs, e.detach(p.Name()))
		}
	}
	return errs
}

func (e *engine) attachOne(pin, name, prog string, typ ebpf.AttachType) error {
	path := filepath.Join(e.dir, pin)
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	l := e.links[pin]
	if l == nil {
		if l, err = link.LoadPinnedLink(path, nil); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if l != nil {
		if at, err := attachedTo(l); err == nil && at == ifi.Index {
			e.links[pin] = l
			return l.Update(e.coll.Programs[prog])
		}
		// The interface went away and came back as another one.
		l.Close()
		delete(e.links, pin)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	l, err = link.AttachTCX(link.TCXOptions{Interface: ifi.Index, Program: e.coll.Programs[prog], Attach: typ})
	if err != nil {
		return err
	}
	if err := l.Pin(path); err != nil {
		l.Close()
		return err
	}
	e.links[pin] = l
	e.log.Info("program attached", "interface", name, "program", prog)
	return nil
}

func attachedTo(l link.Link) (int, error) {
	in, err := l.Info()
	if err != nil {
		return 0, err
	}
	t := in.TCX()
	if t == nil {
		return 0, errors.New("not a TCX link")
	}
	return int(t.Ifindex), nil
}

func (e *engine) detach(pin string) error {
	if l := e.links[pin]; l != nil {
		l.Close()
		delete(e.links, pin)
	}
	if err := os.Remove(filepath.Join(e.dir, pin)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("data path tc: %w", err)
	}
	return nil
}

// uplinks returns the interfaces that tunnels come over: the given ones, or all that are up and have an IPv6 route
// beyond the link-local one.
func (e *engine) uplinks(given []string) ([]string, error) {
	if len(given) > 0 {
		return given, nil
	}
	routes, err := e.nl.RouteList(nil, unix.AF_INET6)
	if err != nil {
		return nil, fmt.Errorf("data path tc: routes: %w", err)
	}
	var out []string
	for _, r := range routes {
		if r.LinkIndex == 0 || r.Dst != nil && (r.Dst.IP.IsLinkLocalUnicast() || r.Dst.IP.IsMulticast()) {
			continue
		}
		l, err := e.nl.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue // gone since
		}
		a := l.Attrs()
		if a.Name != e.name && a.Flags&net.FlagLoopback == 0 && a.Flags&net.FlagUp != 0 && !slices.Contains(out, a.Name) {
			out = append(out, a.Name)
		}
	}
	slices.Sort(out)
	if len(out) == 0 {
		return nil, errors.New("data path tc: no uplink: want a list, or an interface that is up and has an IPv6 route")
	}
	return out, nil
}

// tunnelMTU is what fits through the smallest uplink behind an outer header; configured, when not 0, bounds it.
func tunnelMTU(uplinks []string, configured uint16) (int, error) {
	const outer, least, most = 40, 1280, 65535
	mtu := most
	for _, u := range uplinks {
		l, err := net.InterfaceByName(u)
		if err != nil {
			return 0, fmt.Errorf("data path tc: uplink %s: %w", u, err)
		}
		if l.MTU < least {
			return 0, fmt.Errorf("data path tc: uplink %s has MTU %d: want at least %d (RFC 8200 section 5)", u, l.MTU, least)
		}
		mtu = min(mtu, l.MTU-outer)
	}
	if configured != 0 {
		mtu = min(mtu, int(configured))
	}
	return mtu, nil
}

// deviceUp brings the device up with its MTU. Its IPv6 forwarding flag is what lets the programs ask routing in its
// name.
func (e *engine) deviceUp(uplinks []string, configured uint16) error {
	mtu, err := tunnelMTU(uplinks, configured)
	if err != nil {
		return err
	}
	l, err := e.nl.LinkByName(e.name)
	if err != nil {
		return fmt.Errorf("data path tc: %w", err)
	}
	if l.Attrs().MTU != mtu {
		if err := e.nl.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("data path tc: MTU of %s: %w", e.name, err)
		}
	}
	e.mtu = mtu
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+e.name+"/forwarding", []byte("1"), 0o644); err != nil {
		return fmt.Errorf("data path tc: %w", err)
	}
	if err := e.nl.LinkSetUp(l); err != nil {
		return fmt.Errorf("data path tc: %w", err)
	}
	return nil
}

// close leaves everything pinned in place, or removes it.
func (e *engine) close(keep bool) error {
	var errs error
	for _, l := range e.links {
		errs = errors.Join(errs, l.Close())
	}
	if e.coll != nil {
		e.coll.Close()
	}
	if !keep && e.dir != "" {
		errs = errors.Join(errs, removePins(filepath.Dir(e.dir), e.role))
	}
	if e.tun != nil {
		if !keep {
			errs = errors.Join(errs, setPersistent(e.tun, false))
		}
		errs = errors.Join(errs, e.tun.Close())
		e.nl.Close()
	}
	e.links, e.coll, e.tun, e.nl = nil, nil, nil, nil
	return errs
}

// removePins removes what a role has pinned, of any layout. A program is detached with the last pin of its link.
func removePins(pinDir, role string) error {
	dirs, err := filepath.Glob(filepath.Join(pinDir, role+"-*"))
	for _, d := range dirs {
		err = errors.Join(err, os.RemoveAll(d))
	}
	return err
}

// counted is struct counters of dstm.h.
type counted struct {
	Rx, RxBytes, Tx, TxBytes, Consumed uint64
	Drops                              [32]uint64
}

const (
	up   uint32 = 0
	down uint32 = 1
)

func (e *engine) counters() (dataplane.Counters, error) {
	if e.coll == nil {
		return dataplane.Counters{}, errors.New("data path tc: not configured")
	}
	u, err := e.direction(up)
	if err != nil {
		return dataplane.Counters{}, err
	}
	d, err := e.direction(down)
	return dataplane.Counters{Up: u, Down: d}, err
}

func (e *engine) direction(dir uint32) (dataplane.Direction, error) {
	var cpus []counted
	if err := e.coll.Maps["counters"].Lookup(dir, &cpus); err != nil {
		return dataplane.Direction{}, fmt.Errorf("data path tc: counters: %w", err)
	}
	out := dataplane.Direction{Drops: map[dataplane.DropReason]uint64{}}
	for _, c := range cpus {
		out.Rx += c.Rx
		out.RxBytes += c.RxBytes
		out.Tx += c.Tx
		out.TxBytes += c.TxBytes
		out.Consumed += c.Consumed
		for r, n := range c.Drops {
			if n > 0 {
				out.Drops[dataplane.DropReason(r)] += n
			}
		}
	}
	return out, nil
}

func (e *engine) put(name string, value any) error {
	if e.coll == nil {
		return errors.New("data path tc: not configured")
	}
	if err := e.coll.Maps[name].Put(uint32(0), value); err != nil {
		return fmt.Errorf("data path tc: %s: %w", name, err)
	}
	return nil
}
