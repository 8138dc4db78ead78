package dstm_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/dns64"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/file"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/metadata"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
	_ "github.com/coredns/coredns/plugin/template"
	_ "github.com/coredns/coredns/plugin/view"
	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	_ "github.com/dstm-project/dstm/plugin/dstm"
)

func TestMain(m *testing.M) {
	dnsserver.Directives = slices.Insert(dnsserver.Directives, slices.Index(dnsserver.Directives, "dns64"), "dstm")
	if err := dnsserver.Register(); err != nil {
		panic(err)
	}
	dnsserver.Quiet, caddy.Quiet = true, true
	os.Exit(m.Run())
}

// leases is a lease service over TLS that lists ::1 and answers hints with READY and a lease of an hour.
type leases struct {
	leasev1.UnimplementedResolversServer
	t     *testing.T
	addr  netip.AddrPort
	files tlsid.Files // of a resolver
	stop  func()

	mu             sync.Mutex
	hints, watches int
	opened         int
}

func newLeases(t *testing.T) *leases {
	t.Helper()
	dir := t.TempDir()
	l := &leases{t: t}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(pki.Init(dir, "example.net", time.Hour))
	id := tlsid.ID{TrustDomain: "example.net", Cell: "lab", Role: tlsid.RoleSvc, Name: "lease1"}
	svc, err := pki.Issue(dir, dir, id, pki.Options{DNS: []string{"lease1.example.net"}})
	must(err)
	id.Role, id.Name = tlsid.RoleResolver, "dns1"
	l.files, err = pki.Issue(dir, dir, id, pki.Options{})
	must(err)
	src, err := tlsid.Open(svc, tlsid.RoleSvc, nil)
	must(err)
	ln, err := net.Listen("tcp", "[::1]:0")
	must(err)
	l.addr = netip.MustParseAddrPort(ln.Addr().String())
	g := grpc.NewServer(grpc.Creds(src.Conns(src.Server())))
	leasev1.RegisterResolversServer(g, l)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(ln) }()
	l.stop = sync.OnceFunc(func() { g.Stop(); <-done })
	t.Cleanup(l.stop)
	return l
}

func (l *leases) WatchHosts(r *leasev1.WatchRequest, st grpc.ServerStreamingServer[leasev1.HostEvent]) error {
	if id, err := tlsid.PeerID(st.Context()); err != nil || id.Role != tlsid.RoleResolver {
		l.t.Errorf("watch by %v, %v", id, err)
	}
	l.watch(1)
	defer l.watch(-1)
	lo := netip.IPv6Loopback().As16()
	if err := st.Send(&leasev1.HostEvent{M: &leasev1.HostEvent_Upsert{Upsert: &leasev1.HostState{Source: lo[:], Registered: true, HostKey: 1}}}); err != nil {
		return err
	}
	if err := st.Send(&leasev1.HostEvent{M: &leasev1.HostEvent_InSync{InSync: true}}); err != nil {
		return err
	}
	<-st.Context().Done()
	return nil
}

func (l *leases) watch(by int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watches += by
	l.opened += max(by, 0)
}

func (l *leases) Hint(_ context.Context, r *leasev1.HintRequest) (*leasev1.HintReply, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lo := netip.IPv6Loopback().As16(); string(r.Source) != string(lo[:]) || r.BudgetMs == 0 {
		l.t.Errorf("hint %v: want source ::1 and a budget", r)
	}
	l.hints++
	return &leasev1.HintReply{State: leasev1.HintState_READY, LeaseLeftMs: 3_600_000}, nil
}

func (l *leases) state() (hints, watches, opened int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hints, l.watches, l.opened
}

const zoneText = `$ORIGIN example.
@       300 IN SOA  ns.example. root.example. 1 3600 600 86400 300
@       300 IN NS   ns.example.
ns      300 IN A    203.0.113.53
v4      300 IN A    203.0.113.1
dual    300 IN A    203.0.113.2
dual    300 IN AAAA 2001:db8:5::2
v6      300 IN AAAA 2001:db8:5::3
alias   300 IN CNAME v4
alias6  300 IN CNAME dual
list    300 IN A    127.0.0.2
mixed   300 IN A    127.0.0.2
mixed   300 IN A    203.0.113.4
private 300 IN A    10.0.0.1
text    300 IN TXT  "no address"
`

// corefile returns a server block with the plugin (unless without) and the given others.
func corefile(t *testing.T, l *leases, without bool, more ...string) string {
	t.Helper()
	zone := filepath.Join(t.TempDir(), "zone")
	if err := os.WriteFile(zone, []byte(zoneText), 0o600); err != nil {
		t.Fatal(err)
	}
	block := ""
	if !without {
		block = fmt.Sprintf("dstm {\nclients ::1/128\nto %v\ntls %s %s %s\ntls_servername lease1.example.net\nhold 1s\nnative 10.0.0.0/8\n}\n",
			l.addr, l.files.Cert, l.files.Key, l.files.CA)
	}
	return fmt.Sprintf(".:0 {\nbind ::1\n%s%s\nfile %s example\n"+
		"template IN AAAA broken {\nrcode SERVFAIL\n}\n"+
		"template IN A broken {\nanswer \"{{ .Name }} 60 IN A 203.0.113.9\"\n}\n"+
		"template IN A arpa {\nanswer \"{{ .Name }} 60 IN A 192.0.0.170\"\n}\n"+
		"template IN AAAA arpa {\nrcode NOERROR\n}\n}\n", block, strings.Join(more, "\n"), zone)
}

// start runs a Corefile for the time of the test.
func start(t *testing.T, text string) *caddy.Instance {
	t.Helper()
	inst := launch(t, text)
	t.Cleanup(func() { stop(t, inst) })
	return inst
}

func launch(t *testing.T, text string) *caddy.Instance {
	t.Helper()
	inst, err := caddy.Start(caddy.CaddyfileInput{Filepath: "Corefile", Contents: []byte(text), ServerTypeName: "dns"})
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return inst
}

func stop(t *testing.T, inst *caddy.Instance) {
	t.Helper()
	for _, err := range inst.ShutdownCallbacks() {
		t.Error(err)
	}
	if err := inst.Stop(); err != nil {
		t.Error(err)
	}
}

// inSync waits until n lease services are followed.
func inSync(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		fams, err := prometheus.DefaultGatherer.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fams {
			if f.GetName() == "coredns_dstm_watches_in_sync" && f.GetMetric()[0].GetGauge().GetValue() == float64(n) {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatalf("not %d watches in sync", n)
		}
	}
}

func ask(t *testing.T, inst *caddy.Instance, transport, name string, qtype uint16) []byte {
	t.Helper()
	var addr string
	for _, s := range inst.Servers() {
		if a := s.LocalAddr(); transport == "udp" && a != nil {
			addr = a.String()
		}
		if a := s.Addr(); transport == "tcp" && a != nil {
			addr = a.String()
		}
	}
	q := new(dns.Msg).SetQuestion(name, qtype)
	q.Id = 4711
	c := dns.Client{Net: transport, Timeout: 5 * time.Second}
	m, _, err := c.Exchange(q, addr)
	if err != nil {
		t.Errorf("%s %s: %v", name, dns.TypeToString[qtype], err)
		return nil
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	a    = dns.TypeA
	aaaa = dns.TypeAAAA
)

// TestHintsPerShape: N3, D2 to D6, D11, D12. Each row starts with a host that has no lease.
func TestHintsPerShape(t *testing.T) {
	chains := [][]string{nil, {"dns64"}, {"cache"}, {"dns64", "cache"}}
	for _, c := range []struct {
		name  string
		qname string
		types []uint16
		want  int
		dns64 int // with dns64 an IPv4-only name has IPv6 addresses
	}{
		{"A", "v4.example.", []uint16{a}, 1, 0},
		{"AAAA", "v4.example.", []uint16{aaaa}, 1, 0},
		{"A and AAAA", "v4.example.", []uint16{a, aaaa}, 1, 0},
		{"AAAA and A", "v4.example.", []uint16{aaaa, a}, 1, 0},
		{"again", "v4.example.", []uint16{a, a, aaaa, aaaa, a}, 1, 0},
		{"dual stack", "dual.example.", []uint16{a, aaaa}, 0, 0},
		{"IPv6 only", "v6.example.", []uint16{a, aaaa}, 0, 0},
		{"NXDOMAIN", "none.example.", []uint16{a, aaaa}, 0, 0},
		{"no address", "text.example.", []uint16{a, aaaa, dns.TypeTXT}, 0, 0},
		{"other types", "v4.example.", []uint16{dns.TypeANY, dns.TypeMX, dns.TypeHTTPS, dns.TypeDS}, 0, 0},
		{"CNAME", "alias.example.", []uint16{a, aaaa}, 1, 0},
		{"CNAME to dual", "alias6.example.", []uint16{a, aaaa}, 0, 0},
		{"blocklist", "list.example.", []uint16{a, aaaa}, 0, 0},
		{"one usable of two", "mixed.example.", []uint16{a}, 1, 0},
		{"native", "private.example.", []uint16{a, aaaa}, 0, 0},
		{"ipv4only.arpa", "ipv4only.arpa.", []uint16{a, aaaa}, 0, 0},
		// dns64 passes on an error that came without a message, so the host has no IPv6 address there either.
		{"SERVFAIL on AAAA", "x.broken.", []uint16{a}, 1, 1},
		{"SERVFAIL on AAAA alone", "x.broken.", []uint16{aaaa}, 1, 1},
	} {
		for _, chain := range chains {
			for _, transport := range []string{"udp", "tcp"} {
				t.Run(fmt.Sprintf("%s/%s/%s", c.name, strings.Join(chain, "+"), transport), func(t *testing.T) {
					l := newLeases(t)
					inst := start(t, corefile(t, l, false, chain...))
					inSync(t, 1)
					var wg sync.WaitGroup
					for _, typ := range c.types {
						wg.Go(func() { ask(t, inst, transport, c.qname, typ) })
					}
					wg.Wait()
					want := c.want
					if slices.Contains(chain, "dns64") {
						want = c.dns64
					}
					if got, _, _ := l.state(); got != want {
						t.Errorf("%d hints, want %d", got, want)
					}
				})
			}
		}
	}
}

// TestSameBytes: D1. With and without the plugin, answers are equal to the bit.
func TestSameBytes(t *testing.T) {
	l := newLeases(t)
	with, without := start(t, corefile(t, l, false)), start(t, corefile(t, l, true))
	inSync(t, 1)
	for _, name := range []string{"v4", "dual", "v6", "alias", "alias6", "list", "text", "none", "mixed"} {
		for _, typ := range []uint16{a, aaaa, dns.TypeTXT, dns.TypeANY} {
			for _, transport := range []string{"udp", "tcp"} {
				if diff := cmp.Diff(ask(t, without, transport, name+".example.", typ), ask(t, with, transport, name+".example.", typ)); diff != "" {
					t.Errorf("%s %s %s: %s", name, dns.TypeToString[typ], transport, diff)
				}
			}
		}
	}
	if hints, _, _ := l.state(); hints != 1 {
		t.Errorf("%d hints, want 1", hints)
	}
}

// TestServiceDown: D10, N14. Names resolve, before the service is up and after it is gone.
func TestServiceDown(t *testing.T) {
	l := newLeases(t)
	inst := start(t, corefile(t, l, false))
	inSync(t, 1)
	l.stop()
	inSync(t, 0)
	for range 100 {
		m := new(dns.Msg)
		if err := m.Unpack(ask(t, inst, "udp", "v4.example.", a)); err != nil || len(m.Answer) != 1 {
			t.Fatalf("answer %v, %v", m, err)
		}
	}
}

// TestReload: N13. One watch and no forgotten lease over good and bad reloads; nothing is left at the end.
func TestReload(t *testing.T) {
	l := newLeases(t)
	text := corefile(t, l, false)
	inst := launch(t, text)
	inSync(t, 1)
	ask(t, inst, "udp", "v4.example.", a)
	busy, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	port := busy.Addr().(*net.TCPAddr).Port
	for i := range 12 {
		next, ok := text, true
		switch i % 3 {
		case 1:
			next, ok = text+"nonsense {", false
		case 2: // fails after OnStartup, when the servers are started
			next, ok = text+fmt.Sprintf("other.example:%d {\nbind ::1\ntemplate IN A . {\nrcode NOERROR\n}\n}\n", port), false
		}
		got, err := inst.Restart(caddy.CaddyfileInput{Filepath: "Corefile", Contents: []byte(next), ServerTypeName: "dns"})
		if (err == nil) != ok {
			t.Fatalf("reload %d: %v", i, err)
		}
		inst = got
		ask(t, inst, "udp", "v4.example.", a)
	}
	hints, watches, opened := l.state()
	if diff := cmp.Diff([]int{1, 1, 1}, []int{hints, watches, opened}); diff != "" {
		t.Errorf("hints, watches, watches ever: %s", diff)
	}
	stop(t, inst)
	inSync(t, 0)
}

var block = regexp.MustCompile("(?s)~~~ corefile\n(.*?)~~~")

// TestDocumentedCorefiles starts what the manual and corefile.example show, with loopback and test files put in.
func TestDocumentedCorefiles(t *testing.T) {
	l := newLeases(t)
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("../../corefile.example")
	if err != nil {
		t.Fatal(err)
	}
	texts := []string{string(example)}
	for _, m := range block.FindAllStringSubmatch(string(readme), -1) {
		texts = append(texts, m[1])
	}
	if len(texts) < 3 {
		t.Fatalf("%d Corefiles, want 3 or more", len(texts))
	}
	tlsLine := regexp.MustCompile(`tls /etc/dstm/\S+ /etc/dstm/\S+ /etc/dstm/\S+`)
	for i, text := range texts {
		text = tlsLine.ReplaceAllString(text, fmt.Sprintf("tls %s %s %s", l.files.Cert, l.files.Key, l.files.CA))
		text = strings.NewReplacer("\n. {", "\n.:0 {", "[2001:db8:2::10]:3545", l.addr.String(), "ready [::1]:8181", "ready [::1]:0",
			"prometheus [::1]:9153", "prometheus [::1]:0", "reload 10s", "").Replace("\n" + text)
		t.Run(fmt.Sprint(i), func(t *testing.T) { start(t, text) })
	}
}

// TestMetricNames: what is exported follows Prometheus's conventions and is in the manual, and nothing else is.
func TestMetricNames(t *testing.T) {
	problems, err := testutil.GatherAndLint(prometheus.DefaultGatherer)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "coredns_dstm_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("`(coredns_dstm_[a-z_]+)").FindAllStringSubmatch(string(readme), -1) {
		documented[m[1]] = true
	}
	fams, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	exported := map[string]bool{}
	for _, f := range fams {
		if strings.HasPrefix(f.GetName(), "coredns_dstm_") {
			exported[f.GetName()] = true
		}
	}
	if diff := cmp.Diff(exported, documented); diff != "" {
		t.Errorf("exported and documented metrics differ: %s", diff)
	}
}
