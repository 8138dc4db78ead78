package tepd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
)

var (
	tepAddr = netip.MustParseAddr("2001:db8:a::1")
	hostA   = netip.MustParseAddr("2001:db8:1::a")
	poolPfx = netip.MustParsePrefix("198.51.100.0/24")
	pool    = lease.Pool{Name: "main", Prefix: poolPfx, TEP: tepAddr}
	cluster = lease.ClusterID{1}

	cmpAddr   = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	cmpPrefix = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func binding(last byte, gen lease.Gen) lease.Binding {
	return lease.Binding{Resource: lease.Whole(netip.AddrFrom4([4]byte{198, 51, 100, last})), Host: hostA, TEP: tepAddr, Gen: gen}
}

// fakePath is a packet path that checks how it is used.
type fakePath struct {
	t *testing.T

	mu       sync.Mutex
	cfg      dataplane.GatewayConfig
	table    map[lease.Resource]lease.Binding
	deadline uint64
	closed   bool
	busy     bool
	gate     chan struct{} // Apply and Replace return only after one receive, when not nil
	fail     error         // of the next Apply
	broken   error         // of Counters
}

func (p *fakePath) enter() (leave func()) {
	p.mu.Lock()
	if p.closed {
		p.t.Error("packet path used after Close")
	}
	if p.busy {
		p.t.Error("table changes overlap")
	}
	p.busy = true
	gate := p.gate
	p.mu.Unlock()
	if gate != nil {
		<-gate
	}
	p.mu.Lock()
	return func() { p.busy = false; p.mu.Unlock() }
}

func (p *fakePath) Configure(_ context.Context, c dataplane.GatewayConfig) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cfg = c
	return nil
}

func (p *fakePath) Apply(_ context.Context, ups []lease.Binding, dels []lease.Resource) error {
	defer p.enter()()
	if err := p.fail; err != nil {
		p.fail = nil
		return err
	}
	for _, b := range ups {
		p.table[b.Resource] = b
	}
	for _, r := range dels {
		delete(p.table, r)
	}
	return nil
}

func (p *fakePath) Replace(_ context.Context, bs []lease.Binding) error {
	defer p.enter()()
	p.table = map[lease.Resource]lease.Binding{}
	for _, b := range bs {
		p.table[b.Resource] = b
	}
	return nil
}

func (p *fakePath) SetDeadline(_ context.Context, ns uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ns < p.deadline {
		p.t.Errorf("deadline moves back from %d to %d", p.deadline, ns)
	}
	p.deadline = ns
	return nil
}

func (p *fakePath) has() (entries int, deadline uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.table), p.deadline
}

func (p *fakePath) setGate(g chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gate = g
}

func (p *fakePath) Entries(context.Context) ([]dataplane.Entry, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []dataplane.Entry
	for _, b := range p.table {
		out = append(out, dataplane.Entry{Binding: b})
	}
	slices.SortFunc(out, func(a, b dataplane.Entry) int { return a.Resource.Compare(b.Resource) })
	return out, nil
}

func (p *fakePath) Counters(context.Context) (dataplane.Counters, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return dataplane.Counters{}, p.broken
}

func (p *fakePath) Close(bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	return nil
}

// fakeKernel has the interfaces and the exit that a test gives it.
type fakeKernel struct {
	mu    sync.Mutex
	links map[string]netcfg.Link
	exit  netcfg.Hop
	err   error // of Lookup
	set   netcfg.Desired
	fail  error // of Set
	log   []string
}

func (k *fakeKernel) Set(d netcfg.Desired) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	k.set = d
	return d.Check()
}

func (k *fakeKernel) Cleanup() error {
	k.log = append(k.log, "cleanup")
	return nil
}

func (k *fakeKernel) Watch(ctx context.Context) (<-chan struct{}, error) {
	ch := make(chan struct{})
	context.AfterFunc(ctx, func() { close(ch) })
	return ch, nil
}

func (k *fakeKernel) Lookup(netip.Addr) (netcfg.Hop, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.exit, k.err
}

func (k *fakeKernel) Link(name string) (netcfg.Link, bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l, ok := k.links[name]
	return l, ok, nil
}

func (k *fakeKernel) SetDevice(string, int) error { return nil }

func (k *fakeKernel) RemoveLink(name string) error {
	k.log = append(k.log, "remove "+name)
	delete(k.links, name)
	return nil
}

// fakeService hands out streams that a test drives. While down it refuses.
type fakeService struct {
	mu      sync.Mutex
	down    bool
	hellos  []lease.Hello
	streams chan *fakeStream
}

var errDown = errors.New("connection refused")

func (s *fakeService) Sync(ctx context.Context, hello func() lease.Hello) (Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, errDown
	}
	st := &fakeStream{ctx: ctx, hello: hello(), down: make(chan any), broken: make(chan struct{})}
	s.hellos = append(s.hellos, st.hello)
	s.streams <- st
	return st, nil
}

func (s *fakeService) setDown(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = on
}

type fakeStream struct {
	ctx    context.Context
	hello  lease.Hello
	down   chan any
	broken chan struct{}

	mu    sync.Mutex
	table []lease.TableChunk
	acks  []lease.Ack
	beats []lease.Heartbeat
}

func (s *fakeStream) Recv() (any, error) {
	select {
	case m := <-s.down:
		return m, nil
	case <-s.broken:
		return nil, errDown
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

func (s *fakeStream) Heartbeat(h lease.Heartbeat) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.beats = append(s.beats, h)
	return nil
}

func (s *fakeStream) Ack(a lease.Ack) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acks = append(s.acks, a)
	return nil
}

func (s *fakeStream) Table(c lease.TableChunk) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table = append(s.table, c)
	return nil
}

func (s *fakeStream) Close() {}

func (s *fakeStream) acked() lease.Rev {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.acks) == 0 {
		return 0
	}
	return s.acks[len(s.acks)-1].Applied
}

func (s *fakeStream) lastBeat() (lease.Heartbeat, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.beats) == 0 {
		return lease.Heartbeat{}, false
	}
	return s.beats[len(s.beats)-1], true
}

// fakeSpeaker writes down every call that matters.
type fakeSpeaker struct {
	mu     sync.Mutex
	routes []bgp.Route
	until  time.Time
	conf   bgp.Config
	log    []string
	dead   bool
}

func (s *fakeSpeaker) Attach(context.Context) (bgp.Remote, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = false
	return s, len(s.routes) > 0, nil
}

func (s *fakeSpeaker) Configure(_ context.Context, c bgp.Config) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conf = c
	return nil
}

func (s *fakeSpeaker) Set(ctx context.Context, set bgp.RouteSet) (bgp.Advertised, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := ctx.Deadline(); !ok {
		panic("Set without a deadline")
	}
	s.routes, s.until = set.Routes, set.NotAfter
	var adv bgp.Advertised
	for _, r := range set.Routes {
		adv.Prefixes = append(adv.Prefixes, r.Prefix)
	}
	if line := fmt.Sprint("set ", adv.Prefixes); len(s.log) == 0 || s.log[len(s.log)-1] != line {
		s.log = append(s.log, line) // refreshes of the time limit are not written down
	}
	return adv, nil
}

func (s *fakeSpeaker) Status(context.Context) (bgp.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bgp.Status{Routes: s.routes, Implementation: "fake"}, nil
}

func (s *fakeSpeaker) Beat(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return errors.New("speaker is gone")
	}
	return nil
}

func (s *fakeSpeaker) Close(_ context.Context, m bgp.CloseMode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, fmt.Sprint("close ", m))
	return nil
}

func (s *fakeSpeaker) calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log)
}

// announced is what it announces now: nothing after the time limit of the last Set.
func (s *fakeSpeaker) announced() []bgp.Route {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.until.IsZero() && time.Now().After(s.until) {
		return nil
	}
	return s.routes
}

func (s *fakeSpeaker) limit() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.until
}

// world is a gateway among fakes, inside a synctest bubble.
type world struct {
	t       *testing.T
	cfg     *Config
	path    *fakePath
	kernel  *fakeKernel
	service *fakeService
	speaker *fakeSpeaker
	g       *Gateway
	stop    context.CancelFunc
	done    chan error
	begun   time.Time
}

const testConfig = `cell: lab
id: tep1
lease_service: {servers: ["[2001:db8:2::10]:3545"], name: lease1.example.net, tls: {cert: tep.pem, key: tep.key, ca: ca.pem}}
tunnel: {address: "2001:db8:a::1", ipv4_address: 192.0.2.1}
`

const testBGP = `bgp:
  asn: 64512
  allow_advertise: [198.51.100.0/24, "2001:db8:a::1/128"]
  peers: [{address: "2001:db8:3::1", asn: 64513, hold_time: 9s}]
`

// newWorld builds a gateway that is not running yet. The boot clock starts at 1000 s.
func newWorld(t *testing.T, text string) *world {
	t.Helper()
	cfg, err := ParseConfig("tepd.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Paths.Run = t.TempDir()
	w := &world{
		t: t, cfg: cfg, begun: time.Now(),
		path:    &fakePath{t: t, table: map[lease.Resource]lease.Binding{}},
		kernel:  &fakeKernel{links: map[string]netcfg.Link{}, exit: netcfg.Hop{Link: "eth1"}},
		service: &fakeService{streams: make(chan *fakeStream, 16)},
		speaker: &fakeSpeaker{},
	}
	// The packet path makes the device with the first Configure; here it is there once the gateway has looked.
	d := Deps{
		Service: w.service, Path: makesDevice{w.path, w.kernel}, Kernel: w.kernel, Now: w.now, Log: slog.New(slog.DiscardHandler),
	}
	if cfg.BGP.Enabled() {
		d.Speakers = w.speaker
	}
	w.g = New(cfg, d)
	return w
}

// makesDevice is a packet path that makes its device.
type makesDevice struct {
	*fakePath
	k *fakeKernel
}

func (m makesDevice) Configure(ctx context.Context, c dataplane.GatewayConfig) error {
	m.k.mu.Lock()
	if _, ok := m.k.links[c.Device]; !ok {
		m.k.links[c.Device] = netcfg.Link{Index: 7, Name: c.Device, Kind: tunKind, Up: true}
	}
	m.k.mu.Unlock()
	return m.fakePath.Configure(ctx, c)
}

func (w *world) now() time.Duration { return 1000*time.Second + time.Since(w.begun) }

func (w *world) start() {
	ctx, cancel := context.WithCancel(w.t.Context())
	w.stop, w.done = cancel, make(chan error, 1)
	go func() { w.done <- w.g.Run(ctx, func() {}) }()
}

func (w *world) end() {
	w.stop()
	if err := <-w.done; err != nil {
		w.t.Errorf("Run returned %v", err)
	}
}

func (w *world) stream() *fakeStream {
	w.t.Helper()
	synctest.Wait()
	select {
	case st := <-w.service.streams:
		return st
	case <-time.After(time.Minute):
		w.t.Fatal("no stream to the lease service")
		return nil
	}
}

func (w *world) send(st *fakeStream, m any) {
	w.t.Helper()
	select {
	case st.down <- m:
	case <-time.After(time.Minute):
		w.t.Fatalf("message %T is not taken", m)
	}
	synctest.Wait()
}

// sync brings a stream to revision 10 with the pool and one binding (.1), and a deadline that runs for grant.
func (w *world) sync(st *fakeStream, session uint64, grant time.Duration) {
	w.t.Helper()
	w.send(st, lease.SessionReply{
		Session: session, EchoBootNS: st.hello.SentBootNS, GrantNS: uint64(grant), Floor: 10, Cluster: cluster, Epoch: 1,
		NextBeatNS: uint64(5 * time.Second),
	})
	if st.hello.HaveRev == 0 {
		w.send(st, lease.SnapshotChunk{Session: session, Rev: 10, Last: true, Records: []lease.Record{
			lease.PoolRecord(1, pool, false), lease.BindRecord(3, binding(1, 3)),
		}})
	}
}
