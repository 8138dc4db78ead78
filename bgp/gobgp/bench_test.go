package gobgp

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/dstm-project/dstm/bgp"
)

// BenchmarkSet announces 10,000 leases as /32 and withdraws them, without peers: what `announce: {pool: lease}` costs the
// speaker itself.
func BenchmarkSet(b *testing.B) {
	const n = 10_000
	allow := netip.MustParsePrefix("198.18.0.0/15")
	s := New(slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := s.Configure(ctx, bgp.Config{ASN: 64512, RouterID: netip.MustParseAddr("192.0.2.1"), Allow: []netip.Prefix{allow}}); err != nil {
		b.Fatal(err)
	}
	set := bgp.RouteSet{Version: 1}
	for i, a := 0, allow.Addr(); i < n; i, a = i+1, a.Next() {
		set.Routes = append(set.Routes, bgp.Route{Prefix: netip.PrefixFrom(a, 32)})
	}
	for b.Loop() {
		if adv, err := s.Set(ctx, set); err != nil || len(adv.Prefixes) != n {
			b.Fatal(len(adv.Prefixes), err)
		}
		if _, err := s.Set(ctx, bgp.RouteSet{Version: 2}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/(2*n), "µs/change")
	if err := s.Close(ctx, bgp.Withdraw); err != nil {
		b.Error(err)
	}
}
