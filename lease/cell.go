package lease

import (
	"fmt"
	"net/netip"
)

// Cell is what the cores of one lease service share: the revision counter and who has a lease where. It is used by one
// goroutine, the one that steps the cores.
type Cell struct {
	epoch  Epoch
	last   Rev
	per64  int
	hosts  map[string]Resource
	counts map[netip.Prefix]int
	behind map[string]int // addresses that a host has given up and that nobody else can have yet
}

// maxBehind is how many addresses a host may have behind it. One that moves, or binds and releases, faster than gateways let
// go and hold-downs pass would otherwise drain the pool by itself.
const maxBehind = 4

// NewCell returns the shared part of a store whose newest revision is last. per64 is the number of leases that tunnel
// sources of one /64 may have together; 0 = no limit.
func NewCell(epoch Epoch, last Rev, per64 int) *Cell {
	return &Cell{epoch: epoch, last: last, per64: per64, hosts: map[string]Resource{}, counts: map[netip.Prefix]int{}, behind: map[string]int{}}
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
	r, ok := c.hosts[host]
	return r, ok
}

func net64(a netip.Addr) netip.Prefix {
	p, err := a.Prefix(64)
	if err != nil { // an IPv4 or zero address counts for itself
		return netip.PrefixFrom(a, a.BitLen())
	}
	return p
}

func (c *Cell) full(source netip.Addr) bool {
	return c.per64 > 0 && c.counts[net64(source)] >= c.per64
}

// leave and left count an address that is REVOKING or in HOLD.
func (c *Cell) leave(host string) { c.behind[host]++ }

func (c *Cell) left(host string) {
	if c.behind[host]--; c.behind[host] <= 0 {
		delete(c.behind, host)
	}
}

func (c *Cell) add(a *Address) error {
	if have, ok := c.hosts[a.Host]; ok {
		return fmt.Errorf("host %s holds %s and %s", a.Host, have, a.Resource)
	}
	c.hosts[a.Host] = a.Resource
	c.counts[net64(a.Source)]++
	return nil
}

func (c *Cell) remove(a *Address) {
	delete(c.hosts, a.Host)
	n := net64(a.Source)
	if c.counts[n]--; c.counts[n] <= 0 {
		delete(c.counts, n)
	}
}
