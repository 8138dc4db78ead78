package etcdstore

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// filled makes a store with more records than are read at a time.
func filled(t *testing.T, o Options) *Store {
	t.Helper()
	s := open(t, o)
	t.Cleanup(func() { s.Close() })
	var tx store.Tx
	for rev := lease.Rev(1); rev <= page/2; rev++ {
		tx.Commits = append(tx.Commits, bind(rev, "host"))
	}
	tx.Members = []lease.Member{{TEP: "tep1", Instance: "a", Session: 7}}
	if err := s.Commit(tx).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCopy: a copy becomes a store that is equal, but for the epoch and the mark that it was restored.
func TestCopy(t *testing.T) {
	o := created(t, shared)
	s := filled(t, o)
	var copied bytes.Buffer
	if err := s.Snapshot(t.Context(), &copied); err != nil {
		t.Fatal(err)
	}
	if err := Restore(t.Context(), o, bytes.NewReader(copied.Bytes())); err == nil {
		t.Error("restored over a store that is in use")
	}
	want, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want.Epoch++
	want.Restored = true
	to := o
	to.Prefix += ".restored"
	// A first attempt breaks off: the second clears up behind it.
	broken := copied.Bytes()[:copied.Len()-100]
	if err := Restore(t.Context(), to, bytes.NewReader(broken)); err == nil || !strings.Contains(err.Error(), "copy is damaged") {
		t.Errorf("cut copy: %v, want it called damaged", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := Open(ctx, to); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("after the cut copy: %v, want no store", err)
	}
	if err := Restore(t.Context(), to, &copied); err != nil {
		t.Fatal(err)
	}
	r := open(t, to)
	defer r.Close()
	got, err := r.Load(t.Context())
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(lease.Member{}.Question)); err != nil || d != "" {
		t.Error(err, d)
	}
	if err := newBook().check(t.Context(), r); err != nil {
		t.Error(err)
	}
	events, err := r.Events(t.Context(), 0, page)
	if err != nil || len(events) != page/2 {
		t.Errorf("%d audit records, %v: want %d", len(events), err, page/2)
	}
	if err := Restore(t.Context(), to, bytes.NewReader(nil)); err == nil {
		t.Error("restored over a store")
	}
	if err := r.Commit(store.Tx{Recovered: true}).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st, err := r.Load(t.Context()); err != nil || st.Restored {
		t.Errorf("%v, restored %t after a transaction with Recovered", err, st.Restored)
	}
}

// TestCopyDamaged flips one byte after the other.
func TestCopyDamaged(t *testing.T) {
	s := open(t, created(t, shared))
	defer s.Close()
	if err := s.Commit(store.Tx{Commits: []lease.Commit{bind(1, "host")}}).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	var copied bytes.Buffer
	if err := s.Snapshot(t.Context(), &copied); err != nil {
		t.Fatal(err)
	}
	ignore := func(string, []byte) error { return nil }
	if err := readCopy(bytes.NewReader(copied.Bytes()), ignore); err != nil {
		t.Fatal(err)
	}
	for i := range copied.Len() {
		b := bytes.Clone(copied.Bytes())
		b[i] ^= 1
		if err := readCopy(bytes.NewReader(b), ignore); err == nil {
			t.Errorf("byte %d of %d is wrong and nobody sees it", i, len(b))
		}
	}
}

// compactor compacts all of etcd's history at the first byte that it is given.
type compactor struct {
	t    *testing.T
	c    *clientv3.Client
	done bool
}

func (w *compactor) Write(p []byte) (int, error) {
	if !w.done {
		w.done = true
		compact(w.t.Context(), w.t, w.c)
	}
	return len(p), nil
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
