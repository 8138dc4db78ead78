package leasesvc_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

func contains(err error, text string) bool { return err != nil && strings.Contains(err.Error(), text) }

func attend(t *testing.T, c *leaseclient.Conn) *leaseclient.Attendance {
	t.Helper()
	a, w, err := c.Attend(t.Context(), leaseclient.Hello{Instance: "1", Sources: []netip.Addr{loopback}})
	if err != nil {
		t.Fatal(err)
	}
	if w.Cell != "lab" || w.T1 != 500 || w.Idle != 5*time.Second {
		t.Errorf("welcome %+v: want cell lab, T1 500, idle 5s", w)
	}
	t.Cleanup(a.Close)
	return a
}

func offer(t *testing.T, a *leaseclient.Attendance) leaseclient.Offer {
	t.Helper()
	m, err := a.Recv()
	if err != nil {
		t.Fatal(err)
	}
	o, ok := m.(leaseclient.Offer)
	if !ok {
		t.Fatalf("message %T, want an Offer", m)
	}
	return o
}

// TestColdQuery is a whole connection from the resolver's side: ten queries at once make one Offer and one commit, and
// all are ready when the host says Installed.
func TestColdQuery(t *testing.T) {
	w := newWorld(t, onePool)
	w.gateway("tep1")
	h := w.client(tlsid.RoleHost, "host1")
	a := attend(t, h)
	dns := w.client(tlsid.RoleResolver, "dns1")
	const queries = 10
	var wg sync.WaitGroup
	for range queries {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if res, why, left, err := dns.Hint(ctx, loopback); err != nil || res != leaseclient.HintReady || left <= 0 {
				t.Errorf("hint: %v %v %v %v, want ready with time left", res, why, left, err)
			}
		})
	}
	o := offer(t, a)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := h.Bind(ctx, leaseclient.BindRequest{Source: loopback, Hint: o.Hint, Trigger: lease.TriggerDNS})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Installed(l.Ref); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if n := w.store.commits.Load(); n != 1 {
		t.Errorf("%d commits for a cold query, want 1", n)
	}
	// A holder costs nothing more.
	if res, _, _, err := dns.Hint(ctx, loopback); err != nil || res != leaseclient.HintReady || w.store.commits.Load() != 1 {
		t.Errorf("hint for a holder: %v %v, %d commits, want ready and still 1", res, err, w.store.commits.Load())
	}
}

func TestHintAnswers(t *testing.T) {
	w := newWorld(t, oneAddress)
	w.gateway("tep1")
	dns := w.client(tlsid.RoleResolver, "dns1")
	hint := func(budget time.Duration) (leaseclient.HintResult, lease.Reason) {
		ctx, cancel := context.WithTimeout(t.Context(), budget)
		defer cancel()
		res, why, _, err := dns.Hint(ctx, loopback)
		if err != nil && ctx.Err() == nil {
			t.Fatal(err)
		}
		return res, why
	}
	if res, why := hint(patience); res != leaseclient.HintRefused || why != lease.ReasonNotRegistered {
		t.Errorf("unregistered source: %v %v, want refused NOT_REGISTERED", res, why)
	}
	h := w.client(tlsid.RoleHost, "host1")
	a := attend(t, h)
	if res, _ := hint(100 * time.Millisecond); res != leaseclient.HintPending {
		t.Errorf("host that does not answer: %v, want pending", res)
	}
	offer(t, a)
	// It is not held again: a second hint is answered long before its budget.
	if res, _ := hint(time.Hour); res != leaseclient.HintPending {
		t.Errorf("host that did not answer before: %v, want pending at once", res)
	}
	// I9: an authenticated Bind takes the address whatever was hinted for whom.
	l := bind(t, w.client(tlsid.RoleHost, "host2"))
	got := make(chan lease.Reason, 1)
	if err := a.Installed(l.Ref); err != nil { // speaks again, though not of a lease of its own
		t.Fatal(err)
	}
	eventually(t, "the host is asked again", func() bool {
		go func() { _, why := hint(patience); got <- why }()
		select {
		case why := <-got:
			return why == lease.ReasonPoolDry
		case <-time.After(200 * time.Millisecond):
			offer(t, a)
			if _, err := tryBind(t, h); leaseclient.ReasonOf(err) != lease.ReasonPoolDry {
				t.Errorf("bind: %v, want POOL_DRY", err)
			}
			return <-got == lease.ReasonPoolDry
		}
	})
}

func TestWatchHosts(t *testing.T) {
	w := newWorld(t, onePool)
	w.gateway("tep1")
	dns := w.client(tlsid.RoleResolver, "dns1")
	watch, err := dns.WatchHosts(t.Context(), []netip.Prefix{netip.MustParsePrefix("::1/128")})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	next := func() any {
		t.Helper()
		m, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m, ok := next().(leaseclient.PoolState); !ok || m.Dry {
		t.Errorf("first event %+v, want a pool that is not dry", m)
	}
	if m, ok := next().(leaseclient.InSync); !ok {
		t.Errorf("second event %+v, want InSync", m)
	}
	h := w.client(tlsid.RoleHost, "host1")
	a := attend(t, h)
	if m, ok := next().(leaseclient.HostState); !ok || !m.Registered || m.Left != 0 || m.Source != loopback {
		t.Errorf("event %+v, want the host without a lease", m)
	}
	l := bind(t, h)
	if err := a.Installed(l.Ref); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lease is seen", func() bool { m, ok := next().(leaseclient.HostState); return ok && m.Left > 0 })
	op := w.client(tlsid.RoleOperator, "noc")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := op.Revoke(ctx, lease.Ref{Resource: l.Resource}); err != nil {
		t.Fatal(err)
	}
	if m, err := a.Recv(); err != nil || m != any(leaseclient.Revoked{Ref: l.Ref, Reason: lease.ReasonAdmin}) {
		t.Errorf("host hears %+v, %v, want that its lease was revoked by an operator", m, err)
	}
	eventually(t, "the revoke is seen", func() bool { m, ok := next().(leaseclient.HostState); return ok && m.Left == 0 })
	a.Close()
	eventually(t, "the host is gone", func() bool { m, ok := next().(leaseclient.HostGone); return ok && m.Source == loopback })
}

// TestHintsStop: resolvers are told to send no hints once the pool is nearly full, and to send them again when it is well
// below.
func TestHintsStop(t *testing.T) {
	w := newWorld(t, "pools: [{name: main, prefix: 198.51.100.0/28, tep_address: \"2001:db8:a::1\"}]\n")
	w.gateway("tep1")
	watch, err := w.client(tlsid.RoleResolver, "dns1").WatchHosts(t.Context(), []netip.Prefix{netip.MustParsePrefix("::1/128")})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	until := func(on bool) {
		t.Helper()
		for {
			m, err := watch.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if p, ok := m.(leaseclient.PoolState); ok && p.HintsOn == on {
				return
			}
		}
	}
	until(true)
	hosts := map[*leaseclient.Conn]leaseclient.Lease{}
	for i := range 15 {
		h := w.client(tlsid.RoleHost, fmt.Sprint("host", i))
		hosts[h] = bind(t, h)
	}
	until(false)
	for h, l := range hosts {
		if release(t, h, l); len(hosts) > 10 {
			delete(hosts, h)
		}
	}
	until(true)
}
