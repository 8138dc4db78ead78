package leasesvc_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/lease/replica"
	"github.com/dstm-project/dstm/leasesvc"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/boltstore"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

func TestMain(m *testing.M) {
	etcdtest.Main()
	goleak.VerifyTestMain(m)
}

const patience = 20 * time.Second

var loopback = netip.IPv6Loopback()

// world is one lease service on loopback with a certificate authority of its own.
type world struct {
	t      testing.TB
	ca     string
	db     string
	config string
	addr   netip.AddrPort
	stop   func()
	srv    *leasesvc.Server
	store  *countingStore
	wrap   func(store.Store) store.Store // of the next start
	crl    string
}

// countingStore counts transactions that hold events of addresses.
type countingStore struct {
	store.Store
	commits atomic.Int64
}

func (c *countingStore) Commit(tx store.Tx) *store.Pending {
	c.commits.Add(int64(len(tx.Commits)))
	return c.Store.Commit(tx)
}

// base is the configuration of tests: times of seconds, a pool given by the test.
const base = `
cell: lab
trust_domain: example.net
listen: "[::1]:3545"
tls: {cert: c, key: k, ca: a}
store: {path: p}
teps: [tep1, tep2]
hosts: {prefixes: ["::1/128", "2001:db8:1::/64"], same_64: true, per_64: 0}
timers: {valid: 60s, min_valid: 2s, hold_down: 1s, restart_grace: 1s, fail_static: 60s, bind_wait: 5s, idle: 5s}
limits: {per_host: 0, per_64: 0, handshakes: 0}
admin: "[::1]:0"
`

func newWorld(t testing.TB, pools string) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, ca: filepath.Join(dir, "ca"), db: filepath.Join(dir, "lease.db")}
	w.config = strings.Replace(base, "path: p", "path: "+w.db, 1) + pools
	if err := pki.Init(w.ca, "example.net", time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := boltstore.Create(w.db); err != nil {
		t.Fatal(err)
	}
	w.up()
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) identity(role tlsid.Role, name string) *tlsid.Source {
	w.t.Helper()
	o := pki.Options{}
	if role == tlsid.RoleSvc {
		o.DNS = []string{"lease1.example.net"}
	}
	f, err := pki.Issue(w.ca, w.t.TempDir(), tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: role, Name: name}, o)
	if err != nil {
		w.t.Fatal(err)
	}
	if role == tlsid.RoleSvc {
		f.CRL = w.crl
	}
	s, err := tlsid.Open(f, role, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// up starts the service over the store that is there.
func (w *world) up() { w.upWith(leasesvc.Deps{}) }

// upWith is up with a policy or a registry.
func (w *world) upWith(d leasesvc.Deps) {
	w.t.Helper()
	cfg, err := leasesvc.ParseConfig("test.yaml", []byte(w.config))
	if err != nil {
		w.t.Fatal(err)
	}
	st, err := boltstore.Open(boltstore.Options{Path: w.db})
	if err != nil {
		w.t.Fatal(err)
	}
	w.store = &countingStore{Store: st}
	if w.wrap != nil {
		w.store.Store = w.wrap(st)
	}
	id := w.identity(tlsid.RoleSvc, "lease1")
	d.Store, d.TLS, d.Log = w.store, id, slog.New(slog.DiscardHandler)
	w.srv, err = leasesvc.New(w.t.Context(), cfg, d)
	if err != nil {
		w.t.Fatal(err)
	}
	at := "[::1]:0"
	if w.addr.IsValid() {
		at = w.addr.String() // clients of before find it again
	}
	l, err := net.Listen("tcp", at)
	if err != nil {
		w.t.Fatal(err)
	}
	w.addr = netip.MustParseAddrPort(l.Addr().String())
	ctx, cancel := context.WithCancel(context.Background())
	tasks := w.srv.Tasks(l)
	done := make(chan error, len(tasks))
	for _, task := range tasks {
		go func() { done <- task.Run(ctx) }()
	}
	closing := w.store
	w.stop = func() {
		cancel()
		for range tasks {
			if err := <-done; err != nil {
				w.t.Errorf("service: %v", err)
			}
		}
		if err := closing.Close(); err != nil {
			w.t.Error(err)
		}
		w.stop = func() {}
	}
}

func (w *world) client(role tlsid.Role, name string) *leaseclient.Conn {
	w.t.Helper()
	return w.clientOf(w.identity(role, name))
}

func (w *world) clientOf(id *tlsid.Source) *leaseclient.Conn {
	w.t.Helper()
	c, err := leaseclient.New(leaseclient.Options{
		Servers: []netip.AddrPort{w.addr}, TLS: id.Client("lease1.example.net"),
		BackoffMin: time.Millisecond, BackoffMax: 50 * time.Millisecond,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

// gateway is a TEP in process: a real stream, a real replica, a table in memory for a packet path.
type gateway struct {
	w     *world
	name  string
	r     *replica.Replica
	table map[lease.Resource]lease.Binding
	hold  chan struct{} // while it is not nil and open, changes wait in front of the packet path
	stop  func()
}

var started = time.Now()

func bootNS() uint64 { return uint64(time.Since(started)) + 1 }

func (w *world) gateway(name string) *gateway {
	w.t.Helper()
	g := &gateway{
		w: w, name: name, r: replica.New(replica.Config{TEP: name, Instance: name + "-1"}), table: map[lease.Resource]lease.Binding{},
	}
	g.connect()
	w.t.Cleanup(func() { g.stop() })
	return g
}

func (g *gateway) connect() {
	g.w.t.Helper()
	if err := g.attempt(); err != nil {
		g.w.t.Fatal(err)
	}
}

// attempt opens a stream and returns once the table is in sync, or with what ended the stream before.
func (g *gateway) attempt() error {
	g.w.t.Helper()
	c := g.w.client(tlsid.RoleTEP, g.name)
	s, err := c.Sync(context.Background(), func() lease.Hello { return g.r.Hello(bootNS()) })
	if err != nil {
		g.w.t.Fatal(err)
	}
	synced, done, fail := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(done)
		fail <- g.follow(s, synced)
	}()
	g.stop = func() { s.Close(); <-done; g.stop = func() {} }
	select {
	case <-synced:
		return nil
	case err := <-fail:
		return err
	case <-time.After(patience):
		return errors.New("gateway did not sync")
	}
}

func (g *gateway) follow(s *leaseclient.Sync, synced chan struct{}) error {
	for {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		var out replica.Out
		switch m := m.(type) {
		case lease.Upload:
			c := lease.TableChunk{Last: true}
			for _, b := range g.table {
				c.Held = append(c.Held, b)
			}
			if err := s.Table(c); err != nil {
				return err
			}
			continue
		case lease.SessionReply:
			out, err = g.r.Session(m, m.EchoBootNS)
		case lease.SnapshotChunk:
			out, err = g.r.Snapshot(m)
		case lease.Batch:
			out, err = g.r.Batch(m)
		}
		if err != nil {
			return err
		}
		if ch := out.Change; ch != nil {
			if g.hold != nil {
				<-g.hold
			}
			if ch.Replace {
				clear(g.table)
			}
			for _, b := range ch.Upserts {
				g.table[b.Resource] = b
			}
			for _, r := range ch.Deletes {
				delete(g.table, r)
			}
			out = g.r.Applied(ch.Rev)
		}
		if out.Ack != nil {
			if err := s.Ack(*out.Ack); err != nil {
				return err
			}
		}
		if g.r.Status().Synced {
			select {
			case <-synced:
			default:
				close(synced)
			}
		}
	}
}

const onePool = "pools: [{name: main, prefix: 198.51.100.0/24, tep_address: \"2001:db8:a::1\", exclude: [198.51.100.0, 198.51.100.255]}]\n"

const oneAddress = "pools: [{name: one, prefix: 198.51.100.7/32, tep_address: \"2001:db8:a::1\"}]\n"

func bind(t *testing.T, c *leaseclient.Conn) leaseclient.Lease {
	t.Helper()
	l, err := tryBind(t, c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func tryBind(t *testing.T, c *leaseclient.Conn) (leaseclient.Lease, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return c.Bind(ctx, leaseclient.BindRequest{Source: loopback, Trigger: lease.TriggerPacket, MTU: 1460})
}

func release(t *testing.T, c *leaseclient.Conn, l leaseclient.Lease) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := c.Release(ctx, l.Ref, lease.ReasonIdle); err != nil {
		t.Fatal(err)
	}
}

// eventually tries until f says yes.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

func TestBindRenewRelease(t *testing.T) {
	w := newWorld(t, onePool)
	g := w.gateway("tep1")
	h := w.client(tlsid.RoleHost, "host1")
	l := bind(t, h)
	if !l.Installed || len(l.Waiting) != 0 || l.TEP != netip.MustParseAddr("2001:db8:a::1") || l.Valid <= 0 || l.Valid > time.Minute {
		t.Fatalf("lease %+v: want it installed, of the pool's gateway, with at most 60s", l)
	}
	want := lease.Binding{Resource: l.Resource, Host: loopback, TEP: l.TEP, Gen: l.Gen, MTU: 1460}
	if got := g.table[l.Resource]; got != want {
		t.Errorf("gateway holds %+v when Bind returns, want %+v", got, want)
	}
	if again := bind(t, h); again.Ref != l.Ref {
		t.Errorf("second bind gave %s, want the same lease %s", again.Ref, l.Ref)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if n, err := h.Renew(ctx, leaseclient.RenewRequest{Ref: l.Ref, Source: loopback}); err != nil || n.Ref != l.Ref {
		t.Errorf("renew: %+v, %v, want the same lease", n, err)
	}
	release(t, h, l)
	release(t, h, l) // a second time is no error
	_, err := h.Renew(ctx, leaseclient.RenewRequest{Ref: l.Ref, Source: loopback})
	if leaseclient.ReasonOf(err) == lease.ReasonNone {
		t.Errorf("renew of a released lease: %v, want a refusal with a reason", err)
	}
}

// TestPoolOfOne: the second host is refused with the reason while the first holds the address, gets the very same one
// after release, fence and hold-down, and the audit knows both.
func TestPoolOfOne(t *testing.T) {
	w := newWorld(t, oneAddress)
	w.gateway("tep1")
	h1, h2 := w.client(tlsid.RoleHost, "host1"), w.client(tlsid.RoleHost, "host2")
	l1 := bind(t, h1)
	if _, err := tryBind(t, h2); leaseclient.ReasonOf(err) != lease.ReasonPoolDry {
		t.Fatalf("second host while the first holds the address: %v, want POOL_DRY", err)
	}
	release(t, h1, l1)
	var l2 leaseclient.Lease
	eventually(t, "host2 gets the address", func() bool {
		var err error
		l2, err = tryBind(t, h2)
		return err == nil
	})
	if l2.Addr != l1.Addr || l2.Gen <= l1.Gen {
		t.Errorf("host2 has %s, want the address of %s with a later generation", l2.Ref, l1.Ref)
	}
	op := w.client(tlsid.RoleOperator, "noc")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	who, err := op.Who(ctx, l1.Addr, 0, time.Time{})
	if err != nil || len(who) != 2 || who[0].HostID != "host2" || who[1].HostID != "host1" || who[1].Fenced.IsZero() || who[1].End != lease.ReasonIdle {
		t.Errorf("who says %+v, %v, want host2, then host1 fenced as idle", who, err)
	}
	if at, err := op.Who(ctx, l1.Addr, 0, who[1].Bound); err != nil || len(at) != 1 || at[0].HostID != "host1" {
		t.Errorf("who at the first bind says %+v, %v, want host1 alone", at, err)
	}
}

// TestMove: a host keeps its address when its tunnel source changes, under a new generation, and the gateway never has both
// (L14). While a gateway that is cut off may still forward to the old source, the host gets another address.
func TestMove(t *testing.T) {
	w := newWorld(t, onePool)
	w.stop()
	w.config = strings.NewReplacer("::1/128", "::/64", "bind_wait: 5s", "bind_wait: 300ms").Replace(w.config)
	w.up()
	g1, g2 := w.gateway("tep1"), w.gateway("tep2")
	h := w.client(tlsid.RoleHost, "host1")
	l := bind(t, h)
	move := func(source string) leaseclient.Lease {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		got, err := h.Bind(ctx, leaseclient.BindRequest{Source: netip.MustParseAddr(source), MTU: 1460})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	m := move("::2")
	if m.Addr != l.Addr || m.Gen <= l.Gen || !m.Installed {
		t.Fatalf("moved from %s to %+v: want the same address, installed, under a later generation", l.Ref, m)
	}
	for _, g := range []*gateway{g1, g2} {
		if b := g.table[m.Resource]; b.Host != netip.MustParseAddr("::2") || b.Gen != m.Gen {
			t.Errorf("%s holds %+v", g.name, b)
		}
	}
	g2.stop()
	if n := move("::3"); n.Addr == m.Addr {
		t.Errorf("got %s although tep2 may still forward it to ::2", n.Ref)
	}
}

// TestPortSets: a gateway that cannot forward for port sets keeps everybody from getting one.
func TestPortSets(t *testing.T) {
	w := newWorld(t, strings.Replace(oneAddress, "tep_address", "port_sets: 4, tep_address", 1))
	g := w.gateway("tep1")
	try := func(name string) (leaseclient.Lease, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return w.client(tlsid.RoleHost, name).Bind(ctx, leaseclient.BindRequest{Source: loopback, MTU: 1460, PortSet: true})
	}
	l, err := try("host0")
	if err != nil || l.PSIDLen != 0 {
		t.Fatalf("%+v, %v: want a whole address, the gateway knows nothing else", l, err)
	}
	release(t, w.client(tlsid.RoleHost, "host0"), l)
	g.stop()
	g.r = replica.New(replica.Config{TEP: "tep1", Instance: "tep1-2", Caps: []string{"port_sets"}})
	g.connect()
	eventually(t, "a port set is leased", func() bool {
		l, err = try("host1")
		return err == nil
	})
	l2, err := try("host2")
	if err != nil || l.PSIDLen != 4 || l2.PSIDLen != 4 || l.Overlaps(l2.Resource) || g.table[l2.Resource].Gen != l2.Gen {
		t.Errorf("leases %s and %s, %v: want two port sets that do not overlap, the second at the gateway", l.Ref, l2.Ref, err)
	}
}

// TestFence: an address stays REVOKING while one of two gateways has not taken the revoke.
func TestFence(t *testing.T) {
	w := newWorld(t, oneAddress)
	w.gateway("tep1")
	slow := w.gateway("tep2")
	h1, h2 := w.client(tlsid.RoleHost, "host1"), w.client(tlsid.RoleHost, "host2")
	l := bind(t, h1)
	op := w.client(tlsid.RoleOperator, "noc")
	state := func() string {
		ls, err := op.Leases(t.Context(), "")
		if err != nil || len(ls) != 1 {
			t.Fatalf("leases %+v, %v, want one", ls, err)
		}
		if ls[0].State == "REVOKING" && len(ls[0].Waiting) == 1 {
			return ls[0].State + " " + ls[0].Waiting[0]
		}
		return ls[0].State
	}
	slow.stop() // cut off: it goes on forwarding until its deadline
	release(t, h1, l)
	eventually(t, "only tep2 is missing", func() bool { return state() == "REVOKING tep2" })
	time.Sleep(1200 * time.Millisecond) // longer than the hold-down: waiting alone must not free it
	if got := state(); got != "REVOKING tep2" {
		t.Fatalf("state %s without the acknowledgement of tep2, want REVOKING", got)
	}
	if _, err := tryBind(t, h2); leaseclient.ReasonOf(err) != lease.ReasonPoolDry {
		t.Errorf("bind meanwhile: %v, want POOL_DRY", err)
	}
	slow.connect()
	eventually(t, "host2 gets the address after tep2 is back", func() bool { _, err := tryBind(t, h2); return err == nil })
	if _, ok := slow.table[l.Resource]; !ok {
		t.Error("tep2 does not hold the new binding")
	}
}

func TestBindWaitsForServingGateways(t *testing.T) {
	w := newWorld(t, onePool+"\n")
	g := w.gateway("tep1")
	g.hold = make(chan struct{})
	h := w.client(tlsid.RoleHost, "host1")
	got := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		l, err := h.Bind(ctx, leaseclient.BindRequest{Source: loopback})
		if err == nil && !l.Installed {
			err = errors.New("answered as not installed")
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("bind returned (%v) before the gateway's packet path had the binding", err)
	case <-time.After(300 * time.Millisecond):
	}
	close(g.hold)
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// TestRestart: what was acknowledged is there after the service died, and generations go on growing.
func TestRestart(t *testing.T) {
	w := newWorld(t, oneAddress)
	g := w.gateway("tep1")
	l := bind(t, w.client(tlsid.RoleHost, "host1"))
	g.stop()
	w.stop()
	w.up()
	g = w.gateway("tep1")
	if got := g.table[l.Resource]; got.Gen != l.Gen {
		t.Errorf("gateway holds %+v after the restart, want generation %s", got, l.Gen)
	}
	h := w.client(tlsid.RoleHost, "host1")
	if again := bind(t, h); again.Ref != l.Ref {
		t.Errorf("bind after the restart gave %s, want %s", again.Ref, l.Ref)
	}
	release(t, h, l)
	var next leaseclient.Lease
	eventually(t, "a new lease", func() bool { var err error; next, err = tryBind(t, h); return err == nil })
	if next.Gen <= l.Gen {
		t.Errorf("generation %s after %s, want a later one", next.Gen, l.Gen)
	}
}

func TestRefusals(t *testing.T) {
	w := newWorld(t, onePool)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	h := w.client(tlsid.RoleHost, "host1")
	noTEP, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	if _, err := h.Bind(noTEP, leaseclient.BindRequest{Source: loopback}); leaseclient.ReasonOf(err) != lease.ReasonNoTEP {
		t.Errorf("bind without a gateway: %v, want NO_TEP", err)
	}
	w.gateway("tep1")
	for _, c := range []struct {
		name string
		call func() error
		why  lease.Reason
		text string
	}{
		{"source of somebody else", func() error {
			_, err := h.Bind(ctx, leaseclient.BindRequest{Source: netip.MustParseAddr("2001:db8:1::5")})
			return err
		}, lease.ReasonBadSource, "tunnel source 2001:db8:1::5 is not proven: the call came from ::1"},
		{"source outside", func() error {
			_, err := h.Bind(ctx, leaseclient.BindRequest{Source: netip.MustParseAddr("2001:db8:9::5")})
			return err
		}, lease.ReasonBadSource, "tunnel source 2001:db8:9::5 is outside of hosts.prefixes [::1/128 2001:db8:1::/64]"},
		{"role", func() error {
			_, err := w.client(tlsid.RoleResolver, "dns1").Bind(ctx, leaseclient.BindRequest{Source: loopback})
			return err
		}, lease.ReasonNotAllowed, `want role "host" of cell "lab"`},
		{"unknown gateway", func() error {
			s, err := w.client(tlsid.RoleTEP, "tep9").Sync(ctx, func() lease.Hello { return lease.Hello{TEP: "tep9", SentBootNS: 1} })
			if err == nil {
				_, err = s.Recv()
			}
			return err
		}, lease.ReasonNotAllowed, `gateway "tep9" is not known here: teps allows [tep1 tep2]`},
		{"gateway under another name", func() error {
			s, err := w.client(tlsid.RoleTEP, "tep2").Sync(ctx, func() lease.Hello { return lease.Hello{TEP: "tep1", SentBootNS: 1} })
			if err == nil {
				_, err = s.Recv()
			}
			return err
		}, lease.ReasonNotAllowed, `gateway calls itself "tep1", its certificate is of "tep2"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.call()
			if leaseclient.ReasonOf(err) != c.why || !contains(err, c.text) {
				t.Errorf("error %v, want %s and %q", err, c.why, c.text)
			}
		})
	}
}
