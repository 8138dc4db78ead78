package boltstore

import (
	"go.etcd.io/bbolt"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// apply writes a group of transactions into one of bbolt's.
func apply(tx *bbolt.Tx, group []item) error {
	var meta storev1.Meta
	if err := getProto(tx.Bucket(bucketMeta), keyMeta, &meta); err != nil {
		return err
	}
	for _, it := range group {
		if err := applyOne(tx, it); err != nil {
			return err
		}
		meta.LastRev = uint64(it.last)
		meta.LastWall = max(meta.LastWall, record.Nanos(it.tx.Wall))
		meta.Restored = meta.Restored && !it.tx.Recovered
	}
	return putProto(tx.Bucket(bucketMeta), keyMeta, &meta)
}

func applyOne(tx *bbolt.Tx, it item) error {
	for _, c := range it.tx.Commits {
		if err := putProto(tx.Bucket(bucketAddress), record.ResourceKey(c.Address.Resource), record.EncodeAddress(c.Address)); err != nil {
			return err
		}
		if c.Audit.Ref == (lease.Ref{}) {
			continue
		}
		if err := putProto(tx.Bucket(bucketAudit), record.AuditKey(c.Audit.Ref), record.EncodeAudit(c.Audit)); err != nil {
			return err
		}
	}
	for _, p := range it.tx.Pools {
		b, k := tx.Bucket(bucketPool), []byte(p.Pool.Name)
		if p.Pool.Removed {
			if err := b.Delete(k); err != nil {
				return err
			}
			continue
		}
		if err := putProto(b, k, record.EncodePool(p.Pool.Pool)); err != nil {
			return err
		}
	}
	for _, m := range it.tx.Members {
		if err := putProto(tx.Bucket(bucketMember), []byte(m.TEP), record.EncodeMember(m)); err != nil {
			return err
		}
	}
	for _, id := range it.tx.Removed {
		if err := tx.Bucket(bucketMember).Delete([]byte(id)); err != nil {
			return err
		}
	}
	return nil
}
