package leasesim

import (
	"time"

	"github.com/dstm-project/dstm/lease"
)

// plantFaults begins whatever goes wrong in this world.
func (w *world) plantFaults() {
	f := &w.p.faults
	if w.p.steady {
		w.steadyFaults()
	}
	w.every(w.exp, f.crash, func() { w.crashService(w.chance(0.3)) })
	w.every(w.exp, f.takeover, w.takeOver)
	w.backups()
	w.every(w.exp, f.restore, w.restore)
	w.every(w.exp, f.outage, func() { w.partAll(w.down()) })
	w.every(w.exp, f.part, w.partPair)
	w.every(w.exp, f.alone, func() { w.partOne(w.gates[w.rng.IntN(len(w.gates))], w.down()) })
	w.every(w.exp, f.kill, func() { w.kill(w.gates[w.rng.IntN(len(w.gates))]) })
	w.every(w.exp, f.reboot, func() { w.reboot(w.gates[w.rng.IntN(len(w.gates))]) })
	w.every(w.exp, f.path, func() { w.pathFails = w.now + w.exp(300*time.Millisecond) })
	w.every(w.exp, f.stall, func() { w.stalled = w.now + w.exp(2*time.Second) })
	w.every(w.exp, f.revoke, w.revokeOne)
	w.every(w.exp, f.order, w.orderOne)
	w.every(w.exp, f.foreign, w.foreign)
	w.every(w.exp, f.hint, func() { w.resolve(w.hosts[w.rng.IntN(len(w.hosts))]) })
}

// steadyFaults takes the service from all gateways together, again and again. In between it is there for as long as a gateway
// may need to find it: a Hello that is lost costs one firstReply and one retryMax.
func (w *world) steadyFaults() {
	w.after(firstReply+2*retryMax+w.exp(30*time.Second), func() {
		if w.healed {
			return
		}
		d := w.down()
		if w.chance(0.5) {
			w.partAll(d)
		} else if s := w.owner; s != nil {
			s.crash(w.chance(0.3))
			w.after(d, func() { w.startAgain(s.node) })
		}
		w.after(d, w.steadyFaults)
	})
}

// down draws how long a fault lasts.
func (w *world) down() time.Duration { return 10*time.Millisecond + w.exp(w.p.faults.down) }

// mayCrash lets a party crash after it has sent or handled a message.
func (w *world) mayCrash(n node) {
	if w.p.faults.atMessage > 0 && !w.healed && w.chance(w.p.faults.atMessage) {
		w.after(0, func() { w.crash(n) })
	}
}

// crashNow lets a party crash just before it handles a message.
func (w *world) crashNow(n node) {
	if w.p.faults.atMessage > 0 && !w.healed && w.chance(w.p.faults.atMessage) {
		w.crash(n)
	}
}

func (w *world) crash(n node) {
	switch {
	case n == nodeResolver: // knows nothing that could be lost
	case n < nodeGateway:
		if s := w.serviceAt(n); s != nil && s == w.owner {
			w.crashService(w.chance(0.3))
		}
	case w.isGateway(n):
		if w.chance(0.5) {
			w.kill(w.gateAt(n))
		} else {
			w.reboot(w.gateAt(n))
		}
	default:
		if h := w.hosts[int(n-nodeGateway)-len(w.gates)]; h.on {
			h.die()
		}
	}
}

// crashService ends the life of the owner; another one begins after a while.
func (w *world) crashService(power bool) {
	s := w.owner
	if s == nil {
		return
	}
	s.crash(power)
	w.after(w.down(), func() { w.startAgain(s.node) })
}

// startAgain starts a service where none is.
func (w *world) startAgain(at node) {
	if w.disk.owner == nil || w.disk.owner.dead {
		w.start(at)
	}
}

// takeOver lets the standby own the store. The owner of before finds out later.
func (w *world) takeOver() {
	old := w.owner
	if old == nil || old.dead {
		return
	}
	if w.late != nil {
		w.late.stop()
	}
	w.counts.takeovers++
	w.tracef("%s loses the store", old.name())
	old.tear()
	w.late = old
	w.start(1 - old.node)
	w.after(w.exp(4*time.Second), func() {
		old.stop()
		if w.late == old {
			w.late = nil
		}
	})
}

// backups takes a copy of the store now and then.
func (w *world) backups() {
	if w.p.faults.restore > 0 {
		w.every(w.exp, w.p.faults.restore/3, func() { w.copy = w.disk.copy() })
	}
}

// restore puts an older copy in place of the store.
func (w *world) restore() {
	if w.copy == nil {
		return
	}
	if s := w.disk.owner; s != nil {
		s.crash(false)
	}
	if w.late != nil {
		w.late.stop()
	}
	w.counts.restores++
	epoch := w.disk.epoch + 1
	w.disk = w.copy.copy()
	w.disk.epoch, w.disk.restored = epoch, true
	w.tracef("restore of a copy at revision %d, epoch %d", w.disk.last(), epoch)
	w.truth.rebuild(w.disk)
	w.after(w.down(), func() { w.startAgain(nodeService) })
}

// part cuts a pair of nodes for a while, one way or both.
func (w *world) part(a, b node, forth, back bool, d time.Duration) {
	w.counts.parted++
	if forth {
		w.net.part(a, b, true)
	}
	if back {
		w.net.part(b, a, true)
	}
	w.after(d, func() {
		if forth {
			w.net.part(a, b, false)
		}
		if back {
			w.net.part(b, a, false)
		}
	})
}

// partPair cuts some pair.
func (w *world) partPair() {
	pick := func() node {
		switch u := w.rng.Float64(); {
		case u < 0.3:
			return nodeService
		case u < 0.35:
			return nodeStandby
		case u < 0.85:
			return w.gates[w.rng.IntN(len(w.gates))].node
		}
		return w.hosts[w.rng.IntN(len(w.hosts))].node
	}
	a, b := pick(), pick()
	if a == b {
		return
	}
	way := w.rng.IntN(4) // 0, 1: both
	w.tracef("partition of %d and %d, %d", a, b, way)
	w.part(a, b, way != 2, way != 3, w.down())
}

// partOne cuts a gateway from the lease service.
func (w *world) partOne(g *gateway, d time.Duration) {
	w.tracef("%s is cut off for %s", g.name, d)
	way := w.rng.IntN(4)
	for _, n := range [2]node{nodeService, nodeStandby} {
		w.part(g.node, n, way != 2, way != 3, d)
	}
}

// partAll cuts all gateways from the lease service at once.
func (w *world) partAll(d time.Duration) {
	w.tracef("all gateways are cut off for %s", d)
	for _, g := range w.gates {
		for _, n := range [2]node{nodeService, nodeStandby} {
			w.part(g.node, n, true, true, d)
		}
	}
}

// kill ends the process of a gateway; another one follows.
func (w *world) kill(g *gateway) {
	if g.proc == nil {
		return
	}
	g.end(false)
	w.after(w.exp(2*time.Second), g.startProcess)
}

// reboot takes the power from a gateway, for a while.
func (w *world) reboot(g *gateway) {
	if !g.on {
		return
	}
	w.counts.reboots++
	g.powerOff()
	w.after(w.down(), g.powerOn)
}

// revokeOne is an operator who ends a lease.
func (w *world) revokeOne() {
	if s := w.owner; s != nil {
		w.truth.ordered(w.rng.IntN(len(w.truth.slots)), s.revoke)
	}
}

// orderOne is an operator who vouches for a gateway that is off, or takes one that is fenced out of the set.
func (w *world) orderOne() {
	s := w.owner
	g := w.gates[w.rng.IntN(len(w.gates))]
	if s == nil || s.recover != nil || g.on {
		return
	}
	if s.fence.Order(g.name) == nil && w.chance(0.3) && s.fence.Remove(s.now().Mono, g.name) == nil {
		w.tracef("%s: %s is taken out of the set", s.name(), g.name)
		s.commit(tx{removed: []string{g.name}})
	}
	s.kick()
	s.moved()
}

// foreignEpoch and foreignCluster are of another cell, to whose service a gateway comes by mistake.
const foreignEpoch lease.Epoch = 9999

var foreignCluster = lease.ClusterID{9}

// foreign lets the service of another cell answer a gateway that says Hello.
func (w *world) foreign() {
	g := w.gates[w.rng.IntN(len(w.gates))]
	p := g.proc
	if p == nil || p.first == (lease.ClusterID{}) {
		return
	}
	if p.st != nil {
		p.lost(p.st)
	}
	w.tracef("%s reaches another cell", g.name)
	st := &stream{w: w, ends: [2]node{g.node, nodeService}}
	st.onEnd[up], st.onEnd[down] = func(string) { p.lost(st) }, func(string) {}
	p.st, p.begun = st, w.now
	h := p.rep.Hello(g.boot())
	say := func(m any) { w.after(w.p.net.delay, func() { g.receive(st, m) }) }
	res := w.truth.slots[w.rng.IntN(len(w.truth.slots))].res
	say(lease.SessionReply{
		Session: 1 << 40, EchoBootNS: h.SentBootNS, GrantNS: uint64(time.Hour), Cluster: foreignCluster, Epoch: foreignEpoch,
		NextBeatNS: uint64(time.Second), FailStaticNS: uint64(time.Hour),
	})
	say(lease.SnapshotChunk{Session: 1 << 40, Rev: 1 << 40, Last: true, Records: []lease.Record{lease.BindRecord(1, lease.Binding{
		Resource: res, Host: w.hosts[0].source(), TEP: w.pool(0).TEP, Gen: lease.MakeGen(foreignEpoch, 1),
	})}})
	p.silence(st, time.Second)
}
