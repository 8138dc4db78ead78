package etcdstore

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

// refused opens a store that must not be opened.
func refused(t *testing.T, o Options, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := Open(ctx, o)
	if err == nil {
		s.Close()
	}
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q in it", err, want)
	}
}

// changed returns a store whose meta record was changed.
func changed(t *testing.T, f func(m *storev1.EtcdMeta)) Options {
	t.Helper()
	o := created(t, shared)
	k := newKeys(o.Prefix)
	r, err := shared.Client.Get(t.Context(), k.meta)
	if err != nil {
		t.Fatal(err)
	}
	var m storev1.EtcdMeta
	if err := proto.Unmarshal(r.Kvs[0].Value, &m); err != nil {
		t.Fatal(err)
	}
	f(&m)
	b, err := proto.Marshal(&m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := shared.Client.Put(t.Context(), k.meta, string(b)); err != nil {
		t.Fatal(err)
	}
	return o
}

// elsewhere returns a store that was made in another etcd cluster.
func elsewhere(t *testing.T) Options {
	return changed(t, func(m *storev1.EtcdMeta) { m.EtcdCluster = 0x42 })
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name, want string
		options    func(t *testing.T) Options
	}{
		{"missing", "does not exist: create one with leasesvc --create-store", func(t *testing.T) Options { return options(t, shared) }},
		{"other cell", `it belongs to cell "lab": the configuration is of cell "east"`, func(t *testing.T) Options {
			o := created(t, shared)
			o.Cell = "east"
			return o
		}},
		{"other layout", "layout 7: this version reads layout 1", func(t *testing.T) Options {
			return changed(t, func(m *storev1.EtcdMeta) { m.Meta.Layout = 7 })
		}},
		{"other etcd", "it was made in etcd cluster 42 and is in cluster ", elsewhere},
		{"ttl", "ttl 1.5s: want whole seconds from 2s", func(t *testing.T) Options {
			o := options(t, shared)
			o.TTL = 1500 * time.Millisecond
			return o
		}},
		{"no ca", "no such file", func(t *testing.T) Options {
			o := options(t, shared)
			o.TLS = Files{Cert: "none", Key: "none", CA: "none"}
			return o
		}},
	} {
		t.Run(c.name, func(t *testing.T) { refused(t, c.options(t), c.want) })
	}
	t.Run("create twice", func(t *testing.T) {
		o := created(t, shared)
		if err := Create(t.Context(), o); err == nil || !strings.Contains(err.Error(), "it is not replaced") {
			t.Errorf("error %v, want a refusal", err)
		}
	})
}

// TestVoters: learners do not count.
func TestVoters(t *testing.T) {
	t.Parallel()
	one, err := etcdtest.Start(etcdtest.Options{Dir: t.TempDir(), Members: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	if err := Create(t.Context(), options(t, one)); err == nil || !strings.Contains(err.Error(), "voting members is 1: want 3 or 5") {
		t.Errorf("create on one member: %v, want a refusal", err)
	}
	refused(t, options(t, one), "etcd of e1: the number of voting members is 1: want 3 or 5")
	c, err := etcdtest.Start(etcdtest.Options{Dir: t.TempDir(), Members: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	o := created(t, c)
	reconfigure(t, func() error {
		_, err := c.Client.MemberAddAsLearner(t.Context(), []string{"http://[::1]:1"})
		return err
	})
	if err := open(t, o).Close(); err != nil {
		t.Error(err)
	}
	reconfigure(t, func() error {
		_, err := c.Client.MemberAdd(t.Context(), []string{"http://[::1]:2"})
		return err
	})
	refused(t, o, "voting members is 4: want 3 or 5: four survive the loss of one, as three do")
}

// reconfigure repeats a change of the membership: etcd wants its members to know each other for 5 s before.
func reconfigure(t *testing.T, change func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		err := change()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// states collects what a service says of itself.
type states struct {
	mu  sync.Mutex
	all []string
}

func (s *states) add(state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, state)
}

// wait waits until the newest state has a text in it.
func (s *states) wait(t *testing.T, want string) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		s.mu.Lock()
		all := s.all
		s.mu.Unlock()
		if n := len(all); n > 0 && strings.Contains(all[n-1], want) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("states %q, want %q at last", all, want)
		}
	}
}

// TestStandby: a second service waits and says for whom, outlasts an etcd that cannot be reached, and takes over at once when
// the owner closes the store.
func TestStandby(t *testing.T) {
	o := created(t, shared)
	first := open(t, o)
	p, err := shared.Path()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var said states
	o.Name, o.Endpoints, o.OnState = "lease2", p.Endpoints(), said.add
	opened := opening(t, o)
	said.wait(t, "standby: lease1 owns the cell")
	p.Cut()
	said.wait(t, "standby: etcd: ")
	p.Join()
	said.wait(t, "standby: lease1 owns the cell")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	s := <-opened
	if s == nil {
		return
	}
	defer s.Close()
	said.wait(t, "owner")
	if err := s.Commit(store.Tx{Commits: []lease.Commit{bind(1, "h")}}).Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

// opening opens a store beside the test; nil after an error.
func opening(t *testing.T, o Options) <-chan *Store {
	opened := make(chan *Store, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		s, err := Open(ctx, o)
		if err != nil {
			t.Error(err)
		}
		opened <- s
	}()
	return opened
}

// TestStandbyEnds: waiting ends with its context.
func TestStandbyEnds(t *testing.T) {
	o := created(t, shared)
	defer open(t, o).Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the context's", err)
	}
	o.Endpoints = []string{"http://[::1]:1"}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without etcd: error %v, want the context's", err)
	}
	if err := Create(t.Context(), o); err == nil {
		t.Error("a store was created without etcd")
	}
}

// TestCompaction: etcd forgets its history all the time, under an owner that works and another that waits.
func TestCompaction(t *testing.T) {
	t.Parallel()
	c, err := etcdtest.Start(etcdtest.Options{Dir: t.TempDir(), Members: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, o := newBook(), created(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		for sleep(ctx, 5*time.Millisecond) {
			compact(ctx, t, c.Client)
		}
	})
	first := run(t, b, open(t, o), 8)
	waitFor(t, b, 200)
	var said states
	o.Name, o.OnState = "lease2", said.add
	opened := opening(t, o)
	said.wait(t, "standby: lease1 owns the cell")
	waitFor(t, b, 200)
	first.ended(t, nil)
	s := <-opened
	if s == nil {
		return
	}
	second := run(t, b, s, 8)
	waitFor(t, b, 200)
	second.ended(t, nil)
	cancel()
	wg.Wait()
	s = open(t, o)
	defer s.Close()
	if err := b.check(t.Context(), s); err != nil {
		t.Error(err)
	}
	filledCompacted(t, c, o)
}

// filledCompacted copies a store while etcd forgets the revision that is copied.
func filledCompacted(t *testing.T, c *etcdtest.Cluster, o Options) {
	o.Prefix += ".filled"
	if err := Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w := &compactor{t: t, c: c.Client}
	o.dial = dialOptions{grpc.WithChainUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if _, ok := req.(*pb.RangeRequest); ok {
				w.once()
			}
			return invoke(ctx, method, req, reply, cc, opts...)
		})}
	s := open(t, o)
	defer s.Close()
	filled(t, s)
	if err := s.Snapshot(t.Context(), io.Discard); err == nil || !strings.Contains(err.Error(), "--auto-compaction-retention") {
		t.Errorf("copy during a compaction: %v, want the setting named", err)
	}
	if err := s.Snapshot(t.Context(), io.Discard); err != nil {
		t.Errorf("the next copy: %v", err)
	}
}
