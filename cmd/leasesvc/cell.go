package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore"
)

// cell is the part of the process that runs while it owns the store: with a file always, with etcd now and then. The
// admin listener is there all the time and asks for the rest here.
type cell struct {
	cfg      *leasesvc.Config
	deps     leasesvc.Deps // without Store
	registry prometheus.Registerer
	log      *slog.Logger

	mu    sync.Mutex
	state string           // of a process that does not own the store
	srv   *leasesvc.Server // nil while it does not
	pages http.Handler     // of srv
}

// run works with the store that the configuration names.
func (c *cell) run(ctx context.Context, ready func()) error {
	if c.cfg.Store.Type == leasesvc.StoreEtcd {
		return c.replica(ctx, ready)
	}
	st, err := boltstore.Open(boltstore.Options{Path: c.cfg.Store.Path})
	if err != nil {
		return err
	}
	return errors.Join(c.own(ctx, st, ready), st.Close())
}

// replica waits until this process owns the cell, works until it loses it, and begins again. A standby is ready: there
// is nothing to wait for.
func (c *cell) replica(ctx context.Context, ready func()) error {
	o := etcdOptions(c.cfg, c.deps.TLS.ID().Name)
	o.OnState = func(state string) {
		c.log.Info("store", "state", state)
		c.standby(state)
		ready()
	}
	for {
		st, err := c.wait(ctx, o)
		if ctx.Err() != nil && err != nil {
			return nil
		}
		if err != nil {
			return err
		}
		err = c.tenure(ctx, st, ready)
		if ctx.Err() != nil {
			return err
		}
		if lost := errors.Join(err, st.Err()); !errors.Is(lost, store.ErrNotOwner) {
			return lost
		}
		c.log.Warn("cell lost: hosts and gateways go to its new owner", "err", st.Err())
	}
}

// wait waits for the cell. The certificate files are followed meanwhile, as the service does when it runs.
func (c *cell) wait(ctx context.Context, o etcdstore.Options) (*etcdstore.Store, error) {
	watch, stop := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error { return c.deps.TLS.Watch(watch) })
	st, err := etcdstore.Open(ctx, o)
	stop()
	return st, errors.Join(err, g.Wait())
}

// tenure works with the store until it is lost.
func (c *cell) tenure(ctx context.Context, st *etcdstore.Store, ready func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-st.Lost():
			cancel()
		case <-ctx.Done():
		}
	}()
	return errors.Join(c.own(ctx, st, ready), st.Close())
}

// own serves with a store that this process owns.
func (c *cell) own(ctx context.Context, st store.Store, ready func()) (err error) {
	r := &scope{Registerer: c.registry}
	defer r.close()
	d := c.deps
	d.Store, d.Registry = st, r
	s, err := leasesvc.New(ctx, c.cfg, d)
	if err != nil {
		return err
	}
	debug.FreeOSMemory() // what the load needed is as much as what is left of it
	var tasks []daemon.Task
	if cp := c.cfg.Store.Copies; cp.Every > 0 {
		copies := &boltstore.Copies{Store: st, Dir: c.cfg.CopiesDir(), Every: cp.Every, Keep: cp.Keep, Log: c.log}
		copies.Register(r)
		tasks = append(tasks, daemon.NewTask("copies", copies.Run))
	}
	l, err := net.Listen("tcp", c.cfg.Listen.String())
	if err != nil {
		return err
	}
	c.serve(s)
	defer c.standby("stopping")
	return group(ctx, ready, append(tasks, s.Tasks(l)...))
}

// group runs tasks until one fails or ctx ends, and calls ready when all are.
func group(ctx context.Context, ready func(), tasks []daemon.Task) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, t := range tasks {
		g.Go(func() error {
			if err := t.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("%s: %w", t, err)
			}
			return nil
		})
	}
	g.Go(func() error {
		for _, t := range tasks {
			select {
			case <-t.Ready():
			case <-ctx.Done():
				return nil
			}
		}
		ready()
		return nil
	})
	return g.Wait()
}

func (c *cell) serve(s *leasesvc.Server) {
	mux := http.NewServeMux()
	for pattern, h := range s.Handlers() {
		mux.Handle(pattern, h)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.srv, c.pages = s, mux
}

func (c *cell) standby(state string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.srv, c.pages, c.state = nil, nil, state
}

// ready is the readiness that the admin listener shows: a standby is not.
func (c *cell) ready() error {
	c.mu.Lock()
	s, state := c.srv, c.state
	c.mu.Unlock()
	if s == nil {
		return errors.New(state)
	}
	return s.Ready()
}

// ServeHTTP serves the pages of the service, and of a standby its state.
func (c *cell) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	pages, state := c.pages, c.state
	c.mu.Unlock()
	if pages == nil {
		pages = daemon.JSON("dstm.leasesvc.standby/1", func(*http.Request) (any, error) {
			return struct {
				Cell  string `json:"cell"`
				State string `json:"state"`
			}{c.cfg.Cell, state}, nil
		})
	}
	pages.ServeHTTP(w, r)
}

// etcdOptions returns what the configuration says of etcd.
func etcdOptions(cfg *leasesvc.Config, name string) etcdstore.Options {
	s := cfg.Store
	return etcdstore.Options{
		Endpoints: s.Endpoints, TLS: etcdstore.Files(s.TLS), Prefix: s.Prefix, TTL: s.TTL, Cell: cfg.Cell, Name: name,
		Scratch: cfg.CopiesDir(),
	}
}

// scope takes out of a registry what was registered through it, when a tenure ends.
type scope struct {
	prometheus.Registerer
	own []prometheus.Collector
}

// Register implements prometheus.Registerer.
func (s *scope) Register(c prometheus.Collector) error {
	if err := s.Registerer.Register(c); err != nil {
		return err
	}
	s.own = append(s.own, c)
	return nil
}

// MustRegister implements prometheus.Registerer.
func (s *scope) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := s.Register(c); err != nil {
			panic(err)
		}
	}
}

func (s *scope) close() {
	for _, c := range s.own {
		s.Unregister(c)
	}
}
