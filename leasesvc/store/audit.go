package store

import (
	"context"
	"net/netip"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// AuditKind says what happened to a lease.
type AuditKind uint8

// The kinds, in the order in which they happen to a lease.
const (
	AuditBound   AuditKind = 1
	AuditUnbound AuditKind = 2 // no longer the host's; gateways may still forward for it
	AuditFenced  AuditKind = 3 // no gateway forwards for it any more
)

// String returns the kind's name as exports show it.
func (k AuditKind) String() string {
	switch k {
	case AuditBound:
		return "bound"
	case AuditUnbound:
		return "unbound"
	case AuditFenced:
		return "fenced"
	}
	return "unknown"
}

// Chain is a value of the chain over the audit log: each follows from the one before and the record.
type Chain [16]byte

// AuditEvent is one record of the audit log.
type AuditEvent struct {
	Rev  lease.Rev
	Kind AuditKind
	At   time.Time
	lease.Ref
	Host    string        // bound: identity of the holder
	Source  netip.Addr    // bound: tunnel source
	TEP     netip.Addr    // bound: address of the gateways
	Trigger lease.Trigger // bound
	End     lease.Reason  // unbound: why
	Chain   Chain         // after this record; zero in a record that outlived the pruning of those around it
}

// AuditLog is who had what and when: one record for each event that Commit brings with an Audit, in the transaction of
// the event.
type AuditLog interface {
	// History yields the leases of an address, newest first, until yield returns false: with the zero time all of them,
	// otherwise those whose holder may have sent packets at that instant, from bound until fenced. Of one resource that is
	// one lease at most.
	History(ctx context.Context, addr netip.Addr, at time.Time, yield func(lease.Audit) bool) error
	// Events returns at most limit records after a revision, in order; none when there are no later ones.
	Events(ctx context.Context, after lease.Rev, limit int) ([]AuditEvent, error)
	// Prune forgets, in one bounded step, leases that were fenced before an instant, oldest first, and says whether a
	// further step may find more.
	Prune(ctx context.Context, before time.Time) (more bool, err error)
}
