package dstm

import (
	"net/netip"
	"sync"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// afterHint is how long a host is left alone once a hint for it has ended, whatever came of it: the A and the AAAA query
// for one name, one after the other, cost one hint and at most one hold. A refusal that lasts longer comes with the table.
const afterHint = time.Second

// table is what is known of the hosts, fed by the lease service and asked for each query. All deadlines are on the local
// monotonic clock.
type table struct {
	mu       sync.RWMutex
	bySource map[netip.Addr]*source
	byKey    map[uint64]*host
	round    uint64 // of the listing in progress, to find what a reconnection no longer lists
	hintsOn  bool
	dry      bool
}

type source struct {
	host  *host
	round uint64
}

// host is one machine with all its source addresses.
type host struct {
	key  uint64
	refs int // sources; guarded by table.mu

	mu      sync.Mutex
	lease   time.Time // end of its lease
	refused time.Time // end of the service's refusal
	quiet   time.Time // end of the pause after a hint
	flight  *flight   // the hint under way
}

// flight is a hint under way. done is closed at its end.
type flight struct{ done chan struct{} }

func newTable() *table {
	return &table{bySource: map[netip.Addr]*source{}, byKey: map[uint64]*host{}, hintsOn: true}
}

// needs returns the host at an address if it is registered and a hint for it would be of use now.
func (t *table) needs(a netip.Addr) *host {
	t.mu.RLock()
	s := t.bySource[a]
	useful := t.hintsOn && !t.dry
	t.mu.RUnlock()
	if s == nil || !useful || !s.host.wants(time.Now()) {
		return nil
	}
	return s.host
}

// wants says whether the host has neither a lease with time left nor a reason to be left alone.
func (h *host) wants(now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.open(now)
}

func (h *host) open(now time.Time) bool {
	return !now.Before(h.lease) && !now.Before(h.refused) && !now.Before(h.quiet)
}

// board returns the flight to wait for and whether the caller is the one who flies it; nil if none is needed any more.
func (h *host) board(now time.Time) (f *flight, pilot bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.flight != nil:
		return h.flight, false
	case !h.open(now):
		return nil, false
	}
	h.flight = &flight{done: make(chan struct{})}
	return h.flight, true
}

// land ends the flight. left is what remains of a lease that the hint found, 0 without.
func (h *host) land(now time.Time, left time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.quiet = now.Add(afterHint)
	if left > 0 {
		h.lease = now.Add(left)
	}
	close(h.flight.done)
	h.flight = nil
}

// apply takes one event of the watch.
func (t *table) apply(e any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch e := e.(type) {
	case leaseclient.HostState:
		if !e.Registered {
			t.remove(e.Source)
			return
		}
		t.put(e)
	case leaseclient.HostGone:
		t.remove(e.Source)
	case leaseclient.PoolState:
		t.hintsOn, t.dry = e.HintsOn, e.Dry
	case leaseclient.InSync:
		for a, s := range t.bySource {
			if s.round != t.round {
				t.remove(a)
			}
		}
	}
}

// relist starts a new listing. What the last connection said stays in force until InSync.
func (t *table) relist() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.round++
}

func (t *table) put(e leaseclient.HostState) {
	if s := t.bySource[e.Source]; s != nil && s.host.key != e.Key {
		t.remove(e.Source)
	}
	s := t.bySource[e.Source]
	if s == nil {
		h := t.byKey[e.Key]
		if h == nil {
			h = &host{key: e.Key}
			t.byKey[e.Key] = h
		}
		h.refs++
		s = &source{host: h}
		t.bySource[e.Source] = s
		hostsKnown.Inc()
	}
	s.round = t.round

	now := time.Now()
	h := s.host
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lease, h.refused = now.Add(e.Left), time.Time{}
	if e.Refused != lease.ReasonNone {
		h.refused = now.Add(e.RefusedFor)
	}
}

func (t *table) remove(a netip.Addr) {
	s := t.bySource[a]
	if s == nil {
		return
	}
	delete(t.bySource, a)
	hostsKnown.Dec()
	if s.host.refs--; s.host.refs == 0 {
		delete(t.byKey, s.host.key)
	}
}

// clear empties the table, for the metric's sake.
func (t *table) clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for a := range t.bySource {
		t.remove(a)
	}
}
