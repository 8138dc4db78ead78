package hostd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/hostprobe"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// world is everything around an agent, and writes down what the agent does to it.
type world struct {
	mu      sync.Mutex
	trace   []string
	start   time.Time
	desired netcfg.Desired
	globals []netcfg.GlobalAddr
	v4      netcfg.IPv4
	change  chan struct{}
	packets chan dataplane.Held
	down    chan any      // to the stream; closed = broken
	used    time.Duration // last packet, either way
	sent    uint64        // packets into the tunnel
	sockets bool
	refuse  error // of Attend, Bind and Renew
	gen     lease.Gen
	foreign bool // the device exists before us

	configured bool
	mtu        uint16 // the packet path was configured with
	uplinked   int    // times that it was
	log        bytes.Buffer
}

func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

// take returns what happened since the last take.
func (w *world) take() []string {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() { w.trace = nil }()
	return w.trace
}

func (w *world) now() time.Duration { return time.Since(w.start) }

// conns are the connections of the host: one to the internet, one that never needed a lease.
func (w *world) conns() []hostprobe.Conn {
	return []hostprobe.Conn{
		{Local: ip7.Addr, Remote: netip.MustParseAddr("203.0.113.99")},
		{Local: testPlaceholder.Addr(), Remote: netip.MustParseAddr("10.1.1.1")},
		{Local: netip.MustParseAddr("127.0.0.1"), Remote: netip.MustParseAddr("127.0.0.1")},
	}
}

func (w *world) inUse(match func(hostprobe.Conn) bool) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.conns(), func(c hostprobe.Conn) bool {
		return match(c) && (w.sockets || c.Local != ip7.Addr)
	}), nil
}

func (w *world) abort(match func(hostprobe.Conn) bool) (int, error) {
	gone := []netip.Addr{}
	for _, c := range w.conns() {
		if match(c) {
			gone = append(gone, c.Local)
		}
	}
	w.note("abort %v", gone)
	return len(gone), nil
}

type fakeService struct{ *world }

func (f fakeService) Attend(ctx context.Context, h leaseclient.Hello) (Stream, leaseclient.Welcome, error) {
	f.note("attend %v held %v", h.Sources, h.Held.Addr.IsValid())
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return nil, leaseclient.Welcome{}, f.refuse
	}
	f.world.down = make(chan any, 8)
	s := &fakeStream{world: f.world, ch: f.world.down}
	context.AfterFunc(ctx, s.Close)
	return s, leaseclient.Welcome{Cell: "lab", T1: 500, T2: 800, Idle: 120 * sec, Known: h.Held}, nil
}

func (f fakeService) grant() (leaseclient.Lease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return leaseclient.Lease{
		Ref: lease.Ref{Resource: ip7, Gen: f.gen}, TEP: tep, Valid: 15 * time.Minute, MTU: 1440, Installed: true,
	}, f.refuse
}

func (f fakeService) Bind(_ context.Context, r leaseclient.BindRequest) (leaseclient.Lease, error) {
	f.note("bind %s hint %d from %s mtu %d", r.Trigger, r.Hint, r.Source, r.MTU)
	f.mu.Lock()
	f.gen++
	f.mu.Unlock()
	return f.grant()
}

func (f fakeService) Renew(_ context.Context, r leaseclient.RenewRequest) (leaseclient.Lease, error) {
	f.note("renew %s", r.Ref)
	return f.grant()
}

func (f fakeService) Release(ctx context.Context, ref lease.Ref, why lease.Reason) error {
	if _, ok := ctx.Deadline(); !ok {
		return errors.New("no deadline")
	}
	f.note("release %s %s", ref, why)
	return nil
}

func (f fakeService) Reset() { f.note("reset") }

type fakeStream struct {
	*world
	ch     chan any
	closed sync.Once
}

func (s *fakeStream) Sources(addrs []netip.Addr) error { s.note("sources %v", addrs); return nil }
func (s *fakeStream) Installed(ref lease.Ref) error    { s.note("installed %s", ref); return nil }
func (s *fakeStream) Close()                           { s.closed.Do(func() { close(s.ch) }) }

func (s *fakeStream) Recv() (any, error) {
	m, ok := <-s.ch
	if !ok {
		return nil, errors.New("stream ended")
	}
	return m, nil
}

type fakePath struct{ *world }

func (f fakePath) Configure(_ context.Context, c dataplane.HostConfig) error {
	f.mu.Lock()
	first, mtu := !f.configured, f.mtu
	f.configured, f.mtu = true, c.MTU
	f.uplinked++
	f.mu.Unlock()
	switch {
	case first:
		f.note("configure %s %s", c.Device, c.Placeholder)
	case mtu != c.MTU:
		f.note("path: mtu %d", c.MTU)
	}
	return nil
}

func (f fakePath) SetLease(_ context.Context, b *lease.Binding, deadline uint64) error {
	if b == nil {
		f.note("path: no lease")
		return nil
	}
	f.note("path: lease %s gen %s host %s until %s", b.Addr, b.Gen, b.Host, time.Duration(deadline))
	return nil
}

func (f fakePath) ReadHeld(ctx context.Context) (dataplane.Held, error) {
	select {
	case p := <-f.packets:
		return p, nil
	case <-ctx.Done():
		return dataplane.Held{}, ctx.Err()
	}
}

func (f fakePath) Inject(_ context.Context, h dataplane.Held) error {
	f.note("inject %d", h.Data[27])
	return nil
}

func (f fakePath) Activity(context.Context) (time.Duration, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.used, nil
}

func (f fakePath) Counters(context.Context) (dataplane.Counters, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return dataplane.Counters{Up: dataplane.Direction{Rx: f.sent + 1, Tx: f.sent, Consumed: 1}}, nil
}

func (f fakePath) Close() error { f.note("path: closed"); return nil }

type fakeNet struct{ *world }

func (f fakeNet) Set(d netcfg.Desired) error {
	if err := d.Check(); err != nil {
		return err
	}
	f.mu.Lock()
	same := cmp.Equal(f.world.desired, d, addrCmp, pfxCmp)
	f.world.desired = d
	f.mu.Unlock()
	if !same {
		text := []string{}
		for _, a := range d.Addrs {
			text = append(text, a.Prefix.String())
		}
		for _, r := range d.Routes {
			text = append(text, r.String())
		}
		f.note("net: %s", strings.Join(text, ", "))
	}
	return nil
}
func (f fakeNet) Cleanup() error { f.note("net: clean"); return nil }

func (f fakeNet) Watch(ctx context.Context) (<-chan struct{}, error) { return f.change, nil }

func (f fakeNet) Lookup(netip.Addr) (netcfg.Hop, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.globals) == 0 {
		return netcfg.Hop{}, errors.New("network is unreachable")
	}
	return netcfg.Hop{Link: "eth0", Source: f.globals[0].Addr, MTU: 1500}, nil
}

func (f fakeNet) GlobalIPv6() ([]netcfg.GlobalAddr, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.globals), nil
}

func (f fakeNet) ReadIPv4() (netcfg.IPv4, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.v4, nil
}

func (f fakeNet) Link(name string) (netcfg.Link, bool, error) {
	return netcfg.Link{Name: name, Kind: "tuntap"}, f.foreign, nil
}

func (f fakeNet) SetDevice(_ string, mtu int) error {
	f.note("device up mtu %d", mtu)
	return nil
}

type fakeFilter struct{ *world }

func (f fakeFilter) Set(device string, in Inbound) error {
	f.note("filter %s %s", device, in)
	return nil
}
func (f fakeFilter) Remove() error { f.note("filter removed"); return nil }

// inWorld runs f with an agent that works in a world with one IPv6 address; time is the bubble's.
func inWorld(t *testing.T, prepare func(*world), f func(t *testing.T, w *world, a *Agent)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{
			start: time.Now(), change: make(chan struct{}, 1), packets: make(chan dataplane.Held),
			globals: []netcfg.GlobalAddr{{Link: "eth0", Addr: src1}},
		}
		if prepare != nil {
			prepare(w)
		}
		cfg, err := ParseConfig("test", []byte(minimal))
		if err != nil {
			t.Fatal(err)
		}
		reg := prometheus.NewPedanticRegistry()
		a := New(cfg, Deps{
			Service: fakeService{w}, DataPath: fakePath{w}, Network: fakeNet{w}, Filter: fakeFilter{w},
			Sockets: Sockets{
				InUse: w.inUse, Abort: w.abort,
			},
			Now: w.now, Log: slog.New(slog.NewTextHandler(&w.log, nil)), Registry: reg,
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx, func() {}) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		}()
		f(t, w, a)
		if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
			t.Errorf("metrics: %v %v", problems, err)
		}
	})
}

func (w *world) packet(n byte) {
	p := ipv4("192.0.0.2", "203.0.113.99")
	p[27] = n
	w.packets <- dataplane.Held{Data: p, At: time.Now()}
}

func expect(t *testing.T, w *world, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, w.take()); d != "" {
		t.Fatalf("at %s (-want +got):\n%s", w.now(), d)
	}
}
