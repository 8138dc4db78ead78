package leasesvc_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/rpcload"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/internal/wire"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

const bigPool = "pools: [{name: main, prefix: 198.51.0.0/16, tep_address: \"2001:db8:a::1\"}]\n"

// perStream is how many hosts take turns on one stream of BenchmarkBind.
const perStream = 10

// BenchmarkBind measures new durable leases over mutual TLS, two gateways acknowledging, on a bbolt file or on three members
// of etcd. Each operation is one Bind of a host that is connected and has no lease; streams is how many of them wait for an
// answer at a time. When each host has a lease the time stops until all of them are given back. Hosts, gateways and service
// are one process, each member of etcd another.
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
			hosts := make([]*benchHost, min(b.N, perStream*streams))
			each(streams, len(hosts), func(i int) { hosts[i] = w.benchHost(fmt.Sprintf("host%d", i)) })
			var used time.Duration
			b.ResetTimer()
			for done := 0; done < b.N; done += len(hosts) {
				b.StopTimer()
				each(streams, len(hosts), func(i int) { hosts[i].release(b) })
				before := cpu()
				b.StartTimer()
				each(streams, min(len(hosts), b.N-done), func(i int) { hosts[i].bind(b) })
				used += cpu() - before
			}
			b.StopTimer()
			b.ReportMetric(float64(used.Microseconds())/float64(b.N), "cpu-µs/bind")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "binds/s")
		})
	}
}

// benchHost is a host that makes load.
type benchHost struct {
	*rpcload.Conn
	source []byte
	held   *leasev1.LeaseRef
}

func (w *world) benchHost(name string) *benchHost {
	w.t.Helper()
	c, err := rpcload.Dial(w.t.Context(), &net.Dialer{}, w.addr.String(), w.identity(tlsid.RoleHost, name).Client("lease1.example.net"))
	if err != nil {
		w.t.Error(err)
		return nil
	}
	w.t.Cleanup(func() { c.Close() })
	return &benchHost{c, wire.FromAddr6(loopback), wire.FromRef(nobody)}
}

func (h *benchHost) bind(b *testing.B) {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	var l leasev1.Lease
	err := h.Call(leasev1.Hosts_Bind_FullMethodName, &leasev1.BindRequest{RequestId: id, TunnelSource: h.source}, &l)
	if err != nil || !l.GetInstalled() {
		b.Errorf("bind: installed %t, %v", l.GetInstalled(), err)
	}
	h.held = &leasev1.LeaseRef{Res: l.GetRes(), Gen: l.GetGen()}
}

// release gives the lease back; one that is not there is given back already.
func (h *benchHost) release(b *testing.B) {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	m := &leasev1.ReleaseRequest{RequestId: id, Lease: h.held, Reason: wire.FromReason(lease.ReasonIdle)}
	if err := h.Call(leasev1.Hosts_Release_FullMethodName, m, &leasev1.ReleaseReply{}); err != nil {
		b.Errorf("release: %v", err)
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
