package speaker

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/bgp"
)

// starterRole makes the test binary start a speaker in the directory that is its value, and kill itself.
const starterRole = "DSTM_TEST_STARTER"

func startByAnother(t *testing.T, dir string, stderr *os.File) {
	t.Helper()
	c := exec.Command("/proc/self/exe", "-test.run=^TestSurvivesItsStarter$")
	c.Env = append(os.Environ(), starterRole+"="+dir)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if stderr != nil {
		c.Stderr = stderr
	}
	if err := c.Run(); err == nil || !strings.Contains(out.String(), "started ") {
		t.Fatalf("starter: %v\n%s", err, out.String())
	}
}

// TestJournal has a socket as standard error, as a unit of systemd has: the speaker goes on writing there, and no file.
func TestJournal(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	p := newProcess(t)
	startByAnother(t, p.Dir, theirs)
	theirs.Close()
	if err := p.End(timeout(t)); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(ours) // ends with the last process that has the other end
	if err != nil || !strings.Contains(string(got), "speaker started") || !strings.Contains(string(got), "closed by tepd") {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := os.Stat(p.config().LogPath()); err == nil {
		t.Error("there is a log file as well")
	}
}

// TestSurvivesItsStarter kills the process that started a speaker, which writes more to its log afterwards than a pipe
// holds.
func TestSurvivesItsStarter(t *testing.T) {
	if dir := os.Getenv(starterRole); dir != "" {
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
	startByAnother(t, p.Dir, nil)
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
