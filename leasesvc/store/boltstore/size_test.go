package boltstore

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// events makes the events of leases as the cores do: the address that was free longest is leased, and live leases end in
// an order of their own.
type events struct {
	rng  *rand.Rand
	rev  lease.Rev
	pool int // addresses
	used int // of them
	free []int
	live []lease.Address
	most int // live leases
	n    int // leases so far
}

func address(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10 + byte(i>>24), byte(i >> 16), byte(i >> 8), byte(i)})
}

func index(a netip.Addr) int {
	b := a.As4()
	return int(b[0]-10)<<24 | int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

func (e *events) commit(a lease.Address, audit bool) lease.Commit {
	e.rev++
	a.Rev = e.rev
	c := lease.Commit{Rev: e.rev, Address: a, Record: lease.Record{Rev: e.rev}}
	if audit {
		c.Audit = a.Audit()
	}
	return c
}

// wallOf is the time at which a revision is made.
func wallOf(rev lease.Rev) time.Time { return time.Unix(1_800_000_000, int64(rev)*1_234_567) }

func (e *events) wall() time.Time { return wallOf(e.rev) }

func (e *events) bind() lease.Commit {
	i := e.used
	if i < e.pool {
		e.used++
	} else {
		i, e.free = e.free[0], e.free[1:]
	}
	e.n++
	a := lease.Address{
		Resource: lease.Whole(address(i)), State: lease.Bound, Gen: lease.MakeGen(1, e.rev+1), MTU: 1460, Valid: 15 * time.Minute,
		Host: fmt.Sprintf("host%020d", e.n), Source: netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 1, byte(i >> 8), byte(i), 7, 15: byte(i)}),
		TEP: netip.MustParseAddr("2001:db8:a::1"), Trigger: lease.TriggerDNS, BoundAt: e.wall(),
	}
	e.live = append(e.live, a)
	return e.commit(a, true)
}

// end returns the three events that bring the address of some lease back.
func (e *events) end() []lease.Commit {
	i := e.rng.IntN(len(e.live))
	a := e.live[i]
	e.live[i] = e.live[len(e.live)-1]
	e.live = e.live[:len(e.live)-1]
	a.State, a.RevokeRev, a.UnboundAt, a.End, a.Valid = lease.Revoking, e.rev+1, e.wall(), lease.ReasonIdle, 0
	out := []lease.Commit{e.commit(a, true)}
	a.State, a.FencedAt = lease.Hold, e.wall()
	out = append(out, e.commit(a, true))
	a.State = lease.Free
	e.free = append(e.free, index(a.Addr))
	return append(out, e.commit(a, false))
}

// leases commits n leases, and the ends of those before them.
func (e *events) leases(t testing.TB, s *Store, n int) {
	t.Helper()
	var last *store.Pending
	for i := range n {
		tx := store.Tx{Commits: []lease.Commit{e.bind()}, Wall: e.wall()}
		if len(e.live) > e.most {
			tx.Commits = append(tx.Commits, e.end()...)
		}
		if last = s.Commit(tx); i%1024 == 1023 {
			wait(t, last)
		}
	}
	wait(t, last)
}

func wait(t testing.TB, p *store.Pending) {
	t.Helper()
	if err := p.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestBytesPerLease: N9 asks for at most 300 bytes a lease, measured in the pages of a file: the log, its index, and what
// is empty in them.
func TestBytesPerLease(t *testing.T) {
	const leases = 100_000
	for _, pool := range []int{256, 200_000} {
		t.Run(fmt.Sprint("pool=", pool), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "lease.db")
			if err := Create(path); err != nil {
				t.Fatal(err)
			}
			s := open(t, Options{Path: path})
			defer s.Close()
			s.db.NoSync = true // how full pages are does not depend on it
			e := &events{rng: rand.New(rand.NewPCG(1, 1)), pool: pool, most: min(pool/2, 1000)}
			e.leases(t, s, leases)
			var bytes int
			err := s.db.View(func(tx *bbolt.Tx) error {
				for _, b := range [][]byte{bucketAudit, bucketIndex} {
					st := tx.Bucket(b).Stats()
					t.Logf("%s: %d pairs, %d bytes each, pages %d%% full", b, st.KeyN, (st.LeafAlloc+st.BranchAlloc)/st.KeyN, 100*st.LeafInuse/st.LeafAlloc)
					bytes += st.LeafAlloc + st.BranchAlloc
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if bytes > 300*leases {
				t.Errorf("%d bytes a lease, want at most 300", bytes/leases)
			}
			t.Logf("%d bytes a lease", bytes/leases)
		})
	}
}
