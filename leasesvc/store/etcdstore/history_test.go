package etcdstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

var (
	t0     = time.Unix(1_800_000_000, 0)
	source = netip.MustParseAddr("2001:db8:1::1")
	tep    = netip.MustParseAddr("2001:db8:a::1")
)

// bind returns the lease of a host that begins at a revision, each on an address of its own.
func bind(rev lease.Rev, host string) lease.Commit {
	a := lease.Address{
		Resource: lease.Whole(netip.AddrFrom4([4]byte{10, byte(rev >> 16), byte(rev >> 8), byte(rev)})), State: lease.Bound,
		Gen: lease.MakeGen(1, rev), Rev: rev, Host: host, Source: source, TEP: tep, MTU: 1460, BoundAt: t0, Valid: time.Hour,
	}
	return lease.Commit{Rev: rev, Address: a, Audit: a.Audit(), Record: lease.BindRecord(rev, a.Binding())}
}

// book notes what the owners of a cell were told is durable.
type book struct {
	mu    sync.Mutex
	acked map[lease.Rev]string // host by revision
}

func newBook() *book { return &book{acked: map[lease.Rev]string{}} }

func (b *book) note(rev lease.Rev, host string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.acked[rev] = host
}

func (b *book) size() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.acked)
}

// load lets callers commit binds until ctx ends (nil) or the store refuses. Hosts bear the name of the tenure, so that
// the same revision of two owners differs.
func (b *book) load(ctx context.Context, s *Store, callers int) error {
	st, err := s.Load(ctx)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	rev := st.Last
	next := func() (lease.Rev, string, *store.Pending) {
		mu.Lock()
		defer mu.Unlock()
		rev++
		host := fmt.Sprintf("%s.%d.%d", s.o.Name, s.tenure.rev, rev)
		return rev, host, s.Commit(store.Tx{Commits: []lease.Commit{bind(rev, host)}})
	}
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				rev, host, p := next()
				if errs[i] = p.Wait(context.Background()); errs[i] != nil {
					return
				}
				b.note(rev, host)
				sleep(ctx, time.Millisecond)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// check compares the store with the book: everything acknowledged is there as it was acknowledged, and there is no gap.
func (b *book) check(ctx context.Context, s *Store) error {
	st, err := s.Load(ctx)
	if err != nil {
		return err
	}
	found := map[lease.Rev]string{}
	err = s.Addresses(ctx, func(a lease.Address) error { found[a.Rev] = a.Host; return nil })
	if err != nil {
		return err
	}
	if len(found) != int(st.Last) {
		return fmt.Errorf("%d binds in the store at revision %d: want one a revision", len(found), st.Last)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for rev, host := range b.acked {
		if found[rev] != host {
			return fmt.Errorf("revision %d was acknowledged to %s and is of %q in the store", rev, host, found[rev])
		}
	}
	return nil
}

// breach reads all that ever happened below a prefix from etcd's own history and returns the first breach of a rule: one
// chain of heads, each written while the owner that it names owned the cell, each with all revisions since the one
// before, and no record past it.
func breach(ctx context.Context, c *clientv3.Client, k keys) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r, err := c.Get(ctx, k.meta)
	if err != nil || len(r.Kvs) == 0 {
		return fmt.Errorf("no meta record: %w", err)
	}
	a := auditor{k: k, cell: r.Kvs[0].ModRevision}
	for w := range c.Watch(ctx, k.prefix, clientv3.WithPrefix(), clientv3.WithRev(a.cell), clientv3.WithProgressNotify()) {
		if err := w.Err(); err != nil {
			return err
		}
		for len(w.Events) > 0 {
			n := slices.IndexFunc(w.Events, func(e *clientv3.Event) bool { return e.Kv.ModRevision != w.Events[0].Kv.ModRevision })
			if n < 0 {
				n = len(w.Events)
			}
			if err := a.revision(w.Events[:n]); err != nil {
				return fmt.Errorf("etcd revision %d: %w", w.Events[0].Kv.ModRevision, err)
			}
			w.Events = w.Events[n:]
		}
		if w.Header.Revision >= r.Header.Revision {
			return nil
		}
	}
	return ctx.Err()
}

type auditor struct {
	k     keys
	cell  int64 // etcd revision at which the store was made
	owner int64 // creation revision of the ownership key, 0 = nobody
	head  *storev1.EtcdHead
}

// revision looks at the events of one etcd transaction.
func (a *auditor) revision(events []*clientv3.Event) error {
	var next *storev1.EtcdHead
	revs := map[lease.Rev]bool{}
	for _, e := range events {
		key := string(e.Kv.Key)
		switch {
		case key == a.k.owner && e.Type == clientv3.EventTypeDelete:
			a.owner = 0
		case key == a.k.owner:
			a.owner = e.Kv.CreateRevision
		case key == a.k.head:
			next = new(storev1.EtcdHead)
			if err := proto.Unmarshal(e.Kv.Value, next); err != nil {
				return err
			}
		case strings.HasPrefix(key, a.k.addresses):
			addr, err := record.DecodeAddress(bytes.TrimPrefix(e.Kv.Key, []byte(a.k.addresses)), e.Kv.Value)
			if err != nil {
				return err
			}
			revs[addr.Rev] = true
		}
	}
	if next == nil && len(revs) > 0 {
		return errors.New("addresses written without a head")
	}
	if next == nil {
		return nil
	}
	was := a.head
	a.head = next
	if was == nil {
		return nil
	}
	switch {
	case next.Seq != was.Seq+1:
		return fmt.Errorf("head %d follows on %d", next.Seq, was.Seq)
	case next.Owner != a.owner:
		return fmt.Errorf("head of owner %d while the owner is %d", next.Owner, a.owner)
	case len(revs) != int(next.LastRev-was.LastRev):
		return fmt.Errorf("%d revisions between %d and %d", len(revs), was.LastRev, next.LastRev)
	}
	for r := range revs {
		if uint64(r) <= was.LastRev || uint64(r) > next.LastRev {
			return fmt.Errorf("revision %d between %d and %d", r, was.LastRev, next.LastRev)
		}
	}
	return nil
}

// settled takes the cell once more and compares all there is with the book.
func (b *book) settled(t *testing.T, c *etcdtest.Cluster, o Options) {
	t.Helper()
	o.dial, o.Endpoints = nil, c.Endpoints()
	s := open(t, o)
	defer s.Close()
	if err := b.check(t.Context(), s); err != nil {
		t.Error(err)
	}
	if err := breach(t.Context(), c.Client, newKeys(o.Prefix)); err != nil {
		t.Error(err)
	}
	if b.size() == 0 {
		t.Error("nothing was ever acknowledged")
	}
	t.Logf("%d binds acknowledged", b.size())
}
