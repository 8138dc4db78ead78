package audit

import (
	"time"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// Pruned is what one step of pruning takes out of a log, by key.
type Pruned struct {
	Log, Index [][]byte
	More       bool // the step ended at its limit
}

// Prune looks at at most limit records behind the base of the log and says which of them go: those of leases that were
// fenced before an instant. The base moves on to the first record that is not older. Older records of a lease that lives,
// or was fenced later, stay where they are; the head remembers them as a set.
func Prune(r Reader, h *storev1.AuditHead, before time.Time, limit int) (Pruned, error) {
	p := pruner{r: r, h: h, before: before, gone: map[lease.Rev]bool{}}
	for range limit {
		rev, v, err := r.Record(lease.Rev(h.BaseRev) + 1)
		if err != nil || rev == 0 {
			return p.out, err
		}
		ev, _, err := decode(rev, v)
		if err != nil || !ev.At.Before(before) {
			return p.out, err
		}
		chain := next(chainOf(h.Base), rev, v)
		kept := toggle(h.Kept, rev, v) // v is gone with the next look
		keep, err := p.keeps(ev)
		if err != nil {
			return p.out, err
		}
		h.BaseRev, h.Base = uint64(rev), chain[:]
		if keep {
			h.Kept = kept
		} else {
			p.remove(rev)
		}
	}
	p.out.More = true
	return p.out, nil
}

type pruner struct {
	r      Reader
	h      *storev1.AuditHead
	before time.Time
	out    Pruned
	gone   map[lease.Rev]bool // what this step takes out is still there for r
}

func (p *pruner) remove(rev lease.Rev) {
	p.gone[rev] = true
	p.out.Log = append(p.out.Log, Key(rev))
}

// keeps says whether a record that is old enough stays. With the record of the fence the whole lease goes.
func (p *pruner) keeps(ev store.AuditEvent) (bool, error) {
	key := indexKey(ev.Resource, ev.Gen.Rev())
	k, v, err := p.r.First(key)
	if err != nil || string(k) != string(key) {
		return false, err
	}
	l, err := DecodeLease(k, v)
	if err != nil {
		return false, err
	}
	switch ev.Rev {
	case l.Fenced:
		p.out.Index = append(p.out.Index, key)
		for _, rev := range []lease.Rev{l.Bound, l.Unbound} {
			if err := p.drop(rev); err != nil {
				return false, err
			}
		}
		return false, nil
	case l.Bound, l.Unbound:
		if l.Fenced == 0 {
			return true, nil
		}
		fenced, ok, err := at(p.r, l.Fenced)
		return ok && !fenced.At.Before(p.before), err
	}
	return false, nil // a later record took its place
}

// drop takes out a record that an earlier step kept.
func (p *pruner) drop(rev lease.Rev) error {
	if rev == 0 || p.gone[rev] {
		return nil
	}
	got, v, err := p.r.Record(rev)
	if err != nil || got != rev {
		return err
	}
	p.h.Kept = toggle(p.h.Kept, rev, v)
	p.remove(rev)
	return nil
}
