package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"math"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

// From says what a store is restored from.
type From struct {
	Path   string      // of a copy: a store file
	Aside  string      // file that the store in place is copied to before
	Copies string      // directory in which epochs are looked for; empty = none
	Epoch  lease.Epoch // the new epoch is above it
	// OtherCluster allows that the store in place is of another cluster, or cannot be read, so that nobody knows.
	OtherCluster bool
	// Problems allows a copy that contradicts itself, see boltstore.Report.
	Problems bool
}

// Restored is what Restore did.
type Restored struct {
	boltstore.Report        // of what was restored, with its new epoch
	Aside            string // where the store is that was in place; empty = there was none
}

// Restore puts a copy in the place of a store that nobody owns. What was leased since the copy was made is not known to
// it: so its epoch is new, and State.Restored is set. When it is broken off there is no store until it is repeated.
func Restore(ctx context.Context, o Options, from From) (r Restored, err error) {
	if r.Report, err = boltstore.Check(from.Path, nil); err == nil && len(r.Problems) > 0 && !from.Problems {
		err = fmt.Errorf("the copy contradicts itself: %w", errors.Join(r.Problems...))
	}
	if err == nil {
		err = occupy(ctx, o, func(c *client, t tenure, o Options) error {
			w := &restorer{c: c, o: o, from: from, tenure: t}
			return w.restore(ctx, &r)
		})
	}
	if err != nil {
		return r, fmt.Errorf("restore %s to etcd: %w", from.Path, err)
	}
	return r, nil
}

// occupy owns the cell, which nobody else may own, while f runs.
func occupy(ctx context.Context, o Options, f func(c *client, t tenure, o Options) error) error {
	state := ""
	o.OnState = func(s string) { state = s }
	if err := o.defaults(); err != nil {
		return err
	}
	c, err := dial(o)
	if err != nil {
		return err
	}
	if err := c.retry(ctx, o.TTL, c.voters); err != nil {
		return errors.Join(err, c.Close())
	}
	wait, cancel := context.WithTimeout(ctx, 2*o.TTL) // outlasts an owner that died
	defer cancel()
	t, err := c.campaign(wait, o)
	if err != nil {
		if ctx.Err() == nil && wait.Err() != nil {
			err = fmt.Errorf("%s: are all services of the cell stopped?", state)
		}
		return errors.Join(err, c.Close())
	}
	return errors.Join(f(c, t, o), c.revoke(t.lease), c.Close())
}

// restorer replaces the records of a cell that it owns. The records of a store are made without those that make it one:
// head and meta come last, together. Until then there is a record of the restore, with the newest epoch that there was.
type restorer struct {
	c      *client
	o      Options
	from   From
	tenure tenure
	ops    []clientv3.Op
}

func (w *restorer) restore(ctx context.Context, r *Restored) error {
	newest, err := w.place(ctx, r)
	if err != nil {
		return err
	}
	if newest == math.MaxUint16 {
		return fmt.Errorf("epoch %d is the last: a new cluster is needed", newest)
	}
	if err := w.clear(ctx, r, newest); err != nil {
		return err
	}
	k := w.c.keys
	meta, err := boltstore.Read(ctx, w.from.Path, func(t boltstore.Table, key, value []byte) error {
		return w.put(ctx, k.tables()[t]+string(key), string(value))
	})
	if err != nil {
		return err
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	r.Epoch, r.State.Restored = newest+1, true
	return w.finish(ctx, meta, r.Epoch)
}

// place looks at what is there, keeps a copy of it, and returns the newest epoch that is known.
func (w *restorer) place(ctx context.Context, r *Restored) (newest lease.Epoch, err error) {
	k := w.c.keys
	got, err := w.do(ctx, txn{then: []clientv3.Op{clientv3.OpGet(k.head), clientv3.OpGet(k.meta), clientv3.OpGet(k.restoring)}})
	if err != nil {
		return 0, err
	}
	newest = max(w.from.Epoch, r.Epoch)
	if w.from.Copies != "" {
		copied, err := boltstore.NewestEpoch(w.from.Copies, r.Cluster)
		if err != nil {
			return 0, err
		}
		newest = max(newest, copied)
	}
	for _, i := range []int{1, 2} {
		kvs := got.Responses[i].GetResponseRange().GetKvs()
		if len(kvs) == 0 {
			continue
		}
		m, err := decodeMeta(kvs[0].Value, w.o.Cell, 0)
		switch {
		case err != nil && !w.from.OtherCluster:
			return 0, fmt.Errorf("the store in place: %w", err)
		case err != nil:
			continue
		case lease.ClusterID(m.Meta.ClusterId) == r.Cluster:
			newest = max(newest, lease.Epoch(m.Meta.Epoch))
		case !w.from.OtherCluster:
			return 0, fmt.Errorf("the store in place is of cluster %x, the copy of %x: gateways and hosts of one are not those of the other", m.Meta.ClusterId, r.Cluster)
		}
		if i == 1 {
			if err := w.c.export(ctx, w.o, got, w.from.Aside); err != nil {
				return 0, fmt.Errorf("the store in place is not copied to %s: %w", w.from.Aside, err)
			}
			r.Aside = w.from.Aside
		}
	}
	return newest, nil
}

// clear removes what is in place.
func (w *restorer) clear(ctx context.Context, r *Restored, newest lease.Epoch) error {
	k := w.c.keys
	b, err := proto.Marshal(&storev1.EtcdMeta{Cell: w.o.Cell, Meta: &storev1.Meta{
		ClusterId: r.Cluster[:], Secret: r.Secret[:], Epoch: uint32(newest), Layout: layout, Audit: &storev1.AuditHead{},
	}})
	if err != nil {
		return err
	}
	w.ops = []clientv3.Op{clientv3.OpPut(k.restoring, string(b)), clientv3.OpDelete(k.meta), clientv3.OpDelete(k.head)}
	for _, dir := range k.tables() {
		w.ops = append(w.ops, clientv3.OpDelete(dir, clientv3.WithPrefix()))
	}
	return w.flush(ctx)
}

func (w *restorer) put(ctx context.Context, key, value string) error {
	w.ops = append(w.ops, clientv3.OpPut(key, value))
	if len(w.ops) < maxPuts {
		return nil
	}
	return w.flush(ctx)
}

// finish makes what was written a store.
func (w *restorer) finish(ctx context.Context, m *storev1.Meta, epoch lease.Epoch) error {
	k := w.c.keys
	h, err := newHead(&storev1.EtcdHead{Seq: 1, LastRev: m.LastRev, LastWall: m.LastWall, Restored: true, Audit: m.Audit})
	if err != nil {
		return err
	}
	m = &storev1.Meta{ClusterId: m.ClusterId, Secret: m.Secret, Epoch: uint32(epoch), Layout: layout, Audit: &storev1.AuditHead{}}
	b, err := proto.Marshal(&storev1.EtcdMeta{Meta: m, Cell: w.o.Cell, EtcdCluster: w.tenure.cluster})
	if err != nil {
		return err
	}
	w.ops = []clientv3.Op{clientv3.OpPut(k.meta, string(b)), clientv3.OpPut(k.head, h.value), clientv3.OpDelete(k.restoring)}
	return w.flush(ctx)
}

// flush writes what was collected. It renews the etcd lease before, for a copy may take longer than the TTL.
func (w *restorer) flush(ctx context.Context) error {
	if len(w.ops) == 0 {
		return nil
	}
	if err := w.c.retry(ctx, w.o.TTL, func(ctx context.Context) error { return w.c.renew(ctx, w.tenure.lease) }); err != nil {
		return err
	}
	_, err := w.do(ctx, txn{when: []clientv3.Cmp{w.c.owned(w.tenure)}, then: w.ops})
	w.ops = nil
	return err
}

// do runs a transaction until it is known to be done; all of a restore may be done twice.
func (w *restorer) do(ctx context.Context, t txn) (r *clientv3.TxnResponse, err error) {
	t.els = []clientv3.Op{clientv3.OpGet(w.c.keys.owner)}
	err = w.c.retry(ctx, w.o.TTL, func(ctx context.Context) error {
		if r, err = w.c.do(ctx, t); err == nil && !r.Succeeded {
			err = deposed(holderOf(r, 0))
		}
		return err
	})
	return r, err
}

// Adopt makes the records of an etcd that was itself restored from a copy, or brought back with fewer members than a
// majority, a store again: like Restore, with what is there.
func Adopt(ctx context.Context, o Options, above lease.Epoch) (epoch lease.Epoch, err error) {
	err = occupy(ctx, o, func(c *client, t tenure, o Options) error {
		w := &restorer{c: c, o: o, tenure: t}
		r, err := w.do(ctx, txn{then: []clientv3.Op{clientv3.OpGet(c.keys.head), clientv3.OpGet(c.keys.meta)}})
		if err != nil {
			return err
		}
		hs, ms := r.Responses[0].GetResponseRange().GetKvs(), r.Responses[1].GetResponseRange().GetKvs()
		if len(hs) == 0 || len(ms) == 0 {
			return fmt.Errorf("store %s in etcd does not exist", c.keys.prefix)
		}
		m, err := decodeMeta(ms[0].Value, o.Cell, 0)
		if err != nil {
			return err
		}
		h, err := decodeHead(hs[0].Value)
		if err != nil {
			return err
		}
		m.Meta.LastRev, m.Meta.LastWall, m.Meta.Audit = h.msg.LastRev, h.msg.LastWall, h.msg.Audit
		if epoch = max(above, lease.Epoch(m.Meta.Epoch)); epoch == math.MaxUint16 {
			return fmt.Errorf("epoch %d is the last: a new cluster is needed", epoch)
		}
		epoch++
		return w.finish(ctx, m.Meta, epoch)
	})
	if err != nil {
		return 0, fmt.Errorf("adopt: %w", err)
	}
	return epoch, nil
}
