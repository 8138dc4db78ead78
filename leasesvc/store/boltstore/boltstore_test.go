package boltstore

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Opener {
		path := filepath.Join(t.TempDir(), "lease.db")
		if err := Create(path); err != nil {
			t.Fatal(err)
		}
		return func(t *testing.T, ring int) store.Store { return open(t, Options{Path: path, RingSize: ring}) }
	})
}

func TestCrash(t *testing.T) {
	storetest.RunCrash(t, func(t *testing.T) (storetest.Opener, func(*testing.T) storetest.Opener) {
		path := filepath.Join(t.TempDir(), "lease.db")
		if err := Create(path); err != nil {
			t.Fatal(err)
		}
		at := func(path string) storetest.Opener {
			return func(t *testing.T, ring int) store.Store { return open(t, Options{Path: path, RingSize: ring}) }
		}
		return at(path), func(t *testing.T) storetest.Opener {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			crashed := filepath.Join(t.TempDir(), "crashed.db")
			if err := os.WriteFile(crashed, b, 0o600); err != nil {
				t.Fatal(err)
			}
			return at(crashed)
		}
	})
}

func open(t *testing.T, o Options) *Store {
	t.Helper()
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, rev lease.Rev) {
	t.Helper()
	a := lease.Address{Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, byte(rev >> 8), byte(rev)})), State: lease.Bound, Gen: lease.MakeGen(1, rev), Rev: rev, Host: fmt.Sprint("host", rev)}
	if err := s.Commit(store.Tx{Commits: []lease.Commit{{Rev: rev, Address: a, Audit: a.Audit()}}}).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestSnapshotIsAStore(t *testing.T) {
	dir := t.TempDir()
	path, copied := filepath.Join(dir, "lease.db"), filepath.Join(dir, "copy.db")
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Path: path})
	defer s.Close()
	put(t, s, 1)
	var b bytes.Buffer
	if err := s.Snapshot(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	c := open(t, Options{Path: copied})
	defer c.Close()
	if st, err := c.Load(t.Context()); err != nil || st.Last != 1 {
		t.Errorf("copy: %v, revision %d, want 1", err, st.Last)
	}
}

// used returns the bytes of a file that bbolt uses.
func used(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := checkPages(f, func(string, []byte, []byte) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return int(m.pages) * m.pageSize
}

func TestOpenRefusals(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.db")
	if err := Create(good); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Path: good})
	for rev := lease.Rev(1); rev <= 200; rev++ {
		put(t, s, rev)
	}
	locked := func() error { _, err := Open(Options{Path: good, Lock: 1}); return err }()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	scribbled := bytes.Clone(whole)
	for i := 2 * 4096; i < len(scribbled); i += 4096 {
		copy(scribbled[i:], bytes.Repeat([]byte{0xa5}, 64))
	}
	for _, c := range []struct {
		name, path, want string
	}{
		{"missing", filepath.Join(dir, "none.db"), "does not exist: create one with"},
		{"empty", write("empty.db", nil), "is empty: restore a copy"},
		{"not a store", write("text.db", []byte(strings.Repeat("not a database\n", 1000))), "is damaged"},
		{"cut", write("cut.db", whole[:used(t, good)/3]), "is damaged"},
		{"scribbled", write("scribbled.db", scribbled), "is damaged"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Open(Options{Path: c.path}); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.path) {
				t.Errorf("error %v, want the path and %q in it", err, c.want)
			}
		})
	}
	if locked == nil || !strings.Contains(locked.Error(), "locked by another process") {
		t.Errorf("second open: %v, want it to say that the store is locked", locked)
	}
	if err := Create(good); err == nil || !strings.Contains(err.Error(), "it is not replaced") {
		t.Errorf("create over a store: %v, want a refusal", err)
	}
}
