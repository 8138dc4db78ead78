package boltstore

import (
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// BenchmarkCommit measures durable events at 256 committers that wait for each: one bind or one end of a lease, with its
// record in the audit log and the index.
func BenchmarkCommit(b *testing.B) {
	const committers = 256
	path := filepath.Join(b.TempDir(), "lease.db")
	if err := Create(path); err != nil {
		b.Fatal(err)
	}
	s, err := Open(Options{Path: path})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	e := &events{rng: rand.New(rand.NewPCG(1, 1)), pool: 1 << 16, most: 1 << 15}
	e.leases(b, s, 1<<15)
	var mu sync.Mutex
	var ready []lease.Commit
	commit := func() *store.Pending { // as the service does: one at a time, in order
		mu.Lock()
		defer mu.Unlock()
		if len(ready) == 0 {
			if len(e.live) > e.most {
				ready = e.end()
			} else {
				ready = []lease.Commit{e.bind()}
			}
		}
		c := ready[0]
		ready = ready[1:]
		return s.Commit(store.Tx{Commits: []lease.Commit{c}, Wall: e.wall()})
	}
	before := groups(b, s)
	b.ResetTimer()
	var wg sync.WaitGroup
	for i := range committers {
		wg.Go(func() {
			for n := i; n < b.N; n += committers {
				if err := commit().Wait(b.Context()); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
	b.ReportMetric(float64(b.N)/float64(groups(b, s)-before), "commits/fsync")
}

// groups returns the number of write transactions of a file.
func groups(b *testing.B, s *Store) (n int) {
	b.Helper()
	if err := s.db.View(func(tx *bbolt.Tx) error { n = tx.ID(); return nil }); err != nil {
		b.Fatal(err)
	}
	return n
}

// BenchmarkOpen measures opening and loading a store with a million bound addresses.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "lease.db")
	if err := Create(path); err != nil {
		b.Fatal(err)
	}
	s, err := Open(Options{Path: path})
	if err != nil {
		b.Fatal(err)
	}
	s.db.NoSync = true
	e := &events{rng: rand.New(rand.NewPCG(1, 1)), pool: 1 << 20, most: 1 << 21}
	e.leases(b, s, 1_000_000)
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	for range b.N {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		s, err := Open(Options{Path: path})
		if err != nil {
			b.Fatal(err)
		}
		opened := time.Since(start)
		n := 0
		if err := s.Addresses(b.Context(), func(lease.Address) error { n++; return nil }); err != nil || n != 1_000_000 {
			b.Fatalf("%d addresses, %v", n, err)
		}
		runtime.ReadMemStats(&after)
		b.ReportMetric(opened.Seconds(), "open-s")
		b.ReportMetric(time.Since(start).Seconds(), "load-s")
		b.ReportMetric(float64(after.Sys)/(1<<20), "sys-MiB")
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
