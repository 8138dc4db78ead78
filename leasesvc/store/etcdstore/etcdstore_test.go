package etcdstore

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
	"github.com/dstm-project/dstm/leasesvc/store/storetest"
)

// shared is the cluster of all tests that leave its members alone; each test has a prefix of its own.
var shared *etcdtest.Cluster

func TestMain(m *testing.M) {
	etcdtest.Main()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "etcdstore")
	if err == nil {
		defer os.RemoveAll(dir)
		shared, err = etcdtest.Start(etcdtest.Options{Dir: dir, Members: 3})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if err := shared.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

const patience = time.Minute

// options returns those of a new cell on a cluster.
func options(t testing.TB, c *etcdtest.Cluster) Options {
	return Options{Endpoints: c.Endpoints(), Prefix: "/test/" + t.Name() + "/" + rand.Text(), Cell: "lab", Name: "lease1", TTL: 2 * time.Second}
}

func created(t testing.TB, c *etcdtest.Cluster) Options {
	t.Helper()
	o := options(t, c)
	if err := Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return o
}

func open(t testing.TB, o Options) *Store {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) storetest.Opener {
		o := created(t, shared)
		return func(t *testing.T, ring int) store.Store {
			o := o
			o.RingSize = ring
			return open(t, o)
		}
	})
}

// TestCrash looks at every acknowledgement for what etcd has: that is what is left when the service dies there.
func TestCrash(t *testing.T) {
	t.Parallel()
	storetest.RunCrash(t, func(t *testing.T) (storetest.Opener, func(t *testing.T) storetest.Opener) {
		o, n := created(t, shared), 0
		open := func(o Options) storetest.Opener { return func(t *testing.T, _ int) store.Store { return open(t, o) } }
		return open(o), func(t *testing.T) storetest.Opener {
			image := o
			n++
			image.Prefix = fmt.Sprintf("%s.%d", o.Prefix, n)
			clone(t, newKeys(o.Prefix), newKeys(image.Prefix))
			return open(image)
		}
	})
}

// clone copies all keys of a cell but the owner's, as they are at one revision of etcd.
func clone(t *testing.T, from, to keys) {
	t.Helper()
	r, err := shared.Client.Get(t.Context(), from.prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for kvs := range slices.Chunk(r.Kvs, maxPuts) {
		var ops []clientv3.Op
		for _, kv := range kvs {
			if key := string(kv.Key); key != from.owner {
				ops = append(ops, clientv3.OpPut(to.prefix+strings.TrimPrefix(key, from.prefix), string(kv.Value)))
			}
		}
		if _, err := shared.Client.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
}
