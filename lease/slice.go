package lease

import (
	"cmp"
	"container/heap"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"
)

// minPrefixBits bounds the size of a core: a /12 is a million addresses.
const minPrefixBits = 12

// Core holds the state machine of every address of one slice (a pool or a part of it). It does no I/O, reads no clock
// and starts nothing: the same events give the same actions. One goroutine uses it.
type Core struct {
	cfg      Config
	cell     *Cell
	number   int32    // of the core in its cell
	tep      [16]byte // of the pool
	entries  []entry
	lists    [Conflict + 1]queue // addresses by state; FREE is in order of leaving: the first was free longest
	sets     queue               // FREE port sets of addresses that are cut
	cut      int                 // addresses that are cut
	digest   Digest              // over the bindings
	fixed    map[string]int32    // host → index of the address that only it may have
	fixedFor map[int32]string    // and the other way round
	reserved map[string]int32    // host → index of its reservation
	forHost  map[int32]string    // RESERVED: for whom; REVOKING and HOLD: who takes it along under another identity
	timers   timerHeap
	out      Actions
}

// NewCore builds the core of a slice from the records that the store holds for it; none for a new one. See Loader.
func NewCore(cfg Config, cell *Cell, now Now, records []Address) (*Core, error) {
	l, err := NewLoader(cfg, cell)
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if err := l.Put(r); err != nil {
			return nil, err
		}
	}
	return l.Core(now), nil
}

// Loader builds a core from stored records one by one, so that a large store is never in memory twice.
type Loader struct {
	c      *Core
	stored []bool // by index
}

// NewLoader begins a core without leases.
func NewLoader(cfg Config, cell *Cell) (*Loader, error) {
	p := cfg.Pool.Prefix
	if !p.Addr().Is4() || p != p.Masked() || p.Bits() < minPrefixBits {
		return nil, fmt.Errorf("pool %s: prefix %s is not an IPv4 prefix of /%d to /32 without host bits", cfg.Pool.Name, p, minPrefixBits)
	}
	if err := cfg.Timers.Check(); err != nil {
		return nil, fmt.Errorf("pool %s: %w", cfg.Pool.Name, err)
	}
	c := &Core{
		cfg: cfg, cell: cell, entries: make([]entry, 1<<(32-p.Bits())), fixed: map[string]int32{}, fixedFor: map[int32]string{},
		reserved: map[string]int32{}, forHost: map[int32]string{},
		number: int32(len(cell.cores)), tep: bytes16(cfg.Pool.TEP),
	}
	c.timers.c = c
	for i := range c.lists {
		c.lists[i] = queue{head: -1, tail: -1}
	}
	c.sets = queue{head: -1, tail: -1}
	for i := range c.entries {
		c.entries[i] = entry{prev: -1, next: -1, timer: -1}
	}
	if cfg.PSIDLen > MaxPSIDLen {
		return nil, fmt.Errorf("pool %s: port sets of length %d: want at most %d", cfg.Pool.Name, cfg.PSIDLen, MaxPSIDLen)
	}
	for _, a := range cfg.Exclude {
		if i, ok := c.index(Whole(a)); ok {
			c.entries[i].excluded = true
		}
	}
	for host, a := range cfg.Fixed {
		if i, ok := c.index(Whole(a)); ok {
			c.fixed[host], c.fixedFor[i] = i, host
		}
	}
	cell.cores = append(cell.cores, c)
	return &Loader{c: c, stored: make([]bool, len(c.entries))}, nil
}

// Put adds a stored record.
func (l *Loader) Put(r Address) error {
	c := l.c
	name := c.cfg.Pool.Name
	if r.PSIDLen > 0 {
		if r.State == Free { // says nothing that matters
			return nil
		}
		if r.PSIDLen != c.cfg.PSIDLen {
			return fmt.Errorf("pool %s: port set %s is %s in the store, the pool has port sets of length %d: keep the length until it is free",
				name, r.Resource, r.State, c.cfg.PSIDLen)
		}
		if i, ok := c.index(Whole(r.Addr)); ok && !c.entries[i].cut {
			c.entries[i].cut = true
			c.portSets(i)
			l.stored = append(l.stored, make([]bool, len(c.entries)-len(l.stored))...)
		}
	}
	i, ok := c.index(r.Resource)
	switch {
	case !ok:
		return fmt.Errorf("pool %s: stored address %s is outside of %s", name, r.Resource, c.cfg.Pool.Prefix)
	case l.stored[i]:
		return fmt.Errorf("pool %s: address %s is stored twice", name, r.Resource)
	case r.Rev > c.cell.last:
		return fmt.Errorf("pool %s: address %s was written at revision %d, the store ends at %d", name, r.Resource, r.Rev, c.cell.last)
	}
	l.stored[i] = true
	c.entries[i].put(r)
	return nil
}

// Core puts the records in place, first those never leased, then the others in the order they were written, and returns
// the core. Leases live on: nothing expires before max(T1, Grace) and its own validity have passed, hold-downs begin
// again, revoking addresses wait for the fence again. now.Wall must not be before the newest time in the store, wherever
// the clock of the machine went since.
func (l *Loader) Core(now Now) *Core {
	c := l.c
	l.contradictions()
	var sorted []int32
	for i, stored := range l.stored {
		switch {
		case stored:
			sorted = append(sorted, int32(i))
		case !c.entries[i].cut:
			c.push(Free, int32(i))
		default:
			c.cut++
		}
	}
	slices.SortFunc(sorted, func(a, b int32) int {
		return cmp.Or(cmp.Compare(c.entries[a].order(), c.entries[b].order()), cmp.Compare(a, b))
	})
	grace := c.restartGrace()
	for _, i := range sorted {
		c.place(now, i, grace)
	}
	l.c = nil
	return c
}

// restartGrace is how long nothing expires after a start.
func (c *Core) restartGrace() time.Duration {
	return max(c.cfg.Timers.T1Of(c.cfg.Timers.Valid), c.cfg.Timers.Grace)
}

// contradictions looks for addresses that are stored as leased whole and by port sets too: an operator decides.
func (l *Loader) contradictions() {
	c := l.c
	for i := range c.entries {
		e := &c.entries[i]
		if !e.cut || !l.stored[i] {
			continue
		}
		if e.state == Free { // from before it was cut
			e.put(Address{})
			l.stored[i] = false
			continue
		}
		e.state, e.cut = Conflict, false
		for j := range int32(1) << c.cfg.PSIDLen {
			if l.stored[e.other+j] {
				c.entries[e.other+j].state = Conflict
			}
		}
	}
}

// order sorts revoking addresses by their revoke, as FenceTo takes them, and others by their last event.
func (e *entry) order() Rev {
	if e.state == Revoking {
		return e.revokeRev
	}
	return e.rev
}

func (c *Core) place(now Now, i int32, grace time.Duration) {
	e := &c.entries[i]
	switch e.state {
	case Bound:
		if _, ok := c.cell.Where(e.host); ok { // two leases of one host: an operator decides
			e.state = Conflict
			break
		}
		c.count(i, 1)
		// Whatever was promised was promised before this instant, for at most Valid. No clock is asked how long ago.
		c.setTimer(i, now.Mono+max(grace, e.valid))
	case Hold:
		if seeded("hold-down forgotten at the start") {
			e.state = Free
			break
		}
		c.setTimer(i, now.Mono+c.cfg.Timers.HoldDown)
	case Revoking, Free, Conflict:
	default: // RESERVED is never stored; anything else was written by a newer version
		e.state = Conflict
	}
	c.push(e.state, i)
	if last := c.cell.lastOf(e.host); e.host != "" && (last == nil || e.state == Bound || last.state != Bound && last.rev < e.rev) {
		c.cell.hosts[e.host] = spot{c.number, i}
	}
}

// index returns the position of a resource of the slice; of port sets only those of an address that was cut.
func (c *Core) index(r Resource) (int32, bool) {
	if !c.cfg.Pool.Prefix.Contains(r.Addr) {
		return 0, false
	}
	i := int32(value(r.Addr) - value(c.cfg.Pool.Prefix.Addr()))
	if r.PSIDLen == 0 {
		return i, true
	}
	first := c.entries[i].other
	if r.PSIDLen != c.cfg.PSIDLen || first == 0 {
		return 0, false
	}
	return first + int32(r.PSID), true
}

func value(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

// list returns the list that an entry belongs to in its state, nil for none: nobody in particular may have an address that
// is excluded, fixed or cut.
func (c *Core) list(i int32) *queue {
	e := &c.entries[i]
	switch {
	case e.state != Free:
		return &c.lists[e.state]
	case e.set && c.entries[e.other].cut:
		return &c.sets
	case e.set || e.excluded || e.cut || c.fixedFor[i] != "":
		return nil
	}
	return &c.lists[Free]
}

// push appends the entry to the list of a state, in which it is from now on.
func (c *Core) push(s State, i int32) {
	e := &c.entries[i]
	e.state = s
	if s == Revoking || s == Hold {
		c.cell.leave(e.host)
	}
	c.link(i)
	if s == Free && e.set {
		w := &c.entries[e.other]
		if w.free++; w.free == 1<<c.cfg.PSIDLen {
			c.join(e.other)
		}
	}
}

func (c *Core) link(i int32) {
	e, l := &c.entries[i], c.list(i)
	if l == nil {
		return
	}
	e.prev, e.next = l.tail, -1
	if l.tail >= 0 {
		c.entries[l.tail].next = i
	} else {
		l.head = i
	}
	l.tail = i
	l.count(e, 1)
}

func (l *queue) count(e *entry, by int) {
	if e.set {
		l.sets += by
	} else {
		l.n += by
	}
}

// pull takes the entry out of the list of its state and ends its timer.
func (c *Core) pull(i int32) {
	e := &c.entries[i]
	c.clearTimer(i)
	if e.state == Revoking || e.state == Hold {
		c.cell.left(e.host)
	}
	c.unlink(i)
	if e.state == Free && e.set {
		c.entries[e.other].free--
	}
}

func (c *Core) unlink(i int32) {
	e, l := &c.entries[i], c.list(i)
	if l == nil {
		return
	}
	if e.prev >= 0 {
		c.entries[e.prev].next = e.next
	} else {
		l.head = e.next
	}
	if e.next >= 0 {
		c.entries[e.next].prev = e.prev
	} else {
		l.tail = e.prev
	}
	e.prev, e.next = -1, -1
	l.count(e, -1)
}

// portSet returns a free port set, cutting the address that was free longest when there is none.
func (c *Core) portSet() (int32, bool) {
	if i := c.sets.head; i >= 0 {
		return i, true
	}
	i := c.lists[Free].head
	if c.cfg.PSIDLen == 0 || i < 0 {
		return 0, false
	}
	return c.cutUp(i), true
}

// cutUp cuts a FREE address into its port sets and returns the first.
func (c *Core) cutUp(i int32) int32 {
	c.unlink(i)
	c.entries[i].cut = true
	c.cut++
	first := c.portSets(i)
	for j := range int32(1) << c.cfg.PSIDLen {
		c.link(first + j)
	}
	c.entries[i].free = 1 << c.cfg.PSIDLen
	return first
}

// portSets makes the entries of an address's port sets, once, and returns the first.
func (c *Core) portSets(i int32) int32 {
	if c.entries[i].other == 0 {
		c.entries[i].other = int32(len(c.entries))
		for range 1 << c.cfg.PSIDLen {
			c.entries = append(c.entries, entry{prev: -1, next: -1, timer: -1, set: true, other: i})
		}
	}
	return c.entries[i].other
}

// join makes an address whole again whose port sets are all free.
func (c *Core) join(i int32) {
	first := c.entries[i].other
	for j := range int32(1) << c.cfg.PSIDLen {
		c.unlink(first + j)
	}
	c.entries[i].cut = false
	c.cut--
	c.link(i)
}

// timerHeap orders entries by the time at which their state ends.
type timerHeap struct {
	c  *Core
	ix []int32
}

func (h *timerHeap) Len() int { return len(h.ix) }
func (h *timerHeap) Less(i, j int) bool {
	a, b := &h.c.entries[h.ix[i]], &h.c.entries[h.ix[j]]
	return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(h.ix[i], h.ix[j])) < 0
}

func (h *timerHeap) Swap(i, j int) {
	h.ix[i], h.ix[j] = h.ix[j], h.ix[i]
	h.c.entries[h.ix[i]].timer, h.c.entries[h.ix[j]].timer = int32(i), int32(j)
}

func (h *timerHeap) Push(x any) {
	i := x.(int32)
	h.c.entries[i].timer = int32(len(h.ix))
	h.ix = append(h.ix, i)
}

func (h *timerHeap) Pop() any {
	n := len(h.ix) - 1
	i := h.ix[n]
	h.ix = h.ix[:n]
	h.c.entries[i].timer = -1
	return i
}

func (c *Core) setTimer(i int32, at time.Duration) {
	e := &c.entries[i]
	e.at = at
	if e.timer >= 0 {
		heap.Fix(&c.timers, int(e.timer))
		return
	}
	heap.Push(&c.timers, i)
}

func (c *Core) clearTimer(i int32) {
	if t := c.entries[i].timer; t >= 0 {
		heap.Remove(&c.timers, int(t))
	}
}

// Next returns when the next state ends by itself, on the clock of Now.Mono.
func (c *Core) Next() (time.Duration, bool) {
	if len(c.timers.ix) == 0 {
		return 0, false
	}
	return c.entries[c.timers.ix[0]].at, true
}

// Pool returns the pool of the slice.
func (c *Core) Pool() Pool { return c.cfg.Pool }

// Timers returns the times of the slice.
func (c *Core) Timers() Timers { return c.cfg.Timers }

// Contains reports whether the resource is one of this slice.
func (c *Core) Contains(r Resource) bool {
	_, ok := c.index(r)
	return ok
}

// Knows reports whether a host has an address of its own here, or was the last to have one.
func (c *Core) Knows(host string) bool {
	_, fixed := c.fixed[host]
	last, ok := c.cell.hosts[host]
	return fixed || ok && last.core == c.number
}

// Waits reports whether an address is REVOKING, so that FenceTo could move it on.
func (c *Core) Waits() bool { return c.lists[Revoking].head >= 0 }

// Lookup returns one address with its last record, whatever its state.
func (c *Core) Lookup(now time.Duration, r Resource) (Info, bool) {
	i, ok := c.index(r)
	if !ok {
		return Info{}, false
	}
	return c.info(now, i), true
}

// ByHost returns the live lease of a host in this slice.
func (c *Core) ByHost(now time.Duration, host string) (Info, bool) {
	r, ok := c.cell.Where(host)
	if !ok {
		return Info{}, false
	}
	return c.Lookup(now, r)
}

func (c *Core) info(now time.Duration, i int32) Info {
	e := &c.entries[i]
	in := Info{Address: c.address(i)}
	if e.timer >= 0 {
		in.Left = max(0, e.at-now)
	}
	if e.state == Reserved {
		in.Host = c.forHost[i]
	}
	return in
}

// All yields every address that is not FREE, in order, then every such port set.
func (c *Core) All(now time.Duration) iter.Seq[Info] {
	return func(yield func(Info) bool) {
		for i := range c.entries {
			if c.entries[i].state != Free && !yield(c.info(now, int32(i))) {
				return
			}
		}
	}
}

// Bindings yields the bindings of the slice, in order: what gateways hold once they applied everything up to Cell.Last.
// Events whose commits are still under way are among them; they must be durable before a gateway gets a byte.
func (c *Core) Bindings() iter.Seq[Binding] {
	return func(yield func(Binding) bool) {
		for i := range c.entries {
			if e := &c.entries[i]; e.state == Bound && !yield(c.binding(int32(i))) {
				return
			}
		}
	}
}

// Digest sums up Bindings.
func (c *Core) Digest() Digest { return c.digest }

// Stats counts the addresses by state.
func (c *Core) Stats() Stats {
	s := Stats{
		Free: c.lists[Free].n, Reserved: c.lists[Reserved].n, Bound: c.lists[Bound].n,
		Revoking: c.lists[Revoking].n, Hold: c.lists[Hold].n, Conflict: c.lists[Conflict].n, Cut: c.cut,
		SetsFree: c.sets.sets,
	}
	s.Size = s.Free + s.Reserved + s.Bound + s.Revoking + s.Hold + s.Conflict + s.Cut
	for i := range c.lists {
		s.SetsUsed += c.lists[i].sets
	}
	return s
}
