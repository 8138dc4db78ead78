package dstm

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/nonwriter"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"

	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

var errDown = errors.New("lease service is down")

// fakeService is a lease service in memory. It fails the test on a hint for a source that it did not list, on two hints
// for one host at a time, and on use after Close.
type fakeService struct {
	t      testing.TB
	events chan any // what the watch says; closed = watch breaks
	reply  func(ctx context.Context) (hintReply, error)

	mu     sync.Mutex
	listed map[netip.Addr]bool
	flying int
	hints  int
	closed bool
}

func newFake(t testing.TB, hosts ...leaseclient.HostState) *fakeService {
	f := &fakeService{t: t, events: make(chan any, len(hosts)+16), listed: map[netip.Addr]bool{}}
	for _, h := range hosts {
		f.events <- h
		f.listed[h.Source] = true
	}
	f.events <- leaseclient.InSync{}
	f.reply = func(context.Context) (hintReply, error) {
		return hintReply{result: leaseclient.HintReady, left: time.Hour}, nil
	}
	return f
}

type fakeWatch struct {
	ctx context.Context
	f   *fakeService
}

func (w fakeWatch) Close() {}
func (w fakeWatch) Recv() (any, error) {
	select {
	case ev, ok := <-w.f.events:
		if !ok {
			return nil, errDown
		}
		return ev, nil
	case <-w.ctx.Done():
		return nil, w.ctx.Err()
	}
}

func (f *fakeService) WatchHosts(ctx context.Context, _ []netip.Prefix) (watch, error) {
	return fakeWatch{ctx, f}, nil
}

func (f *fakeService) Hint(ctx context.Context, source netip.Addr) (hintReply, error) {
	f.mu.Lock()
	f.hints++
	f.flying++
	switch {
	case f.closed:
		f.t.Error("hint after Close")
	case !f.listed[source]:
		f.t.Errorf("hint for %v, which is not listed", source)
	case f.flying > 1:
		f.t.Errorf("%d hints at a time", f.flying)
	}
	if _, ok := ctx.Deadline(); !ok {
		f.t.Error("hint without a deadline")
	}
	f.mu.Unlock()
	rep, err := f.reply(ctx)
	f.mu.Lock()
	f.flying--
	f.mu.Unlock()
	return rep, err
}

func (f *fakeService) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		f.t.Error("closed twice")
	}
	f.closed = true
	return nil
}

func (f *fakeService) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hints
}

// zone answers by type of question, below the plugin.
type zone struct {
	a, aaaa answer
	slow    atomic.Int64 // nanoseconds that AAAA takes
	asked   atomic.Int64
}

func (z *zone) Name() string { return "zone" }
func (z *zone) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	z.asked.Add(1)
	a := z.a
	if r.Question[0].Qtype == dns.TypeAAAA {
		time.Sleep(time.Duration(z.slow.Load()))
		a = z.aaaa
	}
	if a.msg == nil {
		return a.rcode, nil
	}
	m := a.msg.Copy()
	m.SetReply(r)
	m.Rcode = a.msg.Rcode
	return m.Rcode, w.WriteMsg(m)
}

// asker is the connection of one query.
type asker struct {
	dns.ResponseWriter
	from net.Addr
	got  []*dns.Msg
	at   time.Time
}

func (w *asker) RemoteAddr() net.Addr { return w.from }
func (w *asker) LocalAddr() net.Addr  { return w.from }
func (w *asker) WriteMsg(m *dns.Msg) error {
	w.got, w.at = append(w.got, m), time.Now()
	return nil
}

var hostA = netip.MustParseAddr("2001:db8:1::a")

func from(a netip.Addr) net.Addr { return net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 5300)) }

func registered(a netip.Addr) leaseclient.HostState {
	return leaseclient.HostState{Source: a, Registered: true, Key: uint64(a.As16()[15])}
}

func testConfig() *config {
	return &config{
		clients: []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/64")}, hold: defaultHold, maxHeld: 10,
		deny: defaultDeny(),
	}
}

// newPlugin returns the plugin over next, with a client of svc that is in sync.
func newPlugin(t testing.TB, svc *fakeService, next plugin.Handler) *DSTM {
	met := newMetrics(nil)
	d := &DSTM{Next: next, cfg: testConfig(), met: met}
	d.client = newClient(svc, d.cfg.clients, met)
	t.Cleanup(d.client.close)
	for !d.client.live.Load() {
		time.Sleep(time.Millisecond)
	}
	// As upstream does it: the whole chain again.
	d.lookup = func(ctx context.Context, state request.Request, name string, typ uint16) (*dns.Msg, error) {
		nw := nonwriter.New(state.W)
		_, err := d.ServeDNS(ctx, nw, state.NewWithQuestion(name, typ).Req)
		return nw.Msg, err
	}
	return d
}

// query asks and returns the answer, nil if none was written, and how long it took.
func query(t testing.TB, d *DSTM, src netip.Addr, qname string, qtype uint16) (*dns.Msg, time.Duration) {
	t.Helper()
	w := &asker{from: from(src)}
	began := time.Now()
	if _, err := d.ServeDNS(context.Background(), w, new(dns.Msg).SetQuestion(qname, qtype)); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	switch len(w.got) {
	case 0:
		return nil, took
	case 1:
		return w.got[0], took
	}
	t.Fatalf("%d answers", len(w.got))
	return nil, 0
}

func v4only(t testing.TB) *zone {
	return &zone{a: reply(t, 0, "n.example. A 203.0.113.1"), aaaa: reply(t, 0)}
}
