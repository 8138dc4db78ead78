package store

import (
	"fmt"

	"github.com/dstm-project/dstm/lease"
)

// Barrier says whether the transaction writes nothing but the time.
func (tx Tx) Barrier() bool {
	return len(tx.Commits)+len(tx.Pools)+len(tx.Members)+len(tx.Removed) == 0 && !tx.Recovered
}

// Follow checks that the revisions of the transaction follow on last, without a gap, and returns its newest: last if it
// has none. The error is ErrOrder.
func (tx Tx) Follow(last lease.Rev) (lease.Rev, error) {
	next := func(r lease.Rev) error {
		if r != last+1 {
			return fmt.Errorf("%w: revision %d after %d", ErrOrder, r, last)
		}
		last = r
		return nil
	}
	for _, c := range tx.Commits {
		if err := next(c.Rev); err != nil {
			return 0, err
		}
	}
	for _, p := range tx.Pools {
		if err := next(p.Rev); err != nil {
			return 0, err
		}
	}
	return last, nil
}

// Records returns what watchers are told of the transaction, in order of revision.
func (tx Tx) Records() []lease.Record {
	out := make([]lease.Record, 0, len(tx.Commits)+len(tx.Pools))
	for _, c := range tx.Commits {
		out = append(out, c.Record)
	}
	return append(out, tx.Pools...)
}
