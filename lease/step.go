package lease

import (
	"net/netip"
	"time"
)

// Step takes one event at now and returns what follows from it.
func (c *Core) Step(now Now, ev Event) Actions {
	c.out = Actions{}
	switch ev := ev.(type) {
	case Bind:
		c.bind(now, ev)
	case Renew:
		c.renew(now, ev)
	case Release:
		c.release(now, ev)
	case Revoke:
		c.revoke(now, ev)
	case Reserve:
		c.reserve(now, ev.Host)
	case FenceTo:
		c.fenceTo(now, ev.Rev)
	case Tick:
		c.tick(now)
	case Adopt:
		c.adopt(now, ev.Binding)
	}
	return c.out
}

// bind follows the order of preference: current, fixed, previous, reserved, requested, longest free.
func (c *Core) bind(now Now, ev Bind) {
	if i, ok := c.claim(ev); ok {
		c.takeOver(now, i, ev)
		return
	}
	along, ok := c.takeAlong(now, ev)
	if !ok {
		c.out.Deny = ReasonQuota
		return
	}
	if r, ok := c.cell.Where(ev.Host); ok && !seeded("second lease") {
		i, here := c.index(r)
		if !here { // the service asks the core that holds the lease; one lease per identity
			c.out.Deny = ReasonQuota
			return
		}
		e := &c.entries[i]
		if e.source == bytes16(ev.Source) && e.tep == c.tep {
			c.extend(now, i, ev.Valid, ev.MTU)
			return
		}
		if c.cell.behind[ev.Host] >= maxBehind || c.crowds(e, ev.Source) {
			c.out.Deny = ReasonQuota // and the lease stays where it was
			return
		}
		c.end(now, i, ReasonMoved)
	}
	if c.cell.full(netOf(ev.Source)) {
		c.out.Deny = ReasonQuota
		return
	}
	if along >= 0 {
		c.cell.hosts[ev.Host] = spot{c.number, along}
	}
	if rev, ok := c.fencing(ev); ok {
		c.out.Wait = rev
		return
	}
	i, ok := c.choose(ev)
	switch {
	case !ok:
		c.out.Deny = ReasonPoolDry
		return
	case c.cell.behind[ev.Host] > maxBehind && !c.isOf(i, ev.Host):
		c.out.Deny = ReasonQuota
		return
	}
	c.grant(now, i, ev)
}

// takeOver gives an adopted lease to the host that comes from its tunnel source. The one that the store knew of it was from
// before.
func (c *Core) takeOver(now Now, i int32, ev Bind) {
	if r, ok := c.cell.Where(ev.Host); ok {
		old, here := c.index(r)
		if !here {
			c.out.Deny = ReasonQuota
			return
		}
		c.end(now, old, ReasonMoved)
	}
	c.supersede(now, i, ReasonMoved)
	c.grant(now, i, ev)
}

// crowds reports whether a lease that moves to a tunnel source would be one too many in the network there.
func (c *Core) crowds(e *entry, source netip.Addr) bool {
	n := netOf(source)
	return net64(e.source[:8]) != n && c.cell.full(n)
}

// takeAlong ends the lease that a host had under another identity and keeps its address for it. It returns the address, -1
// when there is none; false when the host may not move now.
func (c *Core) takeAlong(now Now, ev Bind) (int32, bool) {
	i, ok := c.index(ev.From.Resource)
	if ev.From.Gen == 0 || !ok || c.entries[i].state != Bound || c.entries[i].gen != ev.From.Gen || c.entries[i].host == ev.Host {
		return -1, true // it has ended, or is under this identity
	}
	e := &c.entries[i]
	if c.cell.behind[e.host] >= maxBehind || c.crowds(e, ev.Source) {
		return -1, false
	}
	c.end(now, i, ReasonMoved)
	c.forHost[i] = ev.Host
	delete(c.cell.hosts, e.host)
	return i, true
}

// isOf reports whether an address that no lease holds is a host's to come back to.
func (c *Core) isOf(i int32, host string) bool {
	return c.entries[i].host == host || c.forHost[i] == host
}

// fencing returns the revoke that the host's own address still waits for: it should rather have that one than another, which
// would be one more that nobody can use for a while.
func (c *Core) fencing(ev Bind) (Rev, bool) {
	i, ok := c.last(ev.Host)
	if !ok || ev.Hurry {
		return 0, false
	}
	e := &c.entries[i]
	return e.revokeRev, e.state == Revoking && !e.excluded && c.mayFix(i, ev.Host) && (!e.set || ev.PortSet)
}

// last returns the address of this slice that a host had last, if it is still the host's to come back to.
func (c *Core) last(host string) (int32, bool) {
	at, ok := c.cell.hosts[host]
	return at.i, ok && at.core == c.number && c.isOf(at.i, host)
}

// mayFix reports whether an address is fixed to nobody else.
func (c *Core) mayFix(i int32, host string) bool {
	whose := c.fixedFor[i]
	return whose == "" || whose == host
}

// choose picks the address for a new lease in constant time. A reservation only orders the choice; it never causes a
// refusal (I9): when nothing is free, the oldest reservation of whomever goes.
func (c *Core) choose(ev Bind) (int32, bool) {
	if i, ok := c.fixed[ev.Host]; ok && c.takeable(i, ev) {
		return i, true
	}
	if i, ok := c.last(ev.Host); ok && c.takeable(i, ev) {
		return i, true
	}
	if i, ok := c.reserved[ev.Host]; ok {
		return i, true
	}
	short := ev.PortSet && c.short()
	if i, ok := c.index(ev.Want); ok && (c.entries[i].state == Free || seeded("wanted before it is fenced")) && c.takeable(i, ev) && (ev.Want.PSIDLen > 0 || !short) {
		return i, true
	}
	if short {
		if i, ok := c.portSet(); ok {
			return i, true
		}
	}
	if i := c.lists[Free].head; i >= 0 {
		return i, true
	}
	if i := c.lists[Reserved].head; i >= 0 && !seeded("reservation binds others") {
		return i, true
	}
	return 0, false
}

// short reports whether no more than 5 % of the addresses are left, rounded up: the last one of a small slice can still be
// cut into port sets.
func (c *Core) short() bool {
	s := c.Stats()
	return (s.Free+s.Reserved)*20 < s.Size+20
}

// takeable reports whether a host may have an address at once: a free one, or its own in hold-down, which is 0 for the
// same host.
func (c *Core) takeable(i int32, ev Bind) bool {
	e := &c.entries[i]
	switch {
	case e.excluded || e.cut || !c.mayFix(i, ev.Host):
		return false
	case e.set && (!ev.PortSet || !c.entries[e.other].cut):
		return false
	case e.state == Free:
		return true
	case e.state == Hold:
		return c.isOf(i, ev.Host)
	case e.state == Revoking:
		return seeded("wanted before it is fenced") && c.resource(i) == ev.Want
	}
	return e.state == Reserved && c.forHost[i] == ev.Host
}

func (c *Core) grant(now Now, i int32, ev Bind) {
	e := &c.entries[i]
	if e.state == Reserved {
		delete(c.reserved, c.forHost[i])
		delete(c.forHost, i)
	}
	if r, ok := c.reserved[ev.Host]; ok {
		c.unreserve(r)
	}
	valid := c.validity(ev.Valid)
	c.hold(now, i, ev, c.cfg.Pool.TEP, valid)
	c.answer(i, valid, false)
}

// hold makes an address BOUND to a host under a new generation.
func (c *Core) hold(now Now, i int32, ev Bind, tep netip.Addr, valid time.Duration) {
	e := &c.entries[i]
	c.pull(i)
	here := spot{c.number, i}
	for _, host := range [...]string{e.host, c.forHost[i]} {
		if at, ok := c.cell.hosts[host]; ok && at == here && host != ev.Host {
			delete(c.cell.hosts, host)
		}
	}
	delete(c.forHost, i)
	rev := c.cell.NextRev()
	e.put(Address{
		Gen: c.newGen(rev), Rev: rev,
		Host: ev.Host, Source: ev.Source, TEP: tep, MTU: ev.MTU, Trigger: ev.Trigger,
		BoundAt: now.Wall, Valid: valid,
	})
	c.cell.hosts[ev.Host] = here // it has no other lease here or elsewhere: the caller has looked
	c.count(i, 1)
	c.push(Bound, i)
	c.setTimer(i, now.Mono+valid)
	c.commit(i, BindRecord(rev, c.binding(i)), true)
}

// newGen returns the generation of a lease that begins at a revision.
func (c *Core) newGen(rev Rev) Gen {
	if seeded("generation without revision") {
		rev /= 16
	}
	return MakeGen(c.cell.epoch, rev)
}

// validity returns what a host gets when it asks for want: less when addresses run short, so that those of hosts that
// went without a word come back sooner.
func (c *Core) validity(want time.Duration) time.Duration {
	t := c.cfg.Timers
	valid := t.Clamp(want)
	switch c.Pressure() {
	case PressureHigh:
		return max(t.MinValid, valid/2)
	case PressureFull, PressureDry:
		if c.Stats().Size >= smallSlice {
			return t.MinValid
		}
	case PressureNone:
	}
	return valid
}

// extend renews a BOUND address. The store is written only when what it holds would not cover the new promise: after a
// restart every lease lives for its stored validity once more, so a renewal for as long or less needs no write (F6).
func (c *Core) extend(now Now, i int32, want time.Duration, mtu uint16) {
	e := &c.entries[i]
	valid := c.validity(want)
	moved := mtu != 0 && mtu != e.mtu
	// A shorter validity never takes back what was promised before.
	c.setTimer(i, max(e.at, now.Mono+valid))
	if moved || e.valid < valid && !seeded("renewal not written") {
		e.valid = max(e.valid, valid)
		e.rev = c.cell.NextRev()
		record := Record{Rev: e.rev}
		if moved {
			c.digest.RemoveBinding(c.binding(i))
			e.mtu = mtu
			c.digest.AddBinding(c.binding(i))
			record = BindRecord(e.rev, c.binding(i))
		}
		c.commit(i, record, false)
	}
	c.answer(i, e.at-now.Mono, true)
}

func (c *Core) answer(i int32, valid time.Duration, renewed bool) {
	e := &c.entries[i]
	c.out.Grant = &Grant{
		Ref: c.ref(i), Host: e.host, Source: addr16(e.source), TEP: addr16(e.tep), Valid: valid, MTU: e.mtu,
		Renewed: renewed, Rev: e.gen.Rev(),
	}
}

func (c *Core) renew(now Now, ev Renew) {
	i, ok := c.index(ev.Ref.Resource)
	if !ok {
		c.out.Deny = ReasonStaleGeneration
		return
	}
	e := &c.entries[i]
	switch {
	case (e.gen != ev.Ref.Gen || e.host != ev.Host) && !seeded("renewal of whatever there is"):
		c.out.Deny = ReasonStaleGeneration
	case e.state != Bound:
		c.out.Deny = e.end
		if e.end == ReasonNone {
			c.out.Deny = ReasonStaleGeneration
		}
	case (e.source != bytes16(ev.Source) || e.tep != c.tep) && !seeded("renewal of whatever there is"):
		c.out.Deny = ReasonMoved
	default:
		c.extend(now, i, ev.Valid, ev.MTU)
	}
}

func (c *Core) release(now Now, ev Release) {
	i, ok := c.index(ev.Ref.Resource)
	if !ok || c.entries[i].gen != ev.Ref.Gen || c.entries[i].state != Bound {
		return
	}
	if c.entries[i].host != ev.Host {
		c.out.Deny = ReasonNotAllowed
		return
	}
	reason := ev.Reason
	if reason == ReasonNone {
		reason = ReasonIdle
	}
	c.end(now, i, reason)
}

func (c *Core) revoke(now Now, ev Revoke) {
	i, ok := c.index(ev.Ref.Resource)
	if !ok {
		c.out.Deny = ReasonStaleGeneration
		return
	}
	e := &c.entries[i]
	if e.state != Bound && e.state != Conflict || ev.Ref.Gen != 0 && ev.Ref.Gen != e.gen {
		c.out.Deny = ReasonStaleGeneration
		return
	}
	reason := ev.Reason
	if reason == ReasonNone {
		reason = ReasonAdmin
	}
	c.end(now, i, reason)
}

// end takes a lease from BOUND, or an address from CONFLICT, to REVOKING. From here on it is not the host's, and not
// anyone else's until every gateway is fenced.
func (c *Core) end(now Now, i int32, reason Reason) {
	e := &c.entries[i]
	if e.state == Bound {
		c.count(i, -1)
	}
	c.pull(i)
	e.rev = c.cell.NextRev()
	e.revokeRev, e.unbound, e.fenced, e.end, e.valid = e.rev, nanos(now.Wall), 0, reason, 0
	c.push(Revoking, i)
	c.commit(i, UnbindRecord(e.rev, c.ref(i)), true)
	c.out.Ended = append(c.out.Ended, Ended{Ref: c.ref(i), Host: e.host, Source: addr16(e.source), Reason: reason})
}

// count adds 1 to the leases, or -1, for the one at i.
func (c *Core) count(i int32, by int32) {
	c.cell.count(net64(c.entries[i].source[:8]), by)
	b := c.binding(i)
	if by > 0 {
		c.digest.AddBinding(b)
	} else {
		c.digest.RemoveBinding(b)
	}
}

// fenceTo takes addresses to HOLD in the order in which they were revoked.
func (c *Core) fenceTo(now Now, fenced Rev) {
	for i := c.lists[Revoking].head; i >= 0; {
		e := &c.entries[i]
		next := e.next
		rev := e.revokeRev
		if seeded("fence by generation") {
			rev = e.gen.Rev()
		}
		if rev > fenced {
			return
		}
		c.pull(i)
		e.rev = c.cell.NextRev()
		e.fenced = nanos(now.Wall)
		if seeded("fenced when revoked") {
			e.fenced = e.unbound
		}
		c.push(Hold, i)
		c.setTimer(i, now.Mono+c.cfg.Timers.HoldDown)
		c.commit(i, Record{Rev: e.rev}, true)
		i = next
	}
}

// tick ends every state whose time has come.
func (c *Core) tick(now Now) {
	for len(c.timers.ix) > 0 {
		i := c.timers.ix[0]
		e := &c.entries[i]
		if e.at > now.Mono {
			return
		}
		switch e.state {
		case Reserved:
			c.unreserve(i)
		case Bound:
			c.end(now, i, ReasonExpired)
		case Hold:
			c.free(i)
		case Free, Revoking, Conflict: // have no timer
			c.clearTimer(i)
		}
	}
}

// free makes an address FREE that was leased.
func (c *Core) free(i int32) {
	e := &c.entries[i]
	c.pull(i)
	e.rev = c.cell.NextRev()
	c.push(Free, i)
	c.commit(i, Record{Rev: e.rev}, false)
}

// reserve takes the host's last address, or the one free longest, if there is any.
func (c *Core) reserve(now Now, host string) {
	if _, ok := c.cell.Where(host); ok {
		return
	}
	i, ok := c.reserved[host]
	if !ok {
		if i, ok = c.choose(Bind{Host: host}); !ok || c.entries[i].state != Free {
			return
		}
		c.pull(i)
		c.forHost[i] = host
		c.reserved[host] = i
		c.push(Reserved, i)
	}
	if !seeded("reservation without end") {
		c.setTimer(i, now.Mono+c.cfg.Timers.Reservation)
	}
}

func (c *Core) unreserve(i int32) {
	c.pull(i)
	delete(c.reserved, c.forHost[i])
	delete(c.forHost, i)
	c.push(Free, i)
}

func (c *Core) commit(i int32, r Record, audit bool) {
	a := c.address(i)
	cm := Commit{Rev: a.Rev, Address: a, Record: r}
	if audit && a.Host != "" {
		cm.Audit = a.Audit()
	}
	c.out.Commits = append(c.out.Commits, cm)
}
