package etcdstore

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// call is a transaction on its way to etcd.
type call struct {
	w    *wire
	req  *pb.TxnRequest
	send func() error                    // the answer goes to the store
	also func(ctx context.Context) error // nobody sees the answer
}

// wire stands between a store and etcd.
type wire struct {
	weaken string           // a key whose conditions are left out: the bugs that the tests must find
	fault  func(call) error // what happens to a transaction that writes; nil = nothing

	late          sync.WaitGroup // what is sent later
	mu            sync.Mutex
	reads, writes int
}

func (w *wire) on(o Options) Options {
	o.dial = []grpc.DialOption{grpc.WithChainUnaryInterceptor(w.intercept)}
	return o
}

func (w *wire) intercept(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	r, ok := req.(*pb.TxnRequest)
	if !ok {
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	if w.weaken != "" {
		r = &pb.TxnRequest{Compare: slices.Clone(r.Compare), Success: r.Success, Failure: r.Failure}
		r.Compare = slices.DeleteFunc(r.Compare, func(c *pb.Compare) bool { return string(c.Key) == w.weaken })
	}
	c := call{
		w: w, req: r,
		send: func() error { return invoke(ctx, method, r, reply, cc, opts...) },
		also: func(ctx context.Context) error { return invoke(ctx, method, r, new(pb.TxnResponse), cc) },
	}
	if !w.count(r) || w.fault == nil {
		return c.send()
	}
	return w.fault(c)
}

// count counts a transaction and says whether it writes.
func (w *wire) count(r *pb.TxnRequest) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.ContainsFunc(r.Success, func(op *pb.RequestOp) bool { return op.GetRequestPut() != nil }) {
		w.writes++
		return true
	}
	w.reads++
	return false
}

func (w *wire) counted() (reads, writes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reads, w.writes
}

var errLost = status.Error(codes.Unavailable, "the test lost it")

// later sends a transaction a while later, as a network does with what it delayed or repeated.
func (c call) later() {
	c.w.late.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		sleep(ctx, 20*time.Millisecond)
		_ = c.also(ctx) // what becomes of it then is up to etcd
	})
}

// faults are what can happen to a transaction.
var faults = map[string]func(call) error{
	"none":         func(c call) error { return c.send() },
	"request lost": func(call) error { return errLost },
	"reply lost":   func(c call) error { return errors.Join(c.send(), errLost) },
	"delayed":      func(c call) error { c.later(); return errLost },
	"repeated":     func(c call) error { c.later(); return c.send() },
}

// TestUnknownOutcome: whatever happens to transactions and their answers, each is done once, in order.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	names := []string{"none", "request lost", "reply lost", "delayed", "repeated"}
	rnd := seeded(t)
	var mu sync.Mutex
	w, b := &wire{}, newBook()
	o := created(t, shared)
	w.fault = func(c call) error {
		mu.Lock()
		name := names[rnd.IntN(len(names))]
		mu.Unlock()
		return faults[name](c)
	}
	owner := run(t, b, open(t, w.on(o)), 32)
	waitFor(t, b, 300)
	owner.ended(t, nil)
	w.late.Wait()
	b.settled(t, shared, o)
}

// TestUnresolvedOutcome: an owner that does not learn for the TTL what became of a transaction stops, and was told of no
// more than is there.
func TestUnresolvedOutcome(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"request lost", "reply lost"} {
		t.Run(name, func(t *testing.T) {
			w, b := &wire{}, newBook()
			o := created(t, shared)
			var broken atomic.Bool
			w.fault = func(c call) error {
				if broken.Load() {
					return faults[name](c)
				}
				return c.send()
			}
			s := open(t, w.on(o))
			owner := run(t, b, s, 4)
			waitFor(t, b, 100)
			broken.Store(true)
			lost(t, s)
			owner.ended(t, store.ErrNotOwner)
			b.settled(t, shared, o)
		})
	}
}

// TestSeededBugs leaves out one condition of the transactions at a time; the audit must find each out, and nothing
// without a bug.
func TestSeededBugs(t *testing.T) {
	for _, c := range []struct {
		name, want string
		weaken     func(keys) string
	}{
		{"none", "", func(keys) string { return "" }},
		{"without ownership", "while the owner is", func(k keys) string { return k.owner }},
		{"without head", "follows on", func(k keys) string { return k.head }},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := created(t, shared)
			k := newKeys(o.Prefix)
			w := &wire{weaken: c.weaken(k), fault: faults["repeated"]}
			temptation(t, o, w)
			err := breach(t.Context(), shared.Client, k)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("the audit says %v, want %q", err, c.want)
			}
		})
	}
}

// temptation lets an owner repeat old transactions and go on after it lost the cell.
func temptation(t *testing.T, o Options, w *wire) {
	first := open(t, w.on(o))
	defer first.Close()
	for rev := lease.Rev(1); rev <= 20; rev++ {
		_ = first.Commit(store.Tx{Commits: []lease.Commit{bind(rev, "first")}}).Wait(t.Context())
		sleep(t.Context(), 5*time.Millisecond)
	}
	w.late.Wait()
	if _, err := shared.Client.Delete(t.Context(), first.c.keys.owner); err != nil {
		t.Fatal(err)
	}
	o.Name = "lease2"
	second := open(t, o)
	defer second.Close()
	_ = first.Commit(store.Tx{Commits: []lease.Commit{bind(21, "first")}}).Wait(t.Context())
	w.late.Wait()
	_ = second.Commit(store.Tx{Commits: []lease.Commit{bind(21, "second")}}).Wait(t.Context())
}

// TestBarrier: a barrier asks etcd after its call, writes nothing, and many share one question.
func TestBarrier(t *testing.T) {
	const n = 500
	w := &wire{}
	s := open(t, w.on(created(t, shared)))
	defer s.Close()
	reads, writes := w.counted()
	var all []*store.Pending
	for range n {
		all = append(all, s.Commit(store.Tx{Wall: t0}))
	}
	for _, p := range all {
		if err := p.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if r, w := w.counted(); w != writes || r == reads || r-reads > n/2 {
		t.Errorf("%d barriers cost %d readings and %d writings, want few and none", n, r-reads, w-writes)
	}
	if _, err := shared.Client.Delete(t.Context(), s.c.keys.owner); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(store.Tx{}).Wait(t.Context()); !errors.Is(err, store.ErrNotOwner) {
		t.Errorf("barrier after the loss: %v, want ErrNotOwner", err)
	}
}

// TestLongTransaction: one that does not fit into an etcd transaction is cut in order of revision; a crash in between
// leaves a beginning of it, and it is acknowledged only as a whole.
func TestLongTransaction(t *testing.T) {
	t.Parallel()
	const n, fit = 1000, maxPuts / 3
	tx := store.Tx{Members: []lease.Member{{TEP: "tep1"}}, Recovered: true}
	for rev := lease.Rev(1); rev <= n; rev++ {
		tx.Commits = append(tx.Commits, bind(rev, "host"))
	}
	for _, c := range []struct {
		name    string
		allowed int // writing transactions
		last    lease.Rev
		members int
		err     error
	}{
		{"whole", n, n, 1, nil},
		{"cut", 3, 3 * fit, 0, store.ErrNotOwner},
		{"cut before the first", 0, 0, 0, store.ErrNotOwner},
		{"cut before the last", n / fit, n / fit * fit, 0, store.ErrNotOwner},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, o := &wire{}, created(t, shared)
			s := open(t, w.on(o))
			_, before := w.counted()
			w.fault = func(call call) error {
				if _, n := w.counted(); n-before > c.allowed {
					return errLost
				}
				return call.send()
			}
			watch := s.Watch(0)
			if err := s.Commit(tx).Wait(t.Context()); !errors.Is(err, c.err) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if c.err == nil {
				if b, err := watch.Next(t.Context()); err != nil || b.To != n {
					t.Errorf("watcher: %v to revision %d, want all %d", err, b.To, n)
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			s = open(t, o)
			defer s.Close()
			st, err := s.Load(t.Context())
			if err != nil || st.Last != c.last || len(st.Members) != c.members {
				t.Errorf("%v, revision %d, %d members; want %d and %d", err, st.Last, len(st.Members), c.last, c.members)
			}
			if err := newBook().check(t.Context(), s); err != nil {
				t.Error(err)
			}
		})
	}
}
