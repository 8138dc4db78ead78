package dstm

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// shards is how many locks the table has. One writer and all of CoreDNS's readers share it.
const shards = 64

// table holds the registered hosts by source address. A look-up takes one read lock and allocates nothing.
type table struct {
	start time.Time // of its clock: monotonic nanoseconds since then
	met   *metrics
	off   atomic.Bool // hints are of no use now: switched off, or no address is free

	shard [shards]shard

	mu     sync.Mutex // guards what follows; readers do not need it
	byKey  map[uint64]*host
	round  uint64 // of listing; entries of an older one are gone when the list ends
	amount int
}

type shard struct {
	mu sync.RWMutex
	m  map[netip.Addr]entry
}

type entry struct {
	h     *host
	round uint64
}

// host is one registered host; its sources share it. Times are on the table's clock.
type host struct {
	key  uint64 // 0 = has one source and shares nothing
	uses int    // sources, guarded by table.mu

	leaseUntil atomic.Int64 // 0 = no lease
	quietUntil atomic.Int64 // no hint before: it was refused or brought nothing
	mute       atomic.Bool  // did not answer an offer; its answers are not held before it speaks again

	mu     sync.Mutex
	flight *flight // the hint under way
}

func newTable(met *metrics) *table {
	t := &table{start: time.Now(), met: met, byKey: map[uint64]*host{}}
	for i := range t.shard {
		t.shard[i].m = map[netip.Addr]entry{}
	}
	return t
}

// now never is 0, so that 0 can mean "never".
func (t *table) now() int64 { return int64(time.Since(t.start)) + 1 }

func (h *host) leased(now int64) bool { return h.leaseUntil.Load() > now }
func (h *host) quiet(now int64) bool  { return h.quietUntil.Load() > now }

// settle takes in the outcome of a hint and returns its name in metrics. It is called with h.mu held.
func (h *host) settle(now int64, rep hintReply, err error, late bool) hintResult {
	switch {
	case err != nil && !late:
		h.quietUntil.Store(now + int64(quietError))
		return hintFailed
	case err == nil && rep.result == leaseclient.HintReady:
		h.mute.Store(false)
		if rep.left > 0 {
			h.leaseUntil.Store(now + int64(rep.left))
		} else { // ready, but for a time we were not told
			h.quietUntil.Store(now + int64(quietError))
		}
		return hintReady
	case err == nil && rep.result == leaseclient.HintRefused:
		// A host state with the exact time may have come before.
		if until := now + int64(quietRefused); !h.quiet(now) {
			h.quietUntil.Store(until)
		}
		return hintRefused
	default:
		h.mute.Store(true)
		h.quietUntil.Store(now + int64(quietPending))
		return hintPending
	}
}

// shardOf spreads addresses by the bytes in which neighbours differ: subnet, and the end of the interface identifier.
func (t *table) shardOf(a netip.Addr) *shard {
	b := a.As16()
	return &t.shard[(b[15]^b[14]<<3^b[11]^b[7])%shards]
}

// find returns the registered host with this source, or nil.
func (t *table) find(a netip.Addr) *host {
	s := t.shardOf(a)
	s.mu.RLock()
	e := s.m[a]
	s.mu.RUnlock()
	return e.h
}

// upsert takes in what the service says of one source.
func (t *table) upsert(ev leaseclient.HostState) {
	if !ev.Registered {
		t.remove(ev.Source)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shardOf(ev.Source)
	s.mu.RLock()
	old := s.m[ev.Source]
	s.mu.RUnlock()

	h := old.h
	if h == nil || h.key != ev.Key {
		h = t.byKey[ev.Key] // nothing is ever stored under 0
		if h == nil {
			h = &host{key: ev.Key}
			if ev.Key != 0 {
				t.byKey[ev.Key] = h
			}
		}
		h.uses++
	}
	now := t.now()
	h.mute.Store(false)
	h.leaseUntil.Store(after(now, ev.Left))
	if ev.Refused == lease.ReasonNone {
		h.quietUntil.Store(0)
	} else {
		h.quietUntil.Store(after(now, ev.RefusedFor))
	}
	s.mu.Lock()
	s.m[ev.Source] = entry{h, t.round}
	s.mu.Unlock()
	switch {
	case old.h == nil:
		t.count(1)
	case old.h != h:
		t.unuse(old.h)
	}
}

// after returns the time d from now, 0 for no time.
func after(now int64, d time.Duration) int64 {
	if d <= 0 {
		return 0
	}
	return now + int64(d)
}

// remove forgets a source; one that is not there is removed already.
func (t *table) remove(a netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shardOf(a)
	s.mu.Lock()
	e, ok := s.m[a]
	delete(s.m, a)
	s.mu.Unlock()
	if ok {
		t.unuse(e.h)
		t.count(-1)
	}
}

func (t *table) unuse(h *host) {
	if h.uses--; h.uses == 0 {
		delete(t.byKey, h.key)
	}
}

func (t *table) count(by int) {
	t.amount += by
	t.met.hosts.Add(float64(by))
}

// pool takes in what the service says of its pools.
func (t *table) pool(ev leaseclient.PoolState) { t.off.Store(!ev.HintsOn || ev.Dry) }

// listing says that a new list begins.
func (t *table) listing() {
	t.mu.Lock()
	t.round++
	t.mu.Unlock()
}

// listed says that the list is complete: what it did not name is gone. It returns how many sources there are.
func (t *table) listed() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweep(func(e entry) bool { return e.round != t.round })
	return t.amount
}

// clear forgets everything.
func (t *table) clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweep(func(entry) bool { return true })
}

func (t *table) sweep(gone func(entry) bool) {
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.Lock()
		for a, e := range s.m {
			if gone(e) {
				delete(s.m, a)
				t.unuse(e.h)
				t.count(-1)
			}
		}
		s.mu.Unlock()
	}
}
