package etcdstore

import (
	"sync"
	"testing"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// BenchmarkCommit measures durable binds, each an address with its audit record, of 64 callers that wait, on three members
// of one machine.
func BenchmarkCommit(b *testing.B) {
	const callers = 64
	s := open(b, created(b, shared))
	defer s.Close()
	st, err := s.Load(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	var mu sync.Mutex
	rev := st.Last
	next := func() *store.Pending {
		mu.Lock()
		defer mu.Unlock()
		rev++
		return s.Commit(store.Tx{Commits: []lease.Commit{bind(rev, "host")}})
	}
	var wg sync.WaitGroup
	b.ResetTimer()
	for i := range callers {
		wg.Go(func() {
			for n := i; n < b.N; n += callers {
				if err := next().Wait(b.Context()); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "binds/s")
}
