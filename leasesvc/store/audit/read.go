package audit

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// Reader is a log as a store lends it, at one instant. What it returns is valid until it is used again.
type Reader interface {
	// Record returns the first record of the log at or after a revision; revision 0 when there is none.
	Record(from lease.Rev) (lease.Rev, []byte, error)
	// First returns the first entry of the index at or after a key, nil when there is none.
	First(key []byte) (k, v []byte, err error)
	// Last returns the last entry of the index at or before a key, nil when there is none.
	Last(key []byte) (k, v []byte, err error)
}

// History is store.AuditLog.History over r.
func History(ctx context.Context, r Reader, addr netip.Addr, at time.Time, yield func(lease.Audit) bool) error {
	if !addr.Is4() {
		return fmt.Errorf("audit: address %s is not IPv4", addr)
	}
	list := everyLease
	if !at.IsZero() {
		list = leasesAt
	}
	found, err := list(ctx, r, addr, at)
	if err != nil {
		return err
	}
	slices.SortFunc(found, func(a, b Lease) int { return cmp.Compare(b.Bound, a.Bound) })
	for _, l := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		a, ok, err := read(r, l)
		switch {
		case err != nil:
			return err
		case !ok || !at.IsZero() && !held(a, at):
			continue
		case !yield(a):
			return nil
		}
	}
	return nil
}

// everyLease returns the index of an address.
func everyLease(ctx context.Context, r Reader, addr netip.Addr, _ time.Time) ([]Lease, error) {
	var out []Lease
	from := addr.AsSlice()
	for {
		l, ok, err := firstOf(r, addr, from)
		if err != nil || !ok {
			return out, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		out = append(out, l)
		from = indexKey(l.Resource, l.Bound+1)
	}
}

// leasesAt returns, of each resource of an address, the lease that was bound last at or before an instant. It is found by
// revision: times grow with revisions.
func leasesAt(ctx context.Context, r Reader, addr netip.Addr, at time.Time) ([]Lease, error) {
	until, err := revAt(r, at)
	if err != nil {
		return nil, err
	}
	var out []Lease
	from := addr.AsSlice()
	for {
		next, ok, err := firstOf(r, addr, from)
		if err != nil || !ok {
			return out, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		k, v, err := r.Last(indexKey(next.Resource, until))
		if err != nil {
			return nil, err
		}
		if k != nil {
			l, err := DecodeLease(k, v)
			if err != nil {
				return nil, err
			}
			if l.Resource == next.Resource {
				out = append(out, l)
			}
		}
		from = indexKey(next.Resource, lease.MaxRev+1)
	}
}

// firstOf returns the first entry of an address at or after a key.
func firstOf(r Reader, addr netip.Addr, from []byte) (Lease, bool, error) {
	k, v, err := r.First(from)
	if err != nil || k == nil {
		return Lease{}, false, err
	}
	l, err := DecodeLease(k, v)
	return l, err == nil && l.Addr == addr, err
}

// revAt returns the last revision in the log at or before an instant, 0 when there is none.
func revAt(r Reader, at time.Time) (lease.Rev, error) {
	var lo lease.Rev // at or before
	for hi := lease.MaxRev + 1; hi-lo > 1; {
		mid := lo + (hi-lo)/2
		rev, v, err := r.Record(mid)
		if err != nil {
			return 0, err
		}
		if rev == 0 || rev >= hi {
			hi = mid
			continue
		}
		ev, _, err := decode(rev, v)
		if err != nil {
			return 0, err
		}
		if ev.At.After(at) {
			hi = mid
		} else {
			lo = rev
		}
	}
	return lo, nil
}

// read puts a lease together; false when its first record is pruned already.
func read(r Reader, l Lease) (lease.Audit, bool, error) {
	var a lease.Audit
	for _, rev := range []lease.Rev{l.Bound, l.Unbound, l.Fenced} {
		if rev == 0 {
			continue
		}
		ev, ok, err := at(r, rev)
		switch {
		case err != nil:
			return a, false, err
		case !ok && rev == l.Bound:
			return a, false, nil
		case !ok:
			return a, false, fmt.Errorf("audit: record %d of the lease of %s at %d is missing", rev, l.Resource, l.Bound)
		case ev.Resource != l.Resource || ev.Gen.Rev() != l.Bound:
			return a, false, fmt.Errorf("audit: record %d is of %s, not of the lease of %s at %d", rev, ev.Ref, l.Resource, l.Bound)
		}
		fold(&a, ev)
	}
	return a, true, nil
}

// at returns the record of exactly a revision.
func at(r Reader, rev lease.Rev) (store.AuditEvent, bool, error) {
	got, v, err := r.Record(rev)
	if err != nil || got != rev {
		return store.AuditEvent{}, false, err
	}
	ev, _, err := decode(rev, v)
	return ev, err == nil, err
}

// Events is store.AuditLog.Events over r, whose head is h.
func Events(ctx context.Context, r Reader, h *storev1.AuditHead, after lease.Rev, limit int) ([]store.AuditEvent, error) {
	var out []store.AuditEvent
	var chain store.Chain
	base := lease.Rev(h.BaseRev)
	from := after + 1
	if after >= base { // the chain is known at base and in the first record of each stretch
		from = max(base+1, after/stretch*stretch)
	}
	for first := true; len(out) < limit; first = false {
		rev, v, err := r.Record(from)
		if err != nil || rev == 0 {
			return out, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		ev, before, err := decode(rev, v)
		if err != nil {
			return nil, err
		}
		if rev > base {
			switch {
			case from <= base+1:
				chain = chainOf(h.Base)
			case before != nil:
				chain = chainOf(before)
			case first:
				return nil, fmt.Errorf("audit: record %d has no chain", rev)
			}
			chain = next(chain, rev, v)
			ev.Chain = chain
		}
		if rev > after {
			out = append(out, ev)
		}
		from = rev + 1
	}
	return out, nil
}
