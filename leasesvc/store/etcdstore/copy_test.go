package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
)

// filled puts more records into a store than are read at a time.
func filled(t *testing.T, s *Store) {
	t.Helper()
	tx := store.Tx{Members: []lease.Member{{TEP: "tep1", Instance: "a", Session: 7}}, Wall: t0}
	for rev := lease.Rev(1); rev <= page+10; rev++ {
		tx.Commits = append(tx.Commits, bind(rev, fmt.Sprint("host", rev)))
	}
	if err := s.Commit(tx).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// copied returns the path of a copy of a store.
func copied(t *testing.T, s store.Store) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "copy.db")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Snapshot(t.Context(), f), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// holds compares everything in a store but the ends of its audit log with what is wanted.
func holds(t *testing.T, s store.Store, want store.State) {
	t.Helper()
	got, err := s.Load(t.Context())
	same := cmp.Options{cmpopts.EquateComparable(lease.Member{}.Question), cmpopts.EquateEmpty()}
	if d := cmp.Diff(want, got, same); err != nil || d != "" {
		t.Error(err, d)
	}
	n := 0
	if err := s.Addresses(t.Context(), func(lease.Address) error { n++; return nil }); err != nil || n != int(want.Last) {
		t.Errorf("%d addresses, %v: want %d", n, err, want.Last)
	}
	if es, err := s.Events(t.Context(), want.Last-5, 100); err != nil || len(es) != 5 {
		t.Errorf("%d newest audit records, %v: want 5", len(es), err)
	}
}

// TestCopy: a copy is a store file, of which a store in etcd can be made again.
func TestCopy(t *testing.T) {
	o := created(t, shared)
	s := open(t, o)
	filled(t, s)
	file := copied(t, s)
	want, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rep, err := boltstore.Check(file, nil)
	if err != nil || len(rep.Problems) > 0 || rep.Events != page+10 {
		t.Fatalf("%v, %v, %d audit records: want a whole file with %d", err, rep.Problems, rep.Events, page+10)
	}
	b, err := boltstore.Open(boltstore.Options{Path: file})
	if err != nil {
		t.Fatal(err)
	}
	holds(t, b, want)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	aside := filepath.Join(t.TempDir(), "aside.db")
	from := From{Path: file, Aside: aside}
	if _, err := Restore(t.Context(), o, from); err == nil || !strings.Contains(err.Error(), "lease1 owns the cell: are all services of the cell stopped?") {
		t.Errorf("restored under a service: %v, want a refusal", err)
	}
	put := bind(page+11, "later")
	if err := s.Commit(store.Tx{Commits: []lease.Commit{put}}).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := Restore(t.Context(), o, from)
	if err != nil {
		t.Fatal(err)
	}
	if r.Epoch != 2 || r.Aside != aside {
		t.Errorf("epoch %d, the former in %q: want 2 and %q", r.Epoch, r.Aside, aside)
	}
	if rep, err := boltstore.Check(aside, nil); err != nil || rep.Last != put.Rev {
		t.Errorf("what was in place: %v, revision %d, want %d", err, rep.Last, put.Rev)
	}
	s = open(t, o)
	defer s.Close()
	want.Epoch, want.Restored = 2, true
	holds(t, s, want)
	again := bind(page+11, "other")
	again.Address.Gen = lease.MakeGen(2, again.Rev)
	again.Audit = again.Address.Audit()
	if err := s.Commit(store.Tx{Commits: []lease.Commit{again}, Recovered: true}).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st, err := s.Load(t.Context()); err != nil || st.Restored {
		t.Errorf("%v, restored %t after a transaction with Recovered", err, st.Restored)
	}
}

// TestRestoreBrokenOff: a restore that ends in the middle leaves no store, and no epoch is used again.
func TestRestoreBrokenOff(t *testing.T) {
	o := created(t, shared)
	s := open(t, o)
	filled(t, s)
	file := copied(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	above := func() From { return From{Path: file, Aside: filepath.Join(t.TempDir(), "aside.db"), Epoch: 7} }
	w := &wire{}
	w.fault = func(c call) error {
		if _, n := w.counted(); n > 10 {
			return errLost
		}
		return c.send()
	}
	if _, err := Restore(t.Context(), w.on(o), above()); err == nil {
		t.Fatal("a restore without etcd: no error")
	}
	refused(t, o, "is half restored: repeat dstm db restore")
	if err := Create(t.Context(), o); err == nil {
		t.Error("created over half a store")
	}
	from := above()
	from.Epoch, from.Copies = 0, t.TempDir()
	r, err := Restore(t.Context(), o, from)
	if err != nil || r.Epoch != 8 {
		t.Fatalf("%v, epoch %d, want 8", err, r.Epoch)
	}
	s = open(t, o)
	defer s.Close()
	if err := newBook().check(t.Context(), s); err != nil {
		t.Error(err)
	}
}

// TestRestoreRefusals: copies of other clusters and those that contradict themselves.
func TestRestoreRefusals(t *testing.T) {
	o := created(t, shared)
	path := filepath.Join(t.TempDir(), "other.db")
	if err := boltstore.Create(path); err != nil {
		t.Fatal(err)
	}
	from := From{Path: path, Aside: filepath.Join(t.TempDir(), "aside.db")}
	if _, err := Restore(t.Context(), o, from); err == nil || !strings.Contains(err.Error(), "gateways and hosts of one are not those of the other") {
		t.Errorf("another cluster: %v, want a refusal", err)
	}
	from.OtherCluster = true
	r, err := Restore(t.Context(), o, from)
	if err != nil || r.Epoch != 2 {
		t.Errorf("forced: %v, epoch %d, want 2", err, r.Epoch)
	}
	s := open(t, o)
	st, err := s.Load(t.Context())
	if err != nil || st.Cluster != r.Cluster {
		t.Errorf("%v, cluster %x, want %x", err, st.Cluster, r.Cluster)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte("no store"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), o, from); err == nil {
		t.Error("restored from a file that is no store")
	}
	if err := open(t, o).Close(); err != nil { // and it is still there
		t.Error(err)
	}
}

// TestAdopt: records in another etcd cluster than the one they were made in are used under a new epoch only.
func TestAdopt(t *testing.T) {
	o := elsewhere(t)
	refused(t, o, "run dstm db adopt")
	if epoch, err := Adopt(t.Context(), o, 0); err != nil || epoch != 2 {
		t.Fatalf("%v, epoch %d, want 2", err, epoch)
	}
	s := open(t, o)
	defer s.Close()
	if st, err := s.Load(t.Context()); err != nil || st.Epoch != 2 || !st.Restored {
		t.Errorf("%v, epoch %d, restored %t: want 2, true", err, st.Epoch, st.Restored)
	}
}

// compactor compacts all of etcd's history once.
type compactor struct {
	t    *testing.T
	c    *clientv3.Client
	done bool
}

func (w *compactor) once() {
	if !w.done {
		w.done = true
		compact(w.t.Context(), w.t, w.c)
	}
}

func compact(ctx context.Context, t *testing.T, c *clientv3.Client) {
	r, err := c.Put(ctx, "compaction", "") // so that there is a newer revision
	if err == nil {
		_, err = c.Compact(ctx, r.Header.Revision)
	}
	if err != nil && ctx.Err() == nil {
		t.Error(err)
	}
}
