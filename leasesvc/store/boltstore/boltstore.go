// Package boltstore keeps the lease service's records in one bbolt file on one machine.
package boltstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/internal/failpoint"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// layout is the version of the buckets below; a file of another one is refused.
const layout = 3

// Buckets: meta holds one record; addresses are keyed by resource, members by id, pools by name; see package audit for the
// log and its index.
var (
	bucketMeta    = []byte("meta")
	bucketAddress = []byte("address")
	bucketAudit   = []byte("audit")
	bucketIndex   = []byte("audit index")
	bucketMember  = []byte("member")
	bucketPool    = []byte("pool")
	keyMeta       = []byte("meta")
	allBuckets    = [][]byte{bucketMeta, bucketAddress, bucketAudit, bucketIndex, bucketMember, bucketPool}
)

// Options of a store. Zero values take the defaults.
type Options struct {
	Path     string
	RingSize int           // records kept for reconnecting gateways; 0 = 65536
	Lock     time.Duration // wait for another process's lock; 0 = 2s
}

const (
	defaultRing = 1 << 16
	defaultLock = 2 * time.Second
	// maxGroup bounds the transactions of one fsync, so that the first of them does not wait for ever more.
	maxGroup = 4096
)

// Store is a bbolt file behind one writer, which puts everything that waits into one transaction and one fsync.
type Store struct {
	db   *bbolt.DB
	ring *store.Ring

	mu     sync.Mutex
	queue  []item
	wake   chan struct{} // holds a token while the queue is not empty
	queued lease.Rev     // newest revision queued
	failed error
	closed bool
	done   chan struct{}
}

// item is a transaction or, if prune is not nil, a step of pruning.
type item struct {
	tx        store.Tx
	addresses []pair // of tx.Commits
	last      lease.Rev
	prune     *pruning
	complete  func(error)
}

func (it item) barrier() bool { return it.prune == nil && it.tx.Barrier() }

var _ store.Store = (*Store)(nil)

// Create makes a new, empty store with a new cluster id. It refuses to replace a file: write, fsync, rename, fsync of
// the directory, so that the file is whole or not there.
func Create(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("store %s exists: it is not replaced", path)
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("store: %w", err)
	}
	if err := create(tmp); err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

func create(tmp string) error {
	db, err := bbolt.Open(tmp, 0o600, &bbolt.Options{Timeout: defaultLock})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, b := range allBuckets {
			if _, err := tx.CreateBucket(b); err != nil {
				return err
			}
		}
		return putProto(tx.Bucket(bucketMeta), keyMeta, record.NewMeta(layout))
	})
	return errors.Join(err, db.Close())
}

// Open opens a store and checks its pages. A missing, empty or damaged file is an error: a lease service that starts
// with nothing would lease addresses that are in use.
func Open(o Options) (*Store, error) {
	if o.RingSize == 0 {
		o.RingSize = defaultRing
	}
	if o.Lock == 0 {
		o.Lock = defaultLock
	}
	st, err := os.Stat(o.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("store %s does not exist: create one with leasesvc --create-store, or restore a copy", o.Path)
	case err != nil:
		return nil, fmt.Errorf("store: %w", err)
	case st.Size() == 0:
		return nil, fmt.Errorf("store %s is empty: restore a copy; a new store would lease addresses that are in use", o.Path)
	}
	f, err := openLocked(o.Path, os.O_RDWR, unix.LOCK_EX, o.Lock)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", o.Path, err)
	}
	db, last, err := openChecked(f)
	if err != nil {
		return nil, fmt.Errorf("store %s is damaged: %w: restore a copy", o.Path, err)
	}
	s := &Store{
		db: db, ring: store.NewRing(o.RingSize, last), queued: last,
		wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	go s.write()
	return s, nil
}

// Load implements store.Store.
func (s *Store) Load(context.Context) (st store.State, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		var m storev1.Meta
		if err := getProto(tx.Bucket(bucketMeta), keyMeta, &m); err != nil {
			return err
		}
		st, err = state(tx, &m)
		return err
	})
	if err != nil {
		return store.State{}, fmt.Errorf("store: %w", err)
	}
	return st, nil
}

// state returns what is stored beside addresses and the audit log.
func state(tx *bbolt.Tx, m *storev1.Meta) (store.State, error) {
	st := record.State(m)
	return st, errors.Join(
		tx.Bucket(bucketMember).ForEach(func(k, v []byte) error {
			m, err := record.DecodeMember(k, v)
			st.Members = append(st.Members, m)
			return err
		}),
		tx.Bucket(bucketPool).ForEach(func(k, v []byte) error {
			p, err := record.DecodePool(k, v)
			st.Pools = append(st.Pools, p)
			return err
		}),
	)
}

// Addresses implements store.Store.
func (s *Store) Addresses(ctx context.Context, yield func(lease.Address) error) error {
	defer s.leavePages()
	return s.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketAddress).ForEach(func(k, v []byte) error {
			a, err := record.DecodeAddress(k, v)
			if err != nil {
				return fmt.Errorf("store: %w", err)
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			return yield(a)
		})
	})
}

// leavePages gives the pages of the file, of which a check and a load have touched all, back to the page cache: they would
// count as memory of the process, while what is written is a few of them. It is no harm when that fails.
func (s *Store) leavePages() {
	_ = s.db.View(func(tx *bbolt.Tx) error {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, s.db.Info().Data, uintptr(tx.Size()), unix.MADV_DONTNEED)
		return nil
	})
}

// Commit implements store.Store.
func (s *Store) Commit(tx store.Tx) *store.Pending {
	as, err := addresses(tx)
	if err != nil {
		return store.Done(err)
	}
	p, complete := store.NewPending()
	if err := s.enqueue(item{tx: tx, addresses: as, complete: complete}); err != nil {
		return store.Done(err)
	}
	return p
}

// enqueue hands an item to the writer.
func (s *Store) enqueue(it item) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return store.ErrClosed
	case s.failed != nil:
		return s.failed
	}
	last, err := it.tx.Follow(s.queued)
	if err != nil {
		return err
	}
	s.queued, it.last = last, last
	s.queue = append(s.queue, it)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil
}

// write is the one writer.
func (s *Store) write() {
	defer close(s.done)
	for range s.wake {
		for {
			group, closed := s.take()
			if len(group) == 0 {
				if closed {
					return
				}
				break
			}
			s.flush(group)
		}
	}
}

func (s *Store) take() ([]item, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(len(s.queue), maxGroup)
	group := s.queue[:n:n]
	s.queue = s.queue[n:]
	return group, s.closed
}

func (s *Store) flush(group []item) {
	err := s.failure()
	if err == nil {
		if err = s.update(group); err != nil {
			err = fmt.Errorf("%w: %w", store.ErrFailed, err)
			s.fail(err)
		}
	}
	if err == nil { // watchers get what became durable together in one batch
		var records []lease.Record
		for _, it := range group {
			records = append(records, it.tx.Records()...)
		}
		s.ring.Publish(group[len(group)-1].last, records)
	}
	for _, it := range group {
		it.complete(err)
	}
}

// update writes a group. One of barriers alone has nothing to write: this process holds the file's lock, so it is the owner.
func (s *Store) update(group []item) error {
	if !slices.ContainsFunc(group, func(it item) bool { return !it.barrier() }) {
		return nil
	}
	err := s.db.Update(func(tx *bbolt.Tx) error {
		if err := apply(tx, group); err != nil {
			return err
		}
		return failpoint.Hit("store-before-commit")
	})
	if err != nil {
		return err
	}
	return failpoint.Hit("store-after-commit")
}

func (s *Store) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

func (s *Store) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = err
}

// Watch implements store.Store.
func (s *Store) Watch(after lease.Rev) store.Watcher { return s.ring.Watch(after) }

// Snapshot implements store.Store. What it writes is a store file. As long as it writes, pages that change are kept: w
// should be a file.
func (s *Store) Snapshot(ctx context.Context, w io.Writer) error {
	err := s.db.View(func(tx *bbolt.Tx) error {
		_, err := tx.WriteTo(writerUntil{ctx, w})
		return err
	})
	if err != nil {
		return fmt.Errorf("store: snapshot: %w", err)
	}
	return nil
}

// writerUntil writes until a context ends.
type writerUntil struct {
	ctx context.Context
	w   io.Writer
}

func (w writerUntil) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(b)
}

// Close implements store.Store.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	select {
	case s.wake <- struct{}{}:
	default:
	}
	s.mu.Unlock()
	<-s.done
	s.ring.Close()
	return s.db.Close()
}
