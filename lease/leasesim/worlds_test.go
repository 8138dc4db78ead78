package leasesim

import (
	"net/netip"
	"reflect"
	"runtime"
	"testing"
	"time"
)

// The worlds below are those in which some kind of fault is frequent. Planted mistakes are looked for in them.
var specialWorlds = []func(*profile){restored, cut, copied, takenOver, revoking, restless, lonely, edge, slow, renewed, stalling, steady}

// TestSpecialWorlds runs a few seeds of each.
func TestSpecialWorlds(t *testing.T) {
	for _, adapt := range specialWorlds {
		name := runtime.FuncForPC(reflect.ValueOf(adapt).Pointer()).Name()
		eachSeed(seeds(specialSeeds, soakSpecial), func(seed uint64) bool {
			_, err := run(options{seed: seed, adapt: adapt})
			if err != nil {
				t.Errorf("%s, seed %d: %v\n%s", name, seed, err, lastLines(options{seed: seed, adapt: adapt}))
			}
			return err == nil
		})
	}
}

// restored worlds lose their store for older copies.
func restored(p *profile) {
	p.steady = false
	p.faults.restore, p.faults.down = 40*time.Second, 3*time.Second
}

// cut worlds share addresses by port sets, too.
func cut(p *profile) {
	restored(p)
	p.psidLen, p.host.portSet, p.host.think = 1, 0.8, 20*time.Second
}

// copied worlds have two gateways, each of them cut off alone for as long as a session lease, and are restored often.
func copied(p *profile) {
	p.steady, p.gateways, p.hosts = false, 2, 10
	p.session, p.static, p.net.ordered = 6*time.Second, 90*time.Second, true
	p.faults = faultProfile{restore: 25 * time.Second, alone: 6 * time.Second, down: 5 * time.Second}
}

// edge worlds have two gateways whose clocks run apart, each of them cut off alone for as long as a session lease.
func edge(p *profile) {
	copied(p)
	p.ratePPM, p.faults.restore = 50_000, 0
}

// renewed worlds have services that start with other times, and gateways that go on by the old ones.
func renewed(p *profile) {
	p.steady, p.hosts, p.net.ordered = false, 10, true
	p.faults = faultProfile{renewed: 0.6, crash: 20 * time.Second, alone: 12 * time.Second, outage: 20 * time.Second, down: 12 * time.Second}
}

// stalling worlds have a disk that hangs, a service that crashes and gateways that start.
func stalling(p *profile) {
	p.steady = false
	p.faults = faultProfile{stall: 3 * time.Second, crash: 10 * time.Second, kill: 2 * time.Second, down: time.Second}
}

// takenOver worlds change the owner of the store often.
func takenOver(p *profile) {
	p.steady = false
	p.faults.takeover = 8 * time.Second
}

// revoking worlds have an operator who ends leases, and hosts that do not hear of it.
func revoking(p *profile) {
	p.steady = false
	p.net.loss, p.timers.HoldDown, p.host.think = 0.1, time.Second, 10*time.Second
	p.faults = faultProfile{revoke: 500 * time.Millisecond}
}

// restless worlds have hosts that move, calls that come twice, and gateways that take their time.
func restless(p *profile) {
	p.steady, p.length = false, time.Minute
	p.host.move, p.host.use, p.host.think, p.host.die = 1, 5*time.Second, 5*time.Second, 0
	p.net.dup, p.net.slowBy, p.net.jitter = 0.3, 3*time.Second, 80*time.Millisecond
	p.pools = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/25")}
	p.faults = faultProfile{}
}

// lonely worlds have gateways that are cut off alone, for longer than a session lease, and clocks that run apart.
func lonely(p *profile) {
	p.steady = false
	p.ratePPM = 50_000
	p.faults.alone, p.faults.part, p.faults.down = 15*time.Second, 10*time.Second, p.session
}

// slow worlds deliver some messages late, even between gateways.
func slow(p *profile) {
	lonely(p)
	p.net.ordered, p.net.mesh, p.net.slow, p.net.slowBy = false, false, 0.1, 3*time.Second
	p.faults.stray = 0.5
	p.faults.outage = 30 * time.Second
}

// steady worlds are those of checkI10.
func steady(p *profile) {
	if !p.steady {
		p.makeSteady(&kernel{rng: newRand(1)})
	}
}
