package leasesim

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// service is one life of a lease service: what leasesvc.Server does, as events.
type service struct {
	w     *world
	id    int
	node  node
	dead  bool
	begun time.Duration
	skew  time.Duration // of the machine's wall clock

	queue, writing []*pending
	pending        *pending // of the newest transaction

	wall             time.Time
	epoch            lease.Epoch
	cell             *lease.Cell
	cores            []*lease.Core
	fence            *lease.FenceSet
	answers          *lease.Answers[given]
	resync           map[string]bool
	caps             map[string]bool // gateways that can forward for port sets
	recover          *recovery
	loaded           lease.Rev // the newest revision at the start
	ringBase         lease.Rev // older records are not kept for watchers
	sessions         []*session
	acked            []func()  // who waits for the fence to move
	atServing, atAll lease.Rev // what all serving gateways, and all that may forward, hold since the last acknowledgement
	sweeping         time.Duration
	kicked           bool
	fencedBy         map[string]string // gateway → why it counted as fenced when it was looked at last
}

// given is what is remembered of a Bind that was answered.
type given struct {
	ref     lease.Ref
	at      time.Duration
	valid   time.Duration
	mtu     uint16
	renewed bool
}

func (s *service) name() string { return fmt.Sprintf("service %d", s.id) }

// after plans something that this life of the service does.
func (s *service) after(d time.Duration, do func()) {
	s.w.after(d, func() {
		if !s.dead {
			do()
		}
	})
}

// soon is the time that it takes until another goroutine runs.
func (s *service) soon(do func()) { s.after(time.Duration(s.w.rng.IntN(50))*time.Microsecond, do) }

// start loads a service from the disk, as leasesvc.New.
func (w *world) start(at node) {
	w.services++
	w.counts.starts++
	if w.chance(w.p.faults.renewed) {
		w.p.session = w.between(6*time.Second, 20*time.Second)
		w.p.static = drawStatic(&w.kernel, w.p.session)
		w.tracef("from now on d is %s and D %s", w.p.session, w.p.static)
	}
	s := &service{
		w: w, id: w.services, node: at, begun: w.now, skew: w.wallSkew(), epoch: w.disk.epoch, sweeping: -1,
		answers: lease.NewAnswers[given](2 * w.p.timers.MaxValid), pending: &pending{done: true},
		resync: map[string]bool{}, caps: map[string]bool{}, fencedBy: map[string]string{},
	}
	st := w.disk.load()
	s.wall, s.loaded, s.ringBase = st.wall, st.last, st.last
	now := s.now()
	s.cell = lease.NewCell(s.epoch, st.last, w.p.per64)
	s.loadCores(now, st)
	members := st.members
	if w.disk.restored {
		for _, g := range w.gates {
			if !slices.ContainsFunc(members, func(m lease.Member) bool { return m.TEP == g.name }) {
				members = append(members, lease.Member{TEP: g.name})
			}
		}
		for i := range members {
			members[i] = members[i].Restored(w.p.static)
		}
	}
	s.fence = lease.NewFenceSet(w.fenceConfig(s.epoch), now.Mono, st.last, members...)
	w.disk.owner = s
	w.tracef("%s starts at revision %d, epoch %d, restored %t", s.name(), st.last, s.epoch, w.disk.restored)
	w.truth.loaded(s)
	w.truth.begins(s)
	listen := func() {
		w.owner = s
		if w.disk.restored {
			s.recover = newRecovery(s)
		}
		s.kick()
	}
	if p := s.commitPools(now, st.pools); p != nil {
		p.wait(s, func(error) { listen() })
		return
	}
	listen()
}

func (w *world) fenceConfig(epoch lease.Epoch) lease.FenceConfig {
	c := lease.FenceConfig{FailStatic: w.p.static, Session: w.p.session, Epoch: epoch, RatePPM: w.p.ratePPM}
	if len(w.gates) == 1 {
		c.Session = c.FailStatic
	}
	return c
}

// wallSkew draws where the wall clock of a machine stands that starts.
func (w *world) wallSkew() time.Duration {
	if w.chance(0.7) {
		return 0
	}
	return time.Duration((w.rng.Float64()*2 - 1) * float64(48*time.Hour))
}

func (s *service) loadCores(now lease.Now, st state) {
	var loaders []*lease.Loader
	for i := range s.w.p.pools {
		l, err := lease.NewLoader(lease.Config{Pool: s.w.pool(i), PSIDLen: s.w.p.psidLen, Timers: s.w.p.timers}, s.cell)
		if err != nil {
			panic(err)
		}
		loaders = append(loaders, l)
	}
	for _, a := range st.addresses {
		for i, p := range s.w.p.pools {
			if p.Contains(a.Addr) {
				if err := loaders[i].Put(a); err != nil {
					s.w.fail("load", "%v", err)
					return
				}
			}
		}
	}
	for _, l := range loaders {
		s.cores = append(s.cores, l.Core(now))
	}
}

// commitPools makes the pool records equal to the configuration; nil when they are.
func (s *service) commitPools(now lease.Now, known []lease.Pool) *pending {
	t := tx{wall: now.Wall}
	for _, c := range s.cores {
		if p := c.Pool(); !slices.Contains(known, p) {
			t.pools = append(t.pools, lease.PoolRecord(s.cell.NextRev(), p, false))
		}
	}
	if len(t.pools) == 0 {
		return nil
	}
	s.pending = s.commit(t)
	return s.pending
}

func (s *service) now() lease.Now {
	if m := s.machineWall(); m.After(s.wall) {
		s.wall = m
	}
	return lease.Now{Mono: s.w.now - s.begun, Wall: s.wall}
}

func (s *service) machineWall() time.Time { return wallBase.Add(s.w.now + s.skew) }

var wallBase = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// step runs an event on a core and queues what must become durable.
func (s *service) step(now lease.Now, c *lease.Core, ev lease.Event) (lease.Actions, *pending) {
	acts := c.Step(now, ev)
	s.w.truth.stepped(s, now, acts)
	if s.w.trace != nil {
		s.traceStep(ev, acts)
	}
	if len(acts.Commits) == 0 {
		switch ev.(type) {
		case lease.Tick, lease.FenceTo, lease.Reserve: // nobody is answered
			return acts, s.pending
		}
		return acts, s.barrier()
	}
	p := s.commit(tx{commits: acts.Commits, wall: now.Wall})
	s.pending = p
	for _, e := range acts.Ended {
		if e.Reason != lease.ReasonIdle && e.Reason != lease.ReasonMoved {
			p.wait(s, func(err error) {
				if err == nil {
					s.tellRevoked(e)
				}
			})
		}
	}
	s.kick()
	return acts, p
}

// barrier is what an answer waits for that needs no transaction of its own.
func (s *service) barrier() *pending {
	if s.w.bug == "answers without a barrier" {
		return s.pending
	}
	return s.commit(tx{})
}

func (s *service) traceStep(ev lease.Event, acts lease.Actions) {
	switch ev.(type) {
	case lease.Tick, lease.FenceTo:
		if len(acts.Commits) == 0 {
			return
		}
	}
	s.w.tracef("%s %T%+v: deny %s wait %d", s.name(), ev, ev, acts.Deny, acts.Wait)
	for _, c := range acts.Commits {
		s.w.tracef("    rev %d: %s %s@%s of %s, revoke %d", c.Rev, c.Address.State, c.Address.Resource, c.Address.Gen, c.Address.Host, c.Address.RevokeRev)
	}
}

// tellRevoked pushes the end of a lease to its host.
func (s *service) tellRevoked(e lease.Ended) {
	for _, h := range s.w.hosts {
		if h.identity() == e.Host {
			s.w.net.datagram(s.node, h.node, func() { h.revoked(e.Ref) })
		}
	}
}

// kick makes the sweeper look again.
func (s *service) kick() {
	if s.kicked {
		return
	}
	s.kicked = true
	s.soon(func() {
		s.kicked = false
		s.sweep()
	})
}

// sweep lets time pass for the cores and moves fenced addresses on.
func (s *service) sweep() {
	now := s.now()
	const most = time.Minute
	next := now.Mono + most
	if s.recovered(now) {
		mark := s.fence.Watermark(now.Mono)
		for _, c := range s.cores {
			s.step(now, c, lease.Tick{})
			s.step(now, c, lease.FenceTo{Rev: mark})
			if at, ok := c.Next(); ok {
				next = min(next, at)
			}
		}
	}
	if at, ok := s.fence.Next(now.Mono); ok {
		next = min(next, at)
	}
	s.w.truth.fenced(s)
	at := max(next, now.Mono+time.Millisecond)
	if s.sweeping > now.Mono && s.sweeping <= at {
		return
	}
	s.sweeping = at
	s.after(at-now.Mono, func() {
		if s.sweeping == at {
			s.sweeping = -1
			s.sweep()
		}
	})
}

// moved wakes those who wait for the fence.
func (s *service) moved() {
	waiting := s.acked
	s.acked = nil
	for _, f := range waiting {
		s.soon(f)
	}
}

// await calls then with true as soon as ready does, looked at whenever the fence moves, and with false after bind_wait.
func (s *service) await(ready func() bool, then func(bool)) {
	decided := false
	var look func()
	look = func() {
		switch {
		case decided:
		case ready():
			decided = true
			then(true)
		default:
			s.acked = append(s.acked, look)
		}
	}
	look()
	if !decided {
		s.after(s.w.p.bindWait, func() {
			if !decided {
				decided = true
				then(false)
			}
		})
	}
}

// core returns the core that a resource belongs to.
func (s *service) core(r lease.Resource) *lease.Core {
	for _, c := range s.cores {
		if c.Contains(r) {
			return c
		}
	}
	return nil
}

// stop ends a life of the service in order: its connections are closed, what was not written is lost.
func (s *service) stop() { s.end(false) }

// crash ends it at once. With power lost, nobody is told.
func (s *service) crash(power bool) { s.end(power) }

func (s *service) end(silent bool) {
	if s.dead {
		return
	}
	s.dead = true
	s.w.tracef("%s ends", s.name())
	s.tear()
	for _, ss := range s.sessions {
		if silent {
			ss.st.die(down)
		} else {
			ss.st.close(down, "the service stopped")
		}
	}
	if s.w.owner == s {
		s.w.owner = nil
	}
}

// pool returns the pool of a number.
func (w *world) pool(i int) lease.Pool {
	return lease.Pool{Name: fmt.Sprint("pool", i), Prefix: w.p.pools[i], TEP: netip.MustParseAddr("2001:db8:a::1")}
}
