package boltstore

import (
	"errors"
	"fmt"
	"runtime/debug"

	"go.etcd.io/bbolt"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// openChecked opens a file after a look at all of it. On damage bbolt panics or reads past the end of its mapping, in
// part on goroutines of its own, where nobody can recover. So everything that can be reached is read here first, on this
// goroutine, from a read-only mapping that needs no free list.
func openChecked(o Options) (db *bbolt.DB, last lease.Rev, err error) {
	if err := guard(func() error { return walk(o) }); err != nil {
		return nil, 0, err
	}
	err = guard(func() (err error) {
		db, err = bbolt.Open(o.Path, 0o600, &bbolt.Options{Timeout: o.Lock, FreelistType: bbolt.FreelistMapType})
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	if last, err = check(db); err != nil {
		return nil, 0, errors.Join(err, db.Close())
	}
	return db, last, nil
}

// guard turns panics and memory faults of f into errors.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("page check: %v", p)
		}
	}()
	return f()
}

// walk reads every key and value.
func walk(o Options) error {
	db, err := bbolt.Open(o.Path, 0o600, &bbolt.Options{Timeout: o.Lock, ReadOnly: true})
	if err != nil {
		return err
	}
	err = guard(func() error {
		return db.View(func(tx *bbolt.Tx) error {
			for _, name := range allBuckets {
				b := tx.Bucket(name)
				if b == nil {
					return fmt.Errorf("bucket %q is missing", name)
				}
				if err := b.ForEach(decodes(name)); err != nil {
					return fmt.Errorf("bucket %q: %w", name, err)
				}
			}
			return nil
		})
	})
	return errors.Join(err, db.Close())
}

// decodes returns the check of a bucket's records.
func decodes(bucket []byte) func(k, v []byte) error {
	switch string(bucket) {
	case string(bucketAddress):
		return func(k, v []byte) error { _, err := record.DecodeAddress(k, v); return err }
	case string(bucketAudit):
		return func(k, v []byte) error { _, err := audit.Decode(k, v); return err }
	case string(bucketIndex):
		return func(k, v []byte) error { _, err := audit.DecodeLease(k, v); return err }
	case string(bucketMember):
		return func(k, v []byte) error { _, err := record.DecodeMember(k, v); return err }
	case string(bucketPool):
		return func(k, v []byte) error { _, err := record.DecodePool(k, v); return err }
	}
	return func([]byte, []byte) error { return nil }
}

// check lets bbolt compare its pages with its free list, and reads the meta record.
func check(db *bbolt.DB) (last lease.Rev, err error) {
	err = db.View(func(tx *bbolt.Tx) error {
		var found error
		for err := range tx.Check() { // drained, or its goroutine stays
			found = errors.Join(found, err)
		}
		if found != nil {
			return found
		}
		var m storev1.Meta
		if err := getProto(tx.Bucket(bucketMeta), keyMeta, &m); err != nil {
			return err
		}
		last = lease.Rev(m.LastRev)
		return record.CheckMeta(&m, layout)
	})
	return last, err
}
