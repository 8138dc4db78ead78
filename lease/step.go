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
	if ev.From.Gen != 0 && !c.takeAlong(now, ev) {
		return
	}
	if r, ok := c.cell.Where(ev.Host); ok {
		i, here := c.index(r)
		if !here { // the service asks the core that holds the lease; one lease per identity
			c.out.Deny = ReasonQuota
			return
		}
		e := &c.entries[i]
		if e.Source == ev.Source && e.TEP == c.cfg.Pool.TEP {
			c.extend(now, i, ev.Valid, ev.MTU)
			return
		}
		if c.cell.behind[ev.Host] >= maxBehind || net64(e.Source) != net64(ev.Source) && c.cell.full(ev.Source) {
			c.out.Deny = ReasonQuota // and the lease stays where it was
			return
		}
		c.end(now, i, ReasonMoved)
	}
	if c.cell.full(ev.Source) {
		c.out.Deny = ReasonQuota
		return
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
	case c.cell.behind[ev.Host] > maxBehind && !c.entries[i].isOf(ev.Host):
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

// takeAlong ends the lease that a host had under another identity and keeps its address for it; false when the event is
// answered with a refusal.
func (c *Core) takeAlong(now Now, ev Bind) bool {
	i, ok := c.index(ev.From.Resource)
	if !ok || c.entries[i].State != Bound || c.entries[i].Gen != ev.From.Gen || c.entries[i].Host == ev.Host {
		return true // it has ended, or is under this identity
	}
	e := &c.entries[i]
	if c.cell.behind[e.Host] >= maxBehind || net64(e.Source) != net64(ev.Source) && c.cell.full(ev.Source) {
		c.out.Deny = ReasonQuota
		return false
	}
	c.end(now, i, ReasonMoved)
	e.forHost = ev.Host
	delete(c.previous, e.Host)
	c.previous[ev.Host] = i
	return true
}

// isOf reports whether an address that no lease holds is a host's to come back to.
func (e *entry) isOf(host string) bool { return e.Host == host || e.forHost == host }

// fencing returns the revoke that the host's own address still waits for: it should rather have that one than another, which
// would be one more that nobody can use for a while.
func (c *Core) fencing(ev Bind) (Rev, bool) {
	i, ok := c.previous[ev.Host]
	if !ok || ev.Hurry {
		return 0, false
	}
	e := &c.entries[i]
	return e.RevokeRev, e.State == Revoking && e.isOf(ev.Host) && !e.excluded && (e.fixed == "" || e.fixed == ev.Host) &&
		(e.PSIDLen == 0 || ev.PortSet)
}

// choose picks the address for a new lease in constant time. A reservation only orders the choice; it never causes a
// refusal (I9): when nothing is free, the oldest reservation of whomever goes.
func (c *Core) choose(ev Bind) (int32, bool) {
	if i, ok := c.fixed[ev.Host]; ok && c.takeable(i, ev) {
		return i, true
	}
	if i, ok := c.previous[ev.Host]; ok && c.entries[i].isOf(ev.Host) && c.takeable(i, ev) {
		return i, true
	}
	if i, ok := c.reserved[ev.Host]; ok {
		return i, true
	}
	short := ev.PortSet && c.short()
	if i, ok := c.index(ev.Want); ok && c.entries[i].State == Free && c.takeable(i, ev) && (ev.Want.PSIDLen > 0 || !short) {
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
	if i := c.lists[Reserved].head; i >= 0 && c.rules.takesReserved {
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
	case e.excluded || e.fixed != "" && e.fixed != ev.Host || e.cut:
		return false
	case e.PSIDLen > 0 && (!ev.PortSet || !c.entries[e.whole].cut):
		return false
	case e.State == Free:
		return true
	case e.State == Hold:
		return e.isOf(ev.Host)
	}
	return e.State == Reserved && e.forHost == ev.Host
}

func (c *Core) grant(now Now, i int32, ev Bind) {
	e := &c.entries[i]
	if e.State == Reserved {
		delete(c.reserved, e.forHost)
		e.forHost = ""
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
	for _, host := range []string{e.Host, e.forHost} {
		if at, ok := c.previous[host]; ok && at == i && host != ev.Host {
			delete(c.previous, host)
		}
	}
	e.forHost = ""
	rev := c.cell.NextRev()
	e.Address = Address{
		Resource: e.Resource, Gen: c.rules.newGen(c.cell, rev), Rev: rev,
		Host: ev.Host, Source: ev.Source, TEP: tep, MTU: ev.MTU, Trigger: ev.Trigger,
		BoundAt: now.Wall, Valid: valid,
	}
	c.previous[ev.Host] = i
	// The host has no other lease here or elsewhere: the caller has looked.
	if err := c.cell.add(&e.Address); err != nil {
		panic("lease: " + err.Error())
	}
	c.push(Bound, i)
	c.setTimer(i, now.Mono+valid)
	c.commit(i, BindRecord(rev, e.Binding()), true)
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
	moved := mtu != 0 && mtu != e.MTU
	// A shorter validity never takes back what was promised before.
	c.setTimer(i, max(e.at, now.Mono+valid))
	if moved || c.rules.writes(e.Valid, valid) {
		e.Valid = max(e.Valid, valid)
		e.Rev = c.cell.NextRev()
		record := Record{Rev: e.Rev}
		if moved {
			e.MTU = mtu
			record = BindRecord(e.Rev, e.Binding())
		}
		c.commit(i, record, false)
	}
	c.answer(i, e.at-now.Mono, true)
}

func (c *Core) answer(i int32, valid time.Duration, renewed bool) {
	e := &c.entries[i]
	c.out.Grant = &Grant{
		Ref: e.Ref(), Host: e.Host, Source: e.Source, TEP: e.TEP, Valid: valid, MTU: e.MTU,
		Renewed: renewed, Rev: e.Gen.Rev(),
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
	case e.Gen != ev.Ref.Gen || e.Host != ev.Host:
		c.out.Deny = ReasonStaleGeneration
	case e.State != Bound:
		c.out.Deny = e.End
		if e.End == ReasonNone {
			c.out.Deny = ReasonStaleGeneration
		}
	case e.Source != ev.Source || e.TEP != c.cfg.Pool.TEP:
		c.out.Deny = ReasonMoved
	default:
		c.extend(now, i, ev.Valid, ev.MTU)
	}
}

func (c *Core) release(now Now, ev Release) {
	i, ok := c.index(ev.Ref.Resource)
	if !ok || c.entries[i].Gen != ev.Ref.Gen || c.entries[i].State != Bound {
		return
	}
	if c.entries[i].Host != ev.Host {
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
	if e.State != Bound && e.State != Conflict || ev.Ref.Gen != 0 && ev.Ref.Gen != e.Gen {
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
	if e.State == Bound {
		c.cell.remove(&e.Address)
	}
	c.pull(i)
	e.Rev = c.cell.NextRev()
	e.RevokeRev, e.UnboundAt, e.FencedAt, e.End, e.Valid = e.Rev, now.Wall, time.Time{}, reason, 0
	c.push(Revoking, i)
	c.commit(i, UnbindRecord(e.Rev, e.Ref()), true)
	c.out.Ended = append(c.out.Ended, Ended{Ref: e.Ref(), Host: e.Host, Source: e.Source, Reason: reason})
}

// fenceTo takes addresses to HOLD in the order in which they were revoked.
func (c *Core) fenceTo(now Now, fenced Rev) {
	for i := c.lists[Revoking].head; i >= 0; {
		e := &c.entries[i]
		next := e.next
		if c.rules.fencedAt(&e.Address) > fenced {
			return
		}
		c.pull(i)
		e.Rev = c.cell.NextRev()
		e.FencedAt = now.Wall
		c.push(Hold, i)
		c.setTimer(i, now.Mono+c.cfg.Timers.HoldDown)
		c.commit(i, Record{Rev: e.Rev}, true)
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
		switch e.State {
		case Reserved:
			c.unreserve(i)
		case Bound:
			c.end(now, i, ReasonExpired)
		case Hold:
			c.pull(i)
			e.Rev = c.cell.NextRev()
			c.push(Free, i)
			c.commit(i, Record{Rev: e.Rev}, false)
		case Free, Revoking, Conflict: // have no timer
			c.clearTimer(i)
		}
	}
}

// reserve takes the host's last address, or the one free longest, if there is any.
func (c *Core) reserve(now Now, host string) {
	if _, ok := c.cell.Where(host); ok {
		return
	}
	i, ok := c.reserved[host]
	if !ok {
		if i, ok = c.choose(Bind{Host: host}); !ok || c.entries[i].State != Free {
			return
		}
		c.pull(i)
		c.entries[i].forHost = host
		c.reserved[host] = i
		c.push(Reserved, i)
	}
	c.setTimer(i, now.Mono+c.cfg.Timers.Reservation)
}

func (c *Core) unreserve(i int32) {
	e := &c.entries[i]
	c.pull(i)
	delete(c.reserved, e.forHost)
	e.forHost = ""
	c.push(Free, i)
}

func (c *Core) commit(i int32, r Record, audit bool) {
	e := &c.entries[i]
	a := e.Address
	cm := Commit{Rev: e.Rev, Address: a, Record: r}
	if audit && a.Host != "" {
		cm.Audit = a.Audit()
	}
	c.out.Commits = append(c.out.Commits, cm)
}
