package tc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/lease"
)

// leaseRecord is struct lease of host.c.
type leaseRecord struct {
	Addr      [4]byte
	Host, TEP [16]byte
}

// Host is the packet path of a host. It ends with the process, but for the pins, which the next one takes over.
type Host struct {
	mu sync.Mutex
	e  engine
	fd int // AF_PACKET socket for packets that are sent again, -1 = none
}

var _ dataplane.Host = (*Host)(nil)

// NewHost returns a host's packet path, or an *UnsupportedError on a kernel that cannot run it.
func NewHost(log *slog.Logger) (*Host, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	return &Host{fd: -1, e: engine{
		log: log, role: hostRole, spec: loadHost, eth: "host_uplink_eth", l3: "host_uplink_l3", device: "host_device",
	}}, nil
}

// Configure implements dataplane.Host.
func (h *Host) Configure(_ context.Context, c dataplane.HostConfig) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := &h.e
	if err := e.open(c.Device, false); err != nil {
		return err
	}
	fresh := e.coll == nil
	if err := e.load(c.PinDir); err != nil {
		return err
	}
	if fresh { // the lease of a process that died is not ours
		if err := h.setLease(nil, 0); err != nil {
			return err
		}
	}
	uplinks, err := e.uplinks(c.Uplinks)
	if err != nil {
		return err
	}
	if err := e.deviceUp(uplinks, c.MTU); err != nil {
		return err
	}
	ix, err := ifindex(c.Device)
	if err != nil {
		return err
	}
	r := configRecord{Device: ix, HopLimit: uint32(c.HopLimit), Placeholder: c.Placeholder.Addr().As4()}
	if r.HopLimit == 0 {
		r.HopLimit = defaultHopLimit
	}
	if err := e.put("config", r); err != nil {
		return err
	}
	if err := e.attach(uplinks); err != nil {
		return err
	}
	return h.openInject(int(ix))
}

func (h *Host) openInject(ifindex int) error {
	if h.fd >= 0 {
		return nil
	}
	// SOCK_DGRAM: the kernel knows that the device has no link header. Protocol 0: nothing is received.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("data path tc: packet socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifindex}); err != nil {
		unix.Close(fd)
		return fmt.Errorf("data path tc: packet socket: %w", err)
	}
	h.fd = fd
	return nil
}

// SetLease implements dataplane.Host. The lease goes in before its deadline and comes out after it, so that nothing is
// forwarded under the wrong one.
func (h *Host) SetLease(_ context.Context, b *lease.Binding, deadlineBootNS uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.setLease(b, deadlineBootNS)
}

func (h *Host) setLease(b *lease.Binding, deadline uint64) error {
	if b == nil {
		return errors.Join(h.e.put("deadline", uint64(0)), h.e.put("lease", leaseRecord{}))
	}
	r := leaseRecord{Addr: b.Addr.As4(), Host: b.Host.As16(), TEP: b.TEP.As16()}
	return errors.Join(h.e.put("lease", r), h.e.put("deadline", deadline))
}

// ReadHeld implements dataplane.Host.
func (h *Host) ReadHeld(ctx context.Context) (dataplane.Held, error) {
	h.mu.Lock()
	f := h.e.tun
	h.mu.Unlock()
	if f == nil {
		return dataplane.Held{}, errors.New("data path tc: not configured")
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			_ = f.SetReadDeadline(time.Time{})
		}
	}()
	buf := make([]byte, 1<<16+vnetHeader)
	for {
		pkt, ok, err := readPacket(f, buf)
		switch {
		case ctx.Err() != nil:
			return dataplane.Held{}, ctx.Err()
		case errors.Is(err, os.ErrClosed):
			return dataplane.Held{}, fmt.Errorf("data path tc: %w", err)
		case err != nil: // the device is down; it may come up again
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		case ok:
			return dataplane.Held{Data: append([]byte(nil), pkt...), At: time.Now()}, nil
		}
	}
}

// Inject implements dataplane.Host: the packet leaves through the device once more.
func (h *Host) Inject(_ context.Context, p dataplane.Held) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fd < 0 {
		return errors.New("data path tc: not configured")
	}
	ix, err := ifindex(h.e.name)
	if err != nil {
		return err
	}
	to := &unix.SockaddrLinklayer{Ifindex: int(ix), Protocol: htons(unix.ETH_P_IP)}
	if err := unix.Sendto(h.fd, p.Data, 0, to); err != nil {
		return fmt.Errorf("data path tc: inject %d bytes: %w", len(p.Data), err)
	}
	return nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// Activity implements dataplane.Host.
func (h *Host) Activity(context.Context) (time.Duration, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.e.coll == nil {
		return 0, errors.New("data path tc: not configured")
	}
	var ns uint64
	if err := h.e.coll.Maps["activity"].Lookup(uint32(0), &ns); err != nil {
		return 0, fmt.Errorf("data path tc: activity: %w", err)
	}
	return time.Duration(ns), nil
}

// Counters implements dataplane.Host.
func (h *Host) Counters(context.Context) (dataplane.Counters, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.e.counters()
}

// Close implements dataplane.Host: pins, links and device go.
func (h *Host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var err error
	if h.fd >= 0 {
		err = unix.Close(h.fd)
		h.fd = -1
	}
	return errors.Join(err, h.e.close(false))
}

func ifindex(name string) (uint32, error) {
	l, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("data path tc: device %s: %w", name, err)
	}
	return uint32(l.Index), nil
}

// queryTCX asks for the programs on the loopback interface, which kernels without TCX cannot answer.
func queryTCX() error {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	return err
}

// hostRole is the name of the host's pins.
const hostRole = "host"

// RemoveHostPins removes what a host agent that was killed has pinned below the directory.
func RemoveHostPins(pinDir string) error { return removePins(pinDir, hostRole) }
