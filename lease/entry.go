package lease

import (
	"net/netip"
	"time"
)

// entry is what a core keeps of an address, or of one port set of it. There may be a million of them, so it holds an
// Address in two thirds of its size, and with one pointer for the garbage collector instead of seven. prev and next link
// it into the list of its state.
type entry struct {
	gen                    Gen
	rev, revokeRev         Rev
	host                   string
	source, tep            [16]byte // IPv6; zero = none
	bound, unbound, fenced int64    // Unix nanoseconds; 0 = never
	valid                  time.Duration
	at                     time.Duration // when the state ends by itself
	timer                  int32         // position in the heap, -1 = none
	prev, next             int32
	other                  int32  // an address: index of its port set 0, 0 = it was never cut; a port set: index of its address
	free                   uint16 // an address that is cut: how many of its port sets are FREE
	mtu                    uint16
	state                  State
	trigger                Trigger
	end                    Reason
	set                    bool // a port set
	cut                    bool // an address that is leased by port sets, in no list itself
	excluded               bool
}

// put takes over a record, but for its resource.
func (e *entry) put(a Address) {
	e.gen, e.rev, e.revokeRev, e.host = a.Gen, a.Rev, a.RevokeRev, a.Host
	e.source, e.tep, e.mtu, e.trigger = bytes16(a.Source), bytes16(a.TEP), a.MTU, a.Trigger
	e.bound, e.unbound, e.fenced = nanos(a.BoundAt), nanos(a.UnboundAt), nanos(a.FencedAt)
	e.valid, e.end, e.state = a.Valid, a.End, a.State
}

// address returns the record of an entry.
func (c *Core) address(i int32) Address {
	e := &c.entries[i]
	return Address{
		Resource: c.resource(i), State: e.state, Gen: e.gen, Rev: e.rev, RevokeRev: e.revokeRev,
		Host: e.host, Source: addr16(e.source), TEP: addr16(e.tep), MTU: e.mtu, Trigger: e.trigger,
		BoundAt: instant(e.bound), UnboundAt: instant(e.unbound), FencedAt: instant(e.fenced), Valid: e.valid, End: e.end,
	}
}

// binding returns the lease of an entry that is BOUND as gateways see it.
func (c *Core) binding(i int32) Binding {
	e := &c.entries[i]
	return Binding{Resource: c.resource(i), Host: addr16(e.source), TEP: addr16(e.tep), Gen: e.gen, MTU: e.mtu}
}

// resource returns what the entry at i is about.
func (c *Core) resource(i int32) Resource {
	e := &c.entries[i]
	if !e.set {
		return Whole(c.addr(i))
	}
	return Resource{Addr: c.addr(e.other), PSIDLen: c.cfg.PSIDLen, PSID: uint16(i - c.entries[e.other].other)}
}

// addr returns the address at an index of the prefix.
func (c *Core) addr(i int32) netip.Addr {
	v := value(c.cfg.Pool.Prefix.Addr()) + uint32(i)
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}

func (c *Core) ref(i int32) Ref { return Ref{Resource: c.resource(i), Gen: c.entries[i].gen} }

func bytes16(a netip.Addr) [16]byte {
	if !a.IsValid() {
		return [16]byte{}
	}
	return a.As16()
}

func addr16(b [16]byte) netip.Addr {
	if b == ([16]byte{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(b)
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func instant(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// queue is a doubly linked list of entries through their prev and next.
type queue struct {
	head, tail int32
	n, sets    int // addresses and port sets
}
