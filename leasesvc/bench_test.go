package leasesvc_test

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

const bigPool = "pools: [{name: main, prefix: 198.51.0.0/16, tep_address: \"2001:db8:a::1\"}]\n"

// BenchmarkBind measures new durable leases over mutual TLS and a real bbolt file, two gateways acknowledging. Each operation
// is one Bind of a host that is connected and has no lease; streams is how many of them wait for an answer at a time. The
// hosts and the gateways are in the same process. Run it with -benchtime Nx: every operation needs a host of its own.
func BenchmarkBind(b *testing.B) {
	for _, streams := range []int{1, 64} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			w := newWorld(b, bigPool)
			w.gateway("tep1")
			w.gateway("tep2")
			conns := make([]*leaseclient.Conn, b.N)
			each(streams, b.N, func(i int) {
				conns[i] = w.client(tlsid.RoleHost, fmt.Sprintf("host%d", i))
				// A lease that is not there is released already: the call is for the connection.
				if err := conns[i].Release(b.Context(), nobody, lease.ReasonIdle); err != nil {
					b.Error(err)
				}
			})
			before := cpu()
			b.ResetTimer()
			each(streams, b.N, func(i int) {
				ctx, cancel := context.WithTimeout(b.Context(), patience)
				defer cancel()
				if l, err := conns[i].Bind(ctx, leaseclient.BindRequest{Source: loopback}); err != nil || !l.Installed {
					b.Errorf("bind: installed %t, %v", l.Installed, err)
				}
			})
			b.ReportMetric(float64((cpu()-before).Microseconds())/float64(b.N), "cpu-µs/bind")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "binds/s")
		})
	}
}

// cpu returns the processor time that the process has used.
func cpu() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// each calls f for 0 to n-1, some at a time.
func each(streams, n int, f func(i int)) {
	var wg sync.WaitGroup
	for s := range streams {
		wg.Go(func() {
			for i := s; i < n; i += streams {
				f(i)
			}
		})
	}
	wg.Wait()
}

var nobody = lease.Ref{Resource: lease.Whole(netip.MustParseAddr("198.51.0.1")), Gen: 1}
