package leasesvc

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

type operatorsAPI struct {
	leasev1.UnimplementedOperatorsServer
	s *Server
}

// ListLeases implements the Operators service.
func (a operatorsAPI) ListLeases(m *leasev1.ListRequest, st leasev1.Operators_ListLeasesServer) error {
	s := a.s
	s.mu.Lock()
	now := s.now().Mono
	var out []*leasev1.LeaseInfo
	for _, c := range s.cores {
		if m.GetPool() != "" && m.GetPool() != c.Pool().Name {
			continue
		}
		for in := range c.All(now) {
			li := &leasev1.LeaseInfo{
				Res: wire.FromResource(in.Resource), Gen: uint64(in.Gen), State: in.State.String(), HostId: in.Host,
				Host: wire.FromAddr6(in.Source), Pool: c.Pool().Name, LeftMs: wire.FromDuration(in.Left), BoundMs: wire.FromTime(in.BoundAt),
			}
			if in.State == lease.Revoking {
				li.Waiting = s.fence.Waiting(now, in.RevokeRev)
			}
			out = append(out, li)
		}
	}
	s.mu.Unlock()
	for _, li := range out {
		if err := st.Send(li); err != nil {
			return err
		}
	}
	return nil
}

// Pools implements the Operators service.
func (a operatorsAPI) Pools(context.Context, *leasev1.PoolsRequest) (*leasev1.PoolsReply, error) {
	s := a.s
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now().Mono
	rep := &leasev1.PoolsReply{Hosts: uint32(s.hosts.attended())}
	for _, c := range s.cores {
		p, st := c.Pool(), c.Stats()
		u := s.usage[c].report(now, st)
		rep.Pools = append(rep.Pools, &leasev1.PoolInfo{
			Name: p.Name, Prefix: wire.FromAddr4(p.Prefix.Addr()), Bits: uint32(p.Prefix.Bits()), Tep: wire.FromAddr6(p.TEP),
			Size: uint32(st.Size), Bound: uint32(st.Bound), Revoking: uint32(st.Revoking), HeldDown: uint32(st.Hold),
			Free: uint32(st.Free + st.Reserved), Peak: uint32(u.peak), PeakDay: uint32(u.peakDay),
			WindowMs: wire.FromDuration(u.window), Binds: u.binds, Ends: u.ends, TakenMs: uint64(u.area.Milliseconds()),
			DryMs: wire.FromDuration(u.dry), Cut: uint32(st.Cut), SetsFree: uint32(st.SetsFree), SetsUsed: uint32(st.SetsUsed),
		})
	}
	return rep, nil
}

// ListTeps implements the Operators service.
func (a operatorsAPI) ListTeps(context.Context, *leasev1.TepsRequest) (*leasev1.TepsReply, error) {
	s := a.s
	s.mu.Lock()
	defer s.mu.Unlock()
	rep := &leasev1.TepsReply{}
	for _, t := range s.fence.Status(s.now().Mono) {
		rep.Teps = append(rep.Teps, &leasev1.TepInfo{
			Id: t.TEP, Connected: t.Live, Serving: t.Serving, Session: t.Session, AckedRev: uint64(t.Acked),
			HeadRev: uint64(t.Head), DeadlineLeftMs: wire.FromDuration(t.Deadline), Fenced: t.Fenced,
		})
	}
	return rep, nil
}

// Revoke implements the Operators service.
func (a operatorsAPI) Revoke(ctx context.Context, m *leasev1.RevokeRequest) (*leasev1.RevokeReply, error) {
	res, err := wire.Resource("res", m.GetRes())
	if err != nil {
		return nil, invalid(err)
	}
	s := a.s
	s.mu.Lock()
	c := s.core(res)
	if c == nil {
		s.mu.Unlock()
		return nil, deny(lease.ReasonStaleGeneration, "address %s is in no pool", res)
	}
	ref := lease.Ref{Resource: res, Gen: lease.Gen(m.GetGen())}
	acts, p := s.step(s.now(), c, lease.Revoke{Ref: ref, Reason: lease.ReasonAdmin})
	s.mu.Unlock()
	if acts.Deny != lease.ReasonNone {
		return nil, deny(acts.Deny, "address %s has no lease of generation %s", res, ref.Gen)
	}
	if err := s.durable(ctx, p); err != nil {
		return nil, undurable(err)
	}
	s.d.Log.Info("lease revoked by operator", "addr", res.String(), "operator", callerOf(ctx).id.Name)
	return &leasev1.RevokeReply{}, nil
}

// Status is what GET /status shows.
type Status struct {
	Cell    string       `json:"cell"`
	Cluster string       `json:"cluster"`
	Epoch   uint16       `json:"epoch"`
	Rev     uint64       `json:"rev"`
	Hosts   int          `json:"attended_hosts"`
	Pools   []PoolStatus `json:"pools"`
	TEPs    []TEPStatus  `json:"teps"`
}

// PoolStatus is one pool of a Status.
type PoolStatus struct {
	Name     string       `json:"name"`
	Prefix   netip.Prefix `json:"prefix"`
	Size     int          `json:"size"`
	Bound    int          `json:"bound"`
	Revoking int          `json:"revoking"`
	HeldDown int          `json:"held_down"`
	Free     int          `json:"free"`
}

// TEPStatus is one gateway of a Status.
type TEPStatus struct {
	ID      string `json:"id"`
	Live    bool   `json:"live"`
	Serving bool   `json:"serving"`
	Acked   uint64 `json:"acked_rev"`
}

// Status returns where the service stands.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Status{
		Cell: s.cfg.Cell, Cluster: clusterText(s.cluster), Epoch: uint16(s.cell.Epoch()), Rev: uint64(s.cell.Last()),
		Hosts: s.hosts.attended(), Pools: []PoolStatus{}, TEPs: []TEPStatus{},
	}
	for _, c := range s.cores {
		st := c.Stats()
		out.Pools = append(out.Pools, PoolStatus{
			Name: c.Pool().Name, Prefix: c.Pool().Prefix, Size: st.Size, Bound: st.Bound, Revoking: st.Revoking,
			HeldDown: st.Hold, Free: st.Free + st.Reserved,
		})
	}
	for _, t := range s.fence.Status(s.now().Mono) {
		out.TEPs = append(out.TEPs, TEPStatus{ID: t.TEP, Live: t.Live, Serving: t.Serving, Acked: uint64(t.Acked)})
	}
	return out
}

// Handlers are the pages of the admin listener.
func (s *Server) Handlers() map[string]http.Handler {
	return map[string]http.Handler{
		"GET /status": daemon.JSON("dstm.leasesvc/1", func(*http.Request) (any, error) { return s.Status(), nil }),
	}
}

func clusterText(c lease.ClusterID) string { return fmt.Sprintf("%x", c[:]) }
