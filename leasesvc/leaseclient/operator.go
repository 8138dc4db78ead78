package leaseclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"google.golang.org/grpc"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// LeaseInfo is one address that is not free, as operators see it.
type LeaseInfo struct {
	lease.Ref
	State   string
	HostID  string
	Host    netip.Addr
	Pool    string
	Left    time.Duration
	Bound   time.Time
	Waiting []string // REVOKING: gateways not fenced yet
}

// Leases lists the addresses that are not free; pool "" means all pools.
func (c *Conn) Leases(ctx context.Context, pool string) ([]LeaseInfo, error) {
	st, err := leasev1.NewOperatorsClient(c.get()).ListLeases(ctx, &leasev1.ListRequest{Pool: pool})
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", wire.FromStatus(err))
	}
	var out []LeaseInfo
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list leases: %w", wire.FromStatus(err))
		}
		res, err := wire.Resource("res", m.GetRes())
		if err != nil {
			return nil, fmt.Errorf("list leases: %w", err)
		}
		out = append(out, LeaseInfo{
			Ref: lease.Ref{Resource: res, Gen: lease.Gen(m.GetGen())}, State: m.GetState(), HostID: m.GetHostId(),
			Host: addr6(m.GetHost()), Pool: m.GetPool(), Left: wire.Duration(m.GetLeftMs()), Bound: wire.Time(m.GetBoundMs()),
			Waiting: m.GetWaiting(),
		})
	}
}

// addr6 decodes an address that is shown only: one that makes no sense is shown as none.
func addr6(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

// PoolInfo is one pool with its counts of addresses. An address is taken while it is neither free nor reserved.
type PoolInfo struct {
	lease.Pool
	Size, Bound, Revoking, HeldDown, Free uint32

	Cut                uint32 // addresses leased by port sets
	SetsFree, SetsUsed uint32 // their port sets

	Peak, PeakDay uint32        // most addresses taken at once: since the service started, in the last 24 h
	Window        time.Duration // the last hour, or since the service started: what Binds, Ends and Mean are of
	Binds, Ends   uint64        // leases that began and ended
	Mean          float64       // addresses taken on average
	Dry           time.Duration // until no address is free at the trend of the last ten minutes; 0 = there is no such trend
	Hosts         uint32        // that have a live Attend stream, the same for every pool
}

// Pools lists the pools.
func (c *Conn) Pools(ctx context.Context) ([]PoolInfo, error) {
	rep, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.PoolsRequest) (*leasev1.PoolsReply, error) {
		return leasev1.NewOperatorsClient(cc).Pools(ctx, m)
	}, &leasev1.PoolsRequest{})
	if err != nil {
		return nil, fmt.Errorf("pools: %w", err)
	}
	out := make([]PoolInfo, 0, len(rep.GetPools()))
	for _, p := range rep.GetPools() {
		pfx, err := wire.Prefix4("prefix", p.GetPrefix(), p.GetBits())
		if err != nil {
			return nil, fmt.Errorf("pools: %w", err)
		}
		out = append(out, PoolInfo{
			Pool: lease.Pool{Name: p.GetName(), Prefix: pfx, TEP: addr6(p.GetTep())},
			Size: p.GetSize(), Bound: p.GetBound(), Revoking: p.GetRevoking(), HeldDown: p.GetHeldDown(), Free: p.GetFree(),
			Peak: p.GetPeak(), PeakDay: p.GetPeakDay(), Window: wire.Duration(p.GetWindowMs()), Binds: p.GetBinds(), Ends: p.GetEnds(),
			Mean: float64(p.GetTakenMs()) / float64(max(1, p.GetWindowMs())), Dry: wire.Duration(p.GetDryMs()), Hosts: rep.GetHosts(),
			Cut: p.GetCut(), SetsFree: p.GetSetsFree(), SetsUsed: p.GetSetsUsed(),
		})
	}
	return out, nil
}

// TEPInfo is one gateway of the fence set.
type TEPInfo struct {
	ID           string
	Connected    bool
	Serving      bool
	Session      uint64
	Acked, Head  lease.Rev
	DeadlineLeft time.Duration // until the service counts it as fenced by time
	Fenced       string        // why nothing waits for it: time, witness or order; empty = it may forward
}

// TEPs lists the gateways.
func (c *Conn) TEPs(ctx context.Context) ([]TEPInfo, error) {
	rep, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.TepsRequest) (*leasev1.TepsReply, error) {
		return leasev1.NewOperatorsClient(cc).ListTeps(ctx, m)
	}, &leasev1.TepsRequest{})
	if err != nil {
		return nil, fmt.Errorf("teps: %w", err)
	}
	out := make([]TEPInfo, 0, len(rep.GetTeps()))
	for _, t := range rep.GetTeps() {
		out = append(out, TEPInfo{
			ID: t.GetId(), Connected: t.GetConnected(), Serving: t.GetServing(), Session: t.GetSession(),
			Acked: lease.Rev(t.GetAckedRev()), Head: lease.Rev(t.GetHeadRev()), DeadlineLeft: wire.Duration(t.GetDeadlineLeftMs()), Fenced: t.GetFenced(),
		})
	}
	return out, nil
}

// Revoke ends a lease; generation 0 means whichever is bound.
func (c *Conn) Revoke(ctx context.Context, ref lease.Ref) error {
	m := &leasev1.RevokeRequest{Res: wire.FromResource(ref.Resource), Gen: uint64(ref.Gen)}
	_, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.RevokeRequest) (*leasev1.RevokeReply, error) {
		return leasev1.NewOperatorsClient(cc).Revoke(ctx, m)
	}, m)
	if err != nil {
		return fmt.Errorf("revoke: %w", err)
	}
	return nil
}

// FenceTEP gives the operator's word that a gateway is off.
func (c *Conn) FenceTEP(ctx context.Context, id string) error {
	_, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.FenceTepRequest) (*leasev1.FenceTepReply, error) {
		return leasev1.NewOperatorsClient(cc).FenceTep(ctx, m)
	}, &leasev1.FenceTepRequest{Id: id})
	if err != nil {
		return fmt.Errorf("fence: %w", err)
	}
	return nil
}

// RemoveTEP takes a fenced gateway out of the fence set.
func (c *Conn) RemoveTEP(ctx context.Context, id string) error {
	_, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.RemoveTepRequest) (*leasev1.RemoveTepReply, error) {
		return leasev1.NewOperatorsClient(cc).RemoveTep(ctx, m)
	}, &leasev1.RemoveTepRequest{Id: id})
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}
