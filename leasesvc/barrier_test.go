package leasesvc_test

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// gatedStore completes no barrier before it is let through, as a store does that another service may own by now.
type gatedStore struct {
	store.Store
	gate atomic.Bool
	seen chan func() // barriers, each with what lets it through
}

func (g *gatedStore) Commit(tx store.Tx) *store.Pending {
	if !g.gate.Load() || !tx.Barrier() {
		return g.Store.Commit(tx)
	}
	p, complete := store.NewPending()
	g.seen <- func() { complete(nil) }
	return p
}

// TestAnswersBehindBarrier: what a service says of leases from memory waits for a barrier of the store. Otherwise one that
// has lost its store to a successor would promise, refuse or take back what is not its own any more.
func TestAnswersBehindBarrier(t *testing.T) {
	gated := &gatedStore{seen: make(chan func(), 8)}
	w := newWorld(t, onePool)
	w.stop()
	w.wrap = func(s store.Store) store.Store { gated.Store = s; return gated }
	w.up()
	g := w.gateway("tep1")
	h := w.client(tlsid.RoleHost, "host1")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := h.Bind(ctx, leaseclient.BindRequest{Source: loopback})
	if err != nil {
		t.Fatal(err)
	}
	g.stop() // its session would wait for barriers, too
	eventually(t, "the session of the gateway has ended", func() bool { return w.srv.Ready() != nil })
	stale := lease.Ref{Resource: l.Resource, Gen: l.Gen + 1}
	gated.gate.Store(true)
	for _, tt := range []struct {
		name string
		call func() error
		want lease.Reason
	}{
		{"bind of the holder", func() error {
			_, err := h.Bind(ctx, leaseclient.BindRequest{Source: loopback})
			return err
		}, lease.ReasonNone},
		{"renewal", func() error {
			_, err := h.Renew(ctx, leaseclient.RenewRequest{Ref: l.Ref, Source: loopback})
			return err
		}, lease.ReasonNone},
		{"renewal of another generation", func() error {
			_, err := h.Renew(ctx, leaseclient.RenewRequest{Ref: stale, Source: loopback})
			return err
		}, lease.ReasonStaleGeneration},
		{"release of another generation", func() error {
			return h.Release(ctx, stale, lease.ReasonIdle)
		}, lease.ReasonNone},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answered := make(chan error, 1)
			go func() { answered <- tt.call() }()
			select {
			case err := <-answered:
				t.Fatalf("answered without a barrier: %v", err)
			case let := <-gated.seen:
				let()
			}
			if err := <-answered; leaseclient.ReasonOf(err) != tt.want || tt.want == lease.ReasonNone && err != nil {
				t.Errorf("answer %v, want %s", err, tt.want)
			}
		})
	}
}
