// Package tepd is the gateway as a library: it follows the lease service's table, keeps the packet path at it, owns the
// kernel state that goes with it, tests itself and announces what it can serve.
//
// What to do is decided by pure functions (desired.go, the state machine of health.go, decide in announce.go) and by
// lease/replica; this package's goroutines carry it out.
package tepd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

// Kernel is the machine's network as the kernel has it; netcfg.Config in production.
type Kernel interface {
	Set(netcfg.Desired) error
	Cleanup() error
	Watch(ctx context.Context) (<-chan struct{}, error)
	Lookup(dst netip.Addr) (netcfg.Hop, error)
	Link(name string) (netcfg.Link, bool, error)
	SetDevice(name string, mtu int) error
	RemoveLink(name string) error
}

// Deps are what a Gateway works with.
type Deps struct {
	Service  Service
	Path     dataplane.Gateway
	Kernel   Kernel
	Speakers Speakers             // nil: a configuration with bgp is refused
	Peers    Peers                // nil: the configuration has no peers
	Now      func() time.Duration // CLOCK_BOOTTIME
	Log      *slog.Logger
	Registry prometheus.Registerer // nil = no metrics
}

const (
	settle = 200 * time.Millisecond // changes of the network are looked at together
	heal   = 30 * time.Second       // and without any change
)

// Gateway is one gateway process. Run it once.
type Gateway struct {
	cfg *Config
	Deps
	metrics *metrics
	view    view
	wake    chan struct{} // the announcer has something to look at

	// table guards the deadline and the session of rep, which other gateways ask about. The rest of rep belongs to follow.
	table sync.Mutex
	rep   *replica.Replica

	mu       sync.Mutex // guards what follows and orders calls of Path.Configure and Kernel.Set
	handover handover
	notes    []string // pools not served here, as logged last
}

// New returns a gateway that does nothing yet.
func New(cfg *Config, d Deps) *Gateway {
	return &Gateway{
		cfg: cfg, Deps: d, metrics: newMetrics(d.Registry, d.Path), wake: make(chan struct{}, 1),
		rep: replica.New(replica.Config{TEP: cfg.ID, Instance: fmt.Sprintf("%016x", rand.Uint64()), Question: cfg.Peers.Listen}),
	}
}

// Run takes over or sets up the packet path, calls ready and works until ctx ends. Then it withdraws its announcements and
// leaves the packet path forwarding under its deadline: the next start takes it over, Cleanup removes it.
func (g *Gateway) Run(ctx context.Context, ready func()) error {
	if g.cfg.BGP.Enabled() && g.Speakers == nil {
		return errors.New("bgp is configured, but this program has no speaker in it: leave out bgp and set static routes to this gateway")
	}
	unlock, err := lock(g.cfg.Paths)
	if err != nil {
		return err
	}
	defer unlock()
	conf, err := g.cfg.BGP.SpeakerConfig(readPassword)
	if err != nil {
		return err
	}
	changes, err := g.Kernel.Watch(ctx) // before the first read, so that nothing is missed
	if err != nil {
		return err
	}
	if err := g.takeOver(ctx); err != nil {
		return err
	}
	ready()
	err = g.work(ctx, conf, changes)
	return errors.Join(err, g.Path.Close(true))
}

func (g *Gateway) work(ctx context.Context, conf bgp.Config, changes <-chan struct{}) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return g.follow(ctx) })
	eg.Go(func() error { return g.checkHealth(ctx) })
	eg.Go(func() error { return g.watch(ctx, changes) })
	eg.Go(func() error { return g.goOn(ctx) })
	if g.Peers != nil {
		eg.Go(func() error { return g.Peers.Serve(ctx, g.asked) })
	}
	if g.Speakers != nil {
		eg.Go(func() error { return g.announce(ctx, conf) })
	}
	return eg.Wait()
}

// takeOver starts with the pools that the process before us served, so that what is pinned goes on as it is until the
// lease service has told us more.
func (g *Gateway) takeOver(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	h, err := loadHandover(g.cfg.Paths)
	if err != nil {
		g.Log.Warn("starting without what the process before us left", "err", err)
	}
	g.handover = h
	if err := g.checkDevice(); err != nil {
		return err
	}
	// Said before it is done: whatever stops us in between, the next process and Cleanup know that it is ours.
	if _, there, err := g.Kernel.Link(g.cfg.Tunnel.Device); err != nil {
		return err
	} else if !there {
		g.handover.Device, g.handover.Index = g.cfg.Tunnel.Device, 0
		if err := g.handover.save(g.cfg.Paths); err != nil {
			return err
		}
	}
	if err := g.Path.Configure(ctx, desiredPath(g.cfg, h.Pools)); err != nil {
		return fmt.Errorf("packet path: %w", err)
	}
	if err := g.rememberDevice(); err != nil {
		return err
	}
	return g.setKernel()
}

// checkDevice refuses an interface of our device's name that no tepd made.
func (g *Gateway) checkDevice() error {
	name := g.cfg.Tunnel.Device
	l, there, err := g.Kernel.Link(name)
	switch {
	case err != nil:
		return err
	case !there || l.Kind == tunKind && g.handover.owns(l):
		return nil
	case l.Kind != tunKind:
		return fmt.Errorf("interface %s exists already and is of kind %s, not a TUN of ours: remove it (ip link del %s) or set tunnel.device", name, l.Kind, name)
	}
	return fmt.Errorf("interface %s exists already and was made by another program: stop that program, remove the interface (ip link del %s) or set tunnel.device", name, name)
}

// tunKind is the kind of a TUN as netcfg names it.
const tunKind = "tuntap"

func (g *Gateway) rememberDevice() error {
	l, there, err := g.Kernel.Link(g.cfg.Tunnel.Device)
	if err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("interface %s is missing although the packet path is configured", g.cfg.Tunnel.Device)
	}
	g.handover.Device, g.handover.Index = l.Name, l.Index
	return g.handover.save(g.cfg.Paths)
}

// setPools makes the packet path and the kernel serve the pools. Only an error of the packet path is returned: what is
// wrong with the kernel fails the self-test and is tried again.
func (g *Gateway) setPools(ctx context.Context, pools []lease.Pool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	ours, notes := served(g.cfg, pools)
	if !slices.Equal(notes, g.notes) {
		for _, n := range notes {
			g.Log.Warn("pool not served", "reason", n)
		}
		g.notes = notes
	}
	next := prefixes(ours)
	if err := g.Path.Configure(ctx, desiredPath(g.cfg, next)); err != nil {
		return err
	}
	g.handover.Pools = next
	if err := g.handover.save(g.cfg.Paths); err != nil {
		return err
	}
	_ = g.setKernel() // logged and kept for the self-test
	return nil
}

// setKernel puts addresses, routes and sysctls in place and keeps the result for the self-test.
func (g *Gateway) setKernel() error {
	err := g.Kernel.SetDevice(g.cfg.Tunnel.Device, int(g.cfg.Tunnel.MTU))
	if err == nil {
		err = g.Kernel.Set(desiredKernel(g.cfg, g.handover.Pools))
	}
	if was := g.view.setKernel(err); err != nil && (was == nil || was.Error() != err.Error()) {
		g.Log.Error("kernel state not complete", "err", err)
	}
	return err
}

// watch looks at everything again after changes of interfaces, addresses and routes, and now and then without.
func (g *Gateway) watch(ctx context.Context, changes <-chan struct{}) error {
	t := time.NewTicker(heal)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-changes:
			if !ok {
				changes = nil // the context's end, or only the ticker from here on
				continue
			}
			select {
			case <-time.After(settle):
			case <-ctx.Done():
				return nil
			}
		case <-t.C:
		}
		g.heal(ctx)
	}
}

func (g *Gateway) heal(ctx context.Context) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.Path.Configure(ctx, desiredPath(g.cfg, g.handover.Pools)); err != nil && ctx.Err() == nil {
		g.Log.Error("packet path not configured", "err", err)
		g.view.setKernel(fmt.Errorf("packet path: %w", err))
		return
	}
	_ = g.setKernel() // logged and kept for the self-test
}

func (g *Gateway) wakeAnnouncer() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}
