package etcdstore

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

// seeded returns a generator that DSTM_SEED repeats.
func seeded(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	if text := os.Getenv("DSTM_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("DSTM_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// running is an owner under load.
type running struct {
	s    *Store
	stop context.CancelFunc
	end  chan error
}

func run(t *testing.T, b *book, s *Store, callers int) *running {
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{s: s, stop: cancel, end: make(chan error, 1)}
	go func() { r.end <- b.load(ctx, s, callers) }()
	t.Cleanup(func() { // after a failure; else it is done
		cancel()
		s.Close()
	})
	return r
}

// waitFor waits until n more binds are acknowledged.
func waitFor(t *testing.T, b *book, n int) {
	t.Helper()
	want := b.size() + n
	for end := time.Now().Add(patience); b.size() < want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d binds acknowledged after %s, want %d", b.size(), patience, want)
		}
	}
}

// ended waits for the end of an owner that was stopped or lost the cell.
func (r *running) ended(t *testing.T, want error) {
	t.Helper()
	r.stop()
	select {
	case err := <-r.end:
		if !errors.Is(err, want) {
			t.Errorf("the owner ended with %v, want %v", err, want)
		}
	case <-time.After(patience):
		t.Fatal("the owner does not end")
	}
	if err := r.s.Close(); err != nil {
		t.Error(err)
	}
}

// lost waits until a store says that it lost the cell.
func lost(t *testing.T, s *Store) {
	t.Helper()
	select {
	case <-s.Lost():
	case <-time.After(patience):
		t.Fatal("the loss of the cell is not noticed")
	}
	if err := s.Err(); !errors.Is(err, store.ErrNotOwner) {
		t.Errorf("the store was lost with %v, want ErrNotOwner", err)
	}
	if err := s.Commit(store.Tx{}).Wait(t.Context()); !errors.Is(err, store.ErrNotOwner) {
		t.Errorf("barrier of a lost store: %v, want ErrNotOwner", err)
	}
}

// TestOwnershipEnds takes the cell away from an owner under load, in each way that there is; another goes on.
func TestOwnershipEnds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		take func(t *testing.T, s *Store, p *etcdtest.Path)
	}{
		{"lease revoked", func(t *testing.T, s *Store, _ *etcdtest.Path) {
			if _, err := shared.Client.Revoke(t.Context(), s.tenure.lease); err != nil {
				t.Fatal(err)
			}
		}},
		{"key deleted", func(t *testing.T, s *Store, _ *etcdtest.Path) {
			if _, err := shared.Client.Delete(t.Context(), s.c.keys.owner); err != nil {
				t.Fatal(err)
			}
		}},
		{"cut off", func(_ *testing.T, _ *Store, p *etcdtest.Path) { p.Cut() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := shared.Path()
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			b, o := newBook(), created(t, shared)
			direct := o.Endpoints
			o.Endpoints = p.Endpoints()
			first := run(t, b, open(t, o), 8)
			waitFor(t, b, 500)
			c.take(t, first.s, p)
			o.Name, o.Endpoints = "lease2", direct
			second := run(t, b, open(t, o), 8)
			waitFor(t, b, 500)
			lost(t, first.s)
			first.ended(t, store.ErrNotOwner)
			p.Join()
			second.ended(t, nil)
			b.settled(t, shared, o)
		})
	}
}

// TestIdleOwnerNotices: an owner with nothing to write finds out by itself.
func TestIdleOwnerNotices(t *testing.T) {
	o := created(t, shared)
	s := open(t, o)
	defer s.Close()
	if _, err := shared.Client.Delete(t.Context(), s.c.keys.owner); err != nil {
		t.Fatal(err)
	}
	lost(t, s)
}

// TestLeaderLoss kills the member that leads, several times, and pauses one, under load.
func TestLeaderLoss(t *testing.T) {
	t.Parallel()
	c, err := etcdtest.Start(etcdtest.Options{Dir: t.TempDir(), Members: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, o := newBook(), created(t, c)
	o.TTL = defaultTTL // an election takes 1 to 2 s; on a slow machine the owner may lose the cell, and takes it again
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { compete(t, ctx, b, o) })
	waitFor(t, b, 200)
	for range 2 {
		leader := c.Leader()
		c.Stop(leader)
		waitFor(t, b, 200)
		if err := c.Restart(leader); err != nil {
			t.Fatal(err)
		}
		waitFor(t, b, 200)
	}
	leader := c.Leader()
	if err := c.Pause(leader); err != nil {
		t.Fatal(err)
	}
	waitFor(t, b, 100)
	if err := c.Resume(leader); err != nil {
		t.Fatal(err)
	}
	waitFor(t, b, 200)
	cancel()
	wg.Wait()
	b.settled(t, c, o)
}

// TestRace lets two services fight for a cell whose owner loses its etcd lease again and again.
func TestRace(t *testing.T) {
	t.Parallel()
	const length = 20 * time.Second
	rnd := seeded(t)
	b, o := newBook(), created(t, shared)
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var wg sync.WaitGroup
	for _, name := range []string{"lease1", "lease2"} {
		o := o
		o.Name = name
		wg.Go(func() { compete(t, ctx, b, o) })
	}
	k, revoked := newKeys(o.Prefix), 0
	for sleep(ctx, time.Duration(rnd.IntN(600))*time.Millisecond) {
		r, err := shared.Client.Get(ctx, k.owner)
		if err != nil || len(r.Kvs) == 0 {
			continue
		}
		if _, err := shared.Client.Revoke(ctx, clientv3.LeaseID(r.Kvs[0].Lease)); err == nil {
			revoked++
		}
	}
	wg.Wait()
	b.settled(t, shared, o)
	t.Logf("the owner lost the cell %d times", revoked)
	if revoked < 10 {
		t.Errorf("the owner lost the cell only %d times", revoked)
	}
}

// compete owns the cell whenever it can.
func compete(t *testing.T, ctx context.Context, b *book, o Options) {
	for ctx.Err() == nil {
		s, err := Open(ctx, o)
		if err != nil {
			if ctx.Err() == nil {
				t.Error(err)
			}
			return
		}
		if err := b.load(ctx, s, 4); err != nil && !errors.Is(err, store.ErrNotOwner) && ctx.Err() == nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
