package boltstore

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

const pageSize = 4096

// image is a store file as it was when a revision was acknowledged.
type image struct {
	bytes []byte
	rev   lease.Rev
	state map[lease.Resource]lease.Address
	audit []store.AuditEvent
}

// images returns a store file after each of n transactions of bbolt: binds and ends of leases, members, pruning.
func images(t *testing.T, n int) []image {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lease.db")
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Path: path})
	defer s.Close()
	e := &events{rng: rand.New(rand.NewPCG(7, 7)), pool: 300, most: 100}
	e.leases(t, s, 250)
	var out []image
	for i := range n {
		if i%6 == 5 {
			if _, err := s.Prune(t.Context(), wallOf(e.rev/2)); err != nil {
				t.Fatal(err)
			}
			out = append(out, snapshotOf(t, path, s))
			continue
		}
		tx := store.Tx{Members: []lease.Member{{TEP: fmt.Sprint("tep", i%3), Session: uint64(i)}}, Wall: e.wall()}
		for range 1 + i*i%40 {
			tx.Commits = append(append(tx.Commits, e.end()...), e.bind())
		}
		wait(t, s.Commit(tx))
		out = append(out, snapshotOf(t, path, s))
	}
	return out
}

func snapshotOf(t *testing.T, path string, s *Store) image {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	im := contents(t, s)
	im.bytes = b[:used(t, path)]
	return im
}

// contents reads everything.
func contents(t *testing.T, s *Store) image {
	t.Helper()
	st, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	im := image{rev: st.Last, state: map[lease.Resource]lease.Address{}}
	err = s.Addresses(t.Context(), func(a lease.Address) error { im.state[a.Resource] = a; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if im.audit, err = s.Events(t.Context(), 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	return im
}

// tear returns a file in which a power cut left some pages of b and some of a: how says for each page that differs how many
// of its bytes are new.
func tear(a, b []byte, how func(id int) int) []byte {
	out := bytes.Clone(b)
	for id := range len(b) / pageSize {
		old := make([]byte, pageSize)
		if at := id * pageSize; at < len(a) {
			copy(old, a[at:])
		}
		page := out[id*pageSize : (id+1)*pageSize]
		if !bytes.Equal(old, page) {
			n := how(id)
			copy(page[n:], old[n:])
		}
	}
	return out
}

// outcome opens what a power cut left: nil when it is refused as damaged.
func outcome(t *testing.T, b []byte) *image {
	t.Helper()
	path := filepath.Join(t.TempDir(), "torn.db")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(Options{Path: path})
	if err != nil {
		if !bytes.Contains([]byte(err.Error()), []byte("is damaged")) {
			t.Fatal(err)
		}
		return nil
	}
	defer s.Close()
	im := contents(t, s)
	return &im
}

func (im *image) equal(o image) bool {
	return im.rev == o.rev && maps.Equal(im.state, o.state) && slices.Equal(im.audit, o.audit)
}

// cut is what happens to a disk, and what may become of a store then.
type cut int

const (
	power  cut = iota // between two syncs; the store opens
	sector            // in the middle of a sector, which disks do not do: opens, or is refused
	lying             // and pages are lost that were synced: never opens as it was before
)

// TestTorn cuts the power in every transaction, at every point between its two syncs: whichever of its pages are on the
// disk, whole or in part, the store opens with all that was acknowledged, and with nothing else. If the disk breaks its
// word and loses pages that were synced before the meta page, that is damage and not silence.
func TestTorn(t *testing.T) {
	ims := images(t, 16)
	rng := rand.New(rand.NewPCG(3, 3))
	var before, after, refused int
	for i := range len(ims) - 1 {
		a, b := ims[i], ims[i+1]
		var data []int // pages that differ, without the meta page
		tear(a.bytes, b.bytes, func(id int) int {
			if id > 1 {
				data = append(data, id)
			}
			return pageSize
		})
		try := func(what string, cut cut, how func(id int) int) {
			t.Helper()
			got := outcome(t, tear(a.bytes, b.bytes, how))
			switch {
			case got == nil && cut != power:
				refused++
			case got == nil:
				t.Errorf("transaction %d, %s: refused as damaged", i, what)
			case got.equal(b):
				after++
			case got.equal(a) && cut != lying:
				before++
			default:
				t.Errorf("transaction %d, %s: opens at revision %d, between %d and %d", i, what, got.rev, a.rev, b.rev)
			}
		}
		some := func() int { return rng.IntN(pageSize/512+1) * 512 }
		try("all", power, func(int) int { return pageSize })
		for range 4 {
			try("some pages, no meta page", power, func(id int) int {
				if id < 2 {
					return 0
				}
				return some()
			})
		}
		for n := 8; n < 80; n += 8 {
			try(fmt.Sprint("meta page cut at ", n), sector, func(id int) int {
				if id < 2 {
					return n
				}
				return pageSize
			})
		}
		for range 12 {
			lost := data[rng.IntN(len(data))]
			keep := some()
			try(fmt.Sprint("lost page ", lost, " but for ", keep), lying, func(id int) int {
				if id == lost {
					return keep
				}
				return pageSize
			})
			try("lost pages", lying, func(id int) int {
				if id < 2 {
					return pageSize
				}
				return some()
			})
		}
	}
	t.Logf("%d before, %d after the transaction, %d refused", before, after, refused)
	if before < 100 || after < 20 || refused < 100 {
		t.Errorf("%d before, %d after the transaction, %d refused: the test does not see enough", before, after, refused)
	}
}

// TestCut: a file that lost its end is refused, wherever it ends.
func TestCut(t *testing.T) {
	im := images(t, 2)[1]
	for n := 1; n < len(im.bytes); n += 512 {
		if got := outcome(t, im.bytes[:n]); got != nil {
			t.Fatalf("file of %d bytes cut at %d opens at revision %d", len(im.bytes), n, got.rev)
		}
	}
}

// TestStalePage: a disk that keeps the version before of any one page, sound in itself and in its place, is found out.
func TestStalePage(t *testing.T) {
	ims := images(t, 16)
	found := map[string]int{}
	for i := range len(ims) - 1 {
		a, b := ims[i].bytes, ims[i+1].bytes
		tear(a, b, func(id int) int {
			page := b[id*pageSize : (id+1)*pageSize]
			for _, old := range versions(a, page) {
				torn := bytes.Clone(b)
				copy(torn[id*pageSize:], old)
				native.PutUint64(torn[id*pageSize:], uint64(id))
				// Index entries of leases that are pruned may come back: nobody sees them.
				if got := outcome(t, torn); got != nil && !(i%6 == 4 && got.equal(ims[i+1])) {
					t.Errorf("transaction %d: page %d as before opens at revision %d", i, id, got.rev)
				}
				found[fmt.Sprint("kind ", native.Uint16(page[8:]), " with keys of ", len(firstKey(page)))]++
			}
			return pageSize
		})
	}
	t.Log(found)
	for _, want := range []string{"kind 2 with keys of 7", "kind 2 with keys of 8", "kind 2 with keys of 15"} { // address, log, index
		if found[want] < 10 {
			t.Errorf("pages of %s: %d, want 10 and more", want, found[want])
		}
	}
}

// versions returns the pages of a file that begin like page and are not the same.
func versions(file, page []byte) (out [][]byte) {
	kind, first := native.Uint16(page[8:]), firstKey(page)
	for id := 2; id < len(file)/pageSize && first != nil; id++ {
		old := file[id*pageSize : (id+1)*pageSize]
		if native.Uint16(old[8:]) == kind && bytes.Equal(firstKey(old), first) && !bytes.Equal(old[8:], page[8:]) {
			out = append(out, old)
		}
	}
	return out
}

// firstKey returns the first key of a branch or leaf page, nil of another one.
func firstKey(page []byte) []byte {
	kind, count := native.Uint16(page[8:]), int(native.Uint16(page[10:]))
	if kind != kindBranch && kind != kindLeaf || count == 0 {
		return nil
	}
	k, _, _, err := element(page, 0, count, kind)
	if err != nil {
		return nil
	}
	return k
}
