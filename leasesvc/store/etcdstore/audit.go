package etcdstore

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// pruneStep bounds the records that one step of pruning looks at: each can take out four keys, in one transaction.
const pruneStep = maxPuts / 4

// A reader of the log fetches some keys at a time and keeps a few such stretches: a search then needs few questions, and so
// does who reads on.
const (
	fetched   = 128
	stretches = 8
)

// auditLog reads the log at one revision of etcd.
type auditLog struct {
	past
	last       lease.Rev // newest record of the log
	log, index []stretch // the newest that were fetched
}

var _ audit.Reader = (*auditLog)(nil)

// openLog returns a reader of the log as it is now, and its head.
func (s *Store) openLog(ctx context.Context) (*auditLog, *storev1.AuditHead, error) {
	r, err := s.read(ctx, clientv3.OpGet(s.c.keys.head), clientv3.OpGet(s.c.keys.meta))
	if err != nil {
		return nil, nil, err
	}
	var h head
	if _, err := decodeState(r, s.o.Cell, &h); err != nil {
		return nil, nil, fmt.Errorf("store: %w", err)
	}
	p := past{ctx: ctx, c: s.c, patience: s.o.TTL, rev: r.Header.Revision}
	return &auditLog{past: p, last: lease.Rev(h.msg.Audit.LastRev)}, h.msg.Audit, nil
}

// stretch is keys that were fetched at once.
type stretch struct {
	kvs  []kv
	from string // it begins here; empty = nothing was fetched
	next string // and the keys behind it begin here; empty = there are none
}

type kv struct{ key, value string }

func (r *stretch) covers(key string) bool {
	return r.from != "" && r.from <= key && (r.next == "" || key < r.next)
}

// search returns the index of the first key at or after one that it covers.
func (r *stretch) search(key string) (i int, exact bool) {
	return slices.BinarySearchFunc(r.kvs, key, func(e kv, key string) int { return cmp.Compare(e.key, key) })
}

// at returns a key without dir, and its value; nil outside of it.
func (r *stretch) at(i int, dir string) (k, v []byte) {
	if i < 0 || i >= len(r.kvs) {
		return nil, nil
	}
	return []byte(r.kvs[i].key[len(dir):]), []byte(r.kvs[i].value)
}

// covering returns the stretch that covers a key, nil if none does.
func covering(all []stretch, key string) *stretch {
	for i := range all {
		if all[i].covers(key) {
			return &all[i]
		}
	}
	return nil
}

// seek returns the first key under dir at or after one.
func (l *auditLog) seek(all *[]stretch, dir string, from []byte) (k, v []byte, err error) {
	key := dir + string(from)
	r := covering(*all, key)
	if r == nil {
		if r, err = l.fetch(all, dir, key); err != nil {
			return nil, nil, err
		}
	}
	i, _ := r.search(key)
	k, v = r.at(i, dir)
	return k, v, nil
}

func (l *auditLog) fetch(all *[]stretch, dir, key string) (*stretch, error) {
	got, err := l.get(key, clientv3.GetPrefixRangeEnd(dir), clientv3.WithLimit(fetched))
	if err != nil {
		return nil, err
	}
	r := stretch{from: key}
	for _, e := range got.Kvs {
		r.kvs = append(r.kvs, kv{string(e.Key), string(e.Value)})
	}
	if got.More {
		r.next = r.kvs[len(r.kvs)-1].key + "\x00"
	}
	if len(*all) == stretches {
		*all = append((*all)[:0], (*all)[1:]...)
	}
	*all = append(*all, r)
	return &(*all)[len(*all)-1], nil
}

// Record implements audit.Reader.
func (l *auditLog) Record(from lease.Rev) (lease.Rev, []byte, error) {
	if from > l.last {
		return 0, nil, nil
	}
	k, v, err := l.seek(&l.log, l.c.keys.audit, audit.Key(from))
	if err != nil || k == nil {
		return 0, nil, err
	}
	rev, err := audit.KeyRev(k)
	return rev, v, err
}

// First implements audit.Reader.
func (l *auditLog) First(key []byte) (k, v []byte, err error) {
	return l.seek(&l.index, l.c.keys.index, key)
}

// Last implements audit.Reader, for entries of the resource that the key begins with: package audit asks for no others, and
// etcd reads all of a range to find its last key.
func (l *auditLog) Last(key []byte) (k, v []byte, err error) {
	dir := l.c.keys.index
	first := dir + string(key[:len(record.ResourceKey(lease.Resource{Addr: netip.IPv4Unspecified()}))])
	if r := covering(l.index, first); r != nil && r.covers(dir+string(key)) {
		i, exact := r.search(dir + string(key))
		if !exact {
			i--
		}
		k, v = r.at(i, dir)
		return k, v, nil
	}
	r, err := l.get(first, dir+string(key)+"\x00", clientv3.WithLimit(1), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend))
	if err != nil || len(r.Kvs) == 0 {
		return nil, nil, err
	}
	return r.Kvs[0].Key[len(dir):], r.Kvs[0].Value, nil
}

// History implements store.Store.
func (s *Store) History(ctx context.Context, addr netip.Addr, at time.Time, yield func(lease.Audit) bool) error {
	l, _, err := s.openLog(ctx)
	if err != nil {
		return err
	}
	return audit.History(ctx, l, addr, at, yield)
}

// Events implements store.Store.
func (s *Store) Events(ctx context.Context, after lease.Rev, limit int) ([]store.AuditEvent, error) {
	l, h, err := s.openLog(ctx)
	if err != nil {
		return nil, err
	}
	return audit.Events(ctx, l, h, after, limit)
}

// pruning is a step that waits for the writer. It was worked out beside it: what commits add meanwhile is behind the
// part of the log that it is about, and they touch other fields of the head.
type pruning struct {
	from *storev1.AuditHead // as it was
	to   *storev1.AuditHead // of which base and kept count
	ops  []clientv3.Op
}

// apply moves the base of the log on. A step that another one overtook does nothing.
func (p *pruning) apply(h *storev1.AuditHead) []clientv3.Op {
	if h.BaseRev != p.from.BaseRev {
		return nil
	}
	h.BaseRev, h.Base, h.Kept = p.to.BaseRev, p.to.Base, p.to.Kept
	return p.ops
}

// Prune implements store.Store.
func (s *Store) Prune(ctx context.Context, before time.Time) (more bool, err error) {
	l, h, err := s.openLog(ctx)
	if err != nil {
		return false, err
	}
	p := &pruning{from: proto.CloneOf(h), to: h}
	out, err := audit.Prune(l, h, before, pruneStep)
	if err != nil {
		return false, err
	}
	if p.from.BaseRev == p.to.BaseRev {
		return out.More, nil
	}
	for _, k := range out.Log {
		p.ops = append(p.ops, clientv3.OpDelete(s.c.keys.audit+string(k)))
	}
	for _, k := range out.Index {
		p.ops = append(p.ops, clientv3.OpDelete(s.c.keys.index+string(k)))
	}
	pending, complete := store.NewPending()
	if err := s.enqueue(item{prune: p, complete: complete}); err != nil {
		return false, err
	}
	return out.More, pending.Wait(ctx)
}
