package lease

import (
	"math"
	"net/netip"
)

// Cell is what the cores of one lease service share: the revision counter and who has a lease where. It is used by one
// goroutine, the one that steps the cores.
type Cell struct {
	epoch  Epoch
	last   Rev
	per64  int
	cores  []*Core
	hosts  map[string]spot // where the lease of a host is, or the last one was
	counts map[net64]int32 // leases by the network of their tunnel source
	behind map[string]int  // addresses that a host has given up and that nobody else can have yet
}

// spot is the place of an address: a core of the cell and an index there.
type spot struct{ core, i int32 }

// maxBehind is how many addresses a host may have behind it. One that moves, or binds and releases, faster than gateways let
// go and hold-downs pass would otherwise drain the pool by itself.
const maxBehind = 4

// NewCell returns the shared part of a store whose newest revision is last. per64 is the number of leases that tunnel
// sources of one /64 may have together; 0 = no limit.
func NewCell(epoch Epoch, last Rev, per64 int) *Cell {
	return &Cell{epoch: epoch, last: last, per64: per64, hosts: map[string]spot{}, counts: map[net64]int32{}, behind: map[string]int{}}
}

// Epoch returns the epoch of the store.
func (c *Cell) Epoch() Epoch { return c.epoch }

// Last returns the newest revision given out, committed or still on its way to the store. It is the floor (F7) of a
// session reply made now.
func (c *Cell) Last() Rev { return c.last }

// NextRev takes a revision for a change that no core makes, such as a pool record.
func (c *Cell) NextRev() Rev {
	c.last++
	return c.last
}

// Where returns what the host holds, in whichever core.
func (c *Cell) Where(host string) (Resource, bool) {
	if e := c.lastOf(host); e == nil || e.state != Bound || e.host != host {
		return Resource{}, false
	}
	at := c.hosts[host]
	return c.cores[at.core].resource(at.i), true
}

// lastOf returns the address of the host's lease, or of its last one; nil = none.
func (c *Cell) lastOf(host string) *entry {
	at, ok := c.hosts[host]
	if !ok {
		return nil
	}
	return &c.cores[at.core].entries[at.i]
}

// net64 is the first half of an IPv6 address.
type net64 [8]byte

func netOf(a netip.Addr) net64 { b := bytes16(a); return net64(b[:8]) }

func (c *Cell) full(n net64) bool {
	return c.per64 > 0 && c.counts[n] >= int32(min(c.per64, math.MaxInt32))
}

// leave and left count an address that is REVOKING or in HOLD.
func (c *Cell) leave(host string) { c.behind[host]++ }

func (c *Cell) left(host string) {
	if c.behind[host]--; c.behind[host] <= 0 {
		delete(c.behind, host)
	}
}

// count adds 1 or -1 to the leases of a network.
func (c *Cell) count(n net64, by int32) {
	if c.per64 == 0 {
		return
	}
	if c.counts[n] += by; c.counts[n] <= 0 {
		delete(c.counts, n)
	}
}
