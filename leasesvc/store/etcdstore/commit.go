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
	return head{m, string(b)}, nil
}

// item is a queued transaction. The first at of its records are on their way or written.
type item struct {
	tx       store.Tx
	last     lease.Rev
	complete func(error)
	at       int
}

// Commit implements store.Store.
func (s *Store) Commit(tx store.Tx) *store.Pending {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return store.Done(store.ErrClosed)
	case s.failed != nil:
		return store.Done(s.failed)
	}
	last, err := tx.Follow(s.queued)
	if err != nil {
		return store.Done(err)
	}
	p, complete := store.NewPending()
	s.queued = last
	s.queue = append(s.queue, item{tx: tx, last: last, complete: complete})
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return p
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
		for _, it := range todo[:c.items] {
			s.ring.Publish(it.last, it.tx.Records())
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

// chunk is what one etcd transaction writes: the records of some items and perhaps the first ones of another.
type chunk struct {
	ops   []clientv3.Op
	index map[string]int // of the keys in ops: etcd takes each key once
	head  *storev1.EtcdHead
	write bool // something beside the head
	items int  // that end with it
}

// put adds the operations of one record together, or none of them.
func (c *chunk) put(ops []clientv3.Op) bool {
	more := 0
	for _, op := range ops {
		if _, ok := c.index[string(op.KeyBytes())]; !ok {
			more++
		}
	}
	if len(c.ops)+more > maxPuts {
		return false
	}
	for _, op := range ops {
		k := string(op.KeyBytes())
		i, ok := c.index[k]
		if !ok {
			i = len(c.ops)
			c.index[k] = i
			c.ops = append(c.ops, op)
		}
		c.ops[i] = op
	}
	c.write = true
	return true
}

// fill makes the next chunk of items, at least of a part of the first.
func (s *Store) fill(items []item) (*chunk, error) {
	c := &chunk{index: map[string]int{}, head: proto.CloneOf(s.head.msg)}
	c.head.Seq++
	c.head.Owner = s.tenure.rev
	for i := range items {
		it := &items[i]
		for ; it.at < parts(it.tx); it.at++ {
			ops, rev, err := s.c.keys.part(it.tx, it.at)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", store.ErrFailed, err)
			}
			if !c.put(ops) {
				return c, nil
			}
			c.head.LastRev = max(c.head.LastRev, uint64(rev))
		}
		c.head.LastWall = max(c.head.LastWall, record.Nanos(it.tx.Wall))
		if it.tx.Recovered {
			c.head.Restored, c.write = false, true
		}
		c.items++
	}
	return c, nil
}

func parts(tx store.Tx) int {
	return len(tx.Commits) + len(tx.Pools) + len(tx.Members) + len(tx.Removed)
}

// part returns the i-th record of a transaction, in the order in which they may be cut: commits and pools in order of
// revision, members, members removed. rev is 0 for those without a revision.
func (k keys) part(tx store.Tx, i int) (ops []clientv3.Op, rev lease.Rev, err error) {
	if i < len(tx.Commits) {
		c := tx.Commits[i]
		ops, err = k.commit(c)
		return ops, c.Rev, err
	}
	if i -= len(tx.Commits); i < len(tx.Pools) {
		p := tx.Pools[i]
		if p.Pool.Removed {
			return []clientv3.Op{clientv3.OpDelete(k.pool(p.Pool.Name))}, p.Rev, nil
		}
		ops, err = puts(nil, k.pool(p.Pool.Name), record.EncodePool(p.Pool.Pool))
		return ops, p.Rev, err
	}
	if i -= len(tx.Pools); i < len(tx.Members) {
		m := tx.Members[i]
		ops, err = puts(nil, k.member(m.TEP), record.EncodeMember(m))
		return ops, 0, err
	}
	return []clientv3.Op{clientv3.OpDelete(k.member(tx.Removed[i-len(tx.Members)]))}, 0, nil
}

func (k keys) commit(c lease.Commit) ([]clientv3.Op, error) {
	ops, err := puts(nil, k.address(c.Address.Resource), record.EncodeAddress(c.Address))
	if err != nil || c.Audit.Ref == (lease.Ref{}) {
		return ops, err
	}
	return puts(ops, k.auditOf(c.Audit.Ref), record.EncodeAudit(c.Audit))
}

func puts(ops []clientv3.Op, key string, m proto.Message) ([]clientv3.Op, error) {
	v, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("record %q: %w", key, err)
	}
	return append(ops, clientv3.OpPut(key, string(v))), nil
}

// commit writes a chunk as the owner, on the head that it knows. A chunk without records only looks.
//
// A transaction of which it is not known whether it was done is sent again as it is: whichever comes first moves the head,
// and the others then find the head that they wanted to write. So it is done once, and its end is known, or the
// service stops.
func (s *Store) commit(c *chunk) error {
	next := s.head
	t := txn{
		when: append(s.guard(), clientv3.Compare(clientv3.Value(s.c.keys.head), "=", s.head.value)),
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
