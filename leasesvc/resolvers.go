package leasesvc

import (
	"context"
	"net/netip"
	"slices"
	"time"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

type resolversAPI struct {
	leasev1.UnimplementedResolversServer
	s *Server
}

// watcher is one resolver's view. Changes of one source coalesce, so a slow reader costs one entry a source and never
// holds anybody up.
type watcher struct {
	clients []netip.Prefix
	dirty   map[netip.Addr]struct{}
	pool    *leasev1.PoolState        // last sent
	lists   []*leasev1.RevocationList // to send
	wake    chan struct{}
}

func (w *watcher) wants(a netip.Addr) bool {
	return slices.ContainsFunc(w.clients, func(p netip.Prefix) bool { return p.Contains(a) })
}

func (w *watcher) kick() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// sourceChanged marks a source for every watcher. The caller holds mu.
func (s *Server) sourceChanged(a netip.Addr) {
	for w := range s.hosts.watchers {
		if w.wants(a) {
			w.dirty[a] = struct{}{}
			w.kick()
		}
	}
}

// hostChanged marks every source of a host. The caller holds mu.
func (s *Server) hostChanged(name string) {
	if at := s.hosts.byName[name]; at != nil {
		for _, a := range at.sources {
			s.sourceChanged(a)
		}
	}
}

// WatchHosts implements the Resolvers service.
func (a resolversAPI) WatchHosts(m *leasev1.WatchRequest, st leasev1.Resolvers_WatchHostsServer) error {
	w := &watcher{dirty: map[netip.Addr]struct{}{}, wake: make(chan struct{}, 1)}
	for _, p := range m.GetClients() {
		pfx, err := wire.Prefix6("clients", p)
		if err != nil {
			return invalid(err)
		}
		w.clients = append(w.clients, pfx)
	}
	s := a.s
	s.mu.Lock()
	s.hosts.watchers[w] = struct{}{} // first watch, then list
	w.lists = s.missing(m.GetLists())
	for src := range s.hosts.bySource {
		if w.wants(src) {
			w.dirty[src] = struct{}{}
		}
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.hosts.watchers, w)
		s.mu.Unlock()
	}()
	listed := false
	for {
		for _, e := range s.hostEvents(w) {
			if err := st.Send(e); err != nil {
				return err
			}
		}
		if !listed {
			listed = true
			if err := st.Send(&leasev1.HostEvent{M: &leasev1.HostEvent_InSync{InSync: true}}); err != nil {
				return err
			}
		}
		select {
		case <-st.Context().Done():
			return st.Context().Err()
		case <-w.wake:
		}
	}
}

// hostEvents takes what changed for a watcher.
func (s *Server) hostEvents(w *watcher) []*leasev1.HostEvent {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now().Mono
	var out []*leasev1.HostEvent
	for _, l := range w.lists {
		out = append(out, &leasev1.HostEvent{M: &leasev1.HostEvent_List{List: l}})
	}
	w.lists = nil
	if p := s.poolState(); w.pool == nil || w.pool.Dry != p.Dry || w.pool.HintsOn != p.HintsOn {
		w.pool = p
		out = append(out, &leasev1.HostEvent{M: &leasev1.HostEvent_Pool{Pool: p}})
	}
	for a := range w.dirty {
		at := s.hosts.bySource[a]
		if at == nil {
			out = append(out, &leasev1.HostEvent{M: &leasev1.HostEvent_Delete{Delete: wire.FromAddr6(a)}})
			continue
		}
		h := &leasev1.HostState{Source: wire.FromAddr6(a), Registered: true, HostKey: s.hosts.key(at.name)}
		if in, ok := s.leaseOf(now, at.name); ok && at.installed == in.Ref() {
			h.LeaseLeftMs = wire.FromDuration(in.Left)
		}
		if at.until > now && h.LeaseLeftMs == 0 {
			h.Refused, h.RefusedForMs = wire.FromReason(at.refused), wire.FromDuration(at.until-now)
		}
		out = append(out, &leasev1.HostEvent{M: &leasev1.HostEvent_Upsert{Upsert: h}})
	}
	clear(w.dirty)
	return out
}

func (s *Server) poolState() *leasev1.PoolState {
	dry := true
	for _, c := range s.cores {
		st := c.Stats()
		dry = dry && st.Free+st.Reserved == 0
	}
	return &leasev1.PoolState{HintsOn: !s.short, Dry: dry}
}

// runsShort reports whether resolvers should send no hints: from the time at which every pool is nearly full until one of them
// is well below. Hosts that need IPv4 still bind, by their first packet.
func (s *Server) runsShort() bool {
	for _, c := range s.cores {
		p := c.Pressure()
		if p == lease.PressureNone || p == lease.PressureHigh && !s.short {
			return false
		}
	}
	return true
}

// Hint implements the Resolvers service.
func (a resolversAPI) Hint(ctx context.Context, m *leasev1.HintRequest) (*leasev1.HintReply, error) {
	src, err := wire.Addr6("source", m.GetSource())
	if err != nil {
		return nil, invalid(err)
	}
	budget := time.NewTimer(wire.Duration(m.GetBudgetMs()))
	defer budget.Stop()
	s := a.s
	rep, h := s.hint(src, wire.Duration(m.GetBudgetMs()))
	if h != nil {
		select {
		case <-h.done:
		case <-budget.C:
			s.gaveUp(src, h)
		case <-ctx.Done():
			s.gaveUp(src, h)
		}
		rep = s.hintReply(src, h)
	}
	s.m.hints.WithLabelValues(rep.State.String()).Inc()
	return rep, nil
}

// hint answers what can be answered at once, or returns the hint to wait for: the one under way, or a new one with an
// Offer to the host.
func (s *Server) hint(src netip.Addr, within time.Duration) (*leasev1.HintReply, *hint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	at := s.hosts.bySource[src]
	switch {
	case at == nil:
		return &leasev1.HintReply{State: leasev1.HintState_REFUSED, Reason: leasev1.Reason_NOT_REGISTERED}, nil
	case at.until > now.Mono:
		return &leasev1.HintReply{State: leasev1.HintState_REFUSED, Reason: wire.FromReason(at.refused)}, nil
	}
	if in, ok := s.leaseOf(now.Mono, at.name); ok && at.installed == in.Ref() {
		return &leasev1.HintReply{State: leasev1.HintState_READY, LeaseLeftMs: wire.FromDuration(in.Left)}, nil
	}
	if at.silent {
		return &leasev1.HintReply{State: leasev1.HintState_PENDING}, nil
	}
	if at.hint == nil {
		s.hosts.lastHint++
		at.hint = &hint{id: s.hosts.lastHint, done: make(chan struct{}), state: leasev1.HintState_PENDING}
		s.step(now, s.cores[0], lease.Reserve{Host: at.name})
		at.tell(&leasev1.AttendDown{M: &leasev1.AttendDown_Offer{Offer: &leasev1.Offer{
			HintId: at.hint.id, WithinMs: wire.FromDuration(within),
		}}})
	}
	return nil, at.hint
}

// gaveUp notes that a budget ran out. A host that did not even answer the Offer is not held again until it speaks.
func (s *Server) gaveUp(src netip.Addr, h *hint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := s.hosts.bySource[src]; at != nil && at.hint == h {
		at.silent = !h.spoke
		at.settle(leasev1.HintState_PENDING, lease.ReasonNone)
	}
}

func (s *Server) hintReply(src netip.Addr, h *hint) *leasev1.HintReply {
	s.mu.Lock()
	defer s.mu.Unlock()
	rep := &leasev1.HintReply{State: h.state, Reason: wire.FromReason(h.why)}
	if at := s.hosts.bySource[src]; at != nil && h.state == leasev1.HintState_READY {
		if in, ok := s.leaseOf(s.now().Mono, at.name); ok {
			rep.LeaseLeftMs = wire.FromDuration(in.Left)
		}
	}
	return rep
}
