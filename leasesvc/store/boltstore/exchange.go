package boltstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
)

// Table is a kind of records in a store file. Keys and values are those of packages record and audit, which other stores
// keep as they are.
type Table string

// The tables.
const (
	TableAddress Table = "address"
	TableAudit   Table = "audit"
	TableIndex   Table = "audit index"
	TableMember  Table = "member"
	TablePool    Table = "pool"
)

// batch bounds the records of one transaction of Write.
const batch = 10_000

// Write makes a store file of the records of another store: what fill puts, and a meta record that belongs to them. The
// file is new and on the disk when Write returns nil; after an error it is worth nothing.
func Write(path string, m *storev1.Meta, fill func(put func(t Table, k, v []byte) error) error) error {
	if err := create(path); err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: defaultLock, NoSync: true})
	if err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	b := &bulk{db: db}
	err = fill(b.put)
	if err == nil {
		err = b.end(m)
	}
	if err := errors.Join(err, b.rollback(), db.Sync(), db.Close()); err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	return nil
}

// bulk writes many records in transactions of a bounded size.
type bulk struct {
	db *bbolt.DB
	tx *bbolt.Tx // nil = none is open
	w  *writer
	n  int // records in tx
}

func (b *bulk) begin() (err error) {
	if b.tx, err = b.db.Begin(true); err != nil {
		return err
	}
	b.n = 0
	b.w, err = newWriter(b.tx)
	return err
}

func (b *bulk) rollback() error {
	if b.tx == nil {
		return nil
	}
	return b.tx.Rollback()
}

func (b *bulk) commit(m *storev1.Meta) error {
	m.Digest = b.w.sum[:]
	if err := putProto(b.tx.Bucket(bucketMeta), keyMeta, m); err != nil {
		return err
	}
	err := b.tx.Commit()
	b.tx = nil
	return err
}

func (b *bulk) put(t Table, k, v []byte) error {
	if b.tx != nil && b.n == batch {
		if err := b.commit(&b.w.meta); err != nil {
			return err
		}
	}
	if b.tx == nil {
		if err := b.begin(); err != nil {
			return err
		}
	}
	b.n++
	switch t {
	case TableAddress:
		return b.w.address.Put(k, v)
	case TableMember:
		return b.w.member.Put(k, v)
	case TablePool:
		return b.w.pool.Put(k, v)
	case TableAudit:
		return b.w.log.Put(k, v)
	case TableIndex:
		return b.w.index.Put(k, v)
	}
	return fmt.Errorf("no table %q", t)
}

// end writes the meta record.
func (b *bulk) end(m *storev1.Meta) error {
	if b.tx == nil {
		if err := b.begin(); err != nil {
			return err
		}
	}
	m = proto.CloneOf(m)
	m.Layout, m.GroupAfter = layout, m.LastRev
	return b.commit(m)
}

// Read yields all records of a store file that Check found whole, each valid until yield returns, and returns its meta
// record.
func Read(ctx context.Context, path string, yield func(t Table, k, v []byte) error) (*storev1.Meta, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: defaultLock, ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", path, err)
	}
	var m *storev1.Meta
	err = guard(func() error {
		return db.View(func(tx *bbolt.Tx) (err error) {
			if m, err = loadMeta(tx); err != nil {
				return err
			}
			for _, t := range []Table{TableAddress, TableAudit, TableIndex, TableMember, TablePool} {
				err := tx.Bucket([]byte(t)).ForEach(func(k, v []byte) error { return errors.Join(ctx.Err(), yield(t, k, v)) })
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return nil, fmt.Errorf("store %s: %w", path, err)
	}
	return m, nil
}

// NewestEpoch returns the newest epoch of a cluster among the copies in a directory, 0 without any.
func NewestEpoch(dir string, cluster lease.ClusterID) (newest lease.Epoch, err error) {
	names, err := list(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, n := range names {
		if st, err := peek(filepath.Join(dir, n)); err == nil && st.Cluster == cluster {
			newest = max(newest, st.Epoch)
		}
	}
	return newest, nil
}
