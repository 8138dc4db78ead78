package tepd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/netcfg"
)

// Health is whether this gateway may attract traffic.
//
//	        pass              rise passes in a row
//	DOWN ──────────► RISING ─────────────────────► UP
//	  ▲ ▲──────────────┘ fail                      │ ▲
//	  │                                       fail ▼ │ pass
//	  └───────────────────────────────────────── FALLING
//	              fall failures in a row
//
// UP and FALLING announce, DOWN and RISING do not.
type Health uint8

// The states.
const (
	Down    Health = 0
	Rising  Health = 1
	Up      Health = 2
	Falling Health = 3
)

var healthNames = [...]string{"down", "rising", "up", "falling"}

// String returns the state's name as metrics and status show it.
func (h Health) String() string {
	if int(h) < len(healthNames) {
		return healthNames[h]
	}
	return fmt.Sprintf("health_%d", uint8(h))
}

// announces reports whether a gateway in this state announces itself.
func (h Health) announces() bool { return h == Up || h == Falling }

// healthState is a state with how often in a row the last result came.
type healthState struct {
	state Health
	row   int
}

// next is the whole state machine: the state after one more self-test.
func (s healthState) next(pass bool, rise, fall int) healthState {
	switch {
	case pass && s.state.announces():
		return healthState{state: Up}
	case pass && s.row+1 >= rise:
		return healthState{state: Up}
	case pass:
		return healthState{Rising, s.row + 1}
	case !s.state.announces():
		return healthState{state: Down}
	case s.row+1 >= fall:
		return healthState{state: Down}
	}
	return healthState{Falling, s.row + 1}
}

// probes is what one self-test found.
type probes struct {
	synced   bool   // this process got a whole table and the packet path holds it
	sync     string // why not
	alone    bool   // another gateway has a session with the service, this one has not
	lagging  bool   // the service says that another gateway should take the traffic
	deadline time.Duration
	now      time.Duration // CLOCK_BOOTTIME, as deadline
	path     error         // of the packet path
	kernel   error         // of addresses, routes and sysctls
	exit     netip.Addr
	hop      netcfg.Hop // of exit
	exitErr  error
	device   string
}

// failure returns the sentence that says why the gateway must not attract traffic; empty when it may. Reachability of the
// lease service is not part of it: without the service everything goes on until the deadline (I10).
func (p probes) failure() string {
	switch {
	case !p.synced && p.sync != "":
		return "no table from the lease service yet: " + p.sync
	case !p.synced:
		return "no table from the lease service yet"
	case p.deadline <= p.now:
		return fmt.Sprintf("the deadline passed %s ago: the lease service has not answered since", (p.now - p.deadline).Round(time.Second))
	case p.alone:
		return "this gateway alone is cut off from the lease service: another one has a session"
	case p.lagging:
		return "acknowledgements to the lease service are late, and another gateway serves"
	case p.path != nil:
		return "packet path: " + p.path.Error()
	case p.kernel != nil:
		return "kernel: " + p.kernel.Error()
	case errors.Is(p.exitErr, unix.ENETUNREACH) || errors.Is(p.exitErr, unix.EHOSTUNREACH):
		return fmt.Sprintf("no IPv4 exit: the kernel has no route to %s; add a default route, or set health.exit to an address that must be reachable", p.exit)
	case p.exitErr != nil:
		return "no IPv4 exit: " + p.exitErr.Error()
	case p.hop.Link == p.device:
		return fmt.Sprintf("no IPv4 exit: the route to %s points to %s, back into the tunnel; add a default route to the IPv4 side", p.exit, p.device)
	case p.hop.Link == "lo":
		return fmt.Sprintf("no IPv4 exit: %s is an address of this machine; set health.exit to one outside", p.exit)
	}
	return ""
}

// probe looks at everything that failure judges.
func (g *Gateway) probe(ctx context.Context) probes {
	v := g.view.load()
	p := probes{
		synced: v.everSynced, sync: v.problem, deadline: time.Duration(v.replica.Deadline), now: g.Now(),
		alone: v.alone, lagging: v.lagging && v.connected, kernel: v.kernel, exit: g.cfg.Health.Exit, device: g.cfg.Tunnel.Device,
	}
	_, p.path = g.Path.Counters(ctx)
	if t, ok := g.Path.(SelfTester); ok && p.path == nil {
		p.path = t.SelfTest(ctx)
	}
	p.hop, p.exitErr = g.Kernel.Lookup(g.cfg.Health.Exit)
	return p
}

// SelfTester is a packet path that can send a packet through its own programs and say what was wrong with it.
type SelfTester interface {
	SelfTest(ctx context.Context) error
}

// checkHealth runs the self-test every interval and tells the announcer, until ctx ends.
func (g *Gateway) checkHealth(ctx context.Context) error {
	t := time.NewTicker(g.cfg.Health.Interval)
	defer t.Stop()
	var s healthState
	for {
		why := g.probe(ctx).failure()
		if ctx.Err() != nil {
			return nil
		}
		old := s
		s = s.next(why == "", g.cfg.Health.Rise, g.cfg.Health.Fall)
		if was := g.view.setHealth(s.state, why); was != why || old.state != s.state {
			g.logHealth(old.state, s.state, why)
		}
		if old.state != s.state {
			g.metrics.health(s.state)
			g.wakeAnnouncer()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (g *Gateway) logHealth(old, state Health, why string) {
	log := g.Log.Info
	if why != "" && (old.announces() || state.announces()) {
		log = g.Log.Warn
	}
	if why == "" {
		why = "self-test passed"
	}
	log("health", "old", old.String(), "new", state.String(), "reason", why)
}
