package leasesvc_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

const bigPool = "pools: [{name: main, prefix: 198.51.0.0/16, tep_address: \"2001:db8:a::1\"}]\n"

// BenchmarkBind measures new durable leases over mutual TLS, two gateways acknowledging, on a bbolt file or on three members
// of etcd. Each operation is one Bind of a host that is connected and has no lease; streams is how many of them wait for an
// answer at a time. Hosts, gateways and service are one process, each member of etcd another. Run it with -benchtime Nx:
// every operation needs a host of its own.
func BenchmarkBind(b *testing.B) {
	etcd, err := etcdtest.Start(etcdtest.Options{Dir: b.TempDir(), Members: 3})
	if err != nil {
		b.Fatal(err)
	}
	defer etcd.Close()
	for _, bm := range []struct {
		name    string
		streams int
	}{{"bbolt", 1}, {"bbolt", 64}, {"etcd", 1}, {"etcd", 64}} {
		streams := bm.streams
		b.Run(fmt.Sprintf("store=%s/streams=%d", bm.name, streams), func(b *testing.B) {
			w := newWorld(b, bigPool)
			if bm.name == "etcd" {
				w.onEtcd(etcd)
			}
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

// onEtcd starts the service again, over a new store on etcd.
func (w *world) onEtcd(c *etcdtest.Cluster) {
	w.t.Helper()
	w.stop()
	o := etcdstore.Options{Endpoints: c.Endpoints(), Cell: "lab", Name: "lease1", Prefix: "/bench/" + rand.Text()}
	if err := etcdstore.Create(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
	w.wrap = func(bolt store.Store) store.Store {
		s, err := etcdstore.Open(w.t.Context(), o)
		if err != nil {
			w.t.Fatal(err)
		}
		return both{s, bolt}
	}
	w.up()
}

// both closes the file as well, which is not used.
type both struct {
	store.Store
	file store.Store
}

func (b both) Close() error { return errors.Join(b.Store.Close(), b.file.Close()) }

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
