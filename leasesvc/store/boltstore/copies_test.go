package boltstore

import (
	"context"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// gauges returns the age of the newest copy in seconds and the number of failures.
func gauges(t *testing.T, r *prometheus.Registry) (age, failures float64) {
	t.Helper()
	problems, err := testutil.GatherAndLint(r)
	if err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	ms, err := r.Gather()
	if err != nil || len(ms) != 2 {
		t.Fatalf("%d metrics, %v", len(ms), err)
	}
	return ms[0].GetMetric()[0].GetGauge().GetValue(), ms[1].GetMetric()[0].GetCounter().GetValue()
}

// TestCopies: copies come when they are due, the newest are kept, what fails is counted and the next is tried.
func TestCopies(t *testing.T) {
	path := stored(t, "lease.db")
	dir := filepath.Join(filepath.Dir(path), "copies")
	synctest.Test(t, func(t *testing.T) {
		s := open(t, Options{Path: path})
		defer s.Close()
		c := &Copies{Store: s, Dir: dir, Every: 15 * time.Minute, Keep: 3, Log: slog.New(slog.DiscardHandler)}
		r := prometheus.NewRegistry()
		c.Register(r)
		if age, _ := gauges(t, r); !math.IsInf(age, 1) {
			t.Errorf("age %g without a copy, want +Inf", age)
		}
		stop := run(t, c)
		time.Sleep(settle - time.Second)
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Fatalf("a copy while a start is under way: %v", err)
		}
		time.Sleep(2 * time.Second)
		if got := names(t, dir); len(got) != 1 {
			t.Fatalf("copies %v after the start, want one", got)
		}
		time.Sleep(time.Hour)
		made := names(t, dir)
		age, failures := gauges(t, r)
		if len(made) != 3 || age != 1 || failures != 0 {
			t.Errorf("copies %v, the newest of %g s ago, %g failures: want 3, 1 and 0", made, age, failures)
		}
		if rep, err := Check(filepath.Join(dir, made[2]), nil); err != nil || rep.Last != 1 {
			t.Errorf("copy at revision %d, %v", rep.Last, err)
		}
		stop()
		// Another process goes on with the copies of the one before.
		c = &Copies{Store: s, Dir: dir, Every: 15 * time.Minute, Keep: 3, Log: c.Log}
		r = prometheus.NewRegistry()
		c.Register(r)
		stop = run(t, c)
		if age, _ := gauges(t, r); age != 1 {
			t.Errorf("age %g s after the restart, want 1", age)
		}
		time.Sleep(13 * time.Minute)
		if got := names(t, dir); !slices.Equal(got, made) {
			t.Errorf("copies %v before one is due, want %v", got, made)
		}
		breakDir(t, dir)
		time.Sleep(20 * time.Minute)
		if age, failures := gauges(t, r); age != 33*60+1 || failures != 2 {
			t.Errorf("newest of %g s ago, %g failures: want 1981 and 2", age, failures)
		}
		stop()
	})
}

// breakDir puts a file where the directory was.
func breakDir(t *testing.T, dir string) {
	t.Helper()
	if err := os.Rename(dir, dir+".gone"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// run starts the making of copies and waits until nothing more happens at this instant.
func run(t *testing.T, c *Copies) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, func() {}) }()
	synctest.Wait()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	got, err := list(dir)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestCopyWhileCommitting: a copy is one state of the store, whole, whatever is committed meanwhile; strangers stay, what an
// earlier process left half done goes.
func TestCopyWhileCommitting(t *testing.T) {
	path := stored(t, "lease.db")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Path: path})
	defer s.Close()
	dir := filepath.Join(t.TempDir(), "copies")
	c := &Copies{Store: s, Dir: dir, Every: time.Hour, Keep: 2, Log: slog.New(slog.DiscardHandler)}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"README", copyName(time.Now()) + tmpSuffix} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	e := &events{rng: rand.New(rand.NewPCG(1, 1)), pool: 2000, most: 500}
	var wg sync.WaitGroup
	enough := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-enough:
				return
			default:
				e.leases(t, s, 100)
			}
		}
	})
	var last lease.Rev
	for range 5 {
		copied, err := c.Make(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, err := Check(copied, nil)
		if err != nil || len(r.Problems) > 0 || r.Last < last {
			t.Errorf("copy at revision %d after %d: %v %v", r.Last, last, r.Problems, err)
		}
		last = r.Last
	}
	close(enough)
	wg.Wait()
	es, err := os.ReadDir(dir)
	if err != nil || len(es) != 3 || es[0].Name() != "README" {
		t.Errorf("in the directory: %v, %v: want README and two copies", es, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Make(ctx); err == nil {
		t.Error("a copy after the end: no error")
	}
}

// TestCopyOfContradiction: a copy is kept all the same, and somebody hears of it.
func TestCopyOfContradiction(t *testing.T) {
	s := open(t, Options{Path: stored(t, "lease.db")})
	defer s.Close()
	a := lease.Address{Resource: lease.Whole(address(9)), State: lease.Bound, Gen: lease.MakeGen(1, 2), Rev: 2, Host: "host1"}
	wait(t, s.Commit(store.Tx{Commits: []lease.Commit{{Rev: 2, Address: a, Audit: a.Audit()}}}))
	c := &Copies{Store: s, Dir: t.TempDir(), Every: time.Hour, Keep: 2, Log: slog.New(slog.DiscardHandler)}
	if _, err := c.Make(t.Context()); err == nil || !strings.Contains(err.Error(), "host host1 holds") || len(names(t, c.Dir)) != 1 {
		t.Errorf("got %v and copies %v: want one, and that host host1 holds two addresses", err, names(t, c.Dir))
	}
}
