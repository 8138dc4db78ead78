package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// remoteOperator asks a lease service over TLS.
type remoteOperator struct {
	conn *grpc.ClientConn
	api  leasev1.OperatorsClient
}

// connect prepares the calls; the servers are tried in their order at the first one.
func connect(_ context.Context, c *Config) (operator, error) {
	s := c.LeaseService
	src, err := tlsid.Open(s.TLS, tlsid.RoleOperator, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	return dial(s.Servers, credentials.NewTLS(src.Client(s.Name)))
}

func dial(servers []netip.AddrPort, creds credentials.TransportCredentials) (operator, error) {
	r := manual.NewBuilderWithScheme("dstm")
	var st resolver.State
	for _, ap := range servers {
		st.Addresses = append(st.Addresses, resolver.Address{Addr: ap.String()})
	}
	r.InitialState(st)
	conn, err := grpc.NewClient("dstm:///lease", grpc.WithResolvers(r), grpc.WithTransportCredentials(creds))
	if err != nil {
		return nil, fmt.Errorf("lease service: %w", err)
	}
	return &remoteOperator{conn: conn, api: leasev1.NewOperatorsClient(conn)}, nil
}

func (o *remoteOperator) Close() error { return o.conn.Close() }

// failed turns the error of a call into a sentence.
func failed(err error) error {
	if we := new(wire.Error); errors.As(wire.FromStatus(err), &we) && we.Reason != lease.ReasonNone {
		return fmt.Errorf("lease service refuses: %w", we)
	}
	st := status.Convert(err)
	switch st.Code() {
	case codes.Unavailable:
		return fmt.Errorf("lease service cannot be reached: %s", st.Message())
	case codes.DeadlineExceeded:
		return errors.New("lease service does not answer in time; see --timeout")
	}
	return fmt.Errorf("lease service: %s", st.Message())
}

func (o *remoteOperator) Leases(ctx context.Context, pool string) ([]leaseView, error) {
	stream, err := o.api.ListLeases(ctx, &leasev1.ListRequest{Pool: pool})
	if err != nil {
		return nil, failed(err)
	}
	var out []leaseView
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, failed(err)
		}
		res, err := wire.Resource("lease", m.GetRes())
		if err != nil {
			return nil, err
		}
		out = append(out, leaseView{
			Addr: res.String(), Gen: genText(m.GetGen()), State: m.GetState(), Host: m.GetHostId(), Source: addrText(m.GetHost()),
			Pool: m.GetPool(), LeftMS: int64(m.GetLeftMs()), Bound: timePtr(m.GetBoundMs()), Waiting: m.GetWaiting(),
		})
	}
}

func (o *remoteOperator) Who(ctx context.Context, addr netip.Addr, port uint16, at time.Time) ([]holdingView, error) {
	reply, err := o.api.Who(ctx, &leasev1.WhoRequest{Addr: wire.FromAddr4(addr), Port: uint32(port), AtUnixMs: wire.FromTime(at)})
	if err != nil {
		return nil, failed(err)
	}
	var out []holdingView
	for _, m := range reply.GetHoldings() {
		res, err := wire.Resource("holding", m.GetRes())
		if err != nil {
			return nil, err
		}
		h := holdingView{
			Addr: res.String(), Gen: genText(m.GetGen()), Host: m.GetHostId(), Source: addrText(m.GetHost()),
			Bound: timePtr(m.GetBoundMs()), Unbound: timePtr(m.GetUnboundMs()), Fenced: timePtr(m.GetFencedMs()),
		}
		if end := wire.Reason(m.GetEnd()); end != lease.ReasonNone {
			h.End = end.String()
		}
		out = append(out, h)
	}
	return out, nil
}

func (o *remoteOperator) Pools(ctx context.Context) ([]poolView, error) {
	reply, err := o.api.Pools(ctx, &leasev1.PoolsRequest{})
	if err != nil {
		return nil, failed(err)
	}
	var out []poolView
	for _, m := range reply.GetPools() {
		prefix, err := wire.Prefix4("pool", m.GetPrefix(), m.GetBits())
		if err != nil {
			return nil, err
		}
		out = append(out, poolView{
			Name: m.GetName(), Prefix: prefix.String(), TEP: addrText(m.GetTep()), Size: m.GetSize(), Bound: m.GetBound(),
			Revoking: m.GetRevoking(), HeldDown: m.GetHeldDown(), Free: m.GetFree(),
		})
	}
	return out, nil
}

func (o *remoteOperator) TEPs(ctx context.Context) ([]tepView, error) {
	reply, err := o.api.ListTeps(ctx, &leasev1.TepsRequest{})
	if err != nil {
		return nil, failed(err)
	}
	var out []tepView
	for _, m := range reply.GetTeps() {
		out = append(out, tepView{
			ID: m.GetId(), Connected: m.GetConnected(), Serving: m.GetServing(), Session: m.GetSession(),
			AckedRev: m.GetAckedRev(), HeadRev: m.GetHeadRev(), DeadlineMS: int64(m.GetDeadlineLeftMs()),
		})
	}
	return out, nil
}

func (o *remoteOperator) Revoke(ctx context.Context, ref lease.Ref) error {
	_, err := o.api.Revoke(ctx, &leasev1.RevokeRequest{Res: wire.FromResource(ref.Resource), Gen: uint64(ref.Gen)})
	if err != nil {
		return failed(err)
	}
	return nil
}

// genText prints a generation; a reserved address has none.
func genText(g uint64) string {
	if g == 0 {
		return ""
	}
	return lease.Gen(g).String()
}

// addrText prints an IPv6 address; a reserved address has none.
func addrText(b []byte) string {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return ""
	}
	return a.String()
}

func timePtr(ms int64) *time.Time {
	if ms == 0 {
		return nil
	}
	t := wire.Time(ms).UTC()
	return &t
}
