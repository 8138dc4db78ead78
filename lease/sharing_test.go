package lease_test

import (
	"cmp"
	"container/heap"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// The trace of N28: every host uses IPv4 for a minute in each hour, beginning at an instant of that hour that is drawn.
// The first half hour fills the pool and is not measured.
const (
	traceHosts = 100_000
	traceUse   = time.Minute
	traceFrom  = 30 * time.Minute
	traceTo    = 150 * time.Minute
	fenceDelay = 5 * time.Millisecond // until the gateway has acknowledged a revocation
)

// A profile is how hosts and pool behave.
type profile struct {
	name     string
	idle     time.Duration // hosts give back this long after their last use; 0 = never, as with DHCP
	holdDown time.Duration
	valid    time.Duration
	size     int     // addresses of the pool, at most 65,536
	psidLen  uint8   // hosts accept port sets of this length
	ratio    float64 // most addresses taken at once ÷ most hosts in use at once
}

// TestSharing is N28: how many addresses a trace needs, as a multiple of the hosts that use one at the same time. Nobody can
// do with less than 1, or with port sets of k bits than 1/2^k. The figures are those of docs/capacity.md; the size of the
// last pool is what pool advise says.
func TestSharing(t *testing.T) {
	const (
		limit = 2    // of the dense profile
		slack = 0.03 // relative, of the figures
		share = 1e-3 // of the binds of a pool as advised that may be refused; it aims at 1e-4
	)
	d := lease.DefaultTimers()
	dense := profile{"dense", 20 * time.Second, 30 * time.Second, d.Valid, 1 << 16, 0, 1.80}
	sets := dense
	sets.name, sets.size, sets.psidLen, sets.ratio = "dense, 16 hosts an address", 201, 4, 0.112
	for _, p := range []profile{
		{"default", 120 * time.Second, d.HoldDown, d.Valid, 1 << 16, 0, 4.81},
		dense,
		sets,
		{"DHCP of 15 min", 0, 0, 15 * time.Minute, 1 << 16, 0, 15.07},
	} {
		t.Run(p.name, func(t *testing.T) {
			s := newSharing(t, p)
			s.run()
			r := float64(s.taken.most) / float64(s.inUse.most)
			t.Logf("in use %.0f, at most %d; taken %.0f, at most %d: %.3f; refused %d of %d",
				s.inUse.mean(), s.inUse.most, s.taken.mean(), s.taken.most, r, s.refused, s.binds)
			if math.Abs(r-p.ratio) > slack*p.ratio {
				t.Errorf("%.3f addresses for each host in use, want %.3f ± %.0f %%", r, p.ratio, 100*slack)
			}
			if p == dense && r > limit {
				t.Errorf("N28: the dense profile needs %.2f addresses for each host in use, allowed is %d", r, limit)
			}
			if got := float64(s.refused) / float64(s.binds); got > share || s.refused > 0 && p.psidLen == 0 {
				t.Errorf("%d of %d binds were refused", s.refused, s.binds)
			}
		})
	}
}

// sharing is one run of the trace on a real core.
type sharing struct {
	t       *testing.T
	p       profile
	cell    *lease.Cell
	core    *lease.Core
	fence   *lease.FenceSet
	session uint64 // of the gateway
	todo    traceHeap
	now     time.Duration
	hosts   []traceHost
	names   map[string]int32
	last    map[lease.Resource]quiet // of what was given up

	inUse, taken   level
	binds, refused int
}

// traceHost is a host as its agent sees it.
type traceHost struct {
	name   string
	source netip.Addr
	uses   int           // under way
	used   time.Duration // the end of the last one
	held   bool
	ref    lease.Ref
}

// quiet says since when no gateway forwards for an address, and whose it was.
type quiet struct {
	host   string
	fenced time.Duration
}

// level follows a number over time, from a start on.
type level struct {
	n, most int
	from    time.Duration
	at      time.Duration
	area    float64 // of seconds
}

func (l *level) set(now time.Duration, n int) {
	if now >= l.from {
		l.area += float64(l.n) * (now - max(l.at, l.from)).Seconds()
		l.most = max(l.most, l.n, n)
	}
	l.n, l.at = n, now
}

func (l *level) mean() float64 { return l.area / (l.at - l.from).Seconds() }

// traceEvent is something that happens outside of the core.
type traceEvent struct {
	at   time.Duration
	what uint8
	host int32
	rev  lease.Rev
}

const (
	useBegins uint8 = iota
	useEnds
	idleOver
	renewal
	acked
)

type traceHeap []traceEvent

func (h traceHeap) Len() int           { return len(h) }
func (h traceHeap) Less(i, j int) bool { return h[i].at < h[j].at }
func (h traceHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *traceHeap) Push(x any)        { *h = append(*h, x.(traceEvent)) }
func (h *traceHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}

func newSharing(t *testing.T, p profile) *sharing {
	t.Helper()
	timers := lease.DefaultTimers()
	timers.Valid, timers.HoldDown = p.valid, p.holdDown
	s := &sharing{
		t: t, p: p, cell: lease.NewCell(1, 0, 0), hosts: make([]traceHost, traceHosts), names: map[string]int32{},
		last: map[lease.Resource]quiet{}, fence: lease.NewFenceSet(lease.FenceConfig{FailStatic: 4 * time.Hour}, 0, 0),
	}
	var exclude []netip.Addr
	for i := p.size; i < 1<<16; i++ {
		exclude = append(exclude, netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}))
	}
	core, err := lease.NewCore(lease.Config{
		Pool:   lease.Pool{Name: "p", Prefix: netip.MustParsePrefix("198.18.0.0/16"), TEP: netip.MustParseAddr("2001:db8:a::1")},
		Timers: timers, Exclude: exclude, PSIDLen: p.psidLen,
	}, s.cell, at(0), nil)
	if err != nil {
		t.Fatal(err)
	}
	s.core = core
	m := s.fence.Hello(0, "tep1", "1", netip.AddrPort{})
	s.session = m.Session
	if _, err := s.fence.Grant(0, "tep1", m.Session, 0); err != nil {
		t.Fatal(err)
	}
	for i := range s.hosts {
		h := &s.hosts[i]
		h.name = fmt.Sprint("host", i)
		h.source = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 1, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)})
		s.names[h.name] = int32(i)
	}
	return s
}

// run lets the trace pass, the same one for every profile.
func (s *sharing) run() {
	s.inUse.from, s.taken.from = traceFrom, traceFrom
	rng := rand.New(rand.NewPCG(28, 1))
	var trace []traceEvent
	for i := range s.hosts {
		for hour := time.Duration(0); hour < traceTo; hour += time.Hour {
			if begin := hour + time.Duration(rng.Int64N(int64(time.Hour))); begin < traceTo {
				trace = append(trace, traceEvent{at: begin, what: useBegins, host: int32(i)})
			}
		}
	}
	slices.SortFunc(trace, func(a, b traceEvent) int { return cmp.Compare(a.at, b.at) })
	for _, ev := range trace {
		s.pass(ev.at)
		s.now = ev.at
		s.happen(ev)
	}
	s.pass(traceTo)
	s.inUse.set(traceTo, s.inUse.n)
	s.taken.set(traceTo, s.taken.n)
}

// pass does everything that is due before a time, in order.
func (s *sharing) pass(to time.Duration) {
	for {
		next, timed := s.core.Next()
		timed = timed && next < to
		switch {
		case len(s.todo) > 0 && s.todo[0].at < to && !(timed && next <= s.todo[0].at):
			ev := heap.Pop(&s.todo).(traceEvent)
			s.now = ev.at
			s.happen(ev)
		case timed:
			s.now = max(s.now, next)
			s.step(lease.Tick{})
		default:
			return
		}
	}
}

func (s *sharing) later(d time.Duration, what uint8, host int32, rev lease.Rev) {
	heap.Push(&s.todo, traceEvent{at: s.now + d, what: what, host: host, rev: rev})
}

// happen is what the host's agent does (hostd's keeper), and the gateway.
func (s *sharing) happen(ev traceEvent) {
	h := &s.hosts[ev.host]
	switch ev.what {
	case useBegins:
		if h.uses++; h.uses == 1 {
			s.inUse.set(s.now, s.inUse.n+1)
		}
		s.later(traceUse, useEnds, ev.host, 0)
		switch {
		case !h.held:
			s.bind(ev.host)
		case s.p.idle == 0:
			s.renew(ev.host)
		}
	case useEnds:
		if h.uses--; h.uses == 0 {
			s.inUse.set(s.now, s.inUse.n-1)
		}
		h.used = s.now
		if s.p.idle > 0 {
			s.later(s.p.idle, idleOver, ev.host, 0)
			return
		}
		s.renew(ev.host) // the lease of a host that never releases ends so long after the last use
	case idleOver:
		if h.held && h.uses == 0 && s.now-h.used >= s.p.idle {
			h.held = false
			s.step(lease.Release{Host: h.name, Ref: h.ref})
		}
	case renewal:
		if h.held && h.ref.Gen.Rev() == ev.rev && (h.uses > 0 || s.p.idle > 0) {
			s.renew(ev.host)
			s.later(s.core.Timers().T1Of(s.p.valid), renewal, ev.host, ev.rev)
		}
	case acked:
		if err := s.fence.Ack("tep1", s.session, ev.rev); err != nil {
			s.t.Fatal(err)
		}
		s.step(lease.FenceTo{Rev: s.fence.Watermark(s.now)})
	}
}

// bind asks for an address. A host that gets none does without.
func (s *sharing) bind(host int32) {
	h := &s.hosts[host]
	g := s.step(lease.Bind{Host: h.name, Source: h.source, PortSet: s.p.psidLen > 0}).Grant
	if s.now >= traceFrom {
		s.binds++
		if g == nil {
			s.refused++
		}
	}
	if g == nil {
		return
	}
	if q := s.last[g.Resource]; q.host != "" && q.host != h.name && s.now-q.fenced < s.p.holdDown {
		s.t.Fatalf("%s got %s of %s, %s after the fence", h.name, g.Resource, q.host, s.now-q.fenced)
	}
	delete(s.last, g.Resource)
	h.held, h.ref = true, g.Ref
	s.later(s.core.Timers().T1Of(s.p.valid), renewal, host, g.Gen.Rev())
}

func (s *sharing) renew(host int32) {
	h := &s.hosts[host]
	if a := s.step(lease.Renew{Host: h.name, Ref: h.ref, Source: h.source}); a.Grant == nil {
		s.t.Fatalf("renewal of %s refused: %s", h.name, a.Deny)
	}
}

func (s *sharing) step(ev lease.Event) lease.Actions {
	a := s.core.Step(at(s.now), ev)
	s.fence.Publish(s.now, s.cell.Last())
	for _, c := range a.Commits {
		if c.Address.State == lease.Hold {
			s.last[c.Address.Resource] = quiet{c.Address.Host, s.now}
		}
	}
	for _, e := range a.Ended {
		s.hosts[s.names[e.Host]].held = false
	}
	if len(a.Ended) > 0 {
		s.later(fenceDelay, acked, 0, s.cell.Last())
	}
	st := s.core.Stats()
	s.taken.set(s.now, st.Size-st.Free)
	return a
}
