// Package store is the seam between the lease service and what keeps its records: what a store holds, how it is written
// and followed, and the errors a caller must tell apart. Package storetest is the suite that every store passes.
package store

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// Errors of stores.
var (
	// ErrCompacted means that a watch asks for revisions that are no longer kept; a snapshot is needed.
	ErrCompacted = errors.New("store: revisions are no longer kept")
	// ErrClosed means that the store was closed.
	ErrClosed = errors.New("store: closed")
	// ErrFailed means that an earlier commit failed: what is in memory runs ahead of the store, nothing more is written.
	ErrFailed = errors.New("store: an earlier commit failed")
	// ErrNotOwner means that another service owns the store by now: this one must stop.
	ErrNotOwner = errors.New("store: another service owns it")
	// ErrOrder means that a transaction's revisions do not follow on the store's newest.
	ErrOrder = errors.New("store: revisions out of order")
)

// State is what a store holds beside addresses and audit records.
type State struct {
	Cluster lease.ClusterID
	// Secret belongs to the cluster and is made with it: what hosts without a certificate prove themselves with derives
	// from it.
	Secret [32]byte
	Epoch  lease.Epoch
	Last   lease.Rev // newest revision
	Wall   time.Time // newest time written; a clock that is behind it has stepped back
	// Restored means that the store is a copy of an earlier one: leases may be in force that it does not know. It stands
	// until a transaction with Recovered.
	Restored bool
	Members  []lease.Member
	Pools    []lease.Pool
}

// Tx is one transaction. Revisions in it follow on those before: every one from the store's newest on is in some Tx.
//
// It is acknowledged as a whole. A crash before may leave a beginning of it: commits and pools in order of revision, then
// members, then what is removed, each record whole; Recovered comes with the last one.
//
// An empty one is a barrier. It completes once everything before it is durable and, with a store that several services
// share, once it has been seen after the call that this one is still the owner.
type Tx struct {
	Commits []lease.Commit
	Pools   []lease.Record // of KindPool
	Members []lease.Member // added or replaced
	Removed []string       // ids of members
	Wall    time.Time
	// Recovered ends State.Restored.
	Recovered bool
}

// Pending is a transaction on its way to the disk.
type Pending struct {
	done chan struct{}
	err  error
}

// NewPending returns a Pending and the function that completes it, for stores.
func NewPending() (*Pending, func(error)) {
	p := &Pending{done: make(chan struct{})}
	return p, func(err error) {
		p.err = err
		close(p.done)
	}
}

// Done returns a Pending that is complete.
func Done(err error) *Pending {
	p, complete := NewPending()
	complete(err)
	return p
}

// Wait returns nil once the transaction is durable. Nothing that follows from it may leave before.
func (p *Pending) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Store keeps the records of a lease service. Commit is called by one goroutine at a time, in order of revision; the
// other methods by any.
type Store interface {
	AuditLog
	// Load returns what is stored beside addresses and audit records.
	Load(ctx context.Context) (State, error)
	// Addresses yields every address that was ever leased, in no order; an error of yield ends it and is returned. Called
	// before the first Commit, what it yields belongs to the state that Load returned.
	Addresses(ctx context.Context, yield func(lease.Address) error) error
	// Commit queues a transaction. After an error nothing more is written.
	Commit(tx Tx) *Pending
	// Watch follows the durable records after a revision.
	Watch(after lease.Rev) Watcher
	// Snapshot writes a consistent copy while the store goes on.
	Snapshot(ctx context.Context, w io.Writer) error
	// Close waits for what is queued and closes the store.
	Close() error
}

// Batch is a run of revisions without a gap. Revisions that concern no gateway have no record.
type Batch struct {
	From, To lease.Rev
	Records  []lease.Record
}

// Watcher is a cursor over durable revisions. One goroutine uses it.
type Watcher interface {
	// Next waits for revisions after the cursor. ErrCompacted means that the cursor fell behind what is kept.
	Next(ctx context.Context) (Batch, error)
}
