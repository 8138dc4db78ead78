// Package etcdstore keeps the lease service's records in etcd, for cells that outlive the loss of a machine. Several
// services may be configured with it; one at a time owns the cell. See docs/design/etcd.md.
package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// layout is the version of the keys and values; a store of another one is refused.
const layout = 1

// Options of a store.
type Options struct {
	Endpoints []string // URLs of etcd's members
	TLS       Files    // none = plain text
	Prefix    string   // all keys of the cell lie below it; empty = /dstm/ and the cell
	Cell      string
	Name      string        // of this service, shown to the others; without white space
	TTL       time.Duration // after which a silent owner is replaced, in whole seconds from 2 s; 0 = 5s
	RingSize  int           // records kept for reconnecting gateways; 0 = 65536
	Scratch   string        // directory for files that are gone soon; empty = the system's
	// OnState is told in words what the service is: "standby: ..." or "owner". May be nil.
	OnState func(state string)

	dial dialOptions
}

const (
	defaultTTL  = 5 * time.Second
	leastTTL    = 2 * time.Second
	defaultRing = 1 << 16
)

func (o *Options) defaults() error {
	if o.TTL == 0 {
		o.TTL = defaultTTL
	}
	if o.RingSize == 0 {
		o.RingSize = defaultRing
	}
	if o.Prefix == "" {
		o.Prefix = "/dstm/" + o.Cell
	}
	if o.OnState == nil {
		o.OnState = func(string) {}
	}
	switch {
	case o.Cell == "" || o.Name == "":
		return errors.New("etcd store: cell or name is not set")
	case o.TTL < leastTTL || o.TTL%time.Second != 0:
		return fmt.Errorf("etcd store: ttl %s: want whole seconds from %s", o.TTL, leastTTL)
	}
	return nil
}

// Store is the ownership of one cell in etcd.
type Store struct {
	o      Options
	c      *client
	tenure tenure
	ring   *store.Ring
	head   head // of the writer

	mu     sync.Mutex
	queue  []item
	wake   chan struct{} // holds a token while the queue is not empty
	queued lease.Rev     // newest revision queued
	failed error
	closed bool

	lost    chan struct{} // closed at the first failure
	done    chan struct{} // the writer has ended
	ctx     context.Context
	stop    context.CancelFunc // of keep
	kept    chan struct{}
	closing sync.Once
	closeBy error
}

var _ store.Store = (*Store)(nil)

// Create makes a new, empty store with a new cluster id. It refuses to replace one.
func Create(ctx context.Context, o Options) error {
	if err := o.defaults(); err != nil {
		return err
	}
	c, err := dial(o)
	if err != nil {
		return err
	}
	defer c.Close()
	m := &storev1.EtcdMeta{Meta: record.NewMeta(layout), Cell: o.Cell}
	return c.retry(ctx, o.TTL, func(ctx context.Context) error {
		if err := c.voters(ctx); err != nil {
			return err
		}
		return c.create(ctx, m)
	})
}

// create writes the first two records in one transaction. A repeated one finds its own.
func (c *client) create(ctx context.Context, m *storev1.EtcdMeta) error {
	r, err := c.do(ctx, txn{then: []clientv3.Op{clientv3.OpGet(c.keys.meta)}})
	if err != nil {
		return err
	}
	m.EtcdCluster = r.Header.ClusterId
	meta, err := proto.Marshal(m)
	if err != nil {
		return final{err}
	}
	first, err := newHead(&storev1.EtcdHead{Audit: &storev1.AuditHead{}})
	if err != nil {
		return final{err}
	}
	r, err = c.do(ctx, txn{
		when: []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(c.keys.prefix).WithPrefix(), "=", 0)},
		then: []clientv3.Op{clientv3.OpPut(c.keys.meta, string(meta)), clientv3.OpPut(c.keys.head, first.value)},
		els:  []clientv3.Op{clientv3.OpGet(c.keys.meta)},
	})
	if err != nil {
		return err
	}
	if kvs := r.Responses[0].GetResponseRange().GetKvs(); !r.Succeeded && (len(kvs) == 0 || string(kvs[0].Value) != string(meta)) {
		return final{fmt.Errorf("store %s exists in etcd: it is not replaced", c.keys.prefix)}
	}
	return nil
}

// Open waits until this service owns the cell, for as long as ctx lasts, and through times in which etcd cannot be
// reached. What waiting does not change is an error: no store, that of another cell, a wrong number of voters.
func Open(ctx context.Context, o Options) (*Store, error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	c, err := dial(o)
	if err != nil {
		return nil, err
	}
	s, err := c.open(ctx, o)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	o.OnState("owner")
	return s, nil
}

func (c *client) open(ctx context.Context, o Options) (*Store, error) {
	err := c.retry(ctx, 0, func(ctx context.Context) error {
		err := c.voters(ctx)
		if err == nil {
			err = c.checkMeta(ctx, o)
		}
		if err != nil && !isFinal(err) {
			o.OnState(fmt.Sprintf("standby: etcd: %v", err))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for {
		t, err := c.campaign(ctx, o)
		if err != nil {
			return nil, err
		}
		s := newStore(o, c, t)
		switch err := s.begin(ctx); {
		case err == nil:
			return s, nil
		case ctx.Err() != nil || !errors.Is(err, store.ErrNotOwner):
			return nil, errors.Join(err, c.revoke(t.lease))
		}
	}
}

func newStore(o Options, c *client, t tenure) *Store {
	s := &Store{
		o: o, c: c, tenure: t, wake: make(chan struct{}, 1),
		lost: make(chan struct{}), done: make(chan struct{}), kept: make(chan struct{}),
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

// begin reads the head that the first transaction compares, and starts the goroutines.
func (s *Store) begin(ctx context.Context) error {
	r, err := s.read(ctx, clientv3.OpGet(s.c.keys.head), clientv3.OpGet(s.c.keys.meta))
	if err != nil {
		return err
	}
	if _, err := decodeState(r, s.o.Cell, &s.head); err != nil {
		return fmt.Errorf("store %s in etcd: %w", s.c.keys.prefix, err)
	}
	s.queued = lease.Rev(s.head.msg.LastRev)
	s.ring = store.NewRing(s.o.RingSize, s.queued)
	go s.write()
	go s.keep()
	return nil
}

// decodeState reads head and meta, the first two responses.
func decodeState(r *clientv3.TxnResponse, cell string, h *head) (store.State, error) {
	hs, ms := r.Responses[0].GetResponseRange().GetKvs(), r.Responses[1].GetResponseRange().GetKvs()
	if len(hs) == 0 || len(ms) == 0 {
		return store.State{}, errors.New("head or meta record is missing: restore a copy")
	}
	m, err := decodeMeta(ms[0].Value, cell, r.Header.ClusterId)
	if err != nil {
		return store.State{}, err
	}
	if *h, err = decodeHead(hs[0].Value); err != nil {
		return store.State{}, err
	}
	st := record.State(m.Meta)
	st.Last, st.Wall, st.Restored = lease.Rev(h.msg.LastRev), record.Time(h.msg.LastWall), h.msg.Restored
	return st, nil
}

// Lost is closed when the store can commit nothing more, because another service owns it or for another reason: see
// Err.
func (s *Store) Lost() <-chan struct{} { return s.lost }

// Err returns why the store is lost, nil while it is not.
func (s *Store) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

func (s *Store) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = err
		close(s.lost)
	}
}

// read runs a reading transaction as owner, again until it is known that this still is the owner or the TTL is over.
func (s *Store) read(ctx context.Context, ops ...clientv3.Op) (r *clientv3.TxnResponse, err error) {
	err = s.c.retry(ctx, s.o.TTL, func(ctx context.Context) error {
		r, err = s.once(ctx, ops)
		return err
	})
	switch {
	case err == nil || errors.Is(err, store.ErrNotOwner) || ctx.Err() != nil:
		return r, err
	case isFinal(err):
		return nil, fmt.Errorf("store: etcd: %w", err)
	}
	return nil, fmt.Errorf("%w, or not known to: %w", store.ErrNotOwner, err)
}

// once runs a reading transaction as owner. Readings of transactions see everything committed before their call.
func (s *Store) once(ctx context.Context, ops []clientv3.Op) (*clientv3.TxnResponse, error) {
	r, err := s.c.do(ctx, txn{when: []clientv3.Cmp{s.c.owned(s.tenure)}, then: ops, els: []clientv3.Op{clientv3.OpGet(s.c.keys.owner)}})
	if err != nil {
		return nil, err
	}
	if !r.Succeeded {
		return nil, deposed(holderOf(r, 0))
	}
	return r, nil
}

func deposed(by string) error {
	if by == "" {
		return final{fmt.Errorf("%w: the ownership key is gone", store.ErrNotOwner)}
	}
	return final{fmt.Errorf("%w: %s", store.ErrNotOwner, by)}
}

// Load implements store.Store.
func (s *Store) Load(ctx context.Context) (store.State, error) {
	k := s.c.keys
	r, err := s.read(ctx, clientv3.OpGet(k.head), clientv3.OpGet(k.meta), rangeOf(k.members), rangeOf(k.pools))
	if err != nil {
		return store.State{}, err
	}
	var h head
	st, err := decodeState(r, s.o.Cell, &h)
	if err != nil {
		return store.State{}, fmt.Errorf("store: %w", err)
	}
	for _, kv := range r.Responses[2].GetResponseRange().Kvs {
		m, err := record.DecodeMember(kv.Key[len(k.members):], kv.Value)
		if err != nil {
			return store.State{}, fmt.Errorf("store: %w", err)
		}
		st.Members = append(st.Members, m)
	}
	for _, kv := range r.Responses[3].GetResponseRange().Kvs {
		p, err := record.DecodePool(kv.Key[len(k.pools):], kv.Value)
		if err != nil {
			return store.State{}, fmt.Errorf("store: %w", err)
		}
		st.Pools = append(st.Pools, p)
	}
	return st, nil
}

// page is how many keys are read at a time.
const page = 4096

// Addresses implements store.Store. Each page is read as owner at its own revision of etcd; while nothing is committed in
// between, that is one state, and no compaction can take it away.
func (s *Store) Addresses(ctx context.Context, yield func(lease.Address) error) error {
	dir := s.c.keys.addresses
	for from, end := dir, clientv3.WithRange(clientv3.GetPrefixRangeEnd(dir)); ; {
		r, err := s.read(ctx, clientv3.OpGet(from, end, clientv3.WithLimit(page)))
		if err != nil {
			return err
		}
		rr := r.Responses[0].GetResponseRange()
		for _, kv := range rr.Kvs {
			a, err := record.DecodeAddress(kv.Key[len(dir):], kv.Value)
			if err != nil {
				return fmt.Errorf("store: %w", err)
			}
			if err := yield(a); err != nil {
				return err
			}
		}
		if !rr.More {
			return nil
		}
		from = string(rr.Kvs[len(rr.Kvs)-1].Key) + "\x00"
	}
}

// Watch implements store.Store.
func (s *Store) Watch(after lease.Rev) store.Watcher { return s.ring.Watch(after) }

// Close implements store.Store: it also lets the next service own the cell.
func (s *Store) Close() error {
	s.closing.Do(func() {
		s.mu.Lock()
		s.closed = true
		select {
		case s.wake <- struct{}{}:
		default:
		}
		s.mu.Unlock()
		<-s.done
		s.stop()
		<-s.kept
		s.ring.Close()
		// If etcd cannot be reached, the next one waits for the TTL instead.
		_ = s.c.revoke(s.tenure.lease)
		s.closeBy = s.c.Close()
	})
	return s.closeBy
}
