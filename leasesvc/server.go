// Package leasesvc is the lease service: the only writer of leases. It authenticates callers, steps the pure cores of
// package lease under one lock, lets nothing leave before the store has it, and keeps gateways, resolvers and hosts told.
package leasesvc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/failpoint"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// Deps are what a Server is built from.
type Deps struct {
	Store    store.Store
	TLS      *tlsid.Source
	Server   *tls.Config // of the listener; nil = TLS.Server()
	Policy   Policy      // nil = every authenticated host may have a lease
	Log      *slog.Logger
	Registry prometheus.Registerer // nil = no metrics
}

// Server is one lease service.
type Server struct {
	cfg     *Config
	d       Deps
	m       *metrics
	start   time.Time
	limits  *limits
	streams streams
	cluster lease.ClusterID
	secret  [32]byte // see proof

	mu      sync.Mutex // everything below; held for steps, never while waiting
	wall    time.Time  // newest wall time handed out
	cell    *lease.Cell
	loaded  lease.Rev     // the newest revision at the start: watchers get no older ones
	cores   []*lease.Core // in the order of the configuration
	usage   map[*lease.Core]*usage
	fence   *lease.FenceSet
	answers *lease.Answers[given] // to Binds; what is refused is asked anew
	pending *store.Pending        // of the newest transaction
	hosts   hosts
	dry     bool                // no pool has a free address
	short   bool                // see runsShort
	resync  map[string]bool     // gateways whose table is in doubt: the next session brings a whole one
	caps    map[string][]string // of the gateways
	recover *recovery           // nil once the store is known to know every lease

	sessions map[*session]struct{} // of gateways that take revocation lists

	backup sync.Mutex // held while one is sent

	atServing, atAll lease.Rev // what all serving gateways, and all that may forward, hold since the last acknowledgement

	acked *signal       // an acknowledgement moved the fence
	wake  chan struct{} // the sweeper has to look again
	fatal chan error
}

// New loads the store and builds the cores. Configured pools are compared with what gateways know; what differs is
// committed as pool records.
func New(ctx context.Context, cfg *Config, d Deps) (*Server, error) {
	if d.Server == nil {
		d.Server = d.TLS.Server()
		if cfg.Hosts.Identity == IdentityAddress {
			d.Server = d.TLS.OpenServer()
		}
	}
	s := &Server{
		cfg: cfg, d: d, m: newMetrics(d.Registry), start: time.Now(), acked: newSignal(), wake: make(chan struct{}, 1),
		fatal: make(chan error, 1), resync: map[string]bool{}, caps: map[string][]string{},
		usage: map[*lease.Core]*usage{}, sessions: map[*session]struct{}{},
		answers: lease.NewAnswers[given](2 * cfg.Timers.MaxValid), pending: store.Done(nil),
	}
	s.hosts.init()
	s.limits = newLimits(cfg.Limits, cfg.Hosts.Prefixes, s.m)
	s.streams.all, s.streams.by = map[*stream]struct{}{}, map[callerID]int{}
	st, err := d.Store.Load(ctx)
	if err != nil {
		return nil, err
	}
	s.cluster, s.secret, s.wall = st.Cluster, st.Secret, st.Wall
	now := s.now()
	s.loaded, s.cell = st.Last, lease.NewCell(st.Epoch, st.Last, cfg.Hosts.Per64)
	if err := s.loadCores(ctx, now); err != nil {
		return nil, err
	}
	members := st.Members
	if st.Restored {
		members = cfg.restored(members)
	}
	s.fence = lease.NewFenceSet(cfg.fence(st.Epoch), now.Mono, st.Last, members...)
	if err := s.commitPools(ctx, now, st.Pools); err != nil {
		return nil, err
	}
	if st.Restored {
		s.recover = s.newRecovery()
	}
	if d.Registry != nil {
		d.Registry.MustRegister(state{s})
	}
	for _, t := range cfg.labTimes() {
		d.Log.Warn("timer is shorter than production wants", "timer", t)
	}
	return s, nil
}

// loadCores builds the cores from the stored addresses.
func (s *Server) loadCores(ctx context.Context, now lease.Now) error {
	var loaders []*lease.Loader
	for _, p := range s.cfg.Pools {
		l, err := lease.NewLoader(lease.Config{
			Pool: lease.Pool{Name: p.Name, Prefix: p.Prefix, TEP: p.TEPAddress}, Exclude: p.Exclude, Fixed: p.Reservations,
			PSIDLen: p.PortSets, Timers: s.cfg.leaseTimers(),
		}, s.cell)
		if err != nil {
			return err
		}
		loaders = append(loaders, l)
	}
	err := s.d.Store.Addresses(ctx, func(a lease.Address) error {
		for i, p := range s.cfg.Pools {
			if p.Prefix.Contains(a.Addr) {
				return loaders[i].Put(a)
			}
		}
		if a.State == lease.Free {
			return nil
		}
		return fmt.Errorf("address %s is %s in the store and in no configured pool: keep its pool until it is free", a.Resource, a.State)
	})
	if err != nil {
		return err
	}
	for _, l := range loaders {
		c := l.Core(now)
		s.cores = append(s.cores, c)
		s.usage[c] = newUsage(now.Mono, c.Stats())
	}
	return nil
}

// commitPools makes the pool records equal to the configuration.
func (s *Server) commitPools(ctx context.Context, now lease.Now, known []lease.Pool) error {
	have := map[string]lease.Pool{}
	for _, p := range known {
		have[p.Name] = p
	}
	tx := store.Tx{Wall: now.Wall}
	for _, c := range s.cores {
		p := c.Pool()
		if old, ok := have[p.Name]; !ok || old != p {
			tx.Pools = append(tx.Pools, lease.PoolRecord(s.cell.NextRev(), p, false))
		}
		delete(have, p.Name)
	}
	for _, p := range have {
		tx.Pools = append(tx.Pools, lease.PoolRecord(s.cell.NextRev(), p, true))
	}
	if len(tx.Pools) == 0 {
		return nil
	}
	s.pending = s.d.Store.Commit(tx)
	return s.pending.Wait(ctx)
}

// now is the instant of an event. Wall time never goes back behind what was stored: a clock that stepped back must not
// make an audit record end before it began.
func (s *Server) now() lease.Now {
	mono := time.Since(s.start)
	if w := failpoint.Wall(); w.After(s.wall) {
		s.wall = w
	}
	return lease.Now{Mono: mono, Wall: s.wall}
}

// step runs an event on a core and queues what must become durable. The caller holds mu.
func (s *Server) step(now lease.Now, c *lease.Core, ev lease.Event) (lease.Actions, *store.Pending) {
	acts := c.Step(now, ev)
	s.usage[c].note(now.Mono, c.Stats(), acts)
	if len(acts.Commits) == 0 {
		switch ev.(type) {
		case lease.Tick, lease.FenceTo, lease.Reserve: // nobody is answered
			return acts, s.pending
		}
		return acts, s.barrier()
	}
	p := s.d.Store.Commit(store.Tx{Commits: acts.Commits, Wall: now.Wall})
	s.pending = p
	s.m.commits.Add(float64(len(acts.Commits)))
	for _, e := range acts.Ended {
		s.m.ended.WithLabelValues(e.Reason.String()).Inc()
		s.d.Log.Info("lease ended", "addr", e.Resource.String(), "gen", e.Gen.String(), "host", e.Host, "reason", e.Reason.String())
		s.hostChanged(e.Host)
		if e.Reason != lease.ReasonIdle && e.Reason != lease.ReasonMoved {
			s.tellRevoked(e, p)
		}
	}
	s.kick()
	return acts, p
}

// barrier is what an answer waits for that needs no transaction of its own: a service that lost its store to a successor must
// not speak of leases from memory. The caller holds mu.
func (s *Server) barrier() *store.Pending { return s.d.Store.Commit(store.Tx{}) }

// kick makes the sweeper look at its timers again.
func (s *Server) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// durable waits for a transaction. A store that refuses ends the service: its memory runs ahead of the disk now, and
// only a restart makes them equal again.
func (s *Server) durable(ctx context.Context, p *store.Pending) error {
	if failpoint.Hit("bug-not-durable") != nil {
		return nil
	}
	err := p.Wait(ctx)
	if err != nil && ctx.Err() == nil {
		select {
		case s.fatal <- err:
		default:
		}
	}
	return err
}

// sweep lets time pass for the cores and moves fenced addresses on.
func (s *Server) sweep(ctx context.Context, ready func()) error {
	ready()
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.fatal:
			return fmt.Errorf("store: %w", err)
		case <-s.wake:
		case <-t.C:
		}
		t.Reset(s.sweepOnce())
	}
}

// maxSweep bounds the sleep of the sweeper.
const maxSweep = time.Minute

func (s *Server) sweepOnce() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if !s.recovered(now) {
		return min(maxSweep, s.untilFenced(now))
	}
	mark := s.fence.Watermark(now.Mono)
	next := now.Mono + maxSweep
	for _, c := range s.cores {
		s.step(now, c, lease.Tick{})
		s.step(now, c, lease.FenceTo{Rev: mark})
		if at, ok := c.Next(); ok {
			next = min(next, at)
		}
	}
	if at, ok := s.fence.Next(now.Mono); ok {
		next = min(next, at)
	}
	if dry, short := s.poolState().Dry, s.runsShort(); dry != s.dry || short != s.short {
		s.dry, s.short = dry, short
		for w := range s.hosts.watchers {
			w.kick()
		}
	}
	// Steps kick the sweeper; that it looks once more at once is harmless, and it must not be lost.
	return max(next-now.Mono, time.Millisecond)
}

// Tasks returns the parts of the service that run: the gRPC listener, the sweeper, what pushes revocation lists and the
// certificate watcher.
func (s *Server) Tasks(l net.Listener) []daemon.Task {
	return []daemon.Task{
		daemon.NewTask("grpc", func(ctx context.Context, ready func()) error { return s.serve(ctx, l, ready) }),
		daemon.NewTask("sweeper", s.sweep),
		daemon.NewTask("audit", s.retain),
		daemon.NewTask("revocations", s.pushLists),
		daemon.NewTask("tidy", s.tidy),
		daemon.NewTask("certificates", func(ctx context.Context, ready func()) error { ready(); return s.d.TLS.Watch(ctx) }),
	}
}

// Ready is the readiness of the service: it has a gateway that serves.
func (s *Server) Ready() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recover != nil {
		return errors.New(s.recover.sentence())
	}
	if len(s.fence.Serving(s.now().Mono)) == 0 {
		return errors.New("no gateway serves")
	}
	return nil
}

// core returns the core that a resource belongs to.
func (s *Server) core(r lease.Resource) *lease.Core {
	for _, c := range s.cores {
		if c.Contains(r) {
			return c
		}
	}
	return nil
}

// signal wakes everyone who waits for something to change.
type signal struct {
	mu sync.Mutex
	ch chan struct{}
}

func newSignal() *signal { return &signal{ch: make(chan struct{})} }

// C returns the channel that the next Broadcast closes.
func (g *signal) C() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ch
}

// Broadcast wakes all.
func (g *signal) Broadcast() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.ch)
	g.ch = make(chan struct{})
}
