package tc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/lease"
)

// The records of dstm.h and gateway.c. Addresses are in network order, numbers in the machine's.
type (
	configRecord struct {
		Device, Flags uint32
		Placeholder   [4]byte
		HopLimit      uint32
	}
	bindingKey struct {
		Addr    [4]byte
		PSIDLen uint8
		_       uint8
		PSID    uint16
	}
	bindingRecord struct {
		Host, TEP [16]byte
		Gen       uint64
		LastSeen  uint64
		MTU       uint32
		_         uint32
	}
)

const flagHairpin = 1

// defaultHopLimit is what outer packets get when nothing is configured.
const defaultHopLimit = 64

// Gateway is the packet path of a TEP. Its maps, links and device outlive the process.
type Gateway struct {
	mu     sync.Mutex
	e      engine
	routes mtuRoutes
}

var _ dataplane.Gateway = (*Gateway)(nil)

// NewGateway returns a gateway's packet path, or an *UnsupportedError on a kernel that cannot run it.
func NewGateway(log *slog.Logger) (*Gateway, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	return &Gateway{e: engine{
		log: log, role: "gateway", spec: loadGateway,
		eth: "gateway_uplink_eth", l3: "gateway_uplink_l3", device: "gateway_device",
	}}, nil
}

func supported() error {
	k, err := Probe()
	if err != nil {
		return err
	}
	return k.Check()
}

// Configure implements dataplane.Gateway.
func (g *Gateway) Configure(_ context.Context, c dataplane.GatewayConfig) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	e := &g.e
	fresh := e.tun == nil
	if err := e.open(c.Device, true); err != nil {
		return err
	}
	if fresh {
		go drain(e.tun) // what passes the egress program is nobody's
	}
	if err := e.load(c.PinDir); err != nil {
		return err
	}
	uplinks, err := e.uplinks(c.Uplinks)
	if err != nil {
		return err
	}
	if err := e.deviceUp(uplinks, c.MTU); err != nil {
		return err
	}
	if err := g.settings(c); err != nil {
		return err
	}
	if err := e.attach(uplinks); err != nil {
		return err
	}
	if int(g.routes.most) == e.mtu {
		return g.routes.heal()
	}
	return g.resetRoutes() // the first time, and when the device's MTU has changed
}

func (g *Gateway) settings(c dataplane.GatewayConfig) error {
	ix, err := ifindex(c.Device)
	if err != nil {
		return err
	}
	r := configRecord{Device: ix, HopLimit: uint32(c.HopLimit)}
	if r.HopLimit == 0 {
		r.HopLimit = defaultHopLimit
	}
	if c.Hairpin {
		r.Flags |= flagHairpin
	}
	if err := g.e.put("config", r); err != nil {
		return err
	}
	teps := g.e.coll.Maps["teps"]
	want := map[[16]byte]bool{}
	for _, a := range c.TEPs {
		want[a.As16()] = true
		if err := teps.Put(a.As16(), uint32(1)); err != nil {
			return fmt.Errorf("data path tc: tunnel address %s: %w", a, err)
		}
	}
	return sweep(teps, func(k [16]byte) bool { return want[k] })
}

// sweep removes the keys that keep refuses.
func sweep[K comparable](m *ebpf.Map, keep func(K) bool) error {
	var k K
	var v []byte
	var gone []K
	it := m.Iterate()
	for it.Next(&k, &v) {
		if !keep(k) {
			gone = append(gone, k)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("data path tc: %w", err)
	}
	for _, k := range gone {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("data path tc: %w", err)
		}
	}
	return nil
}

// drain reads the TUN so that its queue never fills. It ends when the descriptor is closed.
func drain(f *os.File) {
	b := make([]byte, 1<<16+vnetHeader)
	for {
		if _, err := f.Read(b); errors.Is(err, os.ErrClosed) {
			return
		} else if err != nil {
			time.Sleep(time.Second) // the device is down; it may come up again
		}
	}
}

func keyOf(r lease.Resource) bindingKey {
	return bindingKey{Addr: r.Addr.As4(), PSIDLen: r.PSIDLen, PSID: r.PSID}
}

func recordOf(b lease.Binding) bindingRecord {
	return bindingRecord{Host: b.Host.As16(), TEP: b.TEP.As16(), Gen: uint64(b.Gen), MTU: uint32(b.MTU)}
}

func (g *Gateway) bindings() (*ebpf.Map, error) {
	if g.e.coll == nil {
		return nil, errors.New("data path tc: not configured")
	}
	return g.e.coll.Maps["bindings"], nil
}

// Apply implements dataplane.Gateway.
func (g *Gateway) Apply(_ context.Context, upserts []lease.Binding, deletes []lease.Resource) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	m, err := g.bindings()
	if err != nil {
		return err
	}
	for _, r := range deletes {
		if err := m.Delete(keyOf(r)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("data path tc: delete %s: %w", r, err)
		}
		if err := g.routes.set(r, 0); err != nil {
			return err
		}
	}
	for _, b := range upserts {
		if err := m.Put(keyOf(b.Resource), recordOf(b)); err != nil {
			return fmt.Errorf("data path tc: put %s: %w", b.Resource, err)
		}
		if err := g.routes.set(b.Resource, b.MTU); err != nil {
			return err
		}
	}
	return nil
}

// Replace implements dataplane.Gateway. Bindings that stay are not touched, so they go on forwarding.
func (g *Gateway) Replace(_ context.Context, bs []lease.Binding) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	m, err := g.bindings()
	if err != nil {
		return err
	}
	if err := (table{m}).replace(bs); err != nil {
		return err
	}
	return g.routes.replace(bs)
}

// SetDeadline implements dataplane.Gateway.
func (g *Gateway) SetDeadline(_ context.Context, bootNS uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.e.put("deadline", bootNS)
}

// Entries implements dataplane.Gateway.
func (g *Gateway) Entries(context.Context) ([]dataplane.Entry, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.entries()
}

func (g *Gateway) entries() ([]dataplane.Entry, error) {
	m, err := g.bindings()
	if err != nil {
		return nil, err
	}
	var out []dataplane.Entry
	err = table{m}.each(func(k bindingKey, r *bindingRecord) {
		out = append(out, dataplane.Entry{
			Binding: lease.Binding{
				Resource: lease.Resource{Addr: netip.AddrFrom4(k.Addr), PSIDLen: k.PSIDLen, PSID: k.PSID},
				Host:     netip.AddrFrom16(r.Host), TEP: netip.AddrFrom16(r.TEP), Gen: lease.Gen(r.Gen), MTU: uint16(r.MTU),
			},
			LastSeen: time.Duration(r.LastSeen),
		})
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Counters implements dataplane.Gateway.
func (g *Gateway) Counters(context.Context) (dataplane.Counters, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.e.counters()
}

// Close implements dataplane.Gateway.
func (g *Gateway) Close(keep bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.e.close(keep)
}
