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
// The first hour fills the pool and is not measured.
const (
	traceHosts = 100_000
	traceUse   = time.Minute
	traceHours = 3
	fenceDelay = 5 * time.Millisecond // until the gateway has acknowledged a revocation
)

// A profile is how hosts and pool behave.
type profile struct {
	name     string
	idle     time.Duration // hosts give back this long after their last use; 0 = never, as with DHCP
	holdDown time.Duration
	valid    time.Duration
	ratio    float64 // most addresses taken at once ÷ most hosts in use at once
}

// TestSharing is N28: how many addresses a trace needs, as a multiple of the hosts that use one at the same time. Nobody can
// do with less than 1. The figures are those of docs/capacity.md.
func TestSharing(t *testing.T) {
	const limit = 2    // of the dense profile
	const slack = 0.03 // relative, of the figures
	ratios := map[string]float64{}
	for _, p := range []profile{
		{"default", 120 * time.Second, lease.DefaultTimers().HoldDown, lease.DefaultTimers().Valid, 4.81},
		{"dense", 20 * time.Second, 30 * time.Second, lease.DefaultTimers().Valid, 1.78},
		{"DHCP of 15 min", 0, 0, 15 * time.Minute, 15.07},
	} {
		s := newSharing(t, p)
		s.run(time.Hour, traceHours*time.Hour)
		r := float64(s.taken.most) / float64(s.inUse.most)
		ratios[p.name] = r
		t.Logf("%-14s in use %.0f, at most %d; taken %.0f, at most %d: %.2f",
			p.name, s.inUse.mean(), s.inUse.most, s.taken.mean(), s.taken.most, r)
		if math.Abs(r-p.ratio) > slack*p.ratio {
			t.Errorf("%s: %.2f addresses for each host in use, want %.2f ± %.0f %%", p.name, r, p.ratio, 100*slack)
		}
	}
	if ratios["dense"] > limit {
		t.Errorf("N28: dense profile needs %.2f addresses for each host in use, allowed is %d", ratios["dense"], limit)
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
	last    map[netip.Addr]quiet // of addresses that were given up

	inUse, taken level
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
		last: map[netip.Addr]quiet{}, fence: lease.NewFenceSet(lease.FenceConfig{FailStatic: 4 * time.Hour}, 0, 0),
	}
	core, err := lease.NewCore(lease.Config{
		Pool:   lease.Pool{Name: "p", Prefix: netip.MustParsePrefix("198.18.0.0/16"), TEP: netip.MustParseAddr("2001:db8:a::1")},
		Timers: timers,
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

// run lets the trace pass, the same one for every profile, and measures between from and to.
func (s *sharing) run(from, to time.Duration) {
	s.inUse.from, s.taken.from = from, from
	rng := rand.New(rand.NewPCG(28, 1))
	var trace []traceEvent
	for i := range s.hosts {
		for hour := range time.Duration(traceHours) {
			begin := hour*time.Hour + time.Duration(rng.Int64N(int64(time.Hour)))
			trace = append(trace, traceEvent{at: begin, what: useBegins, host: int32(i)})
		}
	}
	slices.SortFunc(trace, func(a, b traceEvent) int { return cmp.Compare(a.at, b.at) })
	for _, ev := range trace {
		s.pass(ev.at)
		s.now = ev.at
		s.happen(ev)
	}
	s.pass(to)
	s.inUse.set(to, s.inUse.n)
	s.taken.set(to, s.taken.n)
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

func (s *sharing) bind(host int32) {
	h := &s.hosts[host]
	g := s.step(lease.Bind{Host: h.name, Source: h.source}).Grant
	if g == nil {
		s.t.Fatalf("%s: %s got no address at %s with %+v", s.p.name, h.name, s.now, s.core.Stats())
	}
	if q := s.last[g.Addr]; q.host != "" && q.host != h.name && s.now-q.fenced < s.p.holdDown {
		s.t.Fatalf("%s: %s got %s of %s, %s after the fence", s.p.name, h.name, g.Addr, q.host, s.now-q.fenced)
	}
	delete(s.last, g.Addr)
	h.held, h.ref = true, g.Ref
	s.later(s.core.Timers().T1Of(s.p.valid), renewal, host, g.Gen.Rev())
}

func (s *sharing) renew(host int32) {
	h := &s.hosts[host]
	if a := s.step(lease.Renew{Host: h.name, Ref: h.ref, Source: h.source}); a.Grant == nil {
		s.t.Fatalf("%s: renewal of %s refused: %s", s.p.name, h.name, a.Deny)
	}
}

func (s *sharing) step(ev lease.Event) lease.Actions {
	a := s.core.Step(at(s.now), ev)
	s.fence.Publish(s.now, s.cell.Last())
	for _, c := range a.Commits {
		if c.Address.State == lease.Hold {
			s.last[c.Address.Addr] = quiet{c.Address.Host, s.now}
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
