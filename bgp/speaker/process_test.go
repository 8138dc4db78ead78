package speaker

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/bgp/bgptest"
	"github.com/dstm-project/dstm/bgp/gobgp"
)

// TestMain lets the test binary be the speaker program, and the tepd that starts one and is killed.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "speaker" {
		if err := Serve(func(log *slog.Logger) bgp.Speaker { return gobgp.New(log) }); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// newProcess uses a directory with a short name: unix sockets have at most 107 bytes.
func newProcess(t *testing.T) *Process {
	t.Helper()
	dir, err := os.MkdirTemp("", "spk")
	if err != nil {
		t.Fatal(err)
	}
	p := processIn(t, dir)
	t.Cleanup(func() {
		if err := p.config().Kill(); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(p.config().LogPath()); err == nil && t.Failed() {
			t.Logf("speaker:\n%s", b)
		}
		os.RemoveAll(dir)
	})
	return p
}

func processIn(t *testing.T, dir string) *Process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &Process{Dir: dir, Program: self, Args: []string{"speaker"}, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
}

func timeout(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestContractAcrossProcesses runs the suite with the process and its socket in between.
func TestContractAcrossProcesses(t *testing.T) {
	bgptest.Run(t, func(t *testing.T) bgp.Speaker {
		s, reattached, err := newProcess(t).Attach(timeout(t))
		if err != nil || reattached {
			t.Fatalf("attach: %v, reattached %t", err, reattached)
		}
		return s
	})
}

func TestAttach(t *testing.T) {
	p := newProcess(t)
	ctx := timeout(t)
	if err := p.End(ctx); err != nil {
		t.Fatalf("end before the start: %v", err)
	}
	first, reattached, err := p.Attach(ctx)
	if err != nil || reattached {
		t.Fatalf("first: %v, reattached %t", err, reattached)
	}
	if err := first.Configure(ctx, testConf()); err != nil {
		t.Fatal(err)
	}
	pid := p.cur.proc.PID()

	// Another tepd, as after a restart.
	q := processIn(t, p.Dir)
	second, reattached, err := q.Attach(ctx)
	if err != nil || !reattached || q.cur.proc.PID() != pid {
		t.Fatalf("second: %v, reattached %t, pid %d, want %d", err, reattached, q.cur.proc.PID(), pid)
	}
	if st, err := second.Status(ctx); err != nil || !st.Configured {
		t.Errorf("status after the take-over: %+v, %v", st, err)
	}

	// The speaker dies.
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	bgptest.Eventually(t, "death is seen", func() error {
		if err := second.Beat(ctx); err == nil {
			return errors.New("still answers")
		}
		return nil
	})
	_, reattached, err = q.Attach(ctx)
	if err != nil || reattached || q.cur.proc.PID() == pid {
		t.Fatalf("after its death: %v, reattached %t", err, reattached)
	}
	third := q.cur.proc
	if err := p.End(ctx); err != nil || !third.Exited() {
		t.Errorf("end: %v, exited %t", err, third.Exited())
	}
	for _, f := range []string{"speaker.json", "speaker"} {
		if _, err := os.Stat(filepath.Join(p.Dir, f)); err == nil {
			t.Errorf("%s stays after End", f)
		}
	}
}

// TestWedged replaces a speaker that does not answer.
func TestWedged(t *testing.T) {
	p := newProcess(t)
	if _, _, err := p.Attach(timeout(t)); err != nil {
		t.Fatal(err)
	}
	pid := p.cur.proc.PID()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	q := processIn(t, p.Dir)
	if _, reattached, err := q.Attach(timeout(t)); err != nil || reattached || q.cur.proc.PID() == pid {
		t.Errorf("attach: %v, reattached %t, pid %d", err, reattached, q.cur.proc.PID())
	}
	second := q.cur.proc
	if err := unix.Kill(second.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := processIn(t, p.Dir).End(timeout(t)); err != nil || !second.Exited() {
		t.Errorf("end: %v, exited %t", err, second.Exited())
	}
}

// TestOtherProgram ends what runs when another program is configured, and starts no program with another digest.
func TestOtherProgram(t *testing.T) {
	p := newProcess(t)
	if _, _, err := p.Attach(timeout(t)); err != nil {
		t.Fatal(err)
	}
	first := p.cur.proc
	program, err := os.ReadFile(p.Program)
	if err != nil {
		t.Fatal(err)
	}
	right := sha256.Sum256(program)
	q := processIn(t, p.Dir)
	q.SHA256 = right[:]
	if _, reattached, err := q.Attach(timeout(t)); err != nil || !reattached {
		t.Errorf("right digest: %v, reattached %t", err, reattached)
	}
	q = processIn(t, p.Dir)
	q.SHA256 = make([]byte, 32)
	if _, _, err := q.Attach(timeout(t)); err == nil || !strings.Contains(err.Error(), "configured is 0000") {
		t.Errorf("wrong digest: error %v", err)
	}
	if !first.Exited() {
		t.Error("the speaker that is not the configured one still runs")
	}
}

// TestReusedNumber never touches a process that has got the number of a speaker.
func TestReusedNumber(t *testing.T) {
	p := newProcess(t)
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	record := fmt.Sprintf(`{"pid":%d,"start":"1","socket":"/nowhere","sha256":"00","protocol":1,"program":%q}`, other.Process.Pid, p.Program)
	if err := os.WriteFile(filepath.Join(p.Dir, "speaker.json"), []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, reattached, err := p.Attach(timeout(t)); err != nil || reattached {
		t.Errorf("attach: %v, reattached %t", err, reattached)
	}
	if err := other.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the other process: %v", err)
	}
}

func TestByHand(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(self, "speaker").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "its daemon starts it") {
		t.Errorf("started by hand: %v\n%s", err, out)
	}
}

// TestOtherUser refuses a connection of another user even if the socket's directory lets it in.
func TestOtherUser(t *testing.T) {
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: DSTM_TEST_ROOT=1 go test ./bgp/speaker")
	}
	p := newProcess(t)
	if _, _, err := p.Attach(timeout(t)); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(p.Dir, "speaker")
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("socket directory: %v, %v, want 0700", st.Mode(), err)
	}
	socks, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(socks) != 1 {
		t.Fatalf("sockets: %v", socks)
	}
	for _, f := range []string{p.Dir, dir, socks[0]} {
		if err := os.Chmod(f, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	// An HTTP/2 preface and an empty SETTINGS frame: the speaker answers them to its own user and hangs up on others.
	const script = `import socket,sys
s=socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])
try:
  s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+bytes([0,0,0,4,0,0,0,0,0]))
  print(len(s.recv(9)))
except ConnectionError: print(0)`
	for uid, want := range map[uint32]string{0: "9", 65534: "0"} {
		c := exec.Command("/usr/bin/python3", "-c", script, socks[0])
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := c.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("uid %d: %q, %v: want %s bytes of answer", uid, got, err, want)
		}
	}
}

// TestRestarts is the life of the routes at a real router: they stay while tepd is killed, and with graceful restart while
// the speaker is.
func TestRestarts(t *testing.T) {
	if !bgptest.InNamespace(t) {
		return
	}
	r := bgptest.NewRouter(t, 1, bgptest.RouterOptions{GracefulRestart: true})
	conf := testConf()
	conf.ASN, conf.Peers = bgptest.ASN, []bgp.Peer{r.Peer}
	p := newProcess(t)
	set := bgp.RouteSet{Version: 1, Routes: []bgp.Route{{Prefix: pool}, {Prefix: anchor}}}
	announce := func(s bgp.Remote) {
		t.Helper()
		if err := s.Configure(timeout(t), conf); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Set(timeout(t), set); err != nil {
			t.Fatal(err)
		}
	}
	s, _, err := p.Attach(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	announce(s)
	r.Learns(pool.String())
	r.Learns(anchor.String())

	// The kernel's own account of the router's table: a look now and then would not see a short gap.
	prefixes := []string{"198.51.100.0/24", "2001:db8:a::1"}
	lost := func() {
		t.Helper()
		for _, p := range prefixes {
			if set, deleted := r.Moves(p); set == 0 || deleted > 0 {
				t.Fatalf("%s was set %d times in the router's kernel and deleted %d times: want it to stay", p, set, deleted)
			}
		}
	}
	r.Eventually("kernel routes", func() error {
		for _, p := range prefixes {
			if set, _ := r.Moves(p); set == 0 {
				return errors.New(p)
			}
		}
		return nil
	})
	// Another tepd takes over and says the same again.
	q := processIn(t, p.Dir)
	s, reattached, err := q.Attach(timeout(t))
	if err != nil || !reattached {
		t.Fatalf("attach: %v, reattached %t", err, reattached)
	}
	announce(s)
	lost()

	// The speaker dies: the router keeps what it learnt until a new one has announced it again.
	if err := unix.Kill(p.cur.proc.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.Eventually("sees the end of the session", func() error {
		if r.Up() {
			return errors.New("up")
		}
		return nil
	})
	lost()
	if s, _, err = q.Attach(timeout(t)); err != nil {
		t.Fatal(err)
	}
	announce(s)
	r.Eventually("the new session has synchronised", func() error {
		if out := r.Show("protocols", "all", "tep"); !r.Up() || strings.Contains(out, "Stale") || strings.Contains(out, "restart") && strings.Contains(out, "pending") {
			return errors.New(out)
		}
		return nil
	})
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		lost() // after GoBGP's deferral (1 s) and End-of-RIB
	}
	if err := s.Close(timeout(t), bgp.Withdraw); err != nil {
		t.Fatal(err)
	}
	r.Forgets(pool.String())
	r.Forgets(anchor.String())
	r.Eventually("kernel routes go", func() error {
		for _, p := range prefixes {
			if _, deleted := r.Moves(p); deleted != 1 {
				return fmt.Errorf("%s: deleted %d times", p, deleted)
			}
		}
		return nil
	})
}
