package leasesvc

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// maxHistory bounds a reply that asks for the whole history of an address.
const maxHistory = 1000

// Who implements the Operators service.
func (a operatorsAPI) Who(ctx context.Context, m *leasev1.WhoRequest) (*leasev1.WhoReply, error) {
	port := uint16(m.GetPort())
	rep := &leasev1.WhoReply{}
	err := a.s.d.Store.History(ctx, wire.Addr4(m.GetAddr()), wire.Instant(m.GetAtUnixNs()), func(h lease.Audit) bool {
		if port != 0 && !h.HasPort(port) {
			return true
		}
		rep.Holdings = append(rep.Holdings, &leasev1.Holding{
			HostId: h.Host, Host: wire.FromAddr6(h.Source), Tep: wire.FromAddr6(h.TEP), Res: wire.FromResource(h.Resource), Gen: uint64(h.Gen),
			BoundUnixNs: wire.FromInstant(h.Bound), UnboundUnixNs: wire.FromInstant(h.Unbound), FencedUnixNs: wire.FromInstant(h.Fenced),
			End: wire.FromReason(h.End),
		})
		return len(rep.Holdings) < maxHistory
	})
	if err != nil {
		return nil, unread(ctx, err)
	}
	return rep, nil
}

// exportStep is the number of audit records that are read at once.
const exportStep = 1024

// AuditExport implements the Operators service.
func (a operatorsAPI) AuditExport(m *leasev1.AuditExportRequest, st leasev1.Operators_AuditExportServer) error {
	ctx, s := st.Context(), a.s.d.Store
	after, to := lease.Rev(m.GetAfterRev()), wire.Instant(m.GetToUnixNs())
	if from := wire.Instant(m.GetFromUnixNs()); !from.IsZero() {
		first, err := beforeInstant(ctx, s, from)
		if err != nil {
			return unread(ctx, err)
		}
		after = max(after, first)
	}
	for {
		// What comes after this is watched for; what came before is read below.
		state, err := s.Load(ctx)
		if err != nil {
			return unread(ctx, err)
		}
		done, err := export(st, s, &after, to)
		if err != nil || done || !m.GetFollow() {
			return err
		}
		_, err = s.Watch(state.Last).Next(ctx)
		if err != nil && !errors.Is(err, store.ErrCompacted) {
			return unread(ctx, err)
		}
	}
}

// export sends what is in the log behind after and before an instant; done when it came to that instant.
func export(st leasev1.Operators_AuditExportServer, s store.Store, after *lease.Rev, to time.Time) (done bool, err error) {
	for {
		evs, err := s.Events(st.Context(), *after, exportStep)
		if err != nil {
			return false, unread(st.Context(), err)
		}
		for _, ev := range evs {
			if !to.IsZero() && !ev.At.Before(to) {
				return true, nil
			}
			if err := st.Send(fromEvent(ev)); err != nil {
				return false, err
			}
			*after = ev.Rev
		}
		if len(evs) < exportStep {
			return false, nil
		}
	}
}

func fromEvent(ev store.AuditEvent) *leasev1.AuditEvent {
	m := &leasev1.AuditEvent{
		Rev: uint64(ev.Rev), Kind: leasev1.AuditKind(ev.Kind), AtUnixNs: wire.FromInstant(ev.At), Res: wire.FromResource(ev.Resource),
		Gen: uint64(ev.Gen), HostId: ev.Host, Host: wire.FromAddr6(ev.Source), Tep: wire.FromAddr6(ev.TEP),
		Trigger: leasev1.Trigger(ev.Trigger), End: wire.FromReason(ev.End),
	}
	if ev.Chain != (store.Chain{}) {
		m.Chain = ev.Chain[:]
	}
	return m
}

// beforeInstant returns a revision behind which are exactly the records at or after an instant: times grow with revisions.
func beforeInstant(ctx context.Context, s store.AuditLog, at time.Time) (lease.Rev, error) {
	var lo lease.Rev // the records up to here are earlier
	for hi := lease.MaxRev; lo < hi; {
		mid := lo + (hi-lo)/2
		evs, err := s.Events(ctx, mid, 1)
		switch {
		case err != nil:
			return 0, err
		case len(evs) > 0 && evs[0].At.Before(at):
			lo = evs[0].Rev
		default:
			hi = mid
		}
	}
	return lo, nil
}

// unread is the answer when the store could not be read.
func unread(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, store.ErrClosed) {
		return deny(lease.ReasonDegradedStore, "not read: %v", err)
	}
	return status.Errorf(codes.Internal, "not read: %v", err)
}

// retain forgets leases that were fenced longer ago than the audit log is to be kept.
func (s *Server) retain(ctx context.Context, ready func()) error {
	ready()
	keep := s.cfg.Audit.Retention
	if keep == 0 {
		<-ctx.Done()
		return nil
	}
	t := time.NewTicker(max(time.Second, min(keep/100, 10*time.Minute)))
	defer t.Stop()
	for {
		if err := s.prune(ctx, keep); err != nil && ctx.Err() == nil {
			s.d.Log.Warn("audit log not pruned", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// pruneRest is how long pruning lets commits go first after each step.
const pruneRest = 20 * time.Millisecond

func (s *Server) prune(ctx context.Context, keep time.Duration) error {
	s.mu.Lock()
	before := s.now().Wall.Add(-keep)
	s.mu.Unlock()
	for {
		more, err := s.d.Store.Prune(ctx, before)
		if err != nil || !more {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pruneRest):
		}
	}
}
