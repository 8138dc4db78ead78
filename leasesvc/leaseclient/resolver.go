package leaseclient

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/grpc"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
)

// HostState is what the service knows of one source address.
type HostState struct {
	Source     netip.Addr
	Registered bool
	Left       time.Duration // of the host's lease; 0 = none
	Refused    lease.Reason  // ReasonNone = not refused
	RefusedFor time.Duration
	Key        uint64 // equal for the sources of one host
}

// PoolState is what the service says of all pools together.
type PoolState struct {
	HintsOn bool
	Dry     bool
}

// HostGone says that a source is no longer registered.
type HostGone struct{ Source netip.Addr }

// InSync says that every registered host has been listed.
type InSync struct{}

// Watch is a stream of host events.
type Watch struct {
	c      *Conn
	stream grpc.ServerStreamingClient[leasev1.HostEvent]
	cancel context.CancelFunc
}

// WatchHosts asks for the registered hosts inside the prefixes: all of them, InSync, then changes.
func (c *Conn) WatchHosts(ctx context.Context, clients []netip.Prefix) (*Watch, error) {
	m := &leasev1.WatchRequest{Lists: c.lists()}
	for _, p := range clients {
		m.Clients = append(m.Clients, &leasev1.Prefix{Addr: wire.FromAddr6(p.Addr()), Bits: uint32(p.Bits())})
	}
	ctx, cancel := context.WithCancel(ctx)
	st, err := leasev1.NewResolversClient(c.get()).WatchHosts(ctx, m)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("watch hosts: %w", wire.FromStatus(err))
	}
	return &Watch{c: c, stream: st, cancel: cancel}, nil
}

// Recv returns the next HostState, HostGone, InSync or PoolState. An error ends the watch.
func (w *Watch) Recv() (any, error) {
	for {
		m, err := w.stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("watch hosts: %w", wire.FromStatus(err))
		}
		switch k := m.GetM().(type) {
		case *leasev1.HostEvent_Upsert:
			a, err := wire.Addr6("upsert.source", k.Upsert.GetSource())
			if err != nil {
				return nil, fmt.Errorf("watch hosts: %w", err)
			}
			return HostState{
				Source: a, Registered: k.Upsert.GetRegistered(), Left: wire.Duration(k.Upsert.GetLeaseLeftMs()),
				Refused: wire.Reason(k.Upsert.GetRefused()), RefusedFor: wire.Duration(k.Upsert.GetRefusedForMs()),
				Key: k.Upsert.GetHostKey(),
			}, nil
		case *leasev1.HostEvent_Delete:
			a, err := wire.Addr6("delete", k.Delete)
			if err != nil {
				return nil, fmt.Errorf("watch hosts: %w", err)
			}
			return HostGone{a}, nil
		case *leasev1.HostEvent_InSync:
			return InSync{}, nil
		case *leasev1.HostEvent_Pool:
			return PoolState{HintsOn: k.Pool.GetHintsOn(), Dry: k.Pool.GetDry()}, nil
		case *leasev1.HostEvent_List:
			w.c.pushed(k.List)
		}
	}
}

// Close ends the watch; Recv returns an error.
func (w *Watch) Close() { w.cancel() }

// HintResult is the answer to a Hint.
type HintResult uint8

// The answers.
const (
	HintPending HintResult = 0 // the budget was spent first
	HintReady   HintResult = 1 // the host's path is up
	HintRefused HintResult = 2
)

// Hint says that the host at source is about to use IPv4 and waits, at most until ctx ends, for its path. It is sent
// once: a hint that is late is of no use.
func (c *Conn) Hint(ctx context.Context, source netip.Addr) (HintResult, lease.Reason, time.Duration, error) {
	m := &leasev1.HintRequest{Source: wire.FromAddr6(source)}
	if at, ok := ctx.Deadline(); ok {
		m.BudgetMs = wire.FromDuration(time.Until(at))
	}
	rep, err := leasev1.NewResolversClient(c.get()).Hint(ctx, m)
	if err != nil {
		return HintPending, lease.ReasonNone, 0, fmt.Errorf("hint: %w", wire.FromStatus(err))
	}
	res := HintPending
	switch rep.GetState() {
	case leasev1.HintState_READY:
		res = HintReady
	case leasev1.HintState_REFUSED:
		res = HintRefused
	case leasev1.HintState_PENDING, leasev1.HintState_HINT_UNSPECIFIED:
	}
	return res, wire.Reason(rep.GetReason()), wire.Duration(rep.GetLeaseLeftMs()), nil
}
