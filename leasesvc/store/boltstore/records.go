package boltstore

import (
	"go.etcd.io/bbolt"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// writer writes a group of transactions into one of bbolt's.
type writer struct {
	tx                                *bbolt.Tx
	meta                              storev1.Meta
	address, log, index, member, pool *bbolt.Bucket
}

func newWriter(tx *bbolt.Tx) (*writer, error) {
	w := &writer{
		tx: tx, address: tx.Bucket(bucketAddress), log: tx.Bucket(bucketAudit), index: tx.Bucket(bucketIndex),
		member: tx.Bucket(bucketMember), pool: tx.Bucket(bucketPool),
	}
	w.log.FillPercent = 1 // it only grows at its end
	if err := getProto(tx.Bucket(bucketMeta), keyMeta, &w.meta); err != nil {
		return nil, err
	}
	return w, nil
}

func apply(tx *bbolt.Tx, group []item) error {
	w, err := newWriter(tx)
	if err != nil {
		return err
	}
	for _, it := range group {
		if it.prune != nil {
			err = w.prune(it.prune)
		} else {
			err = w.write(it.tx, it.last)
		}
		if err != nil {
			return err
		}
	}
	return putProto(tx.Bucket(bucketMeta), keyMeta, &w.meta)
}

func (w *writer) write(tx store.Tx, last lease.Rev) error {
	for _, c := range tx.Commits {
		if err := w.commit(c); err != nil {
			return err
		}
	}
	for _, p := range tx.Pools {
		k := []byte(p.Pool.Name)
		if p.Pool.Removed {
			if err := w.pool.Delete(k); err != nil {
				return err
			}
			continue
		}
		if err := putProto(w.pool, k, record.EncodePool(p.Pool.Pool)); err != nil {
			return err
		}
	}
	for _, m := range tx.Members {
		if err := putProto(w.member, []byte(m.TEP), record.EncodeMember(m)); err != nil {
			return err
		}
	}
	for _, id := range tx.Removed {
		if err := w.member.Delete([]byte(id)); err != nil {
			return err
		}
	}
	w.meta.LastRev = uint64(last)
	w.meta.LastWall = max(w.meta.LastWall, record.Nanos(tx.Wall))
	w.meta.Restored = w.meta.Restored && !tx.Recovered
	return nil
}

func (w *writer) commit(c lease.Commit) error {
	if err := putProto(w.address, record.ResourceKey(c.Address.Resource), record.EncodeAddress(c.Address)); err != nil {
		return err
	}
	e, err := audit.Append(w.meta.Audit, c)
	if err != nil || e.Key == nil {
		return err
	}
	if err := w.log.Put(e.Key, e.Value); err != nil {
		return err
	}
	return w.index.Put(e.IndexKey, e.IndexValue)
}
