package speaker

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/bgp"
)

// TestSurvivesItsStarter kills the process that started a speaker, which writes more to its log afterwards than a pipe
// holds.
func TestSurvivesItsStarter(t *testing.T) {
	const role = "DSTM_TEST_STARTER"
	if dir := os.Getenv(role); dir != "" {
		p := processIn(t, dir)
		if _, _, err := p.Attach(timeout(t)); err != nil {
			t.Fatal(err)
		}
		fmt.Printf("started %d\n", p.cur.proc.PID())
		if err := unix.Kill(os.Getpid(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	p := newProcess(t)
	c := exec.Command("/proc/self/exe", "-test.run=^TestSurvivesItsStarter$")
	c.Env = append(os.Environ(), role+"="+p.Dir)
	out, err := c.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "started ") {
		t.Fatalf("starter: %v\n%s", err, out)
	}
	s, reattached, err := p.Attach(timeout(t))
	if err != nil || !reattached {
		t.Fatalf("attach: %v, reattached %t", err, reattached)
	}
	pid := p.cur.proc.PID()
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session id %d, %v: want its own, %d", sid, err, pid)
	}
	conf := testConf()
	conf.Peers[0].Address, conf.Peers[0].LocalAddress = netip.IPv6Loopback(), netip.Addr{} // nobody listens
	for i := range 2000 {                                                                  // each a peer removed and one added: about 150 bytes of log
		conf.Peers[0].Port = uint16(1790 + i%2)
		if err := s.Configure(timeout(t), conf); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if _, err := s.Set(timeout(t), setOf(pool)); err != nil {
				t.Fatal(err)
			}
		}
	}
	st, err := os.Stat(p.config().LogPath())
	if err != nil || st.Size() < 128<<10 {
		t.Errorf("log: %v, %d bytes: want more than a pipe holds", err, st.Size())
	}
	if err := s.Beat(timeout(t)); err != nil {
		t.Error(err)
	}
}

func setOf(ps ...netip.Prefix) bgp.RouteSet {
	s := bgp.RouteSet{Version: 1}
	for _, p := range ps {
		s.Routes = append(s.Routes, bgp.Route{Prefix: p})
	}
	return s
}
