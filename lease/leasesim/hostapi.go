package leasesim

import (
	"net/netip"
	"slices"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// The calls of hosts, as leasesvc serves them.
type (
	bindCall struct {
		id   lease.RequestID
		ev   lease.Bind
		held proof // of From
		op   int   // in the history
	}
	renewCall struct {
		ev     lease.Renew
		secret proof
	}
	releaseCall struct {
		ev     lease.Release
		secret proof
	}
	// granted answers a bind or renew; refused any call.
	granted struct {
		ref     lease.Ref
		tep     netip.Addr
		valid   time.Duration
		renewed bool
	}
	refused  struct{ why lease.Reason }
	released struct{}
)

// proof is the secret of a lease, which only its holder was told; zero for hosts with a certificate.
type proof struct {
	host string
	ref  lease.Ref
}

const capPortSets = "port_sets"

// answer is what a Bind or Renew came to.
type answer struct {
	grant   *lease.Grant
	deny    lease.Reason
	wait    lease.Rev
	pending *pending
	at      time.Duration
}

// call serves a host. Refusals for want of a complete store come first.
func (s *service) call(c any, reply func(any)) {
	if s.dead {
		return
	}
	if s.recover != nil {
		reply(refused{lease.ReasonDegradedStore})
		return
	}
	switch c := c.(type) {
	case bindCall:
		if c.held != (proof{}) {
			c.ev.From = c.held.ref
			if !s.proved(c.held) {
				c.ev.From = lease.Ref{}
			}
		}
		s.bind(c, reply)
	case renewCall:
		if !s.holder(c.secret, c.ev.Ref, &c.ev.Host) {
			reply(refused{lease.ReasonNotAllowed})
			return
		}
		s.renew(c, reply)
	case releaseCall:
		if !s.holder(c.secret, c.ev.Ref, &c.ev.Host) {
			reply(refused{lease.ReasonNotAllowed})
			return
		}
		s.release(c, reply)
	}
}

// proved reports whether a secret is that of the lease as the store has it.
func (s *service) proved(p proof) bool {
	c := s.core(p.ref.Resource)
	if c == nil {
		return false
	}
	in, _ := c.Lookup(s.now().Mono, p.ref.Resource)
	return in.Host == p.host
}

// holder puts the identity under which a caller acts on a lease into host.
func (s *service) holder(p proof, ref lease.Ref, host *string) bool {
	if p == (proof{}) {
		return true
	}
	*host = p.host
	return p.ref == ref && s.proved(p)
}

func (s *service) bind(c bindCall, reply func(any)) {
	ans := s.bindOnce(c)
	if ans.wait == 0 {
		s.answered(ans, reply)
		return
	}
	rev := ans.wait
	s.await(func() bool { return s.fence.Watermark(s.now().Mono) >= rev }, func(fenced bool) {
		c.ev.Hurry = !fenced
		ans := s.bindOnce(c)
		if ans.wait != 0 && s.w.bug != "no second try" { // another Bind of this host came in between, or the fence went back
			c.ev.Hurry = true
			ans = s.bindOnce(c)
		}
		s.answered(ans, reply)
	})
}

// bindOnce asks the cores in order until one is not dry.
func (s *service) bindOnce(c bindCall) *answer {
	now := s.now()
	if old, ok := s.answers.Get(now.Mono, c.ev.Host, c.id); ok {
		return s.again(c.ev, old)
	}
	cores, holds := s.coresFor(c.ev)
	if !holds && len(s.fence.Serving(now.Mono)) == 0 {
		return &answer{deny: lease.ReasonNoTEP, pending: s.pending, at: now.Mono}
	}
	var ans *answer
	free := 0
	for _, core := range cores {
		st := core.Stats()
		free += st.Free + st.Reserved
		if ans = s.bindIn(core, c); ans.deny != lease.ReasonPoolDry {
			break
		}
	}
	s.w.truth.boundOrNot(c.ev, ans, free)
	if g := ans.grant; g != nil && ans.wait == 0 {
		s.answers.Put(now.Mono, c.ev.Host, c.id, given{ref: g.Ref, at: ans.at, valid: g.Valid, mtu: g.MTU, renewed: g.Renewed})
	}
	return ans
}

// coresFor returns the core that has the host's lease, or the one that it takes along; else first those that know it.
func (s *service) coresFor(ev lease.Bind) (cores []*lease.Core, holds bool) {
	r, ok := s.cell.Where(ev.Host)
	if !ok && ev.From.Gen != 0 {
		r, ok = ev.From.Resource, true
	}
	if c := s.core(r); ok && c != nil {
		return []*lease.Core{c}, true
	}
	for _, known := range []bool{true, false} {
		for _, c := range s.cores {
			if c.Knows(ev.Host) == known {
				cores = append(cores, c)
			}
		}
	}
	return cores, false
}

func (s *service) bindIn(core *lease.Core, c bindCall) *answer {
	now := s.now()
	ev := c.ev
	ev.PortSet = ev.PortSet && s.portSets()
	if core.Waits() {
		s.step(now, core, lease.FenceTo{Rev: s.fence.Watermark(now.Mono)})
	}
	ev.Hurry = ev.Hurry || !s.fence.Prompt(now.Mono)
	acts, p := s.step(now, core, ev)
	if g := acts.Grant; g != nil && !g.Renewed {
		s.w.book.bound(g.Ref, c.op)
	}
	return &answer{grant: acts.Grant, deny: acts.Deny, wait: acts.Wait, pending: p, at: now.Mono}
}

// portSets reports whether every gateway that may forward can do so for port sets.
func (s *service) portSets() bool {
	return !slices.ContainsFunc(s.fence.Status(s.now().Mono), func(t lease.TEPStatus) bool { return !s.caps[t.TEP] })
}

// again repeats an answer.
func (s *service) again(ev lease.Bind, g given) *answer {
	ans := &answer{at: g.at, grant: &lease.Grant{
		Ref: g.ref, Host: ev.Host, Source: ev.Source, TEP: s.w.pool(0).TEP, Valid: g.valid, MTU: g.mtu,
		Renewed: g.renewed, Rev: g.ref.Gen.Rev(),
	}}
	ans.pending = s.barrier()
	return ans
}

func (s *service) renew(c renewCall, reply func(any)) {
	ans := &answer{deny: lease.ReasonStaleGeneration, pending: s.pending, at: s.now().Mono}
	if core := s.core(c.ev.Ref.Resource); core != nil {
		acts, p := s.step(s.now(), core, c.ev)
		ans.grant, ans.deny, ans.pending = acts.Grant, acts.Deny, p
	}
	s.answered(ans, reply)
}

func (s *service) release(c releaseCall, reply func(any)) {
	core := s.core(c.ev.Ref.Resource)
	if core == nil {
		reply(released{})
		return
	}
	acts, p := s.step(s.now(), core, c.ev)
	if acts.Deny != lease.ReasonNone {
		reply(refused{acts.Deny})
		return
	}
	p.wait(s, func(err error) {
		if err == nil {
			reply(released{})
		}
	})
}

// answered turns an answer into the reply: durable first, then, for a new lease, installed at the serving gateways.
func (s *service) answered(ans *answer, reply func(any)) {
	pd := ans.pending
	if s.w.bug == "reply before durable" {
		pd = &pending{done: true}
	}
	pd.wait(s, func(err error) {
		if err != nil {
			return
		}
		g := ans.grant
		if g == nil {
			if ans.deny == lease.ReasonNone {
				s.w.fail("reason", "a call is refused without a reason")
			}
			reply(refused{ans.deny})
			return
		}
		s.await(func() bool { return s.installed(g.Rev) }, func(bool) { s.grantReply(ans, reply) })
	})
}

// installed reports whether the serving gateways hold a revision.
func (s *service) installed(rev lease.Rev) bool {
	for _, t := range s.fence.Serving(s.now().Mono) {
		if s.fence.Acked(t) < rev {
			return false
		}
	}
	return true
}

func (s *service) grantReply(ans *answer, reply func(any)) {
	g := ans.grant
	spent := s.now().Mono - ans.at
	if spent >= g.Valid {
		reply(refused{lease.ReasonExpired})
		return
	}
	s.w.truth.promised(s, g, ans.at)
	reply(granted{ref: g.Ref, tep: g.TEP, valid: g.Valid - spent, renewed: g.Renewed})
}

// hint is a resolver's word that a host is about to need a lease: an address is reserved and the host is offered one.
func (s *service) hint(h *host) {
	if s.dead || s.recover != nil {
		return
	}
	s.step(s.now(), s.cores[0], lease.Reserve{Host: h.identity()})
	s.w.net.datagram(s.node, h.node, func() { h.offered() })
}

// revoke is an operator's order.
func (s *service) revoke(r lease.Resource) {
	if s.dead || s.recover != nil {
		return
	}
	if c := s.core(r); c != nil {
		s.step(s.now(), c, lease.Revoke{Ref: lease.Ref{Resource: r}})
	}
}
