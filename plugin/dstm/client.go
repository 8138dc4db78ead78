package dstm

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	clog "github.com/coredns/coredns/plugin/pkg/log"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

var log = clog.NewWithPlugin(pluginName)

const (
	rewatchMin = 100 * time.Millisecond
	rewatchMax = 5 * time.Second
)

// service is what the plugin asks of the lease service.
type service interface {
	watchHosts(ctx context.Context, clients []netip.Prefix) (watch, error)
	Hint(ctx context.Context, source netip.Addr) (leaseclient.HintResult, lease.Reason, time.Duration, error)
	Close() error
}

// watch is a stream of leaseclient.HostState, HostGone, InSync and PoolState.
type watch interface {
	Recv() (any, error)
	Close()
}

// conn is the lease service over gRPC.
type conn struct{ *leaseclient.Conn }

func (c conn) watchHosts(ctx context.Context, clients []netip.Prefix) (watch, error) {
	w, err := c.WatchHosts(ctx, clients)
	if err != nil {
		return nil, err // not w: a nil *Watch is no nil watch
	}
	return w, nil
}

// client follows one lease service for all server blocks, and all their reloads, that share a configuration.
type client struct {
	svc     service
	clients []netip.Prefix
	hosts   *table
	tried   atomic.Bool // in sync once, or failed once
	synced  bool        // of run only
	cancel  context.CancelFunc
	done    sync.WaitGroup

	key  string // with refs: guarded by registry.mu
	refs int
}

// start opens the identity and begins to follow the service. It does not wait for it.
func start(cfg *config) (*client, error) {
	id, err := tlsid.Open(cfg.tls, tlsid.RoleResolver, slog.Default())
	if err != nil {
		return nil, err
	}
	c, err := leaseclient.New(leaseclient.Options{Servers: cfg.to, TLS: id.Client(cfg.serverName)})
	if err != nil {
		return nil, err
	}
	return follow(conn{c}, cfg.clients, id.Watch), nil
}

// follow runs a client and the given companions until stop.
func follow(svc service, clients []netip.Prefix, with ...func(context.Context) error) *client {
	ctx, cancel := context.WithCancel(context.Background())
	c := &client{svc: svc, clients: clients, hosts: newTable(), cancel: cancel}
	c.done.Go(func() { c.run(ctx) })
	for _, f := range with {
		c.done.Go(func() { _ = f(ctx) }) // ends with ctx, and with no error
	}
	return c
}

func (c *client) stop() {
	c.cancel()
	_ = c.svc.Close() // streams and hints under way end with it; there is nobody left to tell
	c.done.Wait()
	c.hosts.clear()
}

// run keeps the host table up to date. Between two streams the last table stays: leases in it run out by themselves.
func (c *client) run(ctx context.Context) {
	wait := rewatchMin
	for {
		err := c.watchOnce(ctx)
		c.tried.Store(true)
		if c.synced {
			c.synced, wait = false, rewatchMin
			inSync.Dec()
		}
		if ctx.Err() != nil {
			return
		}
		watchFailures.Inc()
		if wait == rewatchMin {
			log.Warningf("lease service lost, DNS goes on without it: %v", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		wait = min(2*wait, rewatchMax)
	}
}

func (c *client) watchOnce(ctx context.Context) error {
	c.hosts.relist()
	w, err := c.svc.watchHosts(ctx, c.clients)
	if err != nil {
		return err
	}
	defer w.Close()
	for {
		e, err := w.Recv()
		if err != nil {
			return err
		}
		c.hosts.apply(e)
		if _, ok := e.(leaseclient.InSync); ok && !c.synced {
			c.synced = true
			c.tried.Store(true)
			inSync.Inc()
			log.Info("host table in sync with the lease service")
		}
	}
}

// hint makes sure that one hint for the host is under way and returns at its end.
func (c *client) hint(h *host, source netip.Addr, budget time.Duration) {
	f, pilot := h.board(time.Now())
	switch {
	case f == nil:
		return
	case !pilot:
		<-f.done
		return
	}
	var left time.Duration
	defer func() { h.land(time.Now(), left) }()

	ctx, cancel := context.WithTimeout(context.Background(), budget)
	defer cancel()
	begin := time.Now()
	res, _, l, err := c.svc.Hint(ctx, source)
	hintSeconds.Observe(time.Since(begin).Seconds())
	result := resultOf(ctx, res, err)
	hintsTotal.WithLabelValues(result).Inc()
	if result == "ready" {
		left = l
	}
}

// resultOf names the end of a hint for the metric. An answer that misses the budget is no fault of the service: its own
// timer and ours run out together.
func resultOf(ctx context.Context, res leaseclient.HintResult, err error) string {
	switch {
	case err != nil && ctx.Err() != nil:
		return "timeout"
	case err != nil:
		return "error"
	}
	switch res {
	case leaseclient.HintReady:
		return "ready"
	case leaseclient.HintRefused:
		return "refused"
	case leaseclient.HintPending:
	}
	return "pending"
}

// registry counts the holders of each client. Over a reload CoreDNS starts the new instance before it stops the old one;
// both hold the client meanwhile, so that an unchanged block keeps its connection and table.
type registry struct {
	mu     sync.Mutex
	byKey  map[string]*client
	recent []*client // acquired since the last reload began: given back if that reload fails
}

// shared is the one piece of state that outlives a plugin instance, which CoreDNS offers no other place for.
var shared = &registry{byKey: map[string]*client{}}

func (r *registry) acquire(key string, start func() (*client, error)) (*client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.byKey[key]
	if c == nil {
		var err error
		if c, err = start(); err != nil {
			return nil, fmt.Errorf("lease service: %w", err)
		}
		c.key = key
		r.byKey[key] = c
	}
	c.refs++
	r.recent = append(r.recent, c)
	return c, nil
}

// release gives back what acquire returned; nil is allowed. It is the end of a reload that went well, or of the process.
func (r *registry) release(c *client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recent = nil
	r.drop(c)
}

// restarting notes that what is acquired from now on belongs to an instance that may never run.
func (r *registry) restarting() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recent = nil
}

// restartFailed gives back what the discarded instance acquired: its own shutdown is never called.
func (r *registry) restartFailed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.recent {
		r.drop(c)
	}
	r.recent = nil
}

func (r *registry) drop(c *client) {
	if c == nil {
		return
	}
	if c.refs--; c.refs == 0 {
		delete(r.byKey, c.key)
		c.stop()
	}
}
