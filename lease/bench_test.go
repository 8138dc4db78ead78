package lease_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// full returns a core with n leases, as a restart makes it from its store: a host of each of n /64.
func full(b *testing.B, n int, prefix string) *lease.Core {
	cell := lease.NewCell(1, lease.Rev(n), 0)
	l, err := lease.NewLoader(lease.Config{
		Pool: lease.Pool{Name: "main", Prefix: netip.MustParsePrefix(prefix), TEP: tepA}, Timers: lease.DefaultTimers(),
	}, cell)
	if err != nil {
		b.Fatal(err)
	}
	addr := netip.MustParsePrefix(prefix).Addr()
	for i := range n {
		rev := lease.Rev(i + 1)
		err := l.Put(lease.Address{
			Resource: lease.Whole(addr), State: lease.Bound, Gen: lease.MakeGen(1, rev), Rev: rev, Host: hostName(i),
			Source: sourceOf(i), TEP: tepA, BoundAt: epoch, Valid: 15 * time.Minute,
		})
		if err != nil {
			b.Fatal(err)
		}
		addr = addr.Next()
	}
	return l.Core(lease.Now{Wall: epoch})
}

func hostName(i int) string { return fmt.Sprintf("host%08d.example.net", i) }

func sourceOf(i int) netip.Addr {
	return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, byte(i >> 16), byte(i >> 8), byte(i), 15: 1})
}

// BenchmarkCore measures what grows with the number of leases: the memory and the start of a core.
func BenchmarkCore(b *testing.B) {
	for _, n := range []int{10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprintf("leases=%d", n), func(b *testing.B) {
			var before, after runtime.MemStats
			for b.Loop() {
				b.StopTimer()
				runtime.GC()
				runtime.ReadMemStats(&before)
				b.StartTimer()
				c := full(b, n, "192.0.0.0/12")
				b.StopTimer()
				runtime.GC()
				runtime.ReadMemStats(&after)
				if got := c.Stats().Bound; got != n {
					b.Fatalf("%d leases, want %d", got, n)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "B/lease")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/lease")
		})
	}
}

// BenchmarkLife is one life of an address: bind, release, fence, free.
func BenchmarkLife(b *testing.B) {
	cfg := config("198.51.100.0/24")
	c, err := lease.NewCore(cfg, lease.NewCell(1, 0, 0), at(0), nil)
	if err != nil {
		b.Fatal(err)
	}
	now := time.Duration(0)
	for b.Loop() {
		g := c.Step(at(now), lease.Bind{Host: "a", Source: srcA}).Grant
		c.Step(at(now), lease.Release{Host: "a", Ref: g.Ref})
		c.Step(at(now), lease.FenceTo{Rev: lease.MaxRev})
		now += cfg.Timers.HoldDown
		c.Step(at(now), lease.Tick{})
	}
}

// TestConstantTime: a bind and its end cost as much in a pool of 262,144 addresses of which 0.1 % are free as in one that
// is empty. A search would take hundreds of times as long.
func TestConstantTime(t *testing.T) {
	const size, rounds = 1 << 18, 250
	cost := func(taken int) time.Duration {
		c, err := lease.NewCore(config("192.0.0.0/14"), lease.NewCell(1, 0, 0), at(0), nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range taken {
			c.Step(at(0), lease.Bind{Host: hostName(i), Source: sourceOf(i)})
		}
		begin := time.Now()
		for i := range rounds {
			g := c.Step(at(0), lease.Bind{Host: hostName(size + i), Source: srcA}).Grant
			if g == nil {
				t.Fatalf("no lease in round %d with %d of %d addresses taken", i, taken, size)
			}
			c.Step(at(0), lease.Release{Host: hostName(size + i), Ref: g.Ref})
		}
		return time.Since(begin)
	}
	empty, full := cost(0), cost(size-size/1000)
	t.Logf("%d binds and releases: %s in an empty pool, %s in a full one", rounds, empty, full)
	if full > 20*empty+20*time.Millisecond {
		t.Errorf("%d binds and releases take %s in a full pool, %s in an empty one", rounds, full, empty)
	}
}

// BenchmarkBind is a bind and a release in a pool of a million addresses.
func BenchmarkBind(b *testing.B) {
	for _, free := range []int{1 << 19, 1 << 10} {
		b.Run(fmt.Sprintf("free=%d", free), func(b *testing.B) {
			c := full(b, 1<<20-free, "192.0.0.0/12")
			for b.Loop() {
				g := c.Step(lease.Now{}, lease.Bind{Host: "host", Source: srcA, Hurry: true}).Grant
				c.Step(lease.Now{}, lease.Release{Host: "host", Ref: g.Ref})
				c.Step(lease.Now{}, lease.FenceTo{Rev: lease.MaxRev})
			}
		})
	}
}
