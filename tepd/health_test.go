package tepd

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/netcfg"
)

// Each row is the results of self-tests in order (+ pass, - failure) and the states they lead through.
func TestHealthStates(t *testing.T) {
	for _, c := range []struct {
		name       string
		rise, fall int
		results    string
		want       string
	}{
		{"rises", 3, 3, "+++", "rising rising up"},
		{"rises from the start after a failure", 3, 3, "++-+++", "rising rising down rising rising up"},
		{"falls", 1, 3, "+---", "up falling falling down"},
		{"recovers", 1, 3, "+--+---", "up falling falling up falling falling down"},
		{"at once", 1, 1, "+-+-", "up down up down"},
		{"stays down", 2, 2, "---", "down down down"},
	} {
		var s healthState
		var got []string
		for _, r := range c.results {
			s = s.next(r == '+', c.rise, c.fall)
			got = append(got, s.state.String())
		}
		if g := strings.Join(got, " "); g != c.want {
			t.Errorf("%s: %s, want %s", c.name, g, c.want)
		}
	}
}

func TestProbes(t *testing.T) {
	good := probes{
		synced: true, deadline: 20 * time.Second, now: 10 * time.Second, device: "dstm0",
		exit: netip.MustParseAddr("192.0.0.8"), hop: netcfg.Hop{Link: "eth1"},
	}
	with := func(f func(*probes)) probes {
		p := good
		f(&p)
		return p
	}
	for _, c := range []struct {
		name string
		p    probes
		want string
	}{
		{"good", good, ""},
		{"not synced", with(func(p *probes) { p.synced = false }), "no table from the lease service yet"},
		{"not synced with a reason", with(func(p *probes) { p.synced, p.sync = false, "sync: connection refused" }), "no table from the lease service yet: sync: connection refused"},
		{"service lost, deadline runs", with(func(p *probes) { p.sync = "sync: connection refused" }), ""},
		{"deadline over", with(func(p *probes) { p.now = 25 * time.Second }), "the deadline passed 5s ago: the lease service has not answered since"},
		{"deadline this instant", with(func(p *probes) { p.now = p.deadline }), "the deadline passed 0s ago: the lease service has not answered since"},
		{"packet path", with(func(p *probes) { p.path = errors.New("map counters: no such file") }), "packet path: map counters: no such file"},
		{"kernel", with(func(p *probes) { p.kernel = errors.New("add route") }), "kernel: add route"},
		{"no exit", with(func(p *probes) { p.exitErr = fmt.Errorf("route: %w", unix.ENETUNREACH) }), "no IPv4 exit: the kernel has no route to 192.0.0.8; add a default route, or set health.exit to an address that must be reachable"},
		{"exit unknown", with(func(p *probes) { p.exitErr = errors.New("netlink: closed") }), "no IPv4 exit: netlink: closed"},
		{"exit into the tunnel", with(func(p *probes) { p.hop.Link = "dstm0" }), "no IPv4 exit: the route to 192.0.0.8 points to dstm0, back into the tunnel; add a default route to the IPv4 side"},
		{"exit is ourselves", with(func(p *probes) { p.hop.Link = "lo" }), "no IPv4 exit: 192.0.0.8 is an address of this machine; set health.exit to one outside"},
	} {
		if got := c.p.failure(); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestDecide(t *testing.T) {
	const grace = time.Minute
	for _, c := range []struct {
		name   string
		h      Health
		everUp bool
		since  time.Duration
		want   action
	}{
		{"just started", Down, false, 0, actWait},
		{"rising", Rising, false, 59 * time.Second, actWait},
		{"grace over", Rising, false, grace, actWithdraw},
		{"up", Up, true, 0, actAnnounce},
		{"falling", Falling, true, time.Hour, actAnnounce},
		{"down after up, within grace", Down, true, time.Second, actWithdraw},
	} {
		if got := decide(c.h, c.everUp, c.since, grace); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}
