package cmd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// recovery is how long a service may take until everything works again.
const recovery = time.Minute

// buildBreakable makes the daemons with their failpoints.
var buildBreakable = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(programs, "failpoints")
	if out, err := exec.Command("go", "build", "-tags", "failpoints", "-o", dir+"/", "./leasesvc", "./tepd").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, nil
})

// breakable returns the path of a daemon with its failpoints.
func breakable(t testing.TB, program string) string {
	t.Helper()
	dir, err := buildBreakable()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, program)
}

// seeded returns a generator that DSTM_SEED repeats.
func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("DSTM_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("DSTM_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// stand is a real lease service with two gateways and hosts under load. Each gateway and host is a goroutine with a
// certificate and a connection of its own; what gateways hold and what hosts were told is compared as it happens.
type stand struct {
	*place
	addrs []netip.AddrPort // of the services
	noc   *leaseclient.Conn
	ctx   context.Context
	load  sync.RWMutex // read-locked by a host's call: a write lock finds every host between two calls
	wg    sync.WaitGroup
	gone  map[string]context.CancelFunc // takes a gateway off
	// gatewayAt is the address at which a gateway calls the service; none = where hosts do.
	gatewayAt map[string]netip.Addr
	tepd      *gatewayProcess // one that is real; nil = none

	refusals atomic.Int64 // binds that found no address

	mu     sync.Mutex
	broken []string                                    // rules that were seen broken
	tables map[string]map[lease.Resource]lease.Binding // of gateways
	held   map[string]holding                          // what hosts were told they have, and did not try to give back
	newest map[lease.Resource]lease.Gen
	acked  int
}

// holding is a lease and until when it lasts without a word.
type holding struct {
	lease.Ref
	until time.Time
}

const standConfig = `cell: lab
trust_domain: example.net
listen: "LISTEN"
tls: {cert: DIR/svc.pem, key: DIR/svc.key, ca: DIR/ca.pem}
store: {path: DIR/lease.db}
pools: [{name: main, prefix: 198.51.100.0/27, tep_address: "2001:db8:a::1"}]
teps: [tep1, tep2]
hosts: {prefixes: ["::1/128"], per_64: 0}
timers: {valid: 5m, min_valid: 2s, hold_down: 0s, restart_grace: 1s, fail_static: 10m, bind_wait: 5s, idle: 5s}
limits: {per_host: 0, per_64: 0, handshakes: 0}
admin: "[::1]:0"
`

// newStand makes a stand with one service on bbolt: see config and begin.
func newStand(t testing.TB, hosts int, rnd *rand.Rand, edits ...string) *stand {
	t.Helper()
	s := emptyStand(t)
	s.config("stand.yaml", edits...)
	s.begin(hosts, rnd)
	return s
}

func emptyStand(t testing.TB) *stand {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &stand{
		place: newPlace(t), ctx: ctx, gone: map[string]context.CancelFunc{}, tables: map[string]map[lease.Resource]lease.Binding{},
		held: map[string]holding{}, newest: map[lease.Resource]lease.Gen{},
	}
	t.Cleanup(func() { cancel(); s.wg.Wait() })
	s.issue(tlsid.RoleSvc, "svc", pki.Options{DNS: []string{"lease1.example.net"}})
	return s
}

// config writes the configuration of a service. The pairs of edits are texts of it and what takes their place.
func (s *stand) config(name string, edits ...string) {
	s.t.Helper()
	l, err := net.Listen("tcp", "[::]:0") // gateways may call other addresses of the machine than hosts
	if err != nil {
		s.t.Fatal(err)
	}
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	if err := l.Close(); err != nil {
		s.t.Fatal(err)
	}
	s.addrs = append(s.addrs, netip.AddrPortFrom(netip.IPv6Loopback(), port))
	s.write(name, strings.NewReplacer(append(edits, "LISTEN", fmt.Sprintf("[::]:%d", port))...).Replace(standConfig))
}

// begin makes the store and starts gateways and hosts, which wait for a service.
func (s *stand) begin(hosts int, rnd *rand.Rand) {
	s.t.Helper()
	s.beginWith(hosts, rnd, "tep1", "tep2")
}

// beginWith is begin with some of the gateways.
func (s *stand) beginWith(hosts int, rnd *rand.Rand, gateways ...string) {
	s.t.Helper()
	if out, code := s.run(nil, "leasesvc", "--create-store", "-c", s.path("stand.yaml")); code != 0 {
		s.t.Fatal(out)
	}
	s.noc = s.conn(tlsid.RoleOperator, "noc")
	for _, name := range gateways {
		s.gateway(name)
	}
	for i := range hosts {
		s.host(fmt.Sprint("host", i), rand.New(rand.NewPCG(rnd.Uint64(), 0)))
	}
}

func (s *stand) conn(role tlsid.Role, name string) *leaseclient.Conn {
	return s.connTo(role, name, s.addrs...)
}

func (s *stand) connTo(role tlsid.Role, name string, at ...netip.AddrPort) *leaseclient.Conn {
	s.t.Helper()
	s.issue(role, name, pki.Options{})
	id, err := tlsid.Open(tlsid.Files{Cert: s.path(name + ".pem"), Key: s.path(name + ".key"), CA: s.path("ca.pem")}, role, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := leaseclient.New(leaseclient.Options{
		Servers: at, TLS: id.Client("lease1.example.net"), BackoffMin: 10 * time.Millisecond, BackoffMax: 100 * time.Millisecond,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// violated notes that a rule was broken. The caller holds mu.
func (s *stand) violated(format string, args ...any) {
	s.broken = append(s.broken, fmt.Sprintf(format, args...))
}

// fail is violated for callers that do not hold mu.
func (s *stand) fail(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.violated(format, args...)
}

// kept fails the test for every rule that was broken.
func (s *stand) kept() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, text := range s.broken {
		if i == 10 {
			s.t.Fatalf("and %d more", len(s.broken)-i)
		}
		s.t.Error(text)
	}
	s.broken = nil
}

// host binds, binds again and releases from now on.
func (s *stand) host(name string, rnd *rand.Rand) {
	c := s.conn(tlsid.RoleHost, name)
	s.wg.Go(func() {
		for s.ctx.Err() == nil {
			s.load.RLock()
			if rnd.IntN(3) == 0 {
				s.release(c, name)
			} else {
				s.bind(c, name)
			}
			s.load.RUnlock()
			time.Sleep(time.Duration(rnd.IntN(10)) * time.Millisecond)
		}
	})
}

func (s *stand) bind(c *leaseclient.Conn, name string) {
	ctx, cancel := context.WithTimeout(s.ctx, recovery)
	defer cancel()
	begin := time.Now()
	l, err := c.Bind(ctx, leaseclient.BindRequest{Source: netip.IPv6Loopback()})
	if err != nil {
		s.refusals.Add(1)
		if reason := leaseclient.ReasonOf(err); s.ctx.Err() == nil && reason != lease.ReasonPoolDry && reason != lease.ReasonQuota && reason != lease.ReasonNoTEP {
			s.fail("%s: %v", name, err)
		}
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acked++
	have, ok := s.held[name]
	switch {
	case ok && have.Ref == l.Ref: // renewed
	case ok && time.Now().Before(have.until):
		s.violated("%s was told that it has %s for %s more, and gets %s", name, have.Ref, time.Until(have.until), l.Ref)
	case l.Gen <= s.newest[l.Resource]:
		s.violated("%s gets %s after generation %s of it", name, l.Ref, s.newest[l.Resource])
	}
	for other, h := range s.held {
		if other != name && h.Resource == l.Resource && time.Now().Before(h.until) {
			s.violated("%s gets %s, which %s has as %s", name, l.Ref, other, h.Ref)
		}
	}
	s.held[name], s.newest[l.Resource] = holding{l.Ref, begin.Add(l.Valid)}, max(s.newest[l.Resource], l.Gen)
}

func (s *stand) release(c *leaseclient.Conn, name string) {
	s.mu.Lock()
	h, ok := s.held[name]
	delete(s.held, name) // from here on nothing is promised
	s.mu.Unlock()
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, recovery)
	defer cancel()
	if err := c.Release(ctx, h.Ref, lease.ReasonIdle); err != nil && s.ctx.Err() == nil {
		s.fail("%s: %v", name, err)
	}
}

// process is a running daemon.
type process struct {
	*exec.Cmd
	out  bytes.Buffer
	done chan struct{} // closed when it has ended
	err  error
}

// service starts the lease service with failpoints, none if empty; wrap is a command to run it under.
func (s *stand) service(failpoints string, wrap ...string) *process {
	s.t.Helper()
	return s.serviceOf("stand.yaml", failpoints, wrap...)
}

func (s *stand) serviceOf(config, failpoints string, wrap ...string) *process {
	s.t.Helper()
	here := func(f func() error) {
		if err := f(); err != nil {
			s.t.Fatal(err)
		}
	}
	return s.startIn(here, failpoints, append(wrap, breakable(s.t, "leasesvc"), "-c", s.path(config))...)
}

// startIn starts a program, or one that starts it, with failpoints, on the thread that a function chooses.
func (s *stand) startIn(place func(func() error), failpoints string, args ...string) *process {
	s.t.Helper()
	p := &process{Cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
	p.Env = append(os.Environ(), "DSTM_FAILPOINTS="+failpoints, "DSTM_WALL="+s.path("wall"))
	p.Stdout, p.Stderr = &p.out, &p.out
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a tracer and what it traces end together
	place(p.Start)
	go func() {
		defer close(p.done)
		p.err = p.Wait()
	}()
	s.t.Cleanup(func() { p.stop(syscall.SIGKILL) })
	return p
}

func (p *process) stop(sig syscall.Signal) {
	_ = syscall.Kill(-p.Process.Pid, sig)
	<-p.done
}

// killed waits for the end of a process that a failpoint or a signal kills.
func (s *stand) killed(p *process) {
	s.t.Helper()
	select {
	case <-p.done:
	case <-time.After(recovery):
		s.t.Fatal("the process is not killed")
	}
	var ee *exec.ExitError
	if !errors.As(p.err, &ee) || ee.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		s.t.Fatalf("the process ended with %v:\n%s", p.err, p.out.String())
	}
}

// working waits until n more binds are acknowledged by a service that goes on.
func (s *stand) working(p *process, n int) {
	s.t.Helper()
	s.workingAny(n)
	select {
	case <-p.done:
		s.t.Fatalf("the service ended with %v:\n%s", p.err, p.out.String())
	default:
	}
}

// workingAny waits until n more binds are acknowledged, by whichever service.
func (s *stand) workingAny(n int) {
	s.t.Helper()
	count := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.acked
	}
	want := count() + n
	for end := time.Now().Add(recovery); count() < want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			s.kept()
			s.t.Fatalf("%d binds after %s, want %d", count(), recovery, want)
		}
	}
}

// settled stops the load for a moment and compares what the service, the gateways and the hosts say: nothing that was
// acknowledged is lost, and there is nothing else. Every rule must have been kept until then.
func (s *stand) settled() {
	s.t.Helper()
	if err := s.compare(recovery); err != nil {
		s.t.Fatal(err)
	}
	s.kept()
}

// compare gives the gateways that long.
func (s *stand) compare(patience time.Duration) error {
	s.t.Helper()
	s.load.Lock()
	defer s.load.Unlock()
	ctx, cancel := context.WithTimeout(s.ctx, recovery)
	defer cancel()
	all, err := s.noc.Leases(ctx, "")
	for err != nil { // a service may just take the place of another
		if ctx.Err() != nil {
			s.t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
		all, err = s.noc.Leases(ctx, "")
	}
	bound := map[lease.Resource]lease.Gen{}
	holder := map[string]lease.Ref{}
	for _, l := range all {
		if l.State != "BOUND" {
			continue
		}
		if have, ok := holder[l.HostID]; ok {
			s.fail("%s holds %s and %s", l.HostID, have, l.Ref)
		}
		bound[l.Resource], holder[l.HostID] = l.Gen, l.Ref
	}
	s.mu.Lock()
	for name, h := range s.held {
		if holder[name] != h.Ref && time.Now().Before(h.until) {
			s.violated("%s was told that it has %s, the service says %v", name, h.Ref, holder[name])
		}
	}
	s.mu.Unlock()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		differs := s.differs(bound)
		if differs == "" {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("gateway %s does not hold the %d leases of the service", differs, len(bound))
		}
	}
}

// differs names a gateway that holds something else.
func (s *stand) differs(bound map[lease.Resource]lease.Gen) string {
	if s.tepd != nil {
		if have, err := s.tepd.table(); err != nil || !maps.Equal(have, bound) {
			return s.tepd.name
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, t := range s.tables {
		have := map[lease.Resource]lease.Gen{}
		for r, b := range t {
			have[r] = b.Gen
		}
		if !maps.Equal(have, bound) {
			return name
		}
	}
	return ""
}

// fill leases addresses of a pool, of which the store knows nothing yet, to hosts that are not there.
func (s *stand) fill(pool, prefix string, n int) {
	s.t.Helper()
	s.leases(lease.Pool{Name: pool, Prefix: netip.MustParsePrefix(prefix), TEP: netip.MustParseAddr("2001:db8:a::1")}, n)
}

// serial is of the certificate that the service shows to a new connection.
func (s *stand) serial() string {
	s.t.Helper()
	id, err := tlsid.Open(tlsid.Files{Cert: s.path("noc.pem"), Key: s.path("noc.key"), CA: s.path("ca.pem")}, tlsid.RoleOperator, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	conf := id.Client("lease1.example.net").Clone()
	conf.NextProtos = []string{"h2"}
	c, err := tls.Dial("tcp", s.addrs[0].String(), conf)
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

// whole checks the store that a process has left.
func (s *stand) whole() {
	s.t.Helper()
	if out, code := s.run(nil, "dstm", "db", "check", s.path("lease.db")); code != 0 {
		s.fail("dstm db check: exit code %d: %s", code, out)
	}
}
