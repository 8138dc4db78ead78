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

// PoolInfo is one pool with its counts of addresses.
type PoolInfo struct {
	lease.Pool
	Size, Bound, Revoking, HeldDown, Free uint32
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
			Acked: lease.Rev(t.GetAckedRev()), Head: lease.Rev(t.GetHeadRev()), DeadlineLeft: wire.Duration(t.GetDeadlineLeftMs()),
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
