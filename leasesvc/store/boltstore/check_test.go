package boltstore

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// TestFlippedBits: a bit that flips anywhere in a file is found by Check, or it is in a place that nobody reads.
func TestFlippedBits(t *testing.T) {
	im := images(t, 8)[7]
	path := filepath.Join(t.TempDir(), "flipped.db")
	rng := rand.New(rand.NewPCG(5, 5))
	var found, unread int
	for range 600 {
		b := bytes.Clone(im.bytes)
		at := rng.IntN(len(b))
		b[at] ^= 1 << rng.IntN(8)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := Check(path, nil); err != nil || len(r.Problems) > 0 {
			found++
			continue
		}
		if got := outcome(t, b); got == nil || !got.equal(im) {
			t.Errorf("a bit of byte %d of page %d flipped, unnoticed", at%pageSize, at/pageSize)
		}
		unread++
	}
	t.Logf("%d found, %d unread", found, unread)
	if found < 100 {
		t.Errorf("%d of 600 found: the test does not see enough", found)
	}
}

// change writes into a file behind the store's back.
func change(t *testing.T, path string, do func(tx *bbolt.Tx, m *storev1.Meta) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		w, err := newWriter(tx)
		if err != nil {
			return err
		}
		if err := do(tx, &w.meta); err != nil {
			return err
		}
		// The digest is right: what is left to find is that records do not agree.
		var sum digest
		for _, name := range [][]byte{bucketAddress, bucketMember, bucketPool} {
			err = errors.Join(err, tx.Bucket(name).ForEach(func(k, v []byte) error { sum.toggle(string(name), k, v); return nil }))
		}
		w.meta.Digest = sum[:]
		return errors.Join(err, putProto(tx.Bucket(bucketMeta), keyMeta, &w.meta))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestProblems: records that contradict each other, in a file whose pages are good.
func TestProblems(t *testing.T) {
	first := func(tx *bbolt.Tx, state lease.State, do func(*lease.Address)) error {
		b := tx.Bucket(bucketAddress)
		c := b.Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			a, err := record.DecodeAddress(k, v)
			if err != nil {
				return err
			}
			if a.State == state {
				do(&a)
				return putProto(b, record.ResourceKey(a.Resource), record.EncodeAddress(a))
			}
		}
		return errors.New("no such address")
	}
	for _, c := range []struct {
		name, want string
		do         func(tx *bbolt.Tx, m *storev1.Meta) error
	}{
		{"two leases of one host", "host twice holds", func(tx *bbolt.Tx, _ *storev1.Meta) error {
			twice := func(a *lease.Address) { a.Host, a.State = "twice", lease.Bound }
			return errors.Join(first(tx, lease.Bound, twice), first(tx, lease.Free, twice))
		}},
		{"behind the end", "the store ends at", func(_ *bbolt.Tx, m *storev1.Meta) error { m.LastRev -= 3; return nil }},
		{"state", "state STATE_9 is never stored", func(tx *bbolt.Tx, _ *storev1.Meta) error {
			return first(tx, lease.Free, func(a *lease.Address) { a.State = 9 })
		}},
		{"lease without a record", "no lease", func(tx *bbolt.Tx, _ *storev1.Meta) error {
			return first(tx, lease.Bound, func(a *lease.Address) { a.Gen++; a.Rev = max(a.Rev, a.Gen.Rev()) })
		}},
		{"lease that ended", "was unbound at", func(tx *bbolt.Tx, _ *storev1.Meta) error {
			return first(tx, lease.Free, func(a *lease.Address) { a.State, a.RevokeRev, a.Host = lease.Bound, 0, "new" })
		}},
		{"index", "is missing", func(tx *bbolt.Tx, _ *storev1.Meta) error {
			k, _ := tx.Bucket(bucketIndex).Cursor().First()
			return tx.Bucket(bucketIndex).Put(bytes.Clone(k), []byte{8, 100})
		}},
		{"audit log", "chain is broken", func(tx *bbolt.Tx, _ *storev1.Meta) error {
			k, _ := tx.Bucket(bucketAudit).Cursor().First()
			return tx.Bucket(bucketAudit).Delete(bytes.Clone(k))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "lease.db")
			if err := Create(path); err != nil {
				t.Fatal(err)
			}
			s := open(t, Options{Path: path})
			e := &events{rng: rand.New(rand.NewPCG(1, 1)), pool: 40, most: 20}
			e.leases(t, s, 100)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if r, err := Check(path, nil); err != nil || len(r.Problems) != 0 || r.Addresses[lease.Bound] != 20 || r.Leases != 100 {
				t.Fatalf("before: %+v, %v", r, err)
			}
			change(t, path, c.do)
			r, err := Check(path, nil)
			if err != nil || !strings.Contains(errors.Join(append(r.Problems, errors.New(""))...).Error(), c.want) {
				t.Errorf("%v, problems %v, want %q", err, r.Problems, c.want)
			}
		})
	}
}

// stored makes a store with one lease and returns its path.
func stored(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Path: path})
	put(t, s, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func duplicate(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestRestore: a restored store has what the copy has, says that it is restored, and never uses an epoch again, as far as
// any file knows.
func TestRestore(t *testing.T) {
	path := stored(t, "lease.db")
	dir := filepath.Dir(path)
	copied, copies := filepath.Join(dir, "copy.db"), filepath.Join(dir, "copies")
	duplicate(t, path, copied)
	s := open(t, Options{Path: path})
	put(t, s, 2)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	restore := func(o RestoreOptions) Restored {
		t.Helper()
		o.From, o.Path, o.Copies = copied, path, copies
		o.Now = time.Now()
		r, err := Restore(o)
		if err != nil {
			t.Fatal(err)
		}
		s := open(t, Options{Path: path})
		defer s.Close()
		st, err := s.Load(t.Context())
		if err != nil || st.Epoch != r.Epoch || !st.Restored || st.Last != 1 || st.Cluster != r.Cluster {
			t.Fatalf("restored store %+v, %v: want revision 1 in epoch %d, restored", st, err, r.Epoch)
		}
		if err := s.Commit(store.Tx{Recovered: true}).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if st, err := s.Load(t.Context()); err != nil || st.Restored {
			t.Errorf("after the recovery: restored %t, %v", st.Restored, err)
		}
		return r
	}
	r := restore(RestoreOptions{})
	if was, err := Check(r.Aside, nil); r.Epoch != 2 || err != nil || was.Last != 2 {
		t.Fatalf("epoch %d, aside is at revision %d, %v: want 2 and 2", r.Epoch, was.Last, err)
	}
	if r := restore(RestoreOptions{}); r.Epoch != 3 {
		t.Errorf("the same copy again: epoch %d, want 3", r.Epoch)
	}
	remove := func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	remove()
	if r := restore(RestoreOptions{}); r.Epoch != 3 || r.Aside != "" { // the files aside have 1 and 2
		t.Errorf("with nothing in place: epoch %d, aside %q, want 3 and none", r.Epoch, r.Aside)
	}
	if err := os.Mkdir(copies, 0o700); err != nil {
		t.Fatal(err)
	}
	duplicate(t, path, filepath.Join(copies, copyName(time.Now())))
	remove()
	if r := restore(RestoreOptions{}); r.Epoch != 4 {
		t.Errorf("with a copy of epoch 3: epoch %d, want 4", r.Epoch)
	}
	if r := restore(RestoreOptions{Epoch: 100}); r.Epoch != 101 {
		t.Errorf("above 100: epoch %d, want 101", r.Epoch)
	}
}

func TestRestoreRefusals(t *testing.T) {
	good, other := stored(t, "good.db"), stored(t, "other.db")
	s := open(t, Options{Path: other})
	refused := func(name string, o RestoreOptions, want string) {
		t.Helper()
		before, err := os.ReadFile(o.Path)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := Restore(o); err == nil || !strings.Contains(err.Error(), want) || r.Aside != "" {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
		if after, err := os.ReadFile(o.Path); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: the store in place changed, %v", name, err)
		}
		if left, err := filepath.Glob(o.Path + ".*"); err != nil || len(left) != 0 {
			t.Errorf("%s: left behind %v, %v", name, left, err)
		}
	}
	refused("in use", RestoreOptions{From: good, Path: other}, "is the service still running?")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	refused("other cluster", RestoreOptions{From: good, Path: other}, "gateways and hosts of one are not those of the other")
	refused("itself", RestoreOptions{From: good, Path: good}, "this is the store itself")
	refused("last epoch", RestoreOptions{From: good, Path: other, OtherCluster: true, Epoch: 65535}, "epoch 65535 is the last")
	damaged := filepath.Join(t.TempDir(), "damaged.db")
	if err := os.WriteFile(damaged, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("damaged copy", RestoreOptions{From: damaged, Path: good}, "damaged: meta page 0 is damaged")
	refused("damaged in place", RestoreOptions{From: good, Path: damaged}, "it is not known whether it is of the same cluster")
	change(t, other, func(_ *bbolt.Tx, m *storev1.Meta) error { m.LastRev = 0; return nil })
	refused("contradiction", RestoreOptions{From: other, Path: good, OtherCluster: true}, "contradicts itself")
	if r, err := Restore(RestoreOptions{From: good, Path: damaged, OtherCluster: true}); err != nil || r.Epoch != 2 {
		t.Errorf("in place of a damaged one, forced: epoch %d, %v", r.Epoch, err)
	}
	if r, err := Restore(RestoreOptions{From: other, Path: good, OtherCluster: true, Problems: true}); err != nil || len(r.Problems) == 0 {
		t.Errorf("a contradiction, forced: %+v, %v", r.Problems, err)
	}
}

func FuzzPages(f *testing.F) {
	path := filepath.Join(f.TempDir(), "lease.db")
	if err := Create(path); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole[2*pageSize:6*pageSize], uint16(0))
	f.Fuzz(func(t *testing.T, page []byte, at uint16) {
		// Behind good meta pages anything may stand.
		b := bytes.Clone(whole)
		copy(b[2*pageSize+int(at)%(len(b)-2*pageSize):], page)
		path := filepath.Join(t.TempDir(), "fuzzed.db")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(Options{Path: path})
		if err != nil {
			return
		}
		defer s.Close()
		if _, err := s.Load(t.Context()); err != nil {
			t.Errorf("opens and does not load: %v", err)
		}
		err = s.History(t.Context(), netip.MustParseAddr("198.51.100.1"), time.Time{}, func(lease.Audit) bool { return true })
		if err != nil {
			t.Errorf("opens and cannot be asked: %v", err)
		}
	})
}
