package leasesim

import (
	"slices"
	"strings"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// look runs after each event: what the event touched is compared with the invariants. Nothing else can have changed: a
// deadline that passes only takes away.
func (t *truth) look() {
	for _, i := range t.dirty {
		t.checkI1(i)
		t.checkI4(i)
		t.checkF4(i)
	}
	t.dirty = t.dirty[:0]
	if t.w.p.steady {
		t.checkI10()
	}
}

// lookAtAll is look for every slot, to see that look misses none.
func (t *truth) lookAtAll() {
	for i := range t.slots {
		t.touch(i)
	}
	t.look()
}

// checkI1: the tunnels of two hosts never both forward for one port of an address, at whatever gateways.
func (t *truth) checkI1(i int) {
	for _, g := range t.w.gates {
		if !g.forwards() || !g.path.has[i] {
			continue
		}
		b := g.path.entries[i]
		for _, o := range t.w.gates {
			if !o.forwards() {
				continue
			}
			if o.path.has[i] && o.path.entries[i].Host != b.Host {
				t.w.fail("I1", "%s forwards %s for %s and %s forwards it for %s", g.name, b.Resource, b.Host, o.name, o.path.entries[i].Host)
			}
			for _, j := range t.slots[i].overlap {
				if o.path.has[j] {
					t.w.fail("I1", "%s forwards %s for %s and %s forwards %s for %s", g.name, b.Resource, b.Host, o.name, t.slots[j].res, o.path.entries[j].Host)
				}
			}
		}
	}
}

// checkI4: no gateway forwards by a generation below the newest that a client was told of.
func (t *truth) checkI4(i int) {
	for _, g := range t.w.gates {
		if g.path.has[i] && g.path.entries[i].Gen < t.slots[i].granted && g.forwards() && !t.adopted(i, &g.path.entries[i]) {
			t.w.fail("I4", "%s forwards %s@%s, a client was told of %s", g.name, t.slots[i].res, g.path.entries[i].Gen, t.slots[i].granted)
		}
	}
}

// adopted reports whether an entry is that of the present holder under an earlier generation, after a restore: a lease that
// the copy did not know is adopted, and taken over by its host, without a fence, because its tunnel source stays.
func (t *truth) adopted(i int, b *lease.Binding) bool {
	rec := &t.slots[i].rec
	return t.restore >= 0 && (rec.State == lease.Bound || rec.State == lease.Revoking) && rec.Source == b.Host
}

// checkF4: an address is in HOLD or FREE, or has another lease, only when no gateway forwards for the one before. And a
// gateway knows nothing that is not durable. While the lease of before a restore is replaced by its adopted self, its
// tunnel source tells that it is the same.
func (t *truth) checkF4(i int) {
	rec := &t.slots[i].rec
	for _, g := range t.w.gates {
		if !g.path.has[i] || !g.forwards() {
			continue
		}
		b := &g.path.entries[i]
		held := rec.State == lease.Bound || rec.State == lease.Revoking
		switch {
		case held && rec.Gen == b.Gen:
		case b.Gen.Epoch() < t.w.disk.epoch && t.w.disk.restored, t.adopted(i, b):
		case b.Gen > rec.Gen:
			t.w.fail("F6", "%s forwards %s@%s, the store has generation %s", g.name, b.Resource, b.Gen, rec.Gen)
		default:
			t.w.fail("F4", "%s forwards %s@%s, which is %s@%s", g.name, b.Resource, b.Gen, rec.State, rec.Gen)
		}
	}
}

// checkCommit looks at an event of an address that becomes durable: I1 and I3 among the leases, I2 against what was
// promised.
func (t *truth) checkCommit(i int, c lease.Commit) {
	sl, a := &t.slots[i], &c.Address
	if a.Gen < sl.rec.Gen || a.State == lease.Bound && (sl.rec.State != lease.Bound || sl.rec.Gen != a.Gen) && a.Gen <= sl.newest {
		t.w.fail("I3", "%s is %s under generation %s, it was %s, there was %s", a.Resource, a.State, a.Gen, sl.rec.Gen, sl.newest)
	}
	if a.State == lease.Bound {
		for _, j := range sl.overlap {
			if o := t.slots[j].rec; o.State == lease.Bound || o.State == lease.Revoking || o.State == lease.Hold {
				t.w.fail("I1", "%s is leased while %s is %s", a.Resource, o.Resource, o.State)
			}
		}
		if j, ok := t.hosts[a.Host]; ok && j != i {
			t.w.fail("one lease", "%s holds %s and %s", a.Host, t.slots[j].res, a.Resource)
		}
	}
	t.checkKept(i, a)
}

// checkKept is I2: what was promised under a generation lasts as long as it was promised, unless its holder or an operator
// ended it.
func (t *truth) checkKept(i int, a *lease.Address) {
	p := &t.slots[i].promise
	if p.until <= t.w.now {
		return
	}
	if p.source.IsValid() { // of before a restore
		if a.State == lease.Bound && t.w.machineAt(a.Source) != t.w.machineAt(p.source) {
			t.w.fail("I2", "%s is leased to %s, from before the restore it is promised to %s until %s", a.Resource, a.Source, p.source, p.until)
		}
		return
	}
	old := &t.slots[i].rec
	if a.Gen == p.gen && a.State == lease.Bound || old.Gen != p.gen || old.State != lease.Bound {
		return
	}
	asked := false
	switch a.End {
	case lease.ReasonIdle:
		asked = t.gone[p.gen]
	case lease.ReasonMoved:
		asked = t.moves[old.Host] || strings.HasPrefix(old.Host, "addr:")
	case lease.ReasonAdmin:
		asked = t.orders[a.Resource]
	}
	if !asked {
		t.w.fail("I2", "%s@%s of %s ended (%s), it was promised until %s", a.Resource, p.gen, old.Host, a.End, p.until)
	}
}

// stepped looks at what a core decided, before it is durable.
func (t *truth) stepped(s *service, now lease.Now, acts lease.Actions) {
	if t.w.disk.owner != s {
		return // it decides nothing any more
	}
	for _, e := range acts.Ended {
		p := t.slots[t.w.slot(e.Resource)].promise
		if e.Reason == lease.ReasonExpired && p.gen == e.Gen && p.until > t.w.now {
			t.w.fail("I2", "%s of %s expires, it was promised until %s", e.Ref, e.Host, p.until)
		}
	}
	for _, c := range acts.Commits {
		i := t.w.slot(c.Address.Resource)
		switch {
		case c.Address.State == lease.Hold:
			t.checkFenced(i, c.Address)
		case c.Address.State == lease.Bound && acts.Grant != nil && !acts.Grant.Renewed:
			t.checkI6(i, c.Address)
		}
	}
}

// checkFenced is F4 at the instant in which an address is said to be fenced.
func (t *truth) checkFenced(i int, a lease.Address) {
	for _, g := range t.w.gates {
		if g.path.has[i] && g.path.entries[i].Gen <= a.Gen && g.forwards() {
			t.w.fail("F4", "%s@%s counts as fenced, %s forwards for it", a.Resource, a.Gen, g.name)
		}
	}
}

// checkI6: another host gets an address only when no gateway has forwarded for the last one during the hold-down. A copy
// that is restored does not know of leases that began and ended after it was made, so their hold-down is not kept.
func (t *truth) checkI6(i int, a lease.Address) {
	last, whose := t.lastOther(i, t.w.machine(a.Host))
	if last >= 0 && last+t.w.p.timers.HoldDown > t.w.now+time.Microsecond {
		t.w.fail("I6", "%s goes to %s, a gateway forwarded it for %s until %s", a.Resource, a.Host, whose, last)
	}
}

// promised notes a grant that leaves the service: from here on a client may know of it.
func (t *truth) promised(s *service, g *lease.Grant, at time.Duration) {
	i := t.w.slot(g.Resource)
	sl := &t.slots[i]
	until := s.begun + at + g.Valid
	live := sl.rec.State == lease.Bound && sl.rec.Gen == g.Gen
	if sl.newest < g.Gen {
		t.w.fail("F6", "%s@%s is granted to %s before it is durable", g.Resource, g.Gen, g.Host)
	}
	if live && t.w.now+max(t.w.grace(), sl.rec.Valid) < until {
		t.w.fail("I2", "%s@%s is promised until %s, after a crash it would end at %s", g.Resource, g.Gen, until, t.w.now+max(t.w.grace(), sl.rec.Valid))
	}
	if o := t.w.disk.owner; live && o != nil && !o.dead {
		if in, _ := o.core(g.Resource).Lookup(t.w.now-o.begun, g.Resource); in.State == lease.Bound && in.Gen == g.Gen && t.w.now+in.Left < until {
			t.w.fail("I2", "%s promises %s@%s until %s, %s will end it at %s", s.name(), g.Resource, g.Gen, until, o.name(), t.w.now+in.Left)
		}
	}
	sl.granted = max(sl.granted, g.Gen)
	if live && (sl.promise.gen != g.Gen || sl.promise.until < until) {
		sl.promise = promise{gen: g.Gen, until: until}
	}
	t.touch(i)
}

// loaded is I2 for a service that starts: it knows every lease that is promised, for as long as it is.
func (t *truth) loaded(s *service) {
	for i := range t.slots {
		sl := &t.slots[i]
		if sl.promise.until <= t.w.now || sl.promise.source.IsValid() || sl.rec.Gen != sl.promise.gen || sl.rec.State != lease.Bound {
			continue
		}
		in, _ := s.core(sl.res).Lookup(0, sl.res)
		if in.State != lease.Bound || in.Gen != sl.promise.gen || t.w.now+in.Left < sl.promise.until {
			t.w.fail("I2", "%s@%s is promised until %s, after the start it is %s@%s for %s", sl.res, sl.promise.gen, sl.promise.until, in.State, in.Gen, in.Left)
		}
	}
}

// boundOrNot is I9: while an address is free or merely reserved, nobody is refused for want of one.
func (t *truth) boundOrNot(ev lease.Bind, ans *answer, free int) {
	if ans.deny == lease.ReasonPoolDry && free > 0 {
		t.w.fail("I9", "%s was refused with %d addresses free or reserved", ev.Host, free)
	}
}

// fenced is F5 and F9: whoever counts as fenced by time or by a witness does not forward.
func (t *truth) fenced(s *service) {
	if t.w.disk.owner != s {
		return
	}
	for _, st := range s.fence.Status(t.w.now - s.begun) {
		if st.Fenced == "witness" && s.fencedBy[st.TEP] != st.Fenced {
			t.w.counts.witnessed++
		}
		s.fencedBy[st.TEP] = st.Fenced
		g := t.w.gate(st.TEP)
		if st.Fenced == "" || !g.forwards() {
			continue
		}
		left := g.realTime(g.path.deadline) - t.w.now
		switch st.Fenced {
		case "time":
			t.w.fail("F5", "%s counts as fenced by time, it forwards for %s more", g.name, left)
		case "witness":
			t.w.fail("F9", "%s counts as fenced by a witness, it forwards for %s more", g.name, left)
		case "order":
			t.w.fail("order", "%s counts as off, it forwards for %s more", g.name, left)
		}
	}
}

// acked is I8: the packet path's table is the service's at the revision that is acknowledged.
func (t *truth) acked(g *gateway, a lease.Ack) {
	if g.proc.rep.Status().Epoch != t.w.disk.epoch || int(a.Applied) >= len(t.digests) {
		return
	}
	have := g.path.digest
	for _, p := range g.path.pools {
		have.AddPool(p)
	}
	if have != t.digests[a.Applied] {
		t.w.fail("I8", "%s acknowledges revision %d and holds another table", g.name, a.Applied)
	}
}

// applied is I12: what goes into the packet path is of one cluster.
func (t *truth) applied(g *gateway, p *process, b lease.Binding) {
	if b.Gen.Epoch() == foreignEpoch && p.first != foreignCluster {
		t.w.fail("I12", "%s follows cluster %x and applies %s of another one", g.name, p.first, b.Resource)
	}
}

// checkI10 is for steady worlds: a gateway that was in session goes on until D after the last heartbeat whose answer counted.
func (t *truth) checkI10() {
	for _, g := range t.w.gates {
		gh := &g.ghost
		stopped := g.on && g.path.deadline > 0 && !g.forwards()
		if stopped && !gh.stopped && g.path.deadline < gh.lasts {
			t.w.fail("I10", "%s has stopped %s too early, all gateways lost the service together", g.name, time.Duration(gh.lasts-g.path.deadline))
		}
		gh.stopped, gh.lasts = stopped, gh.used+uint64(t.w.p.static)
	}
}

// gateGhost is what an onlooker knows of the deadlines of a gateway since it was powered on.
type gateGhost struct {
	answered uint64       // newest own send time that the service has answered
	limit    uint64       // latest D after such a time
	used     uint64       // newest own send time of which the answer has moved the deadline
	until    uint64       // latest deadline that a session reply gave
	grant    uint64       // d
	others   []lease.Peer // of the last session reply
	asks     []ask
	set      uint64 // last deadline of this process
	stopped  bool   // in a steady world: it does not forward
	lasts    uint64 // until when it should have gone on
}

// ask is a question, and who has said that it is quiet there.
type ask struct {
	sent  uint64
	quiet []string
}

func (gh *gateGhost) asked(sent uint64) {
	if len(gh.asks) >= 64 {
		gh.asks = slices.Delete(gh.asks, 0, 32)
	}
	gh.asks = append(gh.asks, ask{sent: sent})
}

func (gh *gateGhost) quiet(sent uint64, who string) {
	for i := range gh.asks {
		if gh.asks[i].sent == sent {
			gh.asks[i].quiet = append(gh.asks[i].quiet, who)
		}
	}
}

// replied notes a session reply that the gateway took.
func (gh *gateGhost) replied(m lease.SessionReply) {
	gh.until = max(gh.until, m.EchoBootNS+m.GrantNS)
	gh.grant, gh.others = m.GrantNS, m.Others
}

// answered notes that the service answers a Hello or heartbeat.
func (t *truth) answered(g *gateway, st *stream, r lease.SessionReply) {
	if st.boots == g.boots {
		g.ghost.answered = max(g.ghost.answered, r.EchoBootNS)
		g.ghost.limit = max(g.ghost.limit, r.EchoBootNS+r.FailStaticNS)
	}
}

// deadline is I7: it only grows within a process, a session reply gives no more than it says, and nothing goes beyond D
// from the last heartbeat that was answered.
func (t *truth) deadline(g *gateway, d uint64, alone bool) {
	gh := &g.ghost
	switch {
	case d < gh.set:
		t.w.fail("I7", "the deadline of %s moves back by %s", g.name, time.Duration(gh.set-d))
	case d > gh.limit:
		t.w.fail("I7", "the deadline of %s is %s after its last answered heartbeat", g.name, time.Duration(d-gh.answered))
	case !alone && d > gh.until:
		t.w.fail("I7", "the deadline of %s is %s later than a session reply gave", g.name, time.Duration(d-gh.until))
	}
	gh.set = d
	if !alone {
		gh.used = d - gh.grant
	}
}

// alone is I10 for a deadline that moves without the service: the old one still runs, every other gateway of the last list
// has said that it hears nothing, and it counts from the question.
func (t *truth) alone(g *gateway, d, asked uint64) {
	gh := &g.ghost
	if g.boot() > g.path.deadline {
		t.w.fail("I10", "the deadline of %s moves without the service after it had passed", g.name)
	}
	if d > asked+gh.grant {
		t.w.fail("I10", "the deadline of %s moves by %s from its question", g.name, time.Duration(d-asked))
	}
	i := slices.IndexFunc(gh.asks, func(a ask) bool { return a.sent == asked })
	for _, o := range gh.others {
		if i < 0 || !slices.Contains(gh.asks[i].quiet, o.TEP) {
			t.w.fail("I10", "the deadline of %s moves without the service, %s has not said that it hears nothing", g.name, o.TEP)
		}
	}
}
