package leasesim

import "time"

// node is a party on the network: the two machines of the lease service, the resolver, the gateways, then the hosts.
type node int

const (
	nodeService node = iota
	nodeStandby
	nodeResolver
	nodeGateway // the first one
)

// network carries messages. A pair of nodes may be cut, in one direction or both.
type network struct {
	w   *world
	cut map[[2]node]int // partitions that forbid from → to
}

func (n *network) open(from, to node) bool { return len(n.cut) == 0 || n.cut[[2]node{from, to}] == 0 }

// part adds a partition of one direction, or takes it away.
func (n *network) part(from, to node, on bool) {
	way := [2]node{from, to}
	switch {
	case on:
		n.cut[way]++
	case n.cut[way] > 1:
		n.cut[way]--
	default: // or it has healed meanwhile
		delete(n.cut, way)
	}
}

// delay draws how long a message takes.
func (n *network) delay() time.Duration {
	p := &n.w.p.net
	d := p.delay + n.w.exp(p.jitter)
	if n.w.chance(p.slow) {
		d += n.w.exp(p.slowBy)
	}
	return d
}

// between gateways that are told apart from the service the mesh may be perfect, see profile.
func (n *network) perfect(from, to node) bool {
	p := &n.w.p
	return p.net.mesh && n.w.isGateway(from) && n.w.isGateway(to) || p.net.trunk && !n.w.isHost(from) && !n.w.isHost(to)
}

// datagram carries one message that may be lost, doubled and overtaken.
func (n *network) datagram(from, to node, arrive func()) {
	w, p := n.w, &n.w.p.net
	if n.perfect(from, to) {
		w.after(p.delay, func() { n.arrive(from, to, arrive) })
		return
	}
	if !w.chance(p.loss) {
		w.after(n.delay(), func() { n.arrive(from, to, arrive) })
	}
	if w.chance(p.dup) {
		w.after(n.delay()+w.exp(p.slowBy), func() { n.arrive(from, to, arrive) })
	}
	w.mayCrash(from)
}

func (n *network) arrive(from, to node, arrive func()) {
	if !n.open(from, to) {
		return
	}
	n.w.crashNow(to)
	arrive()
	n.w.mayCrash(to)
}

// Directions of a stream.
const (
	up   = 0 // gateway → service
	down = 1
)

// stream is a connection of a gateway with the lease service. With profile.net.ordered it behaves like TCP: what arrives
// does so in order, and after the first loss nothing does. Without, each message is a datagram, which is worse than any
// connection can be.
type stream struct {
	w      *world
	id     int
	boots  int     // which life of the gateway's machine opened it
	ends   [2]node // gateway, service
	ended  [2]bool
	onEnd  [2]func(why string)
	sent   [2]int // messages so far
	lostAt [2]int // the first that is lost; 0 = none
	last   [2]time.Duration
}

// send carries a message in a direction.
func (st *stream) send(dir int, arrive func()) {
	w := st.w
	from, to := st.ends[dir], st.ends[1-dir]
	deliver := func() {
		if !st.ended[1-dir] {
			arrive()
		}
	}
	if !w.p.net.ordered {
		st.datagram(dir, deliver)
		return
	}
	st.sent[dir]++
	n := st.sent[dir]
	perfect := w.net.perfect(from, to)
	if st.lostAt[dir] == 0 && (!w.net.open(from, to) || !perfect && w.chance(w.p.net.loss/8)) {
		st.lostAt[dir] = n
	}
	if st.lostAt[dir] != 0 {
		return
	}
	d := w.p.net.delay
	if !perfect {
		d = w.net.delay()
		w.mayCrash(from)
	}
	st.last[dir] = max(st.last[dir], w.now+d)
	w.after(st.last[dir]-w.now, func() {
		if st.lostAt[dir] != 0 && n >= st.lostAt[dir] {
			return
		}
		if !w.net.open(from, to) {
			st.lostAt[dir] = n
			return
		}
		w.crashNow(to)
		deliver()
		w.mayCrash(to)
	})
}

// datagram is send on a network without order: most messages come one after the other, some do not come, come twice, or
// are overtaken.
func (st *stream) datagram(dir int, deliver func()) {
	w, n := st.w, st.w.net
	from, to := st.ends[dir], st.ends[1-dir]
	if w.chance(0.9) && !n.perfect(from, to) {
		if w.chance(w.p.net.loss) {
			return
		}
		st.last[dir] = max(st.last[dir], w.now+w.p.net.delay)
		w.after(st.last[dir]-w.now, func() { n.arrive(from, to, deliver) })
		w.mayCrash(from)
		return
	}
	n.datagram(from, to, deliver)
}

// broken reports whether what is sent in a direction does not arrive any more.
func (st *stream) broken(dir int) bool {
	return st.lostAt[dir] != 0 || !st.w.net.open(st.ends[dir], st.ends[1-dir])
}

// close ends a side. The other one is told, if the network lets the word through.
func (st *stream) close(side int, why string) {
	if st.ended[side] {
		return
	}
	st.ended[side] = true
	st.send(side, func() { st.end(1-side, why) })
}

// die ends a side without a word, as a machine does that loses its power.
func (st *stream) die(side int) { st.ended[side] = true }

// end is how a side learns that the stream is over.
func (st *stream) end(side int, why string) {
	if st.ended[side] {
		return
	}
	st.ended[side] = true
	st.onEnd[side](why)
}

// keepalive finds out, now and then, that nothing gets through.
func (st *stream) keepalive() {
	if st.ended[up] && st.ended[down] {
		return
	}
	if st.ended[up] || st.ended[down] || st.broken(up) || st.broken(down) {
		st.end(up, "keepalive")
		st.end(down, "keepalive")
		return
	}
	st.w.after(st.w.p.net.keepalive, st.keepalive)
}
