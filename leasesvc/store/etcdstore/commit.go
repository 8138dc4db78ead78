package etcdstore

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// maxPuts bounds the records of one etcd transaction. etcd takes 128 operations (--max-txn-ops) and 1.5 MB; one is for
// the head, and no record reaches 1 kB.
const maxPuts = 127

// head is the record that chains the transactions: each compares the value that the one before wrote.
type head struct {
	msg   *storev1.EtcdHead
	value string // as stored
}

func newHead(m *storev1.EtcdHead) (head, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return head{}, fmt.Errorf("head record: %w", err)
	}
	return head{m, string(b)}, nil
}

func decodeHead(b []byte) (head, error) {
	m := new(storev1.EtcdHead)
	if err := proto.Unmarshal(b, m); err != nil {
		return head{}, fmt.Errorf("head record: %w", err)
	}
	if m.Audit == nil {
		return head{}, errors.New("head record: no head of the audit log")
	}
	return head{m, string(b)}, nil
}

// item is a queued transaction or, if prune is not nil, a step of pruning. The first at of its parts are on their way or
// written.
type item struct {
	tx       store.Tx
	last     lease.Rev
	prune    *pruning
	complete func(error)
	at       int
}

// Commit implements store.Store.
func (s *Store) Commit(tx store.Tx) *store.Pending {
	p, complete := store.NewPending()
	if err := s.enqueue(item{tx: tx, complete: complete}); err != nil {
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

// write is the one writer: it puts everything that waits into one etcd transaction, as far as it fits.
func (s *Store) write() {
	defer close(s.done)
	for todo := s.take(nil); len(todo) > 0; todo = s.take(todo) {
		c, err := s.fill(todo)
		if err == nil {
			err = s.Err() // nothing is written behind a failure
		}
		if err == nil {
			err = s.commit(c)
		}
		if err != nil {
			s.fail(err)
			for _, it := range todo {
				it.complete(s.Err())
			}
			todo = nil
			continue
		}
		done := todo[:c.items]
		if len(done) == 0 {
			continue
		}
		var records []lease.Record // watchers get what became durable together in one batch
		for _, it := range done {
			records = append(records, it.tx.Records()...)
		}
		s.ring.Publish(done[len(done)-1].last, records)
		for _, it := range done {
			it.complete(nil)
		}
		todo = todo[c.items:]
	}
}

// take adds what was queued meanwhile; without anything to do it waits. It returns nothing once the store is closed.
func (s *Store) take(todo []item) []item {
	for {
		s.mu.Lock()
		todo = append(todo, s.queue...)
		s.queue = nil
		closed := s.closed
		s.mu.Unlock()
		if len(todo) > 0 || closed {
			return todo
		}
		<-s.wake
	}
}

// chunk is what one etcd transaction writes: the parts of some items and perhaps the first ones of another.
type chunk struct {
	ops   []clientv3.Op
	index map[string]int // of the keys in ops: etcd takes each key once
	head  *storev1.EtcdHead
	write bool // something beside the head
	items int  // that end with it
}

func (c *chunk) add(op clientv3.Op) {
	k := string(op.KeyBytes())
	i, ok := c.index[k]
	if !ok {
		i = len(c.ops)
		c.index[k] = i
		c.ops = append(c.ops, op)
	}
	c.ops[i] = op
	c.write = true
}

func (c *chunk) put(key string, m proto.Message) error {
	v, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("record %q: %w", key, err)
	}
	c.add(clientv3.OpPut(key, string(v)))
	return nil
}

// fill makes the next chunk of items, at least of a part of the first.
func (s *Store) fill(items []item) (*chunk, error) {
	c := &chunk{index: map[string]int{}, head: proto.CloneOf(s.head.msg)}
	c.head.Seq++
	c.head.Owner = s.tenure.rev
	for i := range items {
		it := &items[i]
		for ; it.at < it.parts(); it.at++ {
			if len(c.ops)+it.cost() > maxPuts {
				return c, nil
			}
			if err := c.part(s.c.keys, it); err != nil {
				return nil, fmt.Errorf("%w: %w", store.ErrFailed, err)
			}
		}
		c.head.LastWall = max(c.head.LastWall, record.Nanos(it.tx.Wall))
		if it.tx.Recovered {
			c.head.Restored, c.write = false, true
		}
		c.items++
	}
	return c, nil
}

// parts returns how many parts an item can be cut into.
func (it *item) parts() int {
	if it.prune != nil {
		return 1
	}
	return len(it.tx.Commits) + len(it.tx.Pools) + len(it.tx.Members) + len(it.tx.Removed)
}

// cost returns how many keys the next part writes at most.
func (it *item) cost() int {
	switch {
	case it.prune != nil:
		return len(it.prune.ops)
	case it.at < len(it.tx.Commits):
		return 3
	}
	return 1
}

// part adds the next part of an item, in the order in which a transaction may be cut: commits and pools in order of
// revision, members, members removed.
func (c *chunk) part(k keys, it *item) error {
	if it.prune != nil {
		c.write = true
		for _, op := range it.prune.apply(c.head.Audit) {
			c.add(op)
		}
		return nil
	}
	i := it.at
	if i < len(it.tx.Commits) {
		return c.commit(k, it.tx.Commits[i])
	}
	if i -= len(it.tx.Commits); i < len(it.tx.Pools) {
		p := it.tx.Pools[i]
		c.head.LastRev = uint64(p.Rev)
		if p.Pool.Removed {
			c.add(clientv3.OpDelete(k.pool(p.Pool.Name)))
			return nil
		}
		return c.put(k.pool(p.Pool.Name), record.EncodePool(p.Pool.Pool))
	}
	if i -= len(it.tx.Pools); i < len(it.tx.Members) {
		m := it.tx.Members[i]
		return c.put(k.member(m.TEP), record.EncodeMember(m))
	}
	c.add(clientv3.OpDelete(k.member(it.tx.Removed[i-len(it.tx.Members)])))
	return nil
}

func (c *chunk) commit(k keys, m lease.Commit) error {
	c.head.LastRev = uint64(m.Rev)
	if err := c.put(k.address(m.Address.Resource), record.EncodeAddress(m.Address)); err != nil {
		return err
	}
	e, err := audit.Append(c.head.Audit, m)
	if err != nil || e.Key == nil {
		return err
	}
	c.add(clientv3.OpPut(k.audit+string(e.Key), string(e.Value)))
	c.add(clientv3.OpPut(k.index+string(e.IndexKey), string(e.IndexValue)))
	return nil
}

// commit writes a chunk as the owner, on the head that it knows. A chunk without records only looks.
//
// A transaction of which it is not known whether it was done is sent again as it is: whichever comes first moves the head,
// and the others then find the head that they wanted to write. So it is done once, and its end is known, or the
// service stops.
func (s *Store) commit(c *chunk) error {
	next := s.head
	t := txn{
		when: []clientv3.Cmp{s.c.owned(s.tenure), clientv3.Compare(clientv3.Value(s.c.keys.head), "=", s.head.value)},
		els:  []clientv3.Op{clientv3.OpGet(s.c.keys.owner), clientv3.OpGet(s.c.keys.head)},
	}
	t.then = t.els[:1]
	if c.write {
		var err error
		if next, err = newHead(c.head); err != nil {
			return fmt.Errorf("%w: %w", store.ErrFailed, err)
		}
		t.then = append(c.ops, clientv3.OpPut(s.c.keys.head, next.value))
	}
	err := s.c.retry(context.Background(), s.o.TTL, func(ctx context.Context) error {
		r, err := s.c.do(ctx, t)
		if err != nil || r.Succeeded {
			return err
		}
		return s.refused(r, next)
	})
	switch {
	case err == nil:
		s.head = next
		return nil
	case errors.Is(err, store.ErrNotOwner):
		return err
	case isFinal(err):
		return fmt.Errorf("%w: etcd: %w", store.ErrFailed, err)
	}
	return fmt.Errorf("%w, or not known to: etcd did not say for %s whether it wrote: %w", store.ErrNotOwner, s.o.TTL, err)
}

// refused says why a condition did not hold; nil if the transaction was done by an earlier attempt.
func (s *Store) refused(r *clientv3.TxnResponse, next head) error {
	owners, heads := r.Responses[0].GetResponseRange().GetKvs(), r.Responses[1].GetResponseRange().GetKvs()
	switch {
	case len(owners) == 0 || owners[0].CreateRevision != s.tenure.rev:
		return deposed(holderOf(r, 0))
	case len(heads) > 0 && string(heads[0].Value) == next.value:
		return nil
	}
	return final{errors.New("somebody else changed the head record")}
}
