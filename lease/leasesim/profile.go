package leasesim

import (
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// profile is what kind of world a run is in. Each seed draws its own: faults that never happen in one world are frequent in
// another, so that they meet in many combinations.
type profile struct {
	length   time.Duration // of the time with faults; after it everything heals
	gateways int
	hosts    int
	pools    []netip.Prefix
	psidLen  uint8
	timers   lease.Timers
	per64    int
	session  time.Duration // d
	static   time.Duration // D
	bindWait time.Duration
	ratePPM  int64 // by how much clocks may run apart
	ring     lease.Rev
	steady   bool // gateways reach each other always, and lose the service only all together: none may ever stop (I10)

	net    netProfile
	host   hostProfile
	faults faultProfile
}

type netProfile struct {
	ordered   bool // streams keep order, see stream
	mesh      bool // messages between gateways arrive, unless cut
	trunk     bool // and those between gateways and the service
	delay     time.Duration
	jitter    time.Duration
	loss, dup float64
	slow      float64 // share of messages that take slowBy more, on average
	slowBy    time.Duration
	keepalive time.Duration
}

type hostProfile struct {
	think, use time.Duration
	die        float64 // share of uses that end without a word
	move       float64 // share of uses in which the tunnel source changes
	wish       float64 // share of calls that ask for a validity of their own
	hint       float64 // share of binds that begin with a hint
	portSet    float64 // share of hosts that accept a port set
	byAddress  float64 // share of hosts that are known by their address
	apply      time.Duration
}

// faultProfile has the mean times between faults of a kind; 0 = never.
type faultProfile struct {
	crash     time.Duration // of the service
	renewed   float64       // share of starts with other times for gateways in the configuration
	takeover  time.Duration // by a standby, while the owner goes on for a while
	restore   time.Duration // of an older copy
	outage    time.Duration // all gateways lose the service together
	part      time.Duration // partition of a pair of nodes
	alone     time.Duration // one gateway loses the service
	kill      time.Duration // of a gateway's process
	reboot    time.Duration // of a gateway
	path      time.Duration // a change does not get into the packet path
	stall     time.Duration // of the disk
	revoke    time.Duration // operator's orders
	order     time.Duration // an operator vouches for a gateway that is off
	foreign   time.Duration // a gateway reaches the service of another cell
	hint      time.Duration // for a host that may not want one
	stray     float64       // share of questions that a gateway answers that was not asked
	atMessage float64       // crash of sender or receiver at a message
	down      time.Duration // how long faults last
}

// maybe draws a mean time for a kind of fault that this world has with probability p.
func (k *kernel) maybe(p float64, a, b time.Duration) time.Duration {
	if !k.chance(p) {
		return 0
	}
	return k.between(a, b)
}

// drawProfile draws a world.
func drawProfile(k *kernel) profile {
	p := profile{
		length: k.between(3*time.Minute, 5*time.Minute), gateways: 3, hosts: 50,
		pools: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/27")}, timers: drawTimers(k),
		session: k.between(6*time.Second, 20*time.Second), bindWait: 500 * time.Millisecond, ratePPM: 500, ring: 1 << 16,
	}
	p.static = drawStatic(k, p.session)
	if k.chance(0.4) {
		p.pools = append(p.pools, netip.MustParsePrefix("203.0.113.0/28"))
	}
	if k.chance(0.3) {
		p.pools = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/30"), netip.MustParsePrefix("203.0.113.0/29")}
	}
	if k.chance(0.3) {
		p.psidLen = uint8(1 + k.rng.IntN(2))
	}
	if k.chance(0.5) {
		p.ratePPM = 50_000
	}
	if k.chance(0.2) {
		p.ring = 64
	}
	if k.chance(0.15) {
		p.per64 = 6
	}
	p.net, p.host, p.faults = drawNet(k), drawHosts(k), drawFaults(k)
	if k.chance(0.12) {
		p.makeSteady(k)
	}
	return p
}

// drawStatic draws a D for a d.
func drawStatic(k *kernel, session time.Duration) time.Duration {
	return time.Duration(float64(session) * (2 + 6*k.rng.Float64()))
}

func drawTimers(k *kernel) lease.Timers {
	t := lease.Timers{
		MinValid: 4 * time.Second, Valid: k.between(8*time.Second, 40*time.Second), MaxValid: 90 * time.Second,
		T1: 500, T2: 800, Reservation: 5 * time.Second,
		HoldDown: k.between(time.Second, 12*time.Second), Grace: k.between(0, 15*time.Second),
	}
	return t
}

func drawNet(k *kernel) netProfile {
	n := netProfile{
		ordered: k.chance(0.5), mesh: k.chance(0.3), delay: 200 * time.Microsecond, jitter: k.between(time.Millisecond, 10*time.Millisecond),
		keepalive: k.between(2*time.Second, 13*time.Second), slowBy: k.between(50*time.Millisecond, 3*time.Second),
	}
	if k.chance(0.7) {
		n.loss = 0.03 * k.rng.Float64()
	}
	if k.chance(0.7) {
		n.dup, n.slow = 0.03*k.rng.Float64(), 0.03*k.rng.Float64()
	}
	return n
}

func drawHosts(k *kernel) hostProfile {
	h := hostProfile{
		think: k.between(10*time.Second, 60*time.Second), use: k.between(5*time.Second, 40*time.Second),
		die: 0.3 * k.rng.Float64(), move: 0.3 * k.rng.Float64(), wish: 0.5, hint: 0.3, portSet: k.rng.Float64(),
		apply: k.between(100*time.Microsecond, 3*time.Millisecond),
	}
	if k.chance(0.3) {
		h.byAddress = k.rng.Float64()
	}
	return h
}

func drawFaults(k *kernel) faultProfile {
	s := time.Second
	f := faultProfile{
		crash: k.maybe(0.5, 15*s, 120*s), takeover: k.maybe(0.2, 30*s, 120*s), restore: k.maybe(0.12, 60*s, 200*s),
		outage: k.maybe(0.3, 20*s, 120*s), part: k.maybe(0.5, 4*s, 40*s), alone: k.maybe(0.5, 10*s, 60*s),
		kill: k.maybe(0.4, 10*s, 90*s), reboot: k.maybe(0.4, 15*s, 120*s), path: k.maybe(0.2, 10*s, 60*s),
		stall: k.maybe(0.3, 5*s, 60*s), revoke: k.maybe(0.3, 3*s, 30*s), order: k.maybe(0.4, 5*s, 30*s),
		foreign: k.maybe(0.2, 10*s, 60*s), hint: k.maybe(0.5, 300*time.Millisecond, 5*s),
		down: k.between(500*time.Millisecond, 30*s), stray: 0.3 * k.rng.Float64(),
	}
	if k.chance(0.2) {
		f.renewed = 0.3
	}
	if k.chance(0.4) {
		f.atMessage = 0.0005 * k.rng.Float64()
	}
	return f
}

// makeSteady makes the world one in which gateways must never stop: they reach each other, they live, and they lose the
// service only all together, for less than D. Hosts and the service itself have no such luck.
func (p *profile) makeSteady(k *kernel) {
	p.steady = true
	p.net.mesh, p.net.trunk, p.net.ordered = true, true, true
	p.session = k.between(20*time.Second, 30*time.Second)
	p.static = time.Duration(float64(p.session) * (5 + 5*k.rng.Float64()))
	f := &p.faults
	p.faults = faultProfile{revoke: f.revoke, hint: f.hint, down: k.between(5*time.Second, p.static/8)}
}
