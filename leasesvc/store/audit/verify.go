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
	n     int
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
	v.n++
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

// End says whether the log ends where its head says. n is the number of its records.
func (v *Verifier) End() (n int, err error) {
	h := v.head
	switch {
	case v.chain != chainOf(h.GetChain()):
		return v.n, fmt.Errorf("%w: after %d; the log ends at %d, its head is at %d", ErrChain, v.sound, v.last, h.GetLastRev())
	case chainOf(v.kept) != chainOf(h.GetKept()):
		return v.n, fmt.Errorf("%w: in what is kept up to %d", ErrChain, h.GetBaseRev())
	}
	return v.n, nil
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
