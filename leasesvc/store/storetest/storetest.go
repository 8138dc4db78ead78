// Package storetest is the suite that every store of the lease service passes.
package storetest

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// Opener opens the one store of a test, again and again; the first call creates it. ring bounds the records kept for
// watchers.
type Opener func(t *testing.T, ring int) store.Store

// Run runs the suite. newStore returns an Opener over a fresh place.
func Run(t *testing.T, newStore func(t *testing.T) Opener) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, Opener)
	}{
		{"empty", testEmpty},
		{"reopen", testReopen},
		{"order", testOrder},
		{"watch", testWatch},
		{"compaction", testCompaction},
		{"history", testHistory},
		{"who/seed=1", testWho(1)},
		{"who/seed=2", testWho(2)},
		{"who/seed=3", testWho(3)},
		{"events", testEvents},
		{"prune", testPrune},
		{"barrier", testBarrier},
		{"addresses", testAddresses},
		{"concurrency", testConcurrency},
		{"close", testClose},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, newStore(t)) })
	}
}

var (
	tep    = netip.MustParseAddr("2001:db8:a::1")
	host   = netip.MustParseAddr("2001:db8:1::1")
	t0     = time.Unix(1_800_000_000, 0)
	pool   = lease.Pool{Name: "main", Prefix: netip.MustParsePrefix("198.51.100.0/24"), TEP: tep}
	member = lease.Member{
		TEP: "tep1", Instance: "a", Session: 7, Horizon: 4 * time.Hour, FailStatic: 5 * time.Hour, Question: netip.MustParseAddrPort("[2001:db8:3::11]:3546"),
		Witnesses: []string{"tep2", "tep3"},
	}
	same = cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b time.Time) bool { return a.Equal(b) }),
	}
)

// commit returns the bind of address number n at a revision.
func commit(rev lease.Rev, n byte) lease.Commit {
	a := lease.Address{
		Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, n})), State: lease.Bound, Gen: lease.MakeGen(1, rev), Rev: rev,
		Host: fmt.Sprintf("host%d", n), Source: host, TEP: tep, MTU: 1460, Trigger: lease.TriggerDNS,
		BoundAt: t0, Valid: time.Hour,
	}
	return lease.Commit{Rev: rev, Address: a, Audit: a.Audit(), Record: lease.BindRecord(rev, a.Binding())}
}

// loaded is a store's state with its addresses in order.
type loaded struct {
	store.State
	Addresses []lease.Address
}

func load(t *testing.T, s store.Store) loaded {
	t.Helper()
	var l loaded
	var err error
	if l.State, err = s.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Addresses(t.Context(), func(a lease.Address) error { l.Addresses = append(l.Addresses, a); return nil }); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(l.Addresses, func(a, b lease.Address) int { return a.Resource.Compare(b.Resource) })
	return l
}

func mustCommit(t *testing.T, s store.Store, tx store.Tx) {
	t.Helper()
	if err := s.Commit(tx).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func closeStore(t *testing.T, s store.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func testEmpty(t *testing.T, open Opener) {
	s := open(t, 0)
	st := load(t, s)
	if st.Cluster == (lease.ClusterID{}) || st.Secret == ([32]byte{}) || st.Restored || st.Epoch == 0 || st.Last != 0 || len(st.Addresses) != 0 {
		t.Errorf("new store %+v: want a cluster id, an epoch and nothing else", st)
	}
	closeStore(t, s)
	s = open(t, 0)
	defer s.Close()
	if again := load(t, s); again.Cluster != st.Cluster || again.Secret != st.Secret || again.Epoch != st.Epoch {
		t.Errorf("cluster %x epoch %d after reopening, want %x %d", again.Cluster, again.Epoch, st.Cluster, st.Epoch)
	}
}

// testReopen: everything that was acknowledged is there afterwards, whole.
func testReopen(t *testing.T, open Opener) {
	s := open(t, 0)
	first := load(t, s)
	c1, c2 := commit(1, 1), commit(3, 2)
	revoked := c1.Address
	revoked.State, revoked.Rev, revoked.RevokeRev = lease.Revoking, 4, 4
	revoked.UnboundAt, revoked.Valid, revoked.End = t0.Add(time.Minute), 0, lease.ReasonIdle
	c4 := lease.Commit{Rev: 4, Address: revoked, Audit: revoked.Audit(), Record: lease.UnbindRecord(4, revoked.Ref())}
	mustCommit(t, s, store.Tx{Commits: []lease.Commit{c1}, Pools: []lease.Record{lease.PoolRecord(2, pool, false)}, Wall: t0})
	mustCommit(t, s, store.Tx{Members: []lease.Member{member, {TEP: "gone"}}, Wall: t0.Add(time.Second)})
	mustCommit(t, s, store.Tx{Commits: []lease.Commit{c2, c4}, Removed: []string{"gone", "never there"}, Wall: t0.Add(-time.Hour)})
	closeStore(t, s)
	s = open(t, 0)
	defer s.Close()
	got := load(t, s)
	want := loaded{
		State: store.State{
			Cluster: first.Cluster, Secret: first.Secret, Epoch: first.Epoch, Last: 4, Wall: t0.Add(time.Second),
			Members: []lease.Member{member}, Pools: []lease.Pool{pool},
		},
		Addresses: []lease.Address{revoked, c2.Address},
	}
	if d := cmp.Diff(want, got, same); d != "" {
		t.Error(d)
	}
	mustCommit(t, s, store.Tx{Pools: []lease.Record{lease.PoolRecord(5, pool, true)}})
	if got := load(t, s); len(got.Pools) != 0 || got.Last != 5 {
		t.Errorf("pools %v at revision %d after the removal, want none at 5", got.Pools, got.Last)
	}
}

func testOrder(t *testing.T, open Opener) {
	s := open(t, 0)
	defer s.Close()
	load(t, s)
	for _, tx := range []store.Tx{
		{Commits: []lease.Commit{commit(2, 1)}},
		{Commits: []lease.Commit{commit(1, 1), commit(1, 2)}},
		{Commits: []lease.Commit{commit(0, 1)}},
	} {
		if err := s.Commit(tx).Wait(t.Context()); !errors.Is(err, store.ErrOrder) {
			t.Errorf("revision %d on an empty store: %v, want ErrOrder", tx.Commits[0].Rev, err)
		}
	}
	mustCommit(t, s, store.Tx{Commits: []lease.Commit{commit(1, 1)}}) // a refused transaction leaves no trace
	if st := load(t, s); st.Last != 1 || len(st.Addresses) != 1 {
		t.Errorf("store at revision %d with %d addresses, want 1 and 1", st.Last, len(st.Addresses))
	}
}

// next reads until revision to and returns the records, checking that there is no gap.
func next(t *testing.T, w store.Watcher, after, to lease.Rev) []lease.Record {
	t.Helper()
	var out []lease.Record
	for at := after; at < to; {
		b, err := w.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if b.From != at+1 || b.To < b.From {
			t.Fatalf("batch %d to %d after %d: want one without a gap", b.From, b.To, at)
		}
		at = b.To
		out = append(out, b.Records...)
	}
	return out
}

func testWatch(t *testing.T, open Opener) {
	s := open(t, 0)
	defer s.Close()
	load(t, s)
	ahead := s.Watch(2) // before there is anything
	mustCommit(t, s, store.Tx{Commits: []lease.Commit{commit(1, 1)}})
	silent := commit(2, 1)
	silent.Record = lease.Record{Rev: 2}
	mustCommit(t, s, store.Tx{Commits: []lease.Commit{silent, commit(3, 2)}})
	want := []lease.Record{commit(1, 1).Record, commit(3, 2).Record}
	if got := next(t, s.Watch(0), 0, 3); !slices.Equal(got, want) {
		t.Errorf("records %v, want %v", got, want)
	}
	if got := next(t, ahead, 2, 3); !slices.Equal(got, want[1:]) {
		t.Errorf("records after revision 2: %v, want %v", got, want[1:])
	}
}

func testCompaction(t *testing.T, open Opener) {
	const ring = 4
	s := open(t, ring)
	defer s.Close()
	load(t, s)
	for r := range lease.Rev(10) {
		mustCommit(t, s, store.Tx{Commits: []lease.Commit{commit(r+1, byte(r))}})
	}
	if _, err := s.Watch(0).Next(t.Context()); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("watch from the beginning: %v, want ErrCompacted", err)
	}
	if got := next(t, s.Watch(10-ring), 10-ring, 10); len(got) != ring {
		t.Errorf("%d records, want the newest %d", len(got), ring)
	}
}

// testAddresses: an error of the receiver ends the listing and comes back.
func testAddresses(t *testing.T, open Opener) {
	s := open(t, 0)
	defer s.Close()
	load(t, s)
	for rev := lease.Rev(1); rev <= 3; rev++ {
		mustCommit(t, s, store.Tx{Commits: []lease.Commit{commit(rev, byte(rev))}})
	}
	stop, n := errors.New("enough"), 0
	if err := s.Addresses(t.Context(), func(lease.Address) error { n++; return stop }); !errors.Is(err, stop) || n != 1 {
		t.Errorf("%d addresses, %v: want one and the receiver's error", n, err)
	}
}

// testBarrier: an empty transaction completes after everything before it, and leaves no trace.
func testBarrier(t *testing.T, open Opener) {
	s := open(t, 0)
	defer s.Close()
	load(t, s)
	mustCommit(t, s, store.Tx{})
	for rev := lease.Rev(1); rev <= 50; rev++ {
		s.Commit(store.Tx{Commits: []lease.Commit{commit(rev, byte(rev))}})
		mustCommit(t, s, store.Tx{})
		if st := load(t, s); st.Last != rev {
			t.Fatalf("revision %d in the store after a barrier behind %d", st.Last, rev)
		}
	}
}

// testConcurrency: committers wait side by side; a watcher sees every revision once and only when it is durable.
func testConcurrency(t *testing.T, open Opener) {
	const n = 400
	s := open(t, n)
	load(t, s)
	var wg sync.WaitGroup
	for r := range lease.Rev(n) {
		p := s.Commit(store.Tx{Commits: []lease.Commit{commit(r+1, byte(r))}})
		wg.Go(func() {
			if err := p.Wait(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	recs := next(t, s.Watch(0), 0, n)
	for i, r := range recs {
		if r.Rev != lease.Rev(i+1) {
			t.Fatalf("record %d has revision %d", i, r.Rev)
		}
	}
	wg.Wait()
	closeStore(t, s)
	s = open(t, n)
	defer s.Close()
	if st := load(t, s); st.Last != n || len(st.Addresses) != 256 {
		t.Errorf("revision %d with %d addresses after reopening, want %d and 256", st.Last, len(st.Addresses), n)
	}
}

func testClose(t *testing.T, open Opener) {
	s := open(t, 0)
	load(t, s)
	w := s.Watch(0)
	queued := s.Commit(store.Tx{Commits: []lease.Commit{commit(1, 1)}})
	closeStore(t, s)
	if err := queued.Wait(t.Context()); err != nil {
		t.Errorf("what was queued before Close: %v, want it written", err)
	}
	if err := s.Commit(store.Tx{Commits: []lease.Commit{commit(2, 1)}}).Wait(t.Context()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("commit after Close: %v, want ErrClosed", err)
	}
	if _, err := w.Next(t.Context()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("watch after Close: %v, want ErrClosed", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
