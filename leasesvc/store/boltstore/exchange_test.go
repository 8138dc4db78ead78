package boltstore

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// TestExchange: a file made of the records of another is equal to it, through more than one transaction.
func TestExchange(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from.db"), filepath.Join(dir, "to.db")
	if err := Create(from); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Path: from})
	var tx store.Tx
	for rev := lease.Rev(1); rev <= batch/3+10; rev++ {
		a := lease.Address{
			Resource: lease.Whole(netip.AddrFrom4([4]byte{10, 0, byte(rev >> 8), byte(rev)})), State: lease.Bound,
			Gen: lease.MakeGen(1, rev), Rev: rev, Host: fmt.Sprint("host", rev),
		}
		tx.Commits = append(tx.Commits, lease.Commit{Rev: rev, Address: a, Audit: a.Audit()})
	}
	if err := s.Commit(tx).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	type rec struct {
		t    Table
		k, v string
	}
	var records []rec
	m, err := Read(t.Context(), from, func(t Table, k, v []byte) error {
		records = append(records, rec{t, string(k), string(v)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(records) <= batch {
		t.Fatalf("%d records: want more than fit into one transaction", len(records))
	}
	err = Write(to, m, func(put func(Table, []byte, []byte) error) error {
		for _, r := range records {
			if err := put(r.t, []byte(r.k), []byte(r.v)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want, err := Check(from, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Check(to, nil)
	want.Bytes, got.Bytes = 0, 0
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Error(err, d)
	}
	if err := open(t, Options{Path: to}).Close(); err != nil {
		t.Error(err)
	}
	if err := Write(filepath.Join(dir, "wrong.db"), m, func(put func(Table, []byte, []byte) error) error {
		return put("nothing", nil, nil)
	}); err == nil {
		t.Error("a table that does not exist: no error")
	}
}
