package leasesim

import (
	"fmt"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// recoverIn is within what time after the last fault everything is well again (I13).
const recoverIn = time.Minute

// settle ends a run: all faults end, and everything must become well; then the hosts go, and everything must become free.
func (w *world) settle() {
	if w.failed != nil {
		return
	}
	w.heal()
	w.checkI13()
	if w.failed != nil {
		return
	}
	w.checkI15()
	if w.failed != nil {
		return
	}
	if w.truth.restore < 0 {
		w.checkI14()
		w.book.check()
	}
}

// heal ends every fault.
func (w *world) heal() {
	w.tracef("everything heals")
	w.healed = true
	clear(w.net.cut)
	w.stalled, w.pathFails = w.now, w.now
	n := &w.p.net
	n.loss, n.dup, n.slow, n.jitter = 0, 0, 0, time.Millisecond
	if !n.ordered { // what a connection cannot do ends with the connections
		n.ordered = true
		for _, g := range w.gates {
			if g.proc != nil && g.proc.st != nil {
				g.proc.lost(g.proc.st)
			}
		}
	}
	w.p.faults.atMessage = 0
	if w.late != nil {
		w.late.stop()
	}
	if w.disk.owner == nil || w.disk.owner.dead {
		w.start(nodeService)
	}
	for _, g := range w.gates {
		g.powerOn()
		g.startProcess()
	}
}

// checkI13: within a minute the gateways hold what the service holds, and hosts get leases.
func (w *world) checkI13() {
	w.kernel.run(w.now+recoverIn, w.truth.look)
	before := w.counts
	w.kernel.run(w.now+recoverIn/2, w.truth.look)
	after := w.counts
	for why, n := range after.refused {
		// A pool may be dry and a host over its quota, fault or not.
		if r := lease.Reason(why); n > before.refused[why] && r != lease.ReasonPoolDry && r != lease.ReasonQuota {
			w.fail("I13", "%d of %d binds were refused (%s) later than %s after the last fault", n-before.refused[why], after.binds-before.binds, r, recoverIn)
		}
	}
	// Hosts go on; a moment without changes is needed to compare.
	for range 200 {
		if w.unequal() == "" {
			return
		}
		w.kernel.run(w.now+50*time.Millisecond, w.truth.look)
	}
	w.fail("I13", "long after the last fault %s", w.unequal())
}

// unequal says which gateway does not hold the service's table, or does not forward; "" = none.
func (w *world) unequal() string {
	s := w.owner
	if s == nil || s.recover != nil {
		return fmt.Sprintf("the service does not serve (there: %t)", s != nil)
	}
	for _, g := range w.gates {
		if st := g.proc.rep.Status(); !st.Synced || st.Applied != s.cell.Last() || st.Digest != s.digest() || !g.forwards() {
			return fmt.Sprintf("%s is at revision %d (synced %t, digest %x, forwards %t), the service at %d (%x)",
				g.name, st.Applied, st.Synced, st.Digest, g.forwards(), s.cell.Last(), s.digest())
		}
	}
	return ""
}

// checkI15: with the hosts gone, every address is free again in time, and nothing is left over.
func (w *world) checkI15() {
	w.tracef("the hosts go")
	var given []lease.Ref
	for _, h := range w.hosts {
		h.retired = true
		if h.lease != nil && w.chance(0.5) {
			given = append(given, h.lease.ref)
			h.giveBack()
		} else {
			h.on = false
		}
	}
	t := w.p.timers
	w.kernel.run(w.now+time.Second+t.HoldDown, w.truth.look)
	for _, ref := range given {
		if rec := w.truth.slots[w.slot(ref.Resource)].rec; rec.Gen == ref.Gen && rec.State != lease.Free {
			w.fail("I15", "%s was given back %s and a hold-down ago, it is %s", ref, time.Second, rec.State)
		}
	}
	w.kernel.run(w.now+2*t.MaxValid+t.HoldDown+recoverIn, w.truth.look)
	if w.failed != nil {
		return
	}
	s := w.owner
	for _, c := range s.cores {
		if st := c.Stats(); st.Bound+st.Revoking+st.Hold+st.Reserved+st.Cut+st.SetsUsed+st.Conflict != 0 {
			w.fail("I15", "addresses of %s are not free: %+v", c.Pool().Name, st)
		}
	}
	if n := s.answers.Len(); n > 0 && w.now-s.begun > 2*t.MaxValid {
		s.answers.Get(s.now().Mono, "", [16]byte{})
		if n = s.answers.Len(); n > 0 {
			w.fail("I15", "%d answers are remembered", n)
		}
	}
	for _, g := range w.gates {
		if g.path.n != 0 {
			w.fail("I15", "%s holds %d entries", g.name, g.path.n)
		}
	}
}

// checkI14: the audit log names the holder for every packet that was looked at.
func (w *world) checkI14() {
	for _, s := range w.truth.samples {
		got := w.truth.history(s.addr, s.port, s.at)
		if len(got) != 1 || got[0].Gen != s.gen {
			w.fail("I14", "who had %s port %d at %s: %d answers %v, it was forwarded under %s", s.addr, s.port, s.at.Format(time.RFC3339Nano), len(got), got, s.gen)
			return
		}
	}
}
