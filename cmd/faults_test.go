package cmd

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
	"github.com/dstm-project/dstm/leasesvc/store/etcdstore/etcdtest"
)

// privileged ends a test that may not do what it must.
func privileged(t *testing.T) {
	t.Helper()
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skipf("sudo DSTM_TEST_ROOT=1 go test ./cmd -run %s", t.Name())
	}
}

// TestStoreErrors: a disk that fails ends the service with the reason, and nothing that was acknowledged is lost.
func TestStoreErrors(t *testing.T) {
	privileged(t)
	s := newStand(t, 16, seeded(t))
	p := s.service("", "strace", "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=15")
	select {
	case <-p.done:
	case <-time.After(recovery):
		t.Fatal("the service goes on with a disk that fails")
	}
	if out := p.out.String(); p.err == nil || !strings.Contains(out, "input/output error") {
		t.Errorf("the service ended with %v:\n%s", p.err, out)
	}
	s.whole()
	p = s.service("")
	s.working(p, 50)
	s.settled()
}

// TestStoreSlow: a disk that takes 2 s for a sync delays answers and does no harm.
func TestStoreSlow(t *testing.T) {
	privileged(t)
	s := newStand(t, 16, seeded(t))
	p := s.service("", "strace", "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=2000000:when=10..30+10")
	s.working(p, 200)
	s.settled()
}

// TestWallClock: the wall clock may jump by an hour or a day, while the service runs and while it does not.
func TestWallClock(t *testing.T) {
	s := newStand(t, 16, seeded(t))
	p := s.service("")
	for _, off := range []string{"1h", "-1h", "24h", "-24h", "0s"} {
		s.write("wall", off)
		s.working(p, 50)
		s.settled()
		p.stop(syscall.SIGKILL)
		s.whole()
		p = s.service("")
		s.working(p, 50)
		s.settled()
	}
}

// TestRotation: certificates that are replaced every 5 s break no stream, and new connections get the new one.
func TestRotation(t *testing.T) {
	rounds := 3 // the files are looked at every 10 s
	if os.Getenv("DSTM_TEST_FULL") == "1" {
		rounds = 12
	}
	s := newStand(t, 8, seeded(t))
	p := s.service("")
	s.working(p, 50)
	before := s.sessions()
	first := s.serial()
	for range rounds {
		time.Sleep(5 * time.Second)
		s.issue(tlsid.RoleSvc, "svc", pki.Options{DNS: []string{"lease1.example.net"}})
		s.working(p, 50)
	}
	s.settled()
	if now := s.sessions(); now != before {
		t.Errorf("gateways are in sessions %s, before the rotation in %s", now, before)
	}
	if s.serial() == first {
		t.Error("a new connection gets the first certificate still")
	}
}

// sessions says in which session each gateway is.
func (s *stand) sessions() string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, recovery)
	defer cancel()
	teps, err := s.noc.TEPs(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	var out []string
	for _, t := range teps {
		out = append(out, fmt.Sprintf("%s:%d", t.ID, t.Session))
	}
	return strings.Join(out, " ")
}

// TestGatewayOff: one of two gateways that is gone for good delays what it may still forward for, until it must have
// stopped; then nobody goes without an address.
func TestGatewayOff(t *testing.T) {
	s := newStand(t, 16, seeded(t), "fail_static: 10m", "fail_static: 3s, session_lease: 1s")
	p := s.service("")
	s.working(p, 50)
	s.off("tep2")
	time.Sleep(2*3*time.Second + time.Second)
	s.refusals.Store(0)
	s.working(p, 500)
	if n := s.refusals.Load(); n > 0 {
		t.Errorf("%d binds were refused after the gateway must have stopped", n)
	}
	s.settled()
}

// TestMemoryLimit: a service that may use 256 MB serves 100,000 leases and goes on binding.
func TestMemoryLimit(t *testing.T) {
	const limit = 256 << 20
	s := newStand(t, 16, seeded(t), "pools: [", `pools: [{name: big, prefix: 10.0.0.0/15, tep_address: "2001:db8:a::1"}, `)
	s.fill("big", "10.0.0.0/15", 100_000)
	t.Setenv("GOMEMLIMIT", "230MiB") // the rest is for the program and what is freed late
	p := s.service("")
	most := 0
	for range 10 {
		s.working(p, 200)
		rss, _ := memory(t, p.Process.Pid)
		most = max(most, rss)
	}
	t.Logf("%d MB at most", most>>20)
	if most > limit {
		t.Errorf("the service takes %d bytes, want at most %d", most, limit)
	}
	s.kept()
}

// TestPartition: gateways that are cut off from the service, both ways and one way, and come back.
func TestPartition(t *testing.T) {
	if !alone(t) {
		return
	}
	at := map[string]netip.Addr{"tep1": netip.MustParseAddr("2001:db8::11"), "tep2": netip.MustParseAddr("2001:db8::12")}
	for _, a := range at {
		ran(t, "ip", "addr", "add", a.String()+"/128", "dev", "lo", "nodad")
	}
	ran(t, "nft", "add table ip6 cut; add chain ip6 cut in { type filter hook input priority 0; }")
	s := emptyStand(t)
	s.config("stand.yaml")
	s.gatewayAt = at
	s.begin(16, seeded(t))
	p := s.service("")
	s.working(p, 50)
	for _, rule := range []string{
		"ip6 daddr 2001:db8::11 drop", // between the service and tep1
		fmt.Sprintf("ip6 daddr 2001:db8::12 tcp dport %d drop", s.addrs[0].Port()),                 // from tep2 to the service
		fmt.Sprintf("ip6 daddr {2001:db8::11, 2001:db8::12} tcp sport %d drop", s.addrs[0].Port()), // from the service to both
	} {
		ran(t, "nft", "add rule ip6 cut in "+rule)
		time.Sleep(5 * time.Second)
		ran(t, "nft", "flush chain ip6 cut in")
		s.working(p, 100)
		s.settled()
	}
}

func ran(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// TestOwners: of two services on three members of etcd one owns the cell. When it is cut off from etcd, when it is killed,
// or when etcd loses its leader, hosts and gateways go on with whoever owns it then.
func TestOwners(t *testing.T) {
	etcd, err := etcdtest.Start(etcdtest.Options{Dir: t.TempDir(), Members: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	s := emptyStand(t)
	paths := make([]*etcdtest.Path, 2)
	configs := []string{"stand.yaml", "stand2.yaml"}
	for i, name := range configs {
		if paths[i], err = etcd.Path(); err != nil {
			t.Fatal(err)
		}
		defer paths[i].Close()
		s.config(name, "path: DIR/lease.db", fmt.Sprintf("type: etcd, endpoints: [\"%s\"], ttl: 2s", strings.Join(paths[i].Endpoints(), `", "`)))
	}
	s.begin(16, seeded(t))
	services := make([]*process, 2)
	for i, name := range configs {
		services[i] = s.serviceOf(name, "")
	}
	works := func() {
		t.Helper()
		s.workingAny(50)
		s.settled()
	}
	works()
	for i := range services { // whichever owns the cell is one of them
		paths[i].Cut()
		works()
		paths[i].Join()
		works()
	}
	for i, name := range configs {
		services[i].stop(syscall.SIGKILL)
		works()
		services[i] = s.serviceOf(name, "")
	}
	for range 2 {
		leader := etcd.Leader()
		etcd.Stop(leader)
		works()
		if err := etcd.Restart(leader); err != nil {
			t.Fatal(err)
		}
		works()
	}
}
