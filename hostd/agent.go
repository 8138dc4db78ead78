// Package hostd is the host agent as a library: it keeps the tunnel interface, asks for a lease when IPv4 is used, keeps
// it while it is used and gives it back.
//
// Decisions are in the keeper, which is pure. This package's goroutines turn what happens (offers, packets without a
// lease, changes of the network, answers) into its events, and its actions into calls.
package hostd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/hostprobe"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
)

// Network is the host's network as the kernel has it; netcfg.Config in production.
type Network interface {
	Set(netcfg.Desired) error
	Cleanup() error
	Watch(ctx context.Context) (<-chan struct{}, error)
	Lookup(dst netip.Addr) (netcfg.Hop, error)
	GlobalIPv6() ([]netcfg.GlobalAddr, error)
	ReadIPv4() (netcfg.IPv4, error)
	Link(name string) (netcfg.Link, bool, error)
	SetDevice(name string, mtu int) error
}

// Filter is the host's packet filter; Firewall in production.
type Filter interface {
	Set(device string, in Inbound) error
	Remove() error
}

// Sockets asks after and ends sockets; hostprobe in production.
type Sockets struct {
	InUse func(match func(hostprobe.Conn) bool) (bool, error)
	Abort func(match func(hostprobe.Conn) bool) (int, error)
}

// Deps are what an Agent works with.
type Deps struct {
	Service  Service
	DataPath dataplane.Host
	Network  Network
	Filter   Filter
	Sockets  Sockets
	Now      func() time.Duration // CLOCK_BOOTTIME
	Log      *slog.Logger
	Registry prometheus.Registerer // nil = no metrics
}

// Times of the agent itself.
const (
	callTimeout    = 5 * time.Second        // of a Bind, Renew or Release, retries of the client included
	stopTimeout    = 2 * time.Second        // of the Release at the end
	settle         = 50 * time.Millisecond  // changes of the network are looked at together
	backoffMin     = 250 * time.Millisecond // after a refusal
	backoffMax     = time.Minute
	defaultIdle    = 120 * time.Second // if neither the file nor the service says
	defaultT1      = 0.5
	defaultT2      = 0.8
	attendRetryMin = 250 * time.Millisecond
	attendRetryMax = 10 * time.Second
)

// Agent is one host agent. Run it once.
type Agent struct {
	cfg *Config
	Deps
	instance string
	metrics  *metrics
	events   chan any
	wake     chan struct{} // the attend task has something to look at

	k       keeper // of the goroutine of loop
	refusal string // the last that was logged; likewise

	mu   sync.Mutex // guards what follows
	view view
	held heldQueue
}

// view is what the tasks know of each other, and what status shows.
type view struct {
	state    State
	why      string
	lease    held
	has      bool // lease is in the packet path
	net      netState
	stream   Stream
	attended bool
	problem  string // why not attended
	path     uint64 // counts changes of the way out
	sent     uint64 // packets that had gone into the tunnel at the last probe
}

// New returns an agent that does nothing yet.
func New(cfg *Config, d Deps) *Agent {
	a := &Agent{
		cfg: cfg, Deps: d, instance: fmt.Sprintf("%016x", rand.Uint64()), metrics: newMetrics(d.Registry, d.DataPath),
		events: make(chan any, 16), wake: make(chan struct{}, 1),
		held: heldQueue{most: cfg.Trigger.HoldPackets, age: cfg.Trigger.HoldTime},
	}
	a.k = keeper{timers: a.timers(0, 0, 0), jitter: jitter}
	a.k.why = "started"
	return a
}

func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// timers combines what the service says (0 = nothing) with the configuration, which goes first.
func (a *Agent) timers(t1, t2 float64, idle time.Duration) timers {
	t := timers{
		t1: defaultT1, t2: defaultT2, idle: defaultIdle, keepSockets: a.cfg.Idle.KeepOpenSockets,
		holdTime: a.cfg.Trigger.HoldTime, backoffMin: backoffMin, backoffMax: backoffMax,
	}
	if 0 < t1 && t1 < t2 && t2 < 1 {
		t.t1, t.t2 = t1, t2
	}
	switch {
	case a.cfg.Idle.After > 0:
		t.idle = a.cfg.Idle.After
	case idle > 0:
		t.idle = idle
	}
	return t
}

// Run brings the interface up, calls ready and works until ctx ends; then it gives the lease back and removes everything.
// A lease service that cannot be reached is no error: it is tried until it can.
func (a *Agent) Run(ctx context.Context, ready func()) error {
	if err := CheckDevice(a.Network, a.cfg.Device.Name); err != nil {
		return err
	}
	if err := a.Network.Cleanup(); err != nil { // what a killed one left
		return err
	}
	err := a.up(ctx)
	if err == nil {
		ready()
		err = a.work(ctx)
	}
	return errors.Join(err, a.down())
}

// CheckDevice refuses an interface that is there already: a former one of ours ended with its process.
func CheckDevice(n interface {
	Link(name string) (netcfg.Link, bool, error)
}, name string,
) error {
	l, there, err := n.Link(name)
	if err != nil {
		return err
	}
	if there {
		return fmt.Errorf("interface %s (%s) exists already and is not ours: stop the program that made it, remove it, or set device.name", l.Name, l.Kind)
	}
	return nil
}

func (a *Agent) up(ctx context.Context) error {
	if err := a.configurePath(ctx, 0); err != nil {
		return fmt.Errorf("data path: %w", err)
	}
	if err := a.Filter.Set(a.cfg.Device.Name, a.cfg.Device.Inbound); err != nil {
		return err
	}
	// The sysctls come before the device is up, or it would get a link-local address and begin to solicit routers.
	if err := a.Network.Set(netcfg.Desired{Sysctls: a.sysctls()}); err != nil {
		return err
	}
	if err := a.Network.SetDevice(a.cfg.Device.Name, 0); err != nil {
		return err
	}
	return a.Network.Set(a.desired())
}

// configurePath gives the packet path its uplinks, those that have come since too, and the device its MTU; 0 = what fits
// through the uplinks.
func (a *Agent) configurePath(ctx context.Context, mtu uint16) error {
	return a.DataPath.Configure(ctx, dataplane.HostConfig{
		Device: a.cfg.Device.Name, Placeholder: a.cfg.Device.Placeholder, Uplinks: a.cfg.Uplinks, MTU: mtu,
		HopLimit: a.cfg.Device.HopLimit, HoldPackets: a.cfg.Trigger.HoldPackets, PinDir: a.cfg.Paths.BPF,
	})
}

func (a *Agent) down() error {
	return errors.Join(a.Network.Cleanup(), a.Filter.Remove(), a.DataPath.Close())
}

func (a *Agent) work(ctx context.Context) error {
	changes, err := a.Network.Watch(ctx) // before the first read, so that nothing is missed
	if err != nil {
		return err
	}
	if err := a.look(ctx); err != nil {
		a.Log.Warn("network not read", "err", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.watch(ctx, changes) })
	g.Go(func() error { return a.attend(ctx) })
	g.Go(func() error { return a.readHeld(ctx) })
	g.Go(func() error { return a.loop(ctx) })
	return g.Wait()
}

func (a *Agent) sysctls() map[string]string {
	dir := "net/ipv6/conf/" + a.cfg.Device.Name
	return map[string]string{
		// The packet path looks the way out up from the device, which needs this flag there and nowhere else: router
		// advertisements stay in force for the host.
		dir + "/forwarding":    "1",
		dir + "/addr_gen_mode": "1", // none: the device carries IPv4 alone
	}
}

// desired is what the kernel is to have now: the placeholder and the default route, which prefers the lease as its
// source; in standby neither, so that the host's own IPv4 has the field.
func (a *Agent) desired() netcfg.Desired {
	want := netcfg.Desired{Sysctls: a.sysctls()}
	if a.k.state == StateStandby {
		return want
	}
	d := a.cfg.Device
	def := netcfg.Route{Prefix: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Link: d.Name, Metric: d.Metric}
	want.Addrs = []netcfg.Addr{{Link: d.Name, Prefix: d.Placeholder}}
	if a.k.state.holds() {
		def.Src = a.k.lease.Addr
		want.Addrs = append(want.Addrs, netcfg.Addr{Link: d.Name, Prefix: netip.PrefixFrom(a.k.lease.Addr, 32)})
	}
	want.Routes = []netcfg.Route{def}
	return want
}

// post hands an event to the keeper.
func (a *Agent) post(ctx context.Context, ev any) {
	select {
	case a.events <- ev:
	case <-ctx.Done():
	}
}

// Trigger asks for a lease by hand.
func (a *Agent) Trigger(ctx context.Context) {
	a.metrics.trigger(CauseManual)
	a.post(ctx, evTrigger{trigger: lease.TriggerManual})
}
