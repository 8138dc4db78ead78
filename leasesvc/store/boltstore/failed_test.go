package boltstore

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// TestFailed: behind a transaction that could not be written nothing is acknowledged any more, nothing of it is seen by
// anyone, and the file still has what was acknowledged before.
func TestFailed(t *testing.T) {
	path := stored(t, "lease.db")
	s := open(t, Options{Path: path})
	watch := s.Watch(1)
	bad := lease.Address{Resource: lease.Whole(address(1)), State: lease.Bound, Gen: lease.MakeGen(1, 1), Rev: 2, Host: "bad"}
	failing := s.Commit(store.Tx{Commits: []lease.Commit{{Rev: 2, Address: bad, Audit: bad.Audit()}}})
	good := lease.Address{Resource: lease.Whole(address(2)), State: lease.Bound, Gen: lease.MakeGen(1, 3), Rev: 3, Host: "good"}
	behind := s.Commit(store.Tx{Commits: []lease.Commit{{Rev: 3, Address: good, Audit: good.Audit()}}})
	for what, p := range map[string]*store.Pending{
		"the transaction": failing, "one that waited behind it": behind, "a barrier": s.Commit(store.Tx{}),
	} {
		if err := p.Wait(t.Context()); !errors.Is(err, store.ErrFailed) {
			t.Errorf("%s: %v, want ErrFailed", what, err)
		}
	}
	if _, err := s.Prune(t.Context(), wallOf(1)); !errors.Is(err, store.ErrFailed) {
		t.Errorf("pruning: %v, want ErrFailed", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err := watch.Next(t.Context()); !errors.Is(err, store.ErrClosed) {
		t.Errorf("a watcher was told of %+v, %v: want ErrClosed only", b, err)
	}
	s = open(t, Options{Path: path})
	defer s.Close()
	if got := contents(t, s); got.rev != 1 || len(got.state) != 1 || len(got.audit) != 1 {
		t.Errorf("reopened: revision %d, %d addresses, %d events, want 1 of each", got.rev, len(got.state), len(got.audit))
	}
}

// TestDiskFull fills a small file system: what was acknowledged is there, and a restart with room goes on.
func TestDiskFull(t *testing.T) {
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: DSTM_TEST_ROOT=1 go test ./leasesvc/store/boltstore")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "lease.db")
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Path: path})
	e := &events{rng: rand.New(rand.NewPCG(1, 1)), pool: 1 << 16, most: 1 << 16}
	var acked lease.Rev
	var failed error
	for failed == nil && e.rev < 1<<16 {
		c := e.bind()
		if failed = s.Commit(store.Tx{Commits: []lease.Commit{c}}).Wait(t.Context()); failed == nil {
			acked = c.Rev
		}
	}
	if !errors.Is(failed, store.ErrFailed) || !errors.Is(failed, unix.ENOSPC) || acked < 1000 {
		t.Fatalf("%v after revision %d, want ErrFailed for ENOSPC after a thousand", failed, acked)
	}
	if err := s.Commit(store.Tx{Commits: []lease.Commit{e.bind()}}).Wait(t.Context()); !errors.Is(err, store.ErrFailed) {
		t.Errorf("the next: %v, want ErrFailed", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Path: path})
	got := contents(t, s)
	if got.rev < acked || got.rev > acked+1 || len(got.state) != int(got.rev) {
		t.Errorf("with room again: revision %d with %d addresses, %d was acknowledged", got.rev, len(got.state), acked)
	}
	put(t, s, got.rev+1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := Check(path, nil); err != nil || len(r.Problems) > 0 {
		t.Errorf("check: %v %v", r.Problems, err)
	}
}
