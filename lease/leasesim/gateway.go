package leasesim

import (
	"fmt"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
)

const (
	retryMin   = 250 * time.Millisecond
	retryMax   = 5 * time.Second
	firstReply = 10 * time.Second
	beatFirst  = 10 * time.Second // until the service says otherwise
	applyTime  = 2 * time.Millisecond
)

// gateway is a machine: a packet path, and the process that feeds it. kill -9 of the process leaves the packet path as it
// is; a reboot leaves nothing.
type gateway struct {
	w     *world
	node  node
	name  string
	ppm   int64
	on    bool
	gone  bool // powered off for good
	begun time.Duration
	boots int
	path  path
	proc  *process
	ghost gateGhost
}

// boot is CLOCK_BOOTTIME.
func (g *gateway) boot() uint64 { return g.bootAt(g.w.now) }

func (g *gateway) bootAt(t time.Duration) uint64 {
	d := int64(t - g.begun)
	return uint64(int64(time.Second) + d + d/1_000_000*g.ppm + d%1_000_000*g.ppm/1_000_000)
}

// realTime is when CLOCK_BOOTTIME shows b.
func (g *gateway) realTime(b uint64) time.Duration {
	d := float64(int64(b)-int64(time.Second)) / (1 + float64(g.ppm)/1e6)
	return g.begun + time.Duration(d)
}

// forwards reports whether the packet path forwards what it has entries for: rule F2.
func (g *gateway) forwards() bool { return g.on && g.boot() <= g.path.deadline }

// path is the packet path: a table by slot, and the deadline.
type path struct {
	has      []bool
	entries  []lease.Binding
	pools    map[string]lease.Pool
	n        int
	digest   lease.Digest // of entries
	deadline uint64
}

func newPath(slots int) path {
	return path{has: make([]bool, slots), entries: make([]lease.Binding, slots), pools: map[string]lease.Pool{}}
}

func (g *gateway) put(i int, b lease.Binding) {
	g.drop(i)
	p := &g.path
	p.has[i], p.entries[i] = true, b
	p.n++
	p.digest.AddBinding(b)
	g.w.truth.touch(i)
}

func (g *gateway) drop(i int) {
	p := &g.path
	if !p.has[i] {
		return
	}
	g.w.truth.forwarded(g, i)
	p.digest.RemoveBinding(p.entries[i])
	p.has[i] = false
	p.n--
	g.w.truth.touch(i)
}

// setDeadline moves the deadline of the packet path.
func (g *gateway) setDeadline(d uint64) {
	if g.w.trace != nil {
		g.w.tracef("%s: deadline in %s", g.name, time.Duration(int64(d)-int64(g.boot())))
	}
	if !g.forwards() {
		g.w.truth.resumed(g)
	}
	g.path.deadline = d
}

// powerOff ends everything on the machine.
func (g *gateway) powerOff() {
	if !g.on {
		return
	}
	g.w.tracef("%s: power off", g.name)
	for i := range g.path.has {
		g.drop(i)
	}
	g.on = false
	g.path = newPath(len(g.path.has))
	g.end(true)
}

func (g *gateway) powerOn() {
	if g.on || g.gone {
		return
	}
	g.w.tracef("%s: power on", g.name)
	g.on, g.begun = true, g.w.now
	g.boots++
	g.ghost = gateGhost{}
	g.startProcess()
}

// end ends the process. Its connections are reset, unless the power is gone.
func (g *gateway) end(silent bool) {
	p := g.proc
	if p == nil {
		return
	}
	g.w.tracef("%s: process ends", g.name)
	g.proc = nil
	if p.st == nil {
		return
	}
	if silent {
		p.st.die(up)
	} else {
		p.st.close(up, "killed")
	}
}

// process is one life of tepd.
type process struct {
	g      *gateway
	rep    *replica.Replica
	st     *stream
	busy   bool  // a change is on its way into the packet path
	inbox  []any // what came meanwhile
	period time.Duration
	beats  int // number of the beat timer that counts
	heard  int // number of the silence timer that counts
	begun  time.Duration
	wait   time.Duration // back-off
	first  lease.ClusterID
}

func (g *gateway) startProcess() {
	if !g.on || g.proc != nil {
		return
	}
	g.w.processes++
	var caps []string
	if g.w.p.psidLen > 0 {
		caps = []string{capPortSets}
	}
	p := &process{g: g, wait: retryMin, rep: replica.New(replica.Config{
		TEP: g.name, Instance: fmt.Sprint(g.w.processes), Caps: caps, Question: g.w.question(g),
	})}
	g.proc, g.ghost.set = p, 0
	p.connect()
	p.goOn()
}

// after plans something that this process does.
func (p *process) after(d time.Duration, do func()) {
	p.g.w.after(d, func() {
		if p.g.proc == p {
			do()
		}
	})
}

// connect opens a stream and says Hello.
func (p *process) connect() {
	if p.busy { // tepd finishes a change before it looks at anything else
		p.after(applyTime, p.connect)
		return
	}
	w := p.g.w
	to := w.reach(p.g.node)
	st := &stream{w: w, id: w.streams, ends: [2]node{p.g.node, to}}
	w.streams++
	st.onEnd[up] = func(string) { p.lost(st) }
	st.onEnd[down] = func(string) {}
	w.tracef("%s: hello", p.g.name)
	st.boots = p.g.boots
	p.st, p.period, p.begun, p.inbox = st, beatFirst, w.now, nil
	h := p.rep.Hello(p.g.boot())
	st.send(up, func() { w.onHello(st, p.g, h) })
	w.after(w.p.net.keepalive, st.keepalive)
	p.beat(st, beatFirst)
	p.silence(st, firstReply)
}

// lost ends a stream from this side; another one follows after a while.
func (p *process) lost(st *stream) {
	if p.g.proc != p || p.st != st {
		return
	}
	p.g.w.tracef("%s: the stream is lost", p.g.name)
	st.close(up, "lost")
	p.st = nil
	if p.g.w.now-p.begun > retryMax {
		p.wait = retryMin
	}
	p.after(p.g.w.between(p.wait/2, p.wait), p.connect)
	p.wait = min(2*p.wait, retryMax)
}

// beat sends a heartbeat each period.
func (p *process) beat(st *stream, in time.Duration) {
	p.beats++
	n := p.beats
	p.after(in, func() {
		if n != p.beats || p.st != st {
			return
		}
		p.beat(st, p.period)
		if p.rep.Status().Session != 0 {
			h := p.rep.Heartbeat(p.g.boot())
			st.send(up, func() { p.g.w.onUp(st, h) })
		}
	})
}

// silence gives up a stream on which nothing comes.
func (p *process) silence(st *stream, in time.Duration) {
	p.heard++
	n := p.heard
	p.after(in, func() {
		if n == p.heard && p.st == st {
			p.lost(st)
		}
	})
}

// receive takes a message from the stream, or lets it wait while the packet path is busy.
func (g *gateway) receive(st *stream, m any) {
	p := g.proc
	if p == nil || p.st != st {
		return
	}
	if p.busy {
		p.inbox = append(p.inbox, m)
		return
	}
	if r, ok := m.(lease.SessionReply); ok && r.NextBeatNS > 0 {
		p.period = time.Duration(r.NextBeatNS)
		p.beat(st, p.period)
	}
	p.take(st, m)
	// Without order the first reply may be the one that is lost: then nothing else counts. A connection cannot do that.
	if p.st == st && (g.w.p.net.ordered || p.rep.Status().Session != 0) {
		p.silence(st, 3*p.period+firstReply)
	}
}

func (p *process) take(st *stream, m any) {
	g := p.g
	var out replica.Out
	var err error
	if g.w.trace != nil {
		g.w.tracef("%s takes %T %+v", g.name, m, m)
	}
	switch m := m.(type) {
	case lease.SessionReply:
		if g.w.bug == "deadline from the receipt" {
			m.GrantNS += g.boot() - m.EchoBootNS
		}
		out, err = p.rep.Session(m, g.boot())
		if err == nil && p.rep.Status().Session == m.Session {
			g.ghost.replied(m)
			if p.first == (lease.ClusterID{}) {
				p.first = m.Cluster
			}
		}
	case lease.SnapshotChunk:
		out, err = p.rep.Snapshot(m)
	case lease.Batch:
		out, err = p.rep.Batch(m)
	case upload:
		t := table{}
		for i, has := range g.path.has {
			if has {
				t.held = append(t.held, g.path.entries[i])
			}
		}
		st.send(up, func() { g.w.onUp(st, t) })
		return
	}
	if err == nil && out.Deadline != 0 {
		g.w.truth.deadline(g, out.Deadline, false)
		g.setDeadline(out.Deadline)
	}
	if err != nil {
		g.w.tracef("%s: %v", g.name, err)
		p.lost(st)
		return
	}
	p.do(st, out)
}

// do carries out what follows from a message: the packet path first, then Applied, and only what that returns leaves.
func (p *process) do(st *stream, out replica.Out) {
	g := p.g
	if out.Ack != nil && p.st == st {
		a := *out.Ack
		g.w.truth.acked(g, a)
		st.send(up, func() { g.w.onUp(st, a) })
	}
	c := out.Change
	if c == nil {
		p.next(st)
		return
	}
	p.busy = true
	if g.w.bug == "acknowledged before applied" {
		if o := p.rep.Applied(c.Rev); o.Ack != nil {
			a := *o.Ack
			g.w.truth.acked(g, a)
			st.send(up, func() { g.w.onUp(st, a) })
		}
	}
	ops := g.changes(p, c)
	half := g.w.rng.IntN(len(ops) + 1)
	p.after(g.w.exp(applyTime), func() {
		for _, op := range ops[:half] {
			op()
		}
		fails := g.w.now < g.w.pathFails
		p.after(g.w.exp(applyTime), func() {
			if fails {
				p.rep.Failed()
				p.busy = false
				p.lost(st)
				return
			}
			for _, op := range ops[half:] {
				op()
			}
			p.busy = false
			o := p.rep.Applied(c.Rev)
			if o.Deadline != 0 {
				g.w.truth.deadline(g, o.Deadline, false)
				g.setDeadline(o.Deadline)
			}
			p.do(st, o)
		})
	})
}

// next lets in what waited.
func (p *process) next(st *stream) {
	for len(p.inbox) > 0 && !p.busy && p.st == st {
		m := p.inbox[0]
		p.inbox = p.inbox[1:]
		p.g.receive(st, m)
	}
}

// changes are the single steps of a change of the packet path, in order.
func (g *gateway) changes(p *process, c *replica.Change) []func() {
	var ops []func()
	if c.Pools {
		pools := p.rep.Pools()
		ops = append(ops, func() {
			clear(g.path.pools)
			for _, o := range pools {
				g.path.pools[o.Name] = o
			}
		})
	}
	keep := map[int]bool{}
	for _, b := range c.Upserts {
		i := g.w.slot(b.Resource)
		keep[i] = true
		ops = append(ops, func() { g.w.truth.applied(g, p, b); g.put(i, b) })
	}
	for _, r := range c.Deletes {
		ops = append(ops, func() { g.drop(g.w.slot(r)) })
	}
	if c.Replace {
		ops = append(ops, func() {
			for i := range g.path.has {
				if !keep[i] {
					g.drop(i)
				}
			}
		})
	}
	return ops
}
