package dstm

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

const (
	// flightTime is how long a hint may take. It is longer than the answer is held: what is learned late still serves the
	// host's next query.
	flightTime = time.Second

	// After a hint that brought nothing, the host is not hinted for again this soon.
	quietPending = 2 * time.Second
	quietError   = time.Second
	quietRefused = 10 * time.Second

	watchBackoffMin = 100 * time.Millisecond
	watchBackoffMax = 5 * time.Second
)

// service is what the plugin needs of the lease service.
type service interface {
	WatchHosts(ctx context.Context, clients []netip.Prefix) (watch, error)
	Hint(ctx context.Context, source netip.Addr) (hintReply, error)
	Close() error
}

// watch is a stream of leaseclient's HostState, HostGone, InSync and PoolState. Recv ends with an error.
type watch interface {
	Recv() (any, error)
	Close()
}

// hintReply is the lease service's answer to a hint.
type hintReply struct {
	result leaseclient.HintResult
	reason lease.Reason
	left   time.Duration // of the lease
}

// client is one lease service as seen by all server blocks that name it alike: the hosts it knows, and hints to it.
type client struct {
	svc     service
	clients []netip.Prefix
	table   *table
	met     *metrics

	ctx    context.Context
	cancel context.CancelFunc

	tried atomic.Bool // the first watch is in sync or has failed
	live  atomic.Bool // a watch is in sync now

	mu     sync.Mutex // guards closed, and wg.Add against wg.Wait
	closed bool
	wg     sync.WaitGroup
}

func newClient(svc service, prefixes []netip.Prefix, met *metrics) *client {
	c := &client{svc: svc, clients: prefixes, table: newTable(met), met: met}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.spawn(c.follow)
	return c
}

// spawn runs f unless the client is closed.
func (c *client) spawn(f func()) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.wg.Go(f)
	return true
}

func (c *client) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	if err := c.svc.Close(); err != nil {
		log.Warningf("closing the connection to the lease service: %v", err)
	}
	c.wg.Wait()
	c.table.clear()
}

// follow keeps a watch open until the client is closed. While there is none, the table stays as it is: leases in it run
// out by themselves, and hosts that left are at worst hinted for in vain.
func (c *client) follow() {
	wait := watchBackoffMin
	for {
		synced, err := c.watchOnce()
		c.setLive(false)
		c.tried.Store(true)
		if c.ctx.Err() != nil {
			return
		}
		c.met.watchFailures.Inc()
		if synced {
			wait = watchBackoffMin
			log.Warningf("lost the lease service, answers go on without leases: %v", err)
		} else if wait == watchBackoffMin {
			log.Warningf("lease service not reached, answers go on without leases: %v", err)
		}
		select {
		case <-c.ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		wait = min(2*wait, watchBackoffMax)
	}
}

// watchOnce reads one watch to its end. synced says whether it got as far as the end of the list.
func (c *client) watchOnce() (synced bool, err error) {
	w, err := c.svc.WatchHosts(c.ctx, c.clients)
	if err != nil {
		return false, err
	}
	defer w.Close()
	c.table.listing()
	for {
		ev, err := w.Recv()
		if err != nil {
			return synced, err
		}
		switch ev := ev.(type) {
		case leaseclient.HostState:
			c.table.upsert(ev)
		case leaseclient.HostGone:
			c.table.remove(ev.Source)
		case leaseclient.PoolState:
			c.table.pool(ev)
		case leaseclient.InSync:
			synced = true
			n := c.table.listed()
			c.setLive(true)
			c.tried.Store(true)
			log.Infof("lease service in sync: %d host addresses", n)
		}
	}
}

func (c *client) setLive(on bool) {
	if c.live.Swap(on) == on {
		return
	}
	if on {
		c.met.watchUp.Inc()
	} else {
		c.met.watchUp.Dec()
	}
}

// flight is one hint under way.
type flight struct {
	began int64 // on the table's clock
	done  chan struct{}
}

// hint joins the hint under way for the host, or starts one. It returns nil when there is nothing to wait for.
func (c *client) hint(h *host, source netip.Addr) *flight {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := c.table.now()
	if h.flight != nil {
		return h.flight
	}
	if h.leased(now) || h.quiet(now) {
		return nil
	}
	f := &flight{began: now, done: make(chan struct{})}
	if !c.spawn(func() { c.fly(h, f, source) }) {
		return nil
	}
	h.flight = f
	return f
}

func (c *client) fly(h *host, f *flight, source netip.Addr) {
	ctx, cancel := context.WithTimeout(c.ctx, flightTime)
	defer cancel()
	rep, err := c.svc.Hint(ctx, source)

	h.mu.Lock()
	c.met.hint(h.settle(c.table.now(), rep, err, ctx.Err() != nil))
	h.flight = nil
	h.mu.Unlock()
	close(f.done)
}

// clients are the clients of the process, one for each distinct way to a lease service, counted by their users. They
// outlive reloads, so a reload forgets no host and opens no second watch.
type clients struct {
	dial func(*config, *tlsid.Source) (service, error)
	met  *metrics

	mu     sync.Mutex
	byKey  map[string]*shared
	reload bool
	fresh  []func() // releases of what was acquired since the reload began
}

type shared struct {
	c     *client
	users int
}

func newClients(dial func(*config, *tlsid.Source) (service, error), met *metrics) *clients {
	return &clients{dial: dial, met: met, byKey: map[string]*shared{}}
}

// acquire returns the client for cfg and the function that gives it back; calling that twice does no harm.
func (cs *clients) acquire(cfg *config, src *tlsid.Source) (*client, func(), error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	key := cfg.key()
	s := cs.byKey[key]
	if s == nil {
		svc, err := cs.dial(cfg, src)
		if err != nil {
			return nil, nil, err
		}
		s = &shared{c: newClient(svc, slices.Clone(cfg.clients), cs.met)}
		cs.byKey[key] = s
	}
	s.users++
	release := sync.OnceFunc(func() { cs.release(key, s) })
	if cs.reload {
		cs.fresh = append(cs.fresh, release)
	}
	return s.c, release, nil
}

func (cs *clients) release(key string, s *shared) {
	cs.mu.Lock()
	s.users--
	last := s.users == 0
	if last {
		delete(cs.byKey, key)
	}
	cs.mu.Unlock()
	if last {
		s.c.close()
	}
}

// restarting says that a reload began: what is acquired from here on belongs to the new instance.
func (cs *clients) restarting() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.reload, cs.fresh = true, nil
}

// restarted says that the new instance runs.
func (cs *clients) restarted() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.reload, cs.fresh = false, nil
}

// restartFailed gives back what the failed instance acquired: it gets no OnShutdown.
func (cs *clients) restartFailed() {
	cs.mu.Lock()
	fresh := cs.fresh
	cs.reload, cs.fresh = false, nil
	cs.mu.Unlock()
	for _, release := range fresh {
		release()
	}
}
