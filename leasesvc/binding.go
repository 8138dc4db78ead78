package leasesvc

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/policy"
	"github.com/dstm-project/dstm/leasesvc/store"
)

type hostsAPI struct {
	leasev1.UnimplementedHostsServer
	s *Server
}

// given is the lease that a request id was answered with.
type given struct {
	ref     lease.Ref
	at      time.Duration
	valid   time.Duration
	mtu     uint16
	renewed bool
}

// answer is what a host is told once pending is durable.
type answer struct {
	grant   *lease.Grant
	deny    lease.Reason
	pending *store.Pending
	at      time.Duration
	wait    lease.Rev // neither: the revoke at this revision has to be fenced first
	text    string    // of the policy that refused
}

// Bind implements the Hosts service.
func (a hostsAPI) Bind(ctx context.Context, m *leasev1.BindRequest) (*leasev1.Lease, error) {
	if err := a.s.complete(); err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	id, err := wire.RequestID(m.GetRequestId())
	if err != nil {
		return nil, invalid(err)
	}
	source, err := wire.Addr6("tunnel_source", m.GetTunnelSource())
	if err != nil {
		return nil, invalid(err)
	}
	mtu, err := wire.MTU("mtu", m.GetMtu())
	if err != nil {
		return nil, invalid(err)
	}
	ev := lease.Bind{
		Host: c.id.Name, Source: source, Valid: wire.Duration(m.GetValidMs()), MTU: mtu, Trigger: wire.Trigger(m.GetTrigger()),
		PortSet: m.GetAcceptsPortset(),
	}
	if m.GetWant() != nil {
		if ev.Want, err = wire.Resource("want", m.GetWant()); err != nil {
			return nil, invalid(err)
		}
	}
	if ev.From, err = a.s.held(c, m.GetHeld()); err != nil {
		return nil, err
	}
	a.s.hostSpoke(ev.Host)
	if err := a.s.checkSource(c, source); err != nil {
		return nil, err
	}
	ans := a.s.bind(ctx, id, ev, false)
	if ans.wait != 0 {
		// The host comes back to its address, or takes it along: once no gateway forwards for the lease before.
		ev.Hurry = !a.s.awaitFence(ctx, ans.wait)
		if ans = a.s.bind(ctx, id, ev, true); ans.wait != 0 { // another Bind of this host came in between, or the fence went back
			ev.Hurry = true
			ans = a.s.bind(ctx, id, ev, true)
		}
	}
	return a.s.answered(ctx, c, ans, "bind")
}

// Renew implements the Hosts service.
func (a hostsAPI) Renew(ctx context.Context, m *leasev1.RenewRequest) (*leasev1.Lease, error) {
	if err := a.s.complete(); err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	if _, err := wire.RequestID(m.GetRequestId()); err != nil {
		return nil, invalid(err)
	}
	ref, err := wire.Ref("lease", m.GetLease())
	if err != nil {
		return nil, invalid(err)
	}
	source, err := wire.Addr6("tunnel_source", m.GetTunnelSource())
	if err != nil {
		return nil, invalid(err)
	}
	mtu, err := wire.MTU("mtu", m.GetMtu())
	if err != nil {
		return nil, invalid(err)
	}
	if err := a.s.checkSource(c, source); err != nil {
		return nil, err
	}
	host, err := a.s.holder(c, ref, m.GetSecret())
	if err != nil {
		return nil, err
	}
	ev := lease.Renew{Host: host, Ref: ref, Source: source, Valid: wire.Duration(m.GetValidMs()), MTU: mtu}
	return a.s.answered(ctx, c, a.s.renew(ev), "renew")
}

// Release implements the Hosts service.
func (a hostsAPI) Release(ctx context.Context, m *leasev1.ReleaseRequest) (*leasev1.ReleaseReply, error) {
	if err := a.s.complete(); err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	ref, err := wire.Ref("lease", m.GetLease())
	if err != nil {
		return nil, invalid(err)
	}
	s := a.s
	host, err := s.holder(c, ref, m.GetSecret())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	core := s.core(ref.Resource)
	if core == nil { // of a pool that is gone: so is the lease
		s.mu.Unlock()
		return &leasev1.ReleaseReply{}, nil
	}
	acts, p := s.step(s.now(), core, lease.Release{Host: host, Ref: ref, Reason: wire.Reason(m.GetReason())})
	s.mu.Unlock()
	if acts.Deny != lease.ReasonNone {
		return nil, deny(acts.Deny, "lease %s is not of %s", ref, c.id.Name)
	}
	if err := s.durable(ctx, p); err != nil {
		return nil, undurable(err)
	}
	return &leasev1.ReleaseReply{}, nil
}

// coresFor returns the core that has the host's lease, or the one that it takes along; else first those that have had it or
// keep an address for it, then the others, in order of the configuration. The caller holds mu.
func (s *Server) coresFor(ev lease.Bind) (cores []*lease.Core, holds bool) {
	r, ok := s.cell.Where(ev.Host)
	if !ok && ev.From.Gen != 0 {
		r, ok = ev.From.Resource, true
	}
	if c := s.core(r); ok && c != nil {
		return []*lease.Core{c}, true
	}
	out := make([]*lease.Core, 0, len(s.cores))
	for _, known := range []bool{true, false} {
		for _, c := range s.cores {
			if c.Knows(ev.Host) == known {
				out = append(out, c)
			}
		}
	}
	return out, false
}

// capPortSets is what a gateway says that it can do when it can forward for port sets.
const capPortSets = "port_sets"

// portSets reports whether every gateway that may forward can forward for port sets. The caller holds mu.
func (s *Server) portSets() bool {
	for _, t := range s.fence.Status(s.now().Mono) {
		if !slices.Contains(s.caps[t.TEP], capPortSets) {
			return false
		}
	}
	return true
}

// awaitFence waits at most bind_wait for the revoke at a revision to be fenced.
func (s *Server) awaitFence(ctx context.Context, rev lease.Rev) bool {
	limit := time.NewTimer(s.cfg.Timers.BindWait)
	defer limit.Stop()
	for {
		changed := s.acked.C()
		s.mu.Lock()
		fenced := s.fence.Watermark(s.now().Mono) >= rev
		s.mu.Unlock()
		if fenced {
			return true
		}
		select {
		case <-changed:
		case <-limit.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// bind asks the cores in order until one is not dry, each after the policy has allowed a lease of its pool.
func (s *Server) bind(ctx context.Context, id lease.RequestID, ev lease.Bind, moving bool) *answer {
	cores, holds, ans := s.beginBind(id, ev)
	if ans != nil {
		return ans
	}
	for _, c := range cores {
		// Renewals, moves and repeated calls ask no policy. It may take its time, so mu is free meanwhile.
		if !holds && !moving {
			if d := s.decide(ctx, ev, c.Pool().Name); !d.Allowed() {
				ans = &answer{deny: lease.ReasonPolicy, text: d.Reason, pending: store.Done(nil)}
				continue
			}
		}
		if ans = s.bindIn(c, ev); ans.deny != lease.ReasonPoolDry {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ans.wait == 0 {
		now := s.now()
		s.settle(now, ev.Host, ans)
		if g := ans.grant; g != nil {
			s.answers.Put(now.Mono, ev.Host, id, given{ref: g.Ref, at: ans.at, valid: g.Valid, mtu: g.MTU, renewed: g.Renewed})
		}
	}
	return ans
}

// beginBind returns the cores to ask and whether the host has a lease already; or the answer, when that is all there is to it.
func (s *Server) beginBind(id lease.RequestID, ev lease.Bind) (cores []*lease.Core, holds bool, ans *answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if old, ok := s.answers.Get(now.Mono, ev.Host, id); ok {
		return nil, false, s.again(ev, old)
	}
	cores, holds = s.coresFor(ev)
	if !holds && len(s.fence.Serving(now.Mono)) == 0 {
		// An address that nobody forwards is of no use, and would be fenced for hours.
		s.refusedHost(now, ev.Host, lease.ReasonNoTEP)
		return nil, false, &answer{deny: lease.ReasonNoTEP, pending: s.pending, at: now.Mono}
	}
	return cores, holds, nil
}

// bindIn steps one core.
func (s *Server) bindIn(c *lease.Core, ev lease.Bind) *answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	ev.PortSet = ev.PortSet && s.portSets()
	if c.Waits() {
		s.step(now, c, lease.FenceTo{Rev: s.fence.Watermark(now.Mono)}) // or a move would wait for the sweeper
	}
	// While a gateway is away its fence takes its time: then rather another address.
	ev.Hurry = ev.Hurry || !s.fence.Prompt(now.Mono)
	acts, p := s.step(now, c, ev)
	return &answer{grant: acts.Grant, deny: acts.Deny, wait: acts.Wait, pending: p, at: now.Mono}
}

// Policy decides who may have a lease; *policy.Engine in production.
type Policy interface {
	Decide(ctx context.Context, r policy.Request) policy.Decision
}

// decide asks the policy, if there is one.
func (s *Server) decide(ctx context.Context, ev lease.Bind, pool string) policy.Decision {
	if s.d.Policy == nil {
		return policy.Decision{Verdict: policy.Allow}
	}
	return s.d.Policy.Decide(ctx, policy.Request{Host: ev.Host, Source: ev.Source, Trigger: ev.Trigger, Pool: pool})
}

// renew needs no memory of request ids: a call that is repeated renews once more what is live, and nothing else.
func (s *Server) renew(ev lease.Renew) *answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	ans := &answer{deny: lease.ReasonStaleGeneration, pending: s.pending, at: now.Mono}
	if c := s.core(ev.Ref.Resource); c != nil {
		acts, p := s.step(now, c, ev)
		ans.grant, ans.deny, ans.pending = acts.Grant, acts.Deny, p
	}
	s.settle(now, ev.Host, ans)
	return ans
}

// again repeats an answer. The caller holds mu.
func (s *Server) again(ev lease.Bind, g given) *answer {
	ans := &answer{deny: lease.ReasonStaleGeneration, pending: s.pending, at: g.at}
	if c := s.core(g.ref.Resource); c != nil {
		ans.deny = lease.ReasonNone
		ans.grant = &lease.Grant{
			Ref: g.ref, Host: ev.Host, Source: ev.Source, TEP: c.Pool().TEP, Valid: g.valid, MTU: g.mtu,
			Renewed: g.renewed, Rev: g.ref.Gen.Rev(),
		}
		ans.pending = s.barrier()
	}
	return ans
}

// settle notes what a host was answered. The caller holds mu.
func (s *Server) settle(now lease.Now, host string, ans *answer) {
	if ans.grant == nil {
		s.m.binds.WithLabelValues(ans.deny.String()).Inc()
		s.refusedHost(now, host, ans.deny)
		return
	}
	if at := s.hosts.byName[host]; at != nil {
		at.until = 0
	}
	g := ans.grant
	result := "granted"
	if g.Renewed {
		result = "renewed"
	} else {
		s.d.Log.Info("lease granted", "addr", g.Resource.String(), "gen", g.Gen.String(), "host", host, "tep", g.TEP.String())
	}
	s.m.binds.WithLabelValues(result).Inc()
	s.hostChanged(host)
}

// answered turns an answer into the reply: durable first, then, for a new lease, installed at the serving gateways.
func (s *Server) answered(ctx context.Context, c caller, ans *answer, what string) (*leasev1.Lease, error) {
	if err := s.durable(ctx, ans.pending); err != nil {
		return nil, undurable(err)
	}
	if ans.grant == nil {
		why := sentence(ans.deny)
		if ans.text != "" {
			why = ans.text
		}
		return nil, deny(ans.deny, "%s refused: %s", what, why)
	}
	g := ans.grant
	waiting, installed := s.awaitInstalled(ctx, g.Rev)
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	s.mu.Lock()
	spent := s.now().Mono - ans.at
	s.mu.Unlock()
	if spent >= g.Valid {
		return nil, status.Error(codes.DeadlineExceeded, "the lease of this request id has run out")
	}
	out := &leasev1.Lease{
		Res: wire.FromResource(g.Resource), Gen: uint64(g.Gen), Tep: wire.FromAddr6(g.TEP),
		// The host counts from the sending of its request. What was spent since the event comes off, so that an answer
		// that is given again promises no more than the first.
		ValidMs: wire.FromDuration(g.Valid - spent), MtuMax: uint32(g.MTU), Installed: installed, Waiting: waiting,
	}
	if c.byAddress {
		out.Secret = s.proof(g.Host, g.Ref)
	}
	return out, nil
}

// awaitInstalled waits at most bind_wait for the serving gateways to hold a revision.
func (s *Server) awaitInstalled(ctx context.Context, rev lease.Rev) (waiting []string, installed bool) {
	limit := time.NewTimer(s.cfg.Timers.BindWait)
	defer limit.Stop()
	for {
		changed := s.acked.C()
		var serving []string
		s.mu.Lock()
		serving = s.fence.Serving(s.now().Mono)
		waiting = waiting[:0]
		for _, t := range serving {
			if s.fence.Acked(t) < rev {
				waiting = append(waiting, t)
			}
		}
		s.mu.Unlock()
		if len(waiting) == 0 {
			return nil, len(serving) > 0
		}
		select {
		case <-changed:
		case <-limit.C:
			return waiting, false
		case <-ctx.Done():
			return waiting, false
		}
	}
}

// sentence explains a refusal to a person.
func sentence(r lease.Reason) string {
	switch r {
	case lease.ReasonPoolDry:
		return "no address is free"
	case lease.ReasonQuota:
		return "this identity or its /64 has all the leases it may have"
	case lease.ReasonNoTEP:
		return "no gateway serves"
	case lease.ReasonStaleGeneration:
		return "the lease is not the live one"
	case lease.ReasonMoved:
		return "the lease belongs to another tunnel source"
	case lease.ReasonPolicy:
		return "a policy does not allow it"
	}
	return r.String()
}
