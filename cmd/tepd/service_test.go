package main

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
	"github.com/dstm-project/dstm/tepd"
)

// table is a packet path in memory.
type table struct {
	mu       sync.Mutex
	bindings map[lease.Resource]lease.Binding
	deadline uint64
}

func (p *table) Configure(context.Context, dataplane.GatewayConfig) error { return nil }

func (p *table) Apply(_ context.Context, ups []lease.Binding, dels []lease.Resource) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range ups {
		p.bindings[b.Resource] = b
	}
	for _, r := range dels {
		delete(p.bindings, r)
	}
	return nil
}

func (p *table) Replace(ctx context.Context, bs []lease.Binding) error {
	p.mu.Lock()
	clear(p.bindings)
	p.mu.Unlock()
	return p.Apply(ctx, bs, nil)
}

func (p *table) SetDeadline(_ context.Context, ns uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = ns
	return nil
}

func (p *table) Entries(context.Context) ([]dataplane.Entry, error) { return nil, nil }

func (p *table) Counters(context.Context) (dataplane.Counters, error) {
	return dataplane.Counters{}, nil
}

func (p *table) Close(bool) error { return nil }

func (p *table) held() []lease.Binding {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.bindings))
}

// kernel is a machine with a device and a way out.
type kernel struct{}

func (kernel) Set(netcfg.Desired) error { return nil }
func (kernel) Cleanup() error           { return nil }
func (kernel) Watch(context.Context) (<-chan struct{}, error) {
	return make(chan struct{}), nil
}
func (kernel) Lookup(netip.Addr) (netcfg.Hop, error) { return netcfg.Hop{Link: "eth1"}, nil }
func (kernel) Link(name string) (netcfg.Link, bool, error) {
	return netcfg.Link{Index: 7, Name: name, Kind: "tuntap"}, true, nil
}
func (kernel) SetDevice(string, int) error { return nil }
func (kernel) RemoveLink(string) error     { return nil }

// cell is a lease service on loopback with a certificate authority of its own.
type cell struct {
	t          *testing.T
	ca, db     string
	listen     netip.AddrPort
	stopServer func()
}

func (c *cell) identity(role tlsid.Role, name string) *tlsid.Source {
	c.t.Helper()
	files, err := pki.Issue(c.ca, c.t.TempDir(), tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name},
		pki.Options{Valid: time.Hour, DNS: []string{"lease1.example.net"}})
	if err != nil {
		c.t.Fatal(err)
	}
	s, err := tlsid.Open(files, role, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

func (c *cell) client(role tlsid.Role, name string) *leaseclient.Conn {
	c.t.Helper()
	conn, err := leaseclient.New(leaseclient.Options{
		Servers: []netip.AddrPort{c.listen}, TLS: c.identity(role, name).Client("lease1.example.net"),
		BackoffMin: time.Millisecond, BackoffMax: 50 * time.Millisecond,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

// serve starts the lease service over the store that is there, at the same address each time.
func (c *cell) serve() {
	c.t.Helper()
	cfg, err := leasesvc.ParseConfig("leasesvc.yaml", []byte(`
cell: lab
trust_domain: example.net
listen: "[::1]:3545"
tls: {cert: c, key: k, ca: a}
store: {path: p}
teps: [tep1]
hosts: {prefixes: ["::1/128"]}
timers: {valid: 60s, min_valid: 2s, hold_down: 1s, restart_grace: 1s, fail_static: 60s, bind_wait: 5s, idle: 5s}
pools: [{name: main, prefix: 198.51.100.0/24, tep_address: "2001:db8:a::1", exclude: [198.51.100.0, 198.51.100.255]}]
`))
	if err != nil {
		c.t.Fatal(err)
	}
	st, err := boltstore.Open(boltstore.Options{Path: c.db})
	if err != nil {
		c.t.Fatal(err)
	}
	s, err := leasesvc.New(c.t.Context(), cfg, leasesvc.Deps{Store: st, TLS: c.identity(tlsid.RoleSvc, "lease1"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		c.t.Fatal(err)
	}
	at := "[::1]:0"
	if c.listen.IsValid() {
		at = c.listen.String()
	}
	l, err := net.Listen("tcp", at)
	if err != nil {
		c.t.Fatal(err)
	}
	c.listen = netip.MustParseAddrPort(l.Addr().String())
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, task := range s.Tasks(l) {
		wg.Go(func() {
			if err := task.Run(ctx); err != nil {
				c.t.Errorf("lease service: %v", err)
			}
		})
	}
	c.stopServer = func() {
		cancel()
		wg.Wait()
		if err := st.Close(); err != nil {
			c.t.Error(err)
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// startGateway runs a gateway until the test ends.
func startGateway(t *testing.T, c *cell) (*tepd.Gateway, *table) {
	t.Helper()
	cfg, err := tepd.ParseConfig("tepd.yaml", []byte(`
cell: lab
id: tep1
lease_service: {servers: ["[::1]:3545"], name: lease1.example.net, tls: {cert: c, key: k, ca: a}}
tunnel: {address: "2001:db8:a::1", ipv4_address: 192.0.2.1, device: lab0}
health: {interval: 20ms}
`))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Paths.Run = t.TempDir()
	handover := filepath.Join(cfg.Paths.Run, "tepd.json")
	writeFile(t, handover, `{"device":"lab0","index":7}`)
	path := &table{bindings: map[lease.Resource]lease.Binding{}}
	g := tepd.New(cfg, tepd.Deps{
		Service: tepd.Client{Conn: c.client(tlsid.RoleTEP, "tep1")}, Path: path, Kernel: kernel{}, Now: bootTime, Log: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("gateway: %v", err)
		}
	})
	return g, path
}

// TestWithLeaseService: a lease is in the packet path when Bind says so, survives the service's restart there, and is gone
// when it was released.
func TestWithLeaseService(t *testing.T) {
	dir := t.TempDir()
	c := &cell{t: t, ca: filepath.Join(dir, "ca"), db: filepath.Join(dir, "lease.db")}
	if err := pki.Init(c.ca, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := boltstore.Create(c.db); err != nil {
		t.Fatal(err)
	}
	c.serve()
	g, path := startGateway(t, c)
	eventually(t, "the gateway is up", func() bool { return g.Ready() == nil })
	host := c.client(tlsid.RoleHost, "host1")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	l, err := host.Bind(ctx, leaseclient.BindRequest{Source: netip.IPv6Loopback(), Trigger: lease.TriggerPacket, MTU: 1460})
	if err != nil || !l.Installed {
		t.Fatalf("bind: %+v, %v: want it installed", l, err)
	}
	want := []lease.Binding{{Resource: l.Resource, Host: netip.IPv6Loopback(), TEP: l.TEP, Gen: l.Gen, MTU: 1460}}
	cmpAddr := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if d := cmp.Diff(want, path.held(), cmpAddr); d != "" {
		t.Errorf("packet path when Bind returns (-want +got):\n%s", d)
	}
	session := g.Status().Session
	c.stopServer()
	eventually(t, "the loss is seen", func() bool { return !g.Status().Connected })
	if d := cmp.Diff(want, path.held(), cmpAddr); d != "" || g.Ready() != nil {
		t.Errorf("packet path without the service (-want +got):\n%s\nready: %v", d, g.Ready())
	}
	c.serve()
	defer c.stopServer()
	eventually(t, "the next session", func() bool { s := g.Status(); return s.Connected && s.Session > session && s.Synced })
	if d := cmp.Diff(want, path.held(), cmpAddr); d != "" {
		t.Errorf("packet path after the service's restart (-want +got):\n%s", d)
	}
	if err := host.Release(ctx, l.Ref, lease.ReasonIdle); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the packet path forgets the lease", func() bool { return len(path.held()) == 0 })
}
