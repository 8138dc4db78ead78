package leaseclient

import (
	"context"
	"crypto/sha256"
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

// Holding is the audit record of one lease.
type Holding struct {
	lease.Ref
	HostID  string
	Host    netip.Addr
	TEP     netip.Addr
	Bound   time.Time
	Unbound time.Time // zero while bound
	Fenced  time.Time // zero until every gateway is fenced
	End     lease.Reason
}

// Who says whose packets with the address (and port, 0 = any) may have been under way at an instant; the zero time asks
// for the whole history, newest first.
func (c *Conn) Who(ctx context.Context, addr netip.Addr, port uint16, at time.Time) ([]Holding, error) {
	m := &leasev1.WhoRequest{Addr: wire.FromAddr4(addr), Port: uint32(port), AtUnixNs: wire.FromInstant(at)}
	rep, err := call(ctx, c, func(ctx context.Context, cc *grpc.ClientConn, m *leasev1.WhoRequest) (*leasev1.WhoReply, error) {
		return leasev1.NewOperatorsClient(cc).Who(ctx, m)
	}, m)
	if err != nil {
		return nil, fmt.Errorf("who: %w", err)
	}
	out := make([]Holding, 0, len(rep.GetHoldings()))
	for _, h := range rep.GetHoldings() {
		res, err := wire.Resource("res", h.GetRes())
		if err != nil {
			return nil, fmt.Errorf("who: %w", err)
		}
		out = append(out, Holding{
			Ref: lease.Ref{Resource: res, Gen: lease.Gen(h.GetGen())}, HostID: h.GetHostId(), Host: addr6(h.GetHost()), TEP: addr6(h.GetTep()),
			Bound: wire.Instant(h.GetBoundUnixNs()), Unbound: wire.Instant(h.GetUnboundUnixNs()), Fenced: wire.Instant(h.GetFencedUnixNs()),
			End: wire.Reason(h.GetEnd()),
		})
	}
	return out, nil
}

// AuditRange says which part of the audit log an export has. Zero values are no bounds.
type AuditRange struct {
	After    lease.Rev // to go on where an export ended
	From, To time.Time // At is at or after From and before To
	Follow   bool      // what is written later too, until ctx ends
}

// AuditEvent is one record of the audit log.
type AuditEvent struct {
	Rev  lease.Rev
	Kind string // bound, unbound, fenced
	At   time.Time
	lease.Ref
	HostID  string        // bound
	Host    netip.Addr    // bound: tunnel source
	TEP     netip.Addr    // bound
	Trigger lease.Trigger // bound
	End     lease.Reason  // unbound
	Chain   []byte        // after this record; empty when those around it are pruned
}

var auditKinds = map[leasev1.AuditKind]string{
	leasev1.AuditKind_BOUND: "bound", leasev1.AuditKind_UNBOUND: "unbound", leasev1.AuditKind_FENCED: "fenced",
}

// AuditExport calls yield with the records of a range in order of revision, until yield returns an error, which it
// returns. An export that broke off goes on with After = the newest revision that was seen.
func (c *Conn) AuditExport(ctx context.Context, r AuditRange, yield func(AuditEvent) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := leasev1.NewOperatorsClient(c.get()).AuditExport(ctx, &leasev1.AuditExportRequest{
		AfterRev: uint64(r.After), FromUnixNs: wire.FromInstant(r.From), ToUnixNs: wire.FromInstant(r.To), Follow: r.Follow,
	})
	if err != nil {
		return fmt.Errorf("audit export: %w", wire.FromStatus(err))
	}
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("audit export: %w", wire.FromStatus(err))
		}
		res, err := wire.Resource("res", m.GetRes())
		if err != nil {
			return fmt.Errorf("audit export: revision %d: %w", m.GetRev(), err)
		}
		kind, ok := auditKinds[m.GetKind()]
		if !ok {
			return fmt.Errorf("audit export: revision %d: unknown kind %d", m.GetRev(), m.GetKind())
		}
		ev := AuditEvent{
			Rev: lease.Rev(m.GetRev()), Kind: kind, At: wire.Instant(m.GetAtUnixNs()), Ref: lease.Ref{Resource: res, Gen: lease.Gen(m.GetGen())},
			HostID: m.GetHostId(), Host: addr6(m.GetHost()), TEP: addr6(m.GetTep()), Trigger: wire.Trigger(m.GetTrigger()),
			End: wire.Reason(m.GetEnd()), Chain: m.GetChain(),
		}
		if err := yield(ev); err != nil {
			return err
		}
	}
}

// Backup writes a consistent copy of the service's store to w. It is whole only if there is no error.
func (c *Conn) Backup(ctx context.Context, w io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := leasev1.NewOperatorsClient(c.get()).Backup(ctx, &leasev1.BackupRequest{})
	if err != nil {
		return fmt.Errorf("backup: %w", wire.FromStatus(err))
	}
	sum := sha256.New()
	w = io.MultiWriter(w, sum)
	for {
		m, err := st.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return errors.New("backup: ended without its digest")
		case err != nil:
			return fmt.Errorf("backup: %w", wire.FromStatus(err))
		}
		if _, err := w.Write(m.GetData()); err != nil {
			return fmt.Errorf("backup: %w", err)
		}
		if want := m.GetSha256(); len(want) != 0 {
			if got := sum.Sum(nil); string(got) != string(want) {
				return fmt.Errorf("backup: SHA-256 %x of what came, %x of what was sent", got, want)
			}
			return nil
		}
	}
}
