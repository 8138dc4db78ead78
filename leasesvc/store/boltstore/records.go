package boltstore

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// pair is what is kept under a key.
type pair struct{ k, v []byte }

// addresses encodes what a transaction makes of addresses. It is done before the transaction waits for the writer, which
// has enough to do.
func addresses(tx store.Tx) ([]pair, error) {
	out := make([]pair, len(tx.Commits))
	for i, c := range tx.Commits {
		v, err := proto.Marshal(record.EncodeAddress(c.Address))
		if err != nil {
			return nil, fmt.Errorf("store: address %s: %w", c.Address.Resource, err)
		}
		out[i] = pair{record.ResourceKey(c.Address.Resource), v}
	}
	return out, nil
}

// digest is an order-independent sum over the pairs of buckets.
type digest [16]byte

// toggle puts a pair in, or takes it out.
func (d *digest) toggle(bucket string, k, v []byte) {
	b := make([]byte, 0, 512)
	b = append(b, bucket...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(k)))
	b = append(b, k...)
	sum := sha256.Sum256(append(b, v...))
	for i := range d {
		d[i] ^= sum[i]
	}
}

// summed is a bucket whose pairs are in the digest.
type summed struct {
	*bbolt.Bucket
	name string
	sum  *digest
}

// Put replaces a pair.
func (b summed) Put(k, v []byte) error {
	if old := b.Get(k); old != nil {
		b.sum.toggle(b.name, k, old)
	}
	b.sum.toggle(b.name, k, v)
	return b.Bucket.Put(k, v)
}

// Delete removes a pair, if it is there.
func (b summed) Delete(k []byte) error {
	if old := b.Get(k); old != nil {
		b.sum.toggle(b.name, k, old)
	}
	return b.Bucket.Delete(k)
}

// writer writes a group of transactions into one of bbolt's.
type writer struct {
	tx                    *bbolt.Tx
	meta                  storev1.Meta
	sum                   digest
	address, member, pool summed
	log, index            *bbolt.Bucket
}

func newWriter(tx *bbolt.Tx) (*writer, error) {
	w := &writer{tx: tx, log: tx.Bucket(bucketAudit), index: tx.Bucket(bucketIndex)}
	w.log.FillPercent = 1 // it only grows at its end
	if err := getProto(tx.Bucket(bucketMeta), keyMeta, &w.meta); err != nil {
		return nil, err
	}
	copy(w.sum[:], w.meta.Digest)
	w.meta.GroupAfter = w.meta.LastRev
	for name, b := range map[string]*summed{string(bucketAddress): &w.address, string(bucketMember): &w.member, string(bucketPool): &w.pool} {
		*b = summed{tx.Bucket([]byte(name)), name, &w.sum}
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
			err = w.write(it)
		}
		if err != nil {
			return err
		}
	}
	w.meta.Digest = w.sum[:]
	return putProto(tx.Bucket(bucketMeta), keyMeta, &w.meta)
}

func (w *writer) write(it item) error {
	tx := it.tx
	for i, c := range tx.Commits {
		if err := w.commit(c, it.addresses[i]); err != nil {
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
	w.meta.LastRev = uint64(it.last)
	w.meta.LastWall = max(w.meta.LastWall, record.Nanos(tx.Wall))
	w.meta.Restored = w.meta.Restored && !tx.Recovered
	return nil
}

func (w *writer) commit(c lease.Commit, address pair) error {
	if err := w.address.Put(address.k, address.v); err != nil {
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

// putter is a bucket.
type putter interface{ Put(k, v []byte) error }

func putProto(b putter, k []byte, m proto.Message) error {
	v, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	return b.Put(k, v)
}

func getProto(b *bbolt.Bucket, k []byte, m proto.Message) error {
	v := b.Get(k)
	if v == nil {
		return fmt.Errorf("record %q is missing", k)
	}
	return proto.Unmarshal(v, m)
}
