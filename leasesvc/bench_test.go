package leasesvc_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

const bigPool = "pools: [{name: main, prefix: 198.51.0.0/16, tep_address: \"2001:db8:a::1\"}]\n"

// BenchmarkBind measures durable leases over real TLS and a real bbolt file, one gateway acknowledging: each operation is
// one Bind and one Release.
func BenchmarkBind(b *testing.B) {
	for _, hosts := range []int{1, 64} {
		b.Run(fmt.Sprintf("hosts=%d", hosts), func(b *testing.B) {
			w := newWorld(b, bigPool)
			w.gateway("tep1")
			conns := make([]*leaseclient.Conn, hosts)
			for i := range conns {
				conns[i] = w.client(tlsid.RoleHost, fmt.Sprintf("host%d", i))
			}
			b.ResetTimer()
			var wg sync.WaitGroup
			for i, c := range conns {
				wg.Go(func() {
					for n := i; n < b.N; n += hosts {
						cycle(b, c)
					}
				})
			}
			wg.Wait()
			b.StopTimer()
		})
	}
}

func cycle(b *testing.B, c *leaseclient.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	l, err := c.Bind(ctx, leaseclient.BindRequest{Source: loopback})
	if err == nil {
		err = c.Release(ctx, l.Ref, lease.ReasonIdle)
	}
	if err != nil {
		b.Error(err)
	}
}
