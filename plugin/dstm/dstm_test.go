package dstm

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/test"
	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// TestHold: N2. The answer waits for the path, for hold at most, whatever is slow.
func TestHold(t *testing.T) {
	after := func(d time.Duration, rep hintReply, err error) func(context.Context) (hintReply, error) {
		return func(ctx context.Context) (hintReply, error) {
			select {
			case <-time.After(d):
				return rep, err
			case <-ctx.Done():
				return hintReply{}, ctx.Err()
			}
		}
	}
	ready := hintReply{result: leaseclient.HintReady, left: time.Hour}
	refused := hintReply{result: leaseclient.HintRefused, reason: lease.ReasonPoolDry}
	const never = time.Hour
	for _, c := range []struct {
		name         string
		hold         time.Duration
		reply        func(context.Context) (hintReply, error)
		probe        time.Duration
		first, again time.Duration // what the first query waits, and one 3 s later
		hints        int
	}{
		{"ready", 250, after(40*time.Millisecond, ready, nil), 0, 40, 0, 1},
		{"ready after the probe", 250, after(40*time.Millisecond, ready, nil), 30, 70, 0, 1},
		{"refused", 250, after(40*time.Millisecond, refused, nil), 0, 40, 0, 1},
		{"error", 250, after(40*time.Millisecond, hintReply{}, errDown), 0, 40, 40, 2},
		{"pending", 250, after(100*time.Millisecond, hintReply{}, nil), 0, 100, 0, 2},
		{"frozen", 250, after(never, ready, nil), 0, 250, 0, 2},
		{"frozen, longer hold", 900, after(never, ready, nil), 0, 900, 0, 2},
		{"late but in the flight's time", 250, after(600*time.Millisecond, ready, nil), 0, 250, 0, 1},
		{"slow probe counts", 250, after(0, ready, nil), 700, 250, 0, 1},
		{"off", 0, after(100*time.Millisecond, ready, nil), 0, 0, 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, registered(hostA))
				f.reply = c.reply
				z := v4only(t)
				z.slow.Store(int64(c.probe * time.Millisecond))
				d := newPlugin(t, f, z)
				d.cfg.hold = c.hold * time.Millisecond
				_, first := query(t, d, hostA, "n.example.", dns.TypeA)
				time.Sleep(2900 * time.Millisecond)
				z.slow.Store(0)
				_, again := query(t, d, hostA, "n.example.", dns.TypeA)
				time.Sleep(2 * time.Second)
				got := []any{first, again, f.count()}
				want := []any{c.first * time.Millisecond, c.again * time.Millisecond, c.hints}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

// TestMuteHost: a host that let an offer pass is hinted for again but not waited for, until the service speaks of it.
func TestMuteHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, registered(hostA))
		f.reply = func(ctx context.Context) (hintReply, error) { <-ctx.Done(); return hintReply{}, ctx.Err() }
		d := newPlugin(t, f, v4only(t))
		var waits []time.Duration
		ask := func() {
			_, took := query(t, d, hostA, "n.example.", dns.TypeA)
			waits = append(waits, took)
		}
		ask()
		time.Sleep(500 * time.Millisecond)
		ask() // the hint is under way, longer than hold
		time.Sleep(4 * time.Second)
		ask() // mute
		time.Sleep(4 * time.Second)
		f.events <- registered(hostA)
		time.Sleep(time.Second)
		ask()
		time.Sleep(2 * time.Second)
		if diff := cmp.Diff([]time.Duration{defaultHold, 0, 0, defaultHold}, waits); diff != "" {
			t.Error(diff)
		}
		if f.count() != 3 {
			t.Errorf("%d hints, want 3", f.count())
		}
	})
}

// TestPair: D5. A and AAAA in any order and at once are one hint.
func TestPair(t *testing.T) {
	for _, types := range [][]uint16{{dns.TypeA, dns.TypeAAAA}, {dns.TypeAAAA, dns.TypeA}, {dns.TypeA}, {dns.TypeAAAA}} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, registered(hostA))
			f.reply = func(context.Context) (hintReply, error) {
				time.Sleep(50 * time.Millisecond)
				return hintReply{result: leaseclient.HintReady, left: time.Hour}, nil
			}
			d := newPlugin(t, f, v4only(t))
			var wg sync.WaitGroup
			for i, typ := range types {
				wg.Go(func() {
					time.Sleep(time.Duration(i) * time.Millisecond)
					query(t, d, hostA, "n.example.", typ)
				})
			}
			wg.Wait()
			if f.count() != 1 {
				t.Errorf("%v: %d hints, want 1", types, f.count())
			}
		})
	}
}

// TestSourcesOfOneHost: two addresses of one host are one hint, two hosts are two.
func TestSourcesOfOneHost(t *testing.T) {
	b, c := netip.MustParseAddr("2001:db8:1::b"), netip.MustParseAddr("2001:db8:1::c")
	hb := registered(b)
	hb.Key = registered(hostA).Key
	f := newFake(t, registered(hostA), hb, registered(c))
	d := newPlugin(t, f, v4only(t))
	for _, src := range []netip.Addr{hostA, b, c, hostA, b, c} {
		query(t, d, src, "n.example.", dns.TypeA)
	}
	if f.count() != 2 {
		t.Errorf("%d hints, want 2", f.count())
	}
}

// TestLeaseHolder: a host with a lease costs no look-up of the other family and no call; when it ran out, it does again.
func TestLeaseHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := registered(hostA)
		h.Left = time.Minute
		f := newFake(t, h)
		z := v4only(t)
		d := newPlugin(t, f, z)
		for range 10_000 {
			query(t, d, hostA, "n.example.", dns.TypeA)
		}
		if z.asked.Load() != 10_000 || f.count() != 0 {
			t.Errorf("%d look-ups and %d hints, want 10000 and 0", z.asked.Load(), f.count())
		}
		time.Sleep(time.Minute)
		query(t, d, hostA, "n.example.", dns.TypeA)
		if z.asked.Load() != 10_002 || f.count() != 1 {
			t.Errorf("after the lease: %d look-ups and %d hints, want 10002 and 1", z.asked.Load(), f.count())
		}
	})
}

// TestFlood: D8. 5,000 names from one host at once: one hint, and no more queries at work than allowed.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, registered(hostA))
		f.reply = func(context.Context) (hintReply, error) {
			time.Sleep(100 * time.Millisecond)
			return hintReply{result: leaseclient.HintReady, left: time.Hour}, nil
		}
		d := newPlugin(t, f, v4only(t))
		var wg sync.WaitGroup
		for i := range 5000 {
			wg.Go(func() { query(t, d, hostA, fmt.Sprintf("x%d.example.", i), dns.TypeA) })
		}
		synctest.Wait()
		if n := d.held.Load(); n != int64(d.cfg.maxHeld) {
			t.Errorf("%d queries at work, want %d", n, d.cfg.maxHeld)
		}
		if n := testutil.ToFloat64(d.met.queries[queryOverload]); n != float64(5000-d.cfg.maxHeld) {
			t.Errorf("overload = %v, want %d", n, 5000-d.cfg.maxHeld)
		}
		wg.Wait()
		if f.count() != 1 || d.held.Load() != 0 {
			t.Errorf("%d hints, %d at work afterwards; want 1 and 0", f.count(), d.held.Load())
		}
	})
}

// TestNotConcerned: what passes through as if the plugin were not there.
func TestNotConcerned(t *testing.T) {
	b := netip.MustParseAddr("2001:db8:1::b")
	marked := context.WithValue(context.Background(), ownLookup{}, true)
	chaos := new(dns.Msg).SetQuestion("n.example.", dns.TypeA)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	two := new(dns.Msg).SetQuestion("n.example.", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	notify := new(dns.Msg).SetQuestion("n.example.", dns.TypeA)
	notify.Opcode = dns.OpcodeNotify
	q := func(n string, typ uint16) *dns.Msg { return new(dns.Msg).SetQuestion(n, typ) }
	for _, c := range []struct {
		name string
		ctx  context.Context
		src  netip.Addr
		msg  *dns.Msg
	}{
		{"not registered", nil, b, q("n.example.", dns.TypeA)},
		{"not a client", nil, netip.MustParseAddr("2001:db8:2::a"), q("n.example.", dns.TypeA)},
		{"IPv4 client", nil, netip.MustParseAddr("192.0.2.1"), q("n.example.", dns.TypeA)},
		{"own look-up", marked, hostA, q("n.example.", dns.TypeA)},
		{"other type", nil, hostA, q("n.example.", dns.TypeTXT)},
		{"ANY", nil, hostA, q("n.example.", dns.TypeANY)},
		{"CHAOS", nil, hostA, chaos},
		{"two questions", nil, hostA, two},
		{"opcode", nil, hostA, notify},
		{"RFC 7050", nil, hostA, q("ipv4only.arpa.", dns.TypeA)},
		{"RFC 7050, case", nil, hostA, q("IPv4Only.ARPA.", dns.TypeAAAA)},
		{"below a denied name", nil, hostA, q("1.2.0.192.in-addr.arpa.", dns.TypeA)},
		{"local", nil, hostA, q("printer.local.", dns.TypeA)},
	} {
		f := newFake(t, registered(hostA))
		z := v4only(t)
		d := newPlugin(t, f, z)
		if c.ctx == nil {
			c.ctx = context.Background()
		}
		w := &asker{from: from(c.src)}
		if _, err := d.ServeDNS(c.ctx, w, c.msg); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if len(w.got) != 1 || z.asked.Load() != 1 || f.count() != 0 {
			t.Errorf("%s: %d answers, %d look-ups, %d hints; want 1, 1, 0", c.name, len(w.got), z.asked.Load(), f.count())
		}
	}
}

// TestPoolsOff: no look-up and no hint while no hint could bring a lease.
func TestPoolsOff(t *testing.T) {
	for _, c := range []struct {
		ev   leaseclient.PoolState
		want int
	}{{leaseclient.PoolState{HintsOn: true, Dry: true}, 0}, {leaseclient.PoolState{}, 0}, {leaseclient.PoolState{HintsOn: true}, 1}} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t, registered(hostA))
			d := newPlugin(t, f, v4only(t))
			f.events <- c.ev
			synctest.Wait()
			query(t, d, hostA, "n.example.", dns.TypeA)
			if f.count() != c.want {
				t.Errorf("%+v: %d hints, want %d", c.ev, f.count(), c.want)
			}
		})
	}
}

// TestFailOpen: D10, N14. With the watch gone nothing is held, and the answer is as ever.
func TestFailOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, registered(hostA))
		f.reply = func(context.Context) (hintReply, error) {
			time.Sleep(100 * time.Millisecond)
			return hintReply{}, errDown
		}
		d := newPlugin(t, f, v4only(t))
		close(f.events)
		time.Sleep(time.Minute)
		m, took := query(t, d, hostA, "n.example.", dns.TypeA)
		time.Sleep(time.Second)
		if took != 0 || m == nil || len(m.Answer) != 1 {
			t.Errorf("took %v, answer %v", took, m)
		}
		if testutil.ToFloat64(d.met.hints[hintFailed]) != 1 || testutil.ToFloat64(d.met.watchFailures) == 0 || testutil.ToFloat64(d.met.watchUp) != 0 {
			t.Error("failures are not counted")
		}
		if !d.Ready() {
			t.Error("not ready: DNS must not wait for leases")
		}
	})
}

// TestNextFails: what next returns without writing is returned as it is.
func TestNextFails(t *testing.T) {
	f := newFake(t, registered(hostA))
	d := newPlugin(t, f, test.NextHandler(dns.RcodeServerFailure, errDown))
	w := &asker{from: from(hostA)}
	rcode, err := d.ServeDNS(context.Background(), w, new(dns.Msg).SetQuestion("n.example.", dns.TypeAAAA))
	if rcode != dns.RcodeServerFailure || err != errDown || len(w.got) != 0 || f.count() != 0 {
		t.Errorf("rcode %d, err %v, %d answers, %d hints", rcode, err, len(w.got), f.count())
	}
}

// TestNotConcernedAllocates: most of a resolver's queries go this way. The one allocation is CoreDNS's own, in
// plugin.NextOrFailure.
func TestNotConcernedAllocates(t *testing.T) {
	h := registered(hostA)
	h.Left = time.Hour
	f := newFake(t, h)
	d := newPlugin(t, f, test.NextHandler(dns.RcodeSuccess, nil))
	r := new(dns.Msg).SetQuestion("n.example.", dns.TypeA)
	for _, a := range []string{"2001:db8:2::1", "2001:db8:1::b", "2001:db8:1::a"} {
		w := &asker{from: from(netip.MustParseAddr(a))}
		if n := testing.AllocsPerRun(1000, func() { _, _ = d.ServeDNS(context.Background(), w, r) }); n > 1 {
			t.Errorf("%s: %v allocations", a, n)
		}
	}
}

func BenchmarkNotConcerned(b *testing.B) {
	h := registered(hostA)
	h.Left = time.Hour
	f := newFake(b, h)
	d := newPlugin(b, f, plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { return 0, nil }))
	r := new(dns.Msg).SetQuestion("n.example.", dns.TypeA)
	for name, a := range map[string]string{"stranger": "2001:db8:2::1", "unregistered": "2001:db8:1::b", "leased": "2001:db8:1::a"} {
		b.Run(name, func(b *testing.B) {
			w := &asker{from: from(netip.MustParseAddr(a))}
			b.ReportAllocs()
			for b.Loop() {
				_, _ = d.ServeDNS(context.Background(), w, r)
			}
		})
	}
}

// FuzzServeDNS: any query with any answer passes without a panic, and the answer is what next wrote.
func FuzzServeDNS(f *testing.F) {
	seed := func(m *dns.Msg) []byte {
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	for _, typ := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS} {
		q := new(dns.Msg).SetQuestion("n.example.", typ)
		f.Add(seed(q), seed(reply(f, 0, "n.example. A 203.0.113.1").msg))
		f.Add(seed(q), seed(reply(f, 3, "n.example. AAAA 2001:db8::1").msg))
	}
	h := registered(hostA)
	f.Fuzz(func(t *testing.T, question, ans []byte) {
		q, want := new(dns.Msg), new(dns.Msg)
		if q.Unpack(question) != nil || want.Unpack(ans) != nil {
			return
		}
		svc := newFake(t, h)
		d := newPlugin(t, svc, plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, _ *dns.Msg) (int, error) {
			return want.Rcode, w.WriteMsg(want)
		}))
		before := want.String()
		w := &asker{from: from(hostA)}
		rcode, err := d.ServeDNS(context.Background(), w, q)
		if rcode != want.Rcode || err != nil || len(w.got) != 1 || w.got[0] != want || want.String() != before {
			t.Errorf("rcode %d, err %v, answers %v; want %v", rcode, err, w.got, before)
		}
	})
}
