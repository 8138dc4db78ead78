package main

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// service is the far end: it answers with one of everything.
type service struct {
	leasev1.UnimplementedOperatorsServer
	revoke *leasev1.RevokeRequest
}

var (
	address = lease.Whole(netip.MustParseAddr("198.51.100.1"))
	tunnel  = netip.MustParseAddr("2001:db8:1::a")
)

func (*service) ListLeases(_ *leasev1.ListRequest, s grpc.ServerStreamingServer[leasev1.LeaseInfo]) error {
	return s.Send(&leasev1.LeaseInfo{
		Res: wire.FromResource(address), Gen: uint64(lease.MakeGen(1, 42)), State: "BOUND", HostId: "host1",
		Host: wire.FromAddr6(tunnel), Pool: "main", LeftMs: 1000, BoundMs: noon.UnixMilli(),
	})
}

func (*service) Who(_ context.Context, r *leasev1.WhoRequest) (*leasev1.WhoReply, error) {
	if r.GetAtUnixMs() != noon.UnixMilli() || r.GetPort() != 80 {
		return nil, status.Error(codes.InvalidArgument, "not what was asked")
	}
	return &leasev1.WhoReply{Holdings: []*leasev1.Holding{{
		HostId: "host1", Host: wire.FromAddr6(tunnel), Res: wire.FromResource(address), Gen: uint64(lease.MakeGen(1, 42)),
		BoundMs: noon.UnixMilli(), End: leasev1.Reason_EXPIRED,
	}}}, nil
}

func (*service) Pools(context.Context, *leasev1.PoolsRequest) (*leasev1.PoolsReply, error) {
	return &leasev1.PoolsReply{Pools: []*leasev1.PoolInfo{{
		Name: "main", Prefix: wire.FromAddr4(netip.MustParseAddr("198.51.100.0")), Bits: 24, Tep: wire.FromAddr6(tunnel), Size: 254, Free: 254,
	}}}, nil
}

func (s *service) Revoke(_ context.Context, r *leasev1.RevokeRequest) (*leasev1.RevokeReply, error) {
	s.revoke = r
	return nil, wire.ToStatus(&wire.Error{
		Code: wire.CodeFor(lease.ReasonStaleGeneration), Reason: lease.ReasonStaleGeneration, Msg: "198.51.100.1 has another lease",
	})
}

// The calls over a real connection; the first server of the list is dead.
func TestConnect(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	s, far := grpc.NewServer(), &service{}
	leasev1.RegisterOperatorsServer(s, far)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	op, err := dial([]netip.AddrPort{netip.MustParseAddrPort("[::1]:1"), netip.MustParseAddrPort(l.Addr().String())}, insecure.NewCredentials())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = op.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	at := noon
	leases, err := op.Leases(ctx, "")
	check(t, err, leases, []leaseView{{Addr: "198.51.100.1", Gen: "1.42", State: "BOUND", Host: "host1", Source: "2001:db8:1::a", Pool: "main", LeftMS: 1000, Bound: &at}})
	held, err := op.Who(ctx, address.Addr, 80, noon)
	check(t, err, held, []holdingView{{Addr: "198.51.100.1", Gen: "1.42", Host: "host1", Source: "2001:db8:1::a", Bound: &at, End: "EXPIRED"}})
	pools, err := op.Pools(ctx)
	check(t, err, pools, []poolView{{Name: "main", Prefix: "198.51.100.0/24", TEP: "2001:db8:1::a", Size: 254, Free: 254}})
	if _, err := op.TEPs(ctx); err == nil || err.Error() != "lease service: method ListTeps not implemented" {
		t.Errorf("a call that is not there: %v", err)
	}
	if err := op.Revoke(ctx, lease.Ref{Resource: address, Gen: 7}); err == nil || wire.ReasonOf(err) != lease.ReasonStaleGeneration {
		t.Errorf("a refusal: %v", err)
	}
	if far.revoke.GetGen() != 7 {
		t.Errorf("revoke asked for %v", far.revoke)
	}
	s.Stop()
	if _, err := op.Pools(ctx); err == nil {
		t.Error("an answer from nobody")
	}
}

func check[T any](t *testing.T, err error, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
}
