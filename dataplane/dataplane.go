// Package dataplane is the seam between the daemons and the packet path: what a gateway and a host ask of an engine,
// and why packets are dropped. Engines live in sub-packages; packet/ holds the pure byte handling.
package dataplane

import (
	"context"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// GatewayConfig is the whole configuration of a gateway's packet path.
type GatewayConfig struct {
	Device   string         // the TUN, e.g. dstm0
	Uplinks  []string       // interfaces towards hosts; empty = all with an IPv6 route but lo and Device
	TEPs     []netip.Addr   // IPv6 addresses at which tunnels end
	Pools    []netip.Prefix // IPv4 prefixes leased out here
	HopLimit uint8          // of outer packets
	MTU      uint16         // of Device; 0 = smallest uplink - 40
	Hairpin  bool           // host to host through this gateway
	PinDir   string         // on a bpffs, e.g. /sys/fs/bpf/dstm
}

// Entry is one binding as the packet path holds it.
type Entry struct {
	lease.Binding
	LastSeen time.Duration // CLOCK_BOOTTIME of the last accepted uplink packet, coarse; 0 = none yet
}

// Gateway is a packet path in the role of a TEP. A table change is complete when the call returns: only then may an
// acknowledgement leave (invariant I8). Deadlines are CLOCK_BOOTTIME nanoseconds and live in the packet path itself, so
// that they hold whatever happens to the daemon (I7). A packet to a host that is larger than the MTU of its binding is
// answered with that MTU if it must not be fragmented (RFC 1191), and fragmented otherwise.
type Gateway interface {
	// Configure attaches to uplinks and devices; calling it again with other values changes what differs.
	Configure(ctx context.Context, c GatewayConfig) error
	// Apply installs upserts and removes deletes. On error nothing may be acknowledged.
	Apply(ctx context.Context, upserts []lease.Binding, deletes []lease.Resource) error
	// Replace makes the table exactly bs, mark and sweep; bindings in both never stop forwarding.
	Replace(ctx context.Context, bs []lease.Binding) error
	// SetDeadline sets the instant after which nothing is forwarded.
	SetDeadline(ctx context.Context, bootNS uint64) error
	Entries(ctx context.Context) ([]Entry, error)
	Counters(ctx context.Context) (Counters, error)
	// Close leaves the packet path forwarding (keep) or removes every link, map and device.
	Close(keep bool) error
}

// HostConfig is the whole configuration of a host's packet path.
type HostConfig struct {
	Device      string
	Placeholder netip.Prefix // 192.0.0.2/29 (RFC 6333 section 5.7)
	Uplinks     []string     // empty = every interface with an IPv6 route but lo and Device
	HopLimit    uint8
	MTU         uint16 // of Device; 0 = smallest uplink - 40
	HoldPackets int    // packets kept while there is no lease
	PinDir      string
}

// Held is a packet that left the host while it had no lease. Data is the whole IPv4 packet, checksums complete.
type Held struct {
	Data []byte
	At   time.Time
}

// Host is a packet path in the role of a host.
type Host interface {
	Configure(ctx context.Context, c HostConfig) error
	// SetLease installs the lease, or with nil removes it. The deadline (CLOCK_BOOTTIME ns) ends it in the packet path.
	SetLease(ctx context.Context, b *lease.Binding, deadlineBootNS uint64) error
	// ReadHeld returns the next packet that found no lease.
	ReadHeld(ctx context.Context) (Held, error)
	// Inject sends a held packet again, now through the lease.
	Inject(ctx context.Context, h Held) error
	// Activity returns CLOCK_BOOTTIME of the last packet, either direction, 0 = none.
	Activity(ctx context.Context) (time.Duration, error)
	Counters(ctx context.Context) (Counters, error)
	Close() error
}

// Counters are packets since the maps were made. Rx = Tx + Consumed + the sum of Drops, exactly, in each direction.
type Counters struct {
	Up   Direction // host to IPv4: decapsulation on a gateway, encapsulation on a host
	Down Direction // IPv4 to host
}

// Direction counts one direction.
type Direction struct {
	Rx, RxBytes uint64 // packets as they come, from a tunnel with their outer headers
	Tx, TxBytes uint64 // IPv4 packets, into a tunnel without the outer header
	Consumed    uint64 // handed to the kernel or to Go on purpose
	Drops       map[DropReason]uint64
}
