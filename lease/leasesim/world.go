package leasesim

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime/debug"
	"strings"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// world is one run.
type world struct {
	kernel
	seed  uint64
	p     profile
	bug   string // a mistake of the parts around the cores
	net   *network
	disk  *disk
	copy  *disk    // a backup
	owner *service // the one that serves
	late  *service // one that lost the store and does not know it yet
	gates []*gateway
	hosts []*host
	truth *truth
	book  *book

	stalled   time.Duration // until when the disk hangs
	pathFails time.Duration // until when packet paths take no changes
	healed    bool          // no faults any more

	services, processes, streams int
	counts                       counts
}

// counts say what a run was worth.
type counts struct {
	binds     int
	refused   [16]int // by reason
	reused    int     // leases of an address that another host had before
	alone     int     // deadlines that a gateway moved without the service
	witnessed int     // times that a gateway was fenced by a witness
	starts    int     // of a service
	takeovers int
	restores  int
	reboots   int
	parted    int // partitions
}

// options choose a run.
type options struct {
	seed  uint64
	only  string           // the one check that counts; "" = all
	bug   string           // planted mistake of the parts around the cores
	trace func(string)     // nil = off
	adapt func(p *profile) // nil = as drawn
}

// newWorld builds a world in which everything is up.
func newWorld(o options) *world {
	w := &world{seed: o.seed, bug: o.bug, kernel: kernel{rng: newRand(o.seed), only: o.only, trace: o.trace}}
	w.p = drawProfile(&w.kernel)
	if o.adapt != nil {
		o.adapt(&w.p)
	}
	w.net = &network{w: w, cut: map[[2]node]int{}}
	w.truth, w.book = newTruth(w), newBook(w)
	w.disk = &disk{w: w, cluster: lease.ClusterID{1}, epoch: 1}
	for i := range w.p.gateways {
		ppm := []int64{-1, 1, 0}[i%3] * w.p.ratePPM * 48 / 100
		g := &gateway{w: w, node: nodeGateway + node(i), name: fmt.Sprint("tep", i), ppm: ppm, path: newPath(len(w.truth.slots))}
		w.gates = append(w.gates, g)
	}
	for i := range w.p.hosts {
		w.hosts = append(w.hosts, &host{
			w: w, n: i, node: nodeGateway + node(w.p.gateways+i), byAddress: w.chance(w.p.host.byAddress),
			portSet: w.chance(w.p.host.portSet), ppm: int64(w.rng.IntN(3)-1) * w.p.ratePPM * 48 / 100,
		})
	}
	w.tracef("seed %d: %+v", w.seed, w.p)
	w.start(nodeService)
	for _, g := range w.gates {
		g.powerOn()
	}
	for _, h := range w.hosts {
		h.start()
	}
	return w
}

// run is a whole life of a world: faults, then none, then the end of all leases. It returns the first breach.
func run(o options) (w *world, err error) {
	w = newWorld(o)
	defer func() {
		if r := recover(); r != nil {
			w.only = ""
			w.fail("panic", "%v\n%s", r, debug.Stack())
		}
		if w.failed != nil {
			err = w.failed
		}
	}()
	w.plantFaults()
	w.every(w.exp, 2*time.Second, w.truth.sampleOne)
	for w.now < w.p.length && w.failed == nil {
		w.kernel.run(w.now+10*time.Second, w.truth.look)
		w.truth.lookAtAll()
	}
	w.settle()
	return w, nil
}

// every repeats something, at intervals of that mean, until everything heals.
func (w *world) every(draw func(time.Duration) time.Duration, mean time.Duration, do func()) {
	if mean <= 0 {
		return
	}
	w.after(draw(mean), func() {
		if !w.healed {
			do()
			w.every(draw, mean, do)
		}
	})
}

func (w *world) isGateway(n node) bool { return n >= nodeGateway && int(n-nodeGateway) < len(w.gates) }

func (w *world) isHost(n node) bool { return int(n-nodeGateway) >= len(w.gates) }

// gate returns a gateway by name.
func (w *world) gate(name string) *gateway {
	for _, g := range w.gates {
		if g.name == name {
			return g
		}
	}
	panic("leasesim: no gateway " + name)
}

// serviceAt returns the service that listens on a machine; nil = none.
func (w *world) serviceAt(n node) *service {
	for _, s := range [2]*service{w.owner, w.late} {
		if s != nil && !s.dead && s.node == n {
			return s
		}
	}
	return nil
}

// reach returns the machine of the lease service that a party tries: that of the owner, now and then another one.
func (w *world) reach(node) node {
	if w.late != nil && !w.late.dead && w.chance(0.4) {
		return w.late.node
	}
	if w.owner != nil {
		return w.owner.node
	}
	return nodeService
}

// onHello brings a Hello to whoever listens.
func (w *world) onHello(st *stream, g *gateway, h lease.Hello) {
	s := w.serviceAt(st.ends[down])
	if s == nil {
		if w.net.open(st.ends[down], st.ends[up]) {
			w.after(w.p.net.delay, func() { st.end(up, "refused") })
		}
		return
	}
	s.hello(st, h)
}

// onUp brings another message of a gateway to its session.
func (w *world) onUp(st *stream, m any) {
	s := w.serviceAt(st.ends[down])
	if s == nil {
		return
	}
	if t, ok := m.(table); ok {
		s.collected(w.gateAt(st.ends[up]).name, t)
		st.close(down, "say hello once more")
		return
	}
	for i := len(s.sessions) - 1; i >= 0; i-- {
		if ss := s.sessions[i]; ss.st == st {
			ss.receive(m)
			return
		}
	}
}

func (w *world) gateAt(n node) *gateway { return w.gates[n-nodeGateway] }

// grace is how long nothing expires after a start.
func (w *world) grace() time.Duration {
	return max(w.p.timers.T1Of(w.p.timers.Valid), w.p.timers.Grace)
}

// machine returns the host behind an identity. Some identities are addresses, and change with them.
func (w *world) machine(identity string) string {
	at := strings.IndexAny(identity, ":@")
	if at < 0 {
		return identity
	}
	a, _, _ := strings.Cut(identity[at+1:], "/")
	ip, err := netip.ParseAddr(a)
	if err != nil {
		panic("leasesim: identity " + identity)
	}
	return w.machineAt(ip)
}

// machineAt returns the host behind a tunnel source.
func (w *world) machineAt(source netip.Addr) string {
	b := source.As16()
	return fmt.Sprint("host", binary.BigEndian.Uint32(b[12:])>>8)
}

// resolve is a resolver that saw a query of a host.
func (w *world) resolve(h *host) {
	to := w.reach(nodeResolver)
	w.net.datagram(nodeResolver, to, func() {
		if s := w.serviceAt(to); s != nil {
			s.hint(h)
		}
	})
}
