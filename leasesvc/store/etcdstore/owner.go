package etcdstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// pollsPerTTL is how often a standby looks whether the cell is free. Reading costs etcd next to nothing, and unlike a
// watch it needs no history, so that a compaction cannot get in its way.
const pollsPerTTL = 20

// tenure is one ownership of the cell. It is over when the key is gone, whatever the owner thinks.
type tenure struct {
	lease   clientv3.LeaseID
	rev     int64  // creation revision of the ownership key: every transaction compares it
	cluster uint64 // id of the etcd cluster
}

// campaign waits until nobody owns the cell and takes it.
func (c *client) campaign(ctx context.Context, o Options) (tenure, error) {
	for told := ""; ; {
		try, cancel := c.deadline(ctx)
		t, holder, err := c.take(try, o)
		cancel()
		switch {
		case ctx.Err() != nil:
			return tenure{}, ctx.Err()
		case isFinal(err) && !errors.Is(err, rpctypes.ErrNoSpace): // which an operator can end
			return tenure{}, err
		case err == nil && holder == "":
			return t, nil
		}
		state := fmt.Sprintf("standby: %s owns the cell", holder)
		if err != nil {
			state = fmt.Sprintf("standby: etcd: %v", err)
		}
		if state != told {
			told = state
			o.OnState(state)
		}
		if !sleep(ctx, o.TTL/pollsPerTTL) {
			return tenure{}, ctx.Err()
		}
	}
}

// take takes the cell if nobody owns it; else it returns the owner's name. After an error a key may have been made: it
// belongs to an etcd lease that is ended here, or by nobody's renewing it.
func (c *client) take(ctx context.Context, o Options) (t tenure, holder string, err error) {
	get := clientv3.OpGet(c.keys.owner)
	r, err := c.do(ctx, txn{then: []clientv3.Op{get}})
	if err != nil {
		return tenure{}, "", err
	}
	if holder := holderOf(r, 0); holder != "" {
		return tenure{}, holder, nil
	}
	if t.lease, err = c.grant(ctx, o.TTL); err != nil {
		return tenure{}, "", err
	}
	r, err = c.do(ctx, txn{
		when: []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(c.keys.owner), "=", 0)},
		then: []clientv3.Op{clientv3.OpPut(c.keys.owner, o.Name+" "+rand.Text(), clientv3.WithLease(t.lease))},
		els:  []clientv3.Op{get},
	})
	switch {
	case err != nil:
		return tenure{}, "", errors.Join(err, c.revoke(t.lease))
	case !r.Succeeded:
		return tenure{}, holderOf(r, 0), c.revoke(t.lease)
	}
	t.rev, t.cluster = r.Header.Revision, r.Header.ClusterId
	return t, "", nil
}

// holderOf returns the name of the owner that the i-th response of a transaction shows, "" without one.
func holderOf(r *clientv3.TxnResponse, i int) string {
	kvs := r.Responses[i].GetResponseRange().GetKvs()
	if len(kvs) == 0 {
		return ""
	}
	var name, nonce string
	if n, _ := fmt.Sscan(string(kvs[0].Value), &name, &nonce); n != 2 {
		return "somebody"
	}
	return name
}

// checkMeta reads the record that says whose store this is.
func (c *client) checkMeta(ctx context.Context, o Options) error {
	r, err := c.do(ctx, txn{then: []clientv3.Op{clientv3.OpGet(c.keys.meta), clientv3.OpGet(c.keys.restoring)}})
	if err != nil {
		return err
	}
	kvs := r.Responses[0].GetResponseRange().GetKvs()
	switch {
	case len(kvs) == 0 && r.Responses[1].GetResponseRange().GetCount() > 0:
		return final{fmt.Errorf("store %s in etcd is half restored: repeat dstm db restore", c.keys.prefix)}
	case len(kvs) == 0:
		return final{fmt.Errorf("store %s in etcd does not exist: create one with leasesvc --create-store, or restore a copy", c.keys.prefix)}
	}
	if _, err := decodeMeta(kvs[0].Value, o.Cell, r.Header.ClusterId); err != nil {
		return final{fmt.Errorf("store %s in etcd: %w", c.keys.prefix, err)}
	}
	c.cluster = r.Header.ClusterId
	return nil
}

// decodeMeta refuses the store of another cell, layout or etcd cluster (0 = any).
func decodeMeta(b []byte, cell string, cluster uint64) (*storev1.EtcdMeta, error) {
	var m storev1.EtcdMeta
	if err := proto.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("meta record: %w", err)
	}
	if m.Meta == nil {
		return nil, errors.New("meta record is empty")
	}
	if err := record.CheckMeta(m.Meta, layout); err != nil {
		return nil, err
	}
	if m.Cell != cell {
		return nil, fmt.Errorf("it belongs to cell %q: the configuration is of cell %q", m.Cell, cell)
	}
	if cluster != 0 && m.EtcdCluster != cluster {
		return nil, fmt.Errorf("it was made in etcd cluster %x and is in cluster %x now: if etcd was restored from a copy, run dstm db adopt", m.EtcdCluster, cluster)
	}
	return &m, nil
}

// owned is the condition that a tenure lasts.
func (c *client) owned(t tenure) clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(c.keys.owner), "=", t.rev)
}

// keep renews the etcd lease and looks whether the key is still there, so that an idle owner notices its loss too.
func (s *Store) keep() {
	defer close(s.kept)
	last := time.Now()
	for sleep(s.ctx, s.o.TTL/callsPerTTL) {
		at := time.Now()
		err := s.renew()
		switch {
		case err == nil:
			last = at
		case s.ctx.Err() != nil:
			return
		case errors.Is(err, store.ErrNotOwner) || isFinal(err):
			s.fail(err)
			return
		case time.Since(last) > s.o.TTL:
			s.fail(fmt.Errorf("%w, or not known to: etcd did not answer for %s: %w", store.ErrNotOwner, s.o.TTL, err))
			return
		}
	}
}

func (s *Store) renew() error {
	ctx, cancel := s.c.deadline(s.ctx)
	defer cancel()
	if err := s.c.renew(ctx, s.tenure.lease); errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("%w: its etcd lease %x ended", store.ErrNotOwner, s.tenure.lease)
	} else if err != nil {
		return err
	}
	_, err := s.once(ctx, nil)
	return err
}
