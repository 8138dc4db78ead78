package audit

import (
	"bytes"
	"errors"
	"fmt"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// ErrChain means that a log is not what was written.
var ErrChain = errors.New("audit: chain is broken")

// Verifier checks a log, record by record, against its head.
type Verifier struct {
	head  *storev1.AuditHead
	chain store.Chain
	last  lease.Rev
	sound lease.Rev // up to here the chain is right
	kept  []byte
}

// NewVerifier begins a check.
func NewVerifier(h *storev1.AuditHead) *Verifier {
	return &Verifier{head: h, chain: chainOf(h.GetBase()), sound: lease.Rev(h.GetBaseRev())}
}

// Add takes the next record, in order of revision, and returns it with its chain. A broken place is found
// within 64 revisions of records.
func (v *Verifier) Add(key, value []byte) (store.AuditEvent, error) {
	rev, err := KeyRev(key)
	if err != nil {
		return store.AuditEvent{}, err
	}
	ev, before, err := decode(rev, value)
	switch {
	case err != nil:
		return ev, err
	case rev <= v.last || rev > lease.Rev(v.head.GetLastRev()):
		return ev, fmt.Errorf("%w: record %d after %d, the head is at %d", ErrChain, rev, v.last, v.head.GetLastRev())
	}
	v.last = rev
	if rev <= lease.Rev(v.head.GetBaseRev()) {
		v.kept = toggle(v.kept, rev, value)
		return ev, nil
	}
	if before != nil {
		if !bytes.Equal(before, v.chain[:]) {
			return ev, fmt.Errorf("%w: after %d and before %d", ErrChain, v.sound, rev)
		}
		v.sound = rev
	}
	v.chain = next(v.chain, rev, value)
	ev.Chain = v.chain
	return ev, nil
}

// End says whether the log ends where its head says.
func (v *Verifier) End() error {
	h := v.head
	if v.chain != chainOf(h.GetChain()) {
		return fmt.Errorf("%w: after %d; the log ends at %d, its head is at %d", ErrChain, v.sound, v.last, h.GetLastRev())
	}
	return keptError(h, v.kept)
}

// CheckEnds checks what the newest transaction of a store may have changed, if it began after a revision: what is kept
// before the base of the log, the chain from that revision up to the head, and the index of those leases.
func CheckEnds(r Reader, h *storev1.AuditHead, after lease.Rev) error {
	if err := checkKept(r, h); err != nil {
		return err
	}
	last, base := lease.Rev(h.GetLastRev()), lease.Rev(h.GetBaseRev())
	end, chain, known := base, chainOf(h.GetBase()), true
	from := base + 1
	if after = min(after, last); after > base {
		from = max(from, after/stretch*stretch)
		known = from == base+1
	}
	for {
		rev, v, err := r.Record(from)
		if err != nil {
			return err
		}
		if rev == 0 {
			break
		}
		ev, before, err := decode(rev, v)
		switch {
		case err != nil:
			return err
		case !known && before == nil, known && before != nil && chainOf(before) != chain:
			return fmt.Errorf("%w: before %d", ErrChain, rev)
		case !known:
			chain, known = chainOf(before), true
		}
		chain, end, from = next(chain, rev, v), rev, rev+1
		if rev > after {
			if err := checkIndexed(r, ev); err != nil {
				return err
			}
		}
	}
	if end != max(last, base) || chain != chainOf(h.GetChain()) {
		return fmt.Errorf("%w: the log ends at %d, its head is at %d", ErrChain, end, last)
	}
	return nil
}

func checkKept(r Reader, h *storev1.AuditHead) error {
	var kept []byte
	for from := lease.Rev(0); ; {
		rev, v, err := r.Record(from)
		if err != nil {
			return err
		}
		if rev == 0 || rev > lease.Rev(h.GetBaseRev()) {
			break
		}
		kept, from = toggle(kept, rev, v), rev+1
	}
	return keptError(h, kept)
}

func keptError(h *storev1.AuditHead, kept []byte) error {
	if chainOf(kept) != chainOf(h.GetKept()) {
		return fmt.Errorf("%w: in what is kept up to %d", ErrChain, h.GetBaseRev())
	}
	return nil
}

// checkIndexed says whether the index knows of an event.
func checkIndexed(r Reader, ev store.AuditEvent) error {
	key := indexKey(ev.Resource, ev.Gen.Rev())
	k, v, err := r.First(key)
	if err != nil {
		return err
	}
	var l Lease
	if string(k) == string(key) {
		if l, err = DecodeLease(k, v); err != nil {
			return err
		}
	}
	at := map[store.AuditKind]lease.Rev{store.AuditBound: l.Bound, store.AuditUnbound: l.Unbound, store.AuditFenced: l.Fenced}
	if at[ev.Kind] < ev.Rev {
		return fmt.Errorf("audit: record %d of lease %s is not in the index", ev.Rev, ev.Ref)
	}
	return nil
}

// CheckLease compares an entry of the index with the log.
func CheckLease(r Reader, h *storev1.AuditHead, l Lease) error {
	base := lease.Rev(h.GetBaseRev())
	for _, c := range []struct {
		rev  lease.Rev
		kind store.AuditKind
	}{{l.Bound, store.AuditBound}, {l.Unbound, store.AuditUnbound}, {l.Fenced, store.AuditFenced}} {
		if c.rev == 0 {
			continue
		}
		ev, ok, err := at(r, c.rev)
		switch {
		case err != nil:
			return err
		case !ok && c.rev <= base && l.Fenced > base: // on its way out
		case !ok || ev.Kind != c.kind || ev.Resource != l.Resource || ev.Gen.Rev() != l.Bound:
			return fmt.Errorf("audit: record %d of the lease of %s at %d is missing: want %s", c.rev, l.Resource, l.Bound, c.kind)
		}
	}
	return nil
}

// CheckAddress compares the record of an address with the newest lease of it in the log: a lease that is in force is
// there, and as far as the address says. One that is over may have been pruned.
func CheckAddress(r Reader, a lease.Address) error {
	key := indexKey(a.Resource, a.Gen.Rev())
	k, v, err := r.First(key)
	if err != nil {
		return err
	}
	if string(k) != string(key) {
		if a.State == lease.Bound || a.State == lease.Revoking {
			return fmt.Errorf("audit: no lease %s: the address is %s", a.Ref(), a.State)
		}
		return nil
	}
	l, err := DecodeLease(k, v)
	if err != nil {
		return err
	}
	var unbound, fenced lease.Rev
	switch a.State {
	case lease.Bound:
	case lease.Revoking:
		unbound = a.RevokeRev
	default:
		unbound, fenced = a.RevokeRev, l.Fenced
	}
	if l.Unbound != unbound || l.Fenced != fenced || a.State == lease.Hold && l.Fenced != a.Rev || a.State == lease.Free && l.Fenced == 0 {
		return fmt.Errorf("audit: lease %s was unbound at %d and fenced at %d: the address is %s since %d, revoked at %d",
			a.Ref(), l.Unbound, l.Fenced, a.State, a.Rev, a.RevokeRev)
	}
	return nil
}
