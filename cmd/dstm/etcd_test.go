package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

func TestMain(m *testing.M) {
	etcdtest.Main()
	os.Exit(m.Run())
}

// TestRestoreEtcd: a backup of a store in etcd is checked, put back and adopted like the file that it is.
func TestRestoreEtcd(t *testing.T) {
	c, err := etcdtest.Start(etcdtest.Options{Dir: t.TempDir(), Members: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	dir := t.TempDir()
	yaml, file := filepath.Join(dir, "leasesvc.yaml"), filepath.Join(dir, "backup.db")
	b, err := os.ReadFile("../../deploy/leasesvc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(b), "path: /var/lib/dstm/lease.db", `endpoints: ["`+strings.Join(c.Endpoints(), `", "`)+`"]`, 1)
	text = strings.NewReplacer("type: bolt", "type: etcd", "/var/lib/dstm/copies", filepath.Join(dir, "copies")).Replace(text)
	if err := os.WriteFile(yaml, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	o := etcdstore.Options{Endpoints: c.Endpoints(), Cell: "lab", Name: "lease1"}
	if err := etcdstore.Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	s, err := etcdstore.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	a := lease.Address{
		Resource: lease.Whole(netip.MustParseAddr("198.51.100.7")), State: lease.Bound, Gen: lease.MakeGen(1, 1), Rev: 1,
		Host: "host1", Source: host1, TEP: tepAddr, BoundAt: noon, Valid: time.Hour,
	}
	if err := s.Commit(store.Tx{Commits: []lease.Commit{{Rev: 1, Address: a, Audit: a.Audit()}}, Wall: noon}).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Snapshot(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := dstm(t, nil, "db", "check", file); err != nil || !strings.Contains(out, "store is whole: epoch 1, revision 1") {
		t.Errorf("check: %q, %v", out, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := dstm(t, nil, "db", "restore", file, "-c", yaml)
	if err != nil || !strings.Contains(out, "etcd: restored from "+file+": epoch 2, revision 1") {
		t.Fatalf("restore: %q, %v", out, err)
	}
	aside := regexp.MustCompile(`etcd: kept as (\S+)\n`).FindStringSubmatch(out)
	if aside == nil {
		t.Fatalf("restore: %q does not say where the store in place is", out)
	}
	if r, err := boltstore.Check(aside[1], nil); err != nil || r.Epoch != 1 {
		t.Errorf("what was in place: %v, epoch %d, want 1", err, r.Epoch)
	}
	if out, err := dstm(t, nil, "db", "adopt", "-c", yaml, "--epoch", "7"); err != nil || !strings.Contains(out, "adopted under epoch 8") {
		t.Errorf("adopt: %q, %v", out, err)
	}
	if s, err = etcdstore.Open(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if st, err := s.Load(t.Context()); err != nil || st.Epoch != 8 || !st.Restored || st.Last != 1 {
		t.Errorf("%v, epoch %d, restored %t, revision %d: want 8, true, 1", err, st.Epoch, st.Restored, st.Last)
	}
	if _, err := dstm(t, nil, "db", "adopt", "-c", serviceYAML(t, filepath.Join(dir, "lease.db"))); err == nil || !strings.Contains(err.Error(), "only a store in etcd is adopted") {
		t.Errorf("a store in a file: %v, want a refusal", err)
	}
}
