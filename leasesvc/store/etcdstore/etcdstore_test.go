package etcdstore

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

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

const patience = 20 * time.Second

// options returns those of a cell of the test's own on a cluster.
func options(t testing.TB, c *etcdtest.Cluster) Options {
	return Options{Endpoints: c.Endpoints(), Prefix: "/test/" + t.Name(), Cell: "lab", Name: "lease1", TTL: 2 * time.Second}
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
	storetest.Run(t, func(t *testing.T) storetest.Opener {
		o := created(t, shared)
		return func(t *testing.T, ring int) store.Store {
			o.RingSize = ring
			return open(t, o)
		}
	})
}
