package external

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/dstm-project/dstm/internal/proc"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/policy"
)

// selfDigest is that of the test binary, which is big.
var selfDigest = sync.OnceValue(func() (d policy.Digest) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		panic(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		panic(err)
	}
	h.Sum(d[:0])
	return d
})

// self is the test binary as a plugin.
func self(mode string) policy.PluginConfig {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return policy.PluginConfig{Name: "p", Path: path, SHA256: selfDigest(), Args: []string{mode}, OnFailure: policy.Closed}
}

func start(ctx context.Context, dir, mode string, log *slog.Logger) (*process, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p, err := Starter(dir, log)(ctx, self(mode))
	if err != nil {
		return nil, err
	}
	return p.(*process), nil
}

// socketDir has a short name: unix sockets have at most 107 bytes.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pol")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func mustStart(t *testing.T, dir, mode string, log *slog.Logger) *process {
	t.Helper()
	p, err := start(t.Context(), dir, mode, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func request(host string) policy.Request {
	return policy.Request{Host: host, Source: netip.MustParseAddr("2001:db8:1::7"), Trigger: lease.TriggerDNS, Pool: "main"}
}

// gone waits for the end of a process.
func gone(t *testing.T, pid int, began string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		now, err := proc.StartTime(pid)
		if err != nil || now != began {
			return
		}
		if time.Now().After(end) {
			_ = unix.Kill(pid, unix.SIGKILL)
			t.Fatalf("process %d is still there", pid)
		}
	}
}

func began(t *testing.T, pid int) string {
	t.Helper()
	s, err := proc.StartTime(pid)
	if err != nil {
		t.Fatalf("process %d: %v", pid, err)
	}
	return s
}

func TestDecide(t *testing.T) {
	for _, mode := range []string{"plain", "helper"} {
		t.Run(mode, func(t *testing.T) {
			p := mustStart(t, socketDir(t), mode, nil)
			for host, want := range map[string]policy.Decision{
				"lap7":   {Verdict: policy.Allow},
				"nobody": {Verdict: policy.Deny, Reason: "host nobody from 2001:db8:1::7 by TRIGGER_DNS of main"},
			} {
				if got, err := p.Decide(t.Context(), request(host)); err != nil || got != want {
					t.Errorf("%s: %+v, %v; want %+v", host, got, err, want)
				}
			}
			var at peer.Peer
			if _, err := p.client.Decide(t.Context(), toWire(request("lap7")), grpc.Peer(&at)); err != nil {
				t.Fatal(err)
			}
			if info, ok := at.AuthInfo.(credentials.TLSInfo); !ok || info.State.Version != tls.VersionTLS13 {
				t.Errorf("connection %+v, want TLS 1.3", at.AuthInfo)
			}
		})
	}
}

// TestSurroundings: a plugin gets nothing of ours that it does not need.
func TestSurroundings(t *testing.T) {
	t.Setenv("DSTM_TEST_SECRET", "x")
	ours, err := os.Create(filepath.Join(t.TempDir(), "ours"))
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	p := mustStart(t, socketDir(t), "plain", nil)
	dir := fmt.Sprintf("/proc/%d/", p.PID())
	env, err := os.ReadFile(dir + "environ")
	if err != nil || strings.Contains(string(env), "DSTM_TEST_SECRET") || !strings.Contains(string(env), "DSTM_POLICY=policy\x00") {
		t.Errorf("environment %q, %v", env, err)
	}
	if cwd, err := os.Readlink(dir + "cwd"); cwd != "/" {
		t.Errorf("working directory %s, %v", cwd, err)
	}
	fds, err := os.ReadDir(dir + "fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, _ := os.Readlink(dir + "fd/" + fd.Name()); to == ours.Name() {
			t.Errorf("descriptor %s is a file of ours", fd.Name())
		}
	}
}

// TestLies asks plugins that do not answer as they should.
func TestLies(t *testing.T) {
	for _, c := range []struct {
		mode    string
		want    policy.Decision
		invalid bool   // the error is ErrInvalid
		err     string // is in the error
	}{
		{mode: "dirty", want: policy.Decision{Verdict: policy.Deny, Reason: "]0;title   " + strings.Repeat("y", 189)}},
		{mode: "verdict", invalid: true, err: "verdict 77"},
		{mode: "unspecified", invalid: true, err: "verdict 0"},
		{mode: "megabyte", invalid: true, err: "larger than max (1048"},
		{mode: "noservice", invalid: true, err: "unknown service dstm.policy.v1.Policy"},
		{mode: "error", err: "zzzz"},
		{mode: "crash", err: "Unavailable"},
	} {
		t.Run(c.mode, func(t *testing.T) {
			p := mustStart(t, socketDir(t), c.mode, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			got, err := p.Decide(ctx, request("lap7"))
			if c.err == "" {
				if err != nil || got != c.want {
					t.Errorf("%+v, %v; want %+v", got, err, c.want)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.err) || errors.Is(err, policy.ErrInvalid) != c.invalid {
				t.Errorf("%+v, %v; want %q in the error, invalid %t", got, err, c.err, c.invalid)
			}
			if err != nil && (len(err.Error()) > 2*maxError || strings.Contains(err.Error(), "\x1b")) {
				t.Errorf("error of %d bytes: %q", len(err.Error()), err)
			}
		})
	}
}

// TestLongestName: the longest name that the configuration takes leaves room for the socket.
func TestLongestName(t *testing.T) {
	const most = 60 // of dir and name, see policy.Config.Check
	dir, conf := socketDir(t), self("plain")
	conf.Name = strings.Repeat("x", most-len(dir))
	p, err := Starter(dir, slog.New(slog.DiscardHandler))(t.Context(), conf)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
}

// TestStartErrors: what cannot be a plugin is not started, or ended at once, and the error says why.
func TestStartErrors(t *testing.T) {
	other := self("plain")
	other.SHA256[0]++
	missing := self("plain")
	missing.Path = "/nowhere/plugin"
	text := self("plain")
	text.Path = filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text.Path, []byte("hello\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	text.SHA256 = sha256.Sum256([]byte("hello\n"))
	byHand := self("plain")
	byHand.Path = "/bin/true"
	b, err := os.ReadFile(byHand.Path)
	if err != nil {
		t.Fatal(err)
	}
	byHand.SHA256 = sha256.Sum256(b)
	for _, c := range []struct {
		name string
		conf policy.PluginConfig
		want string // regular expression
	}{
		{"digest", other, ` has sha256 [0-9a-f]{64}, configured is [0-9a-f]{64}$`},
		{"missing", missing, `open /nowhere/plugin: no such file`},
		{"no program", text, `start .*/text: .*exec format error`},
		{"no plugin", byHand, `start /bin/true: .*(Unrecognized|plugin exited)`},
		{"garbage", self("garbage"), `start .*Unrecognized remote plugin message: xxx`},
		{"version", self("version"), `Plugin version: 2, Client versions: \[1\]`},
		{"tcp", self("tcp"), `listens on tcp 127.0.0.1:\d+: want a unix socket`},
		{"elsewhere", self("elsewhere"), `listens on unix /run/other.sock: want a unix socket in \$PLUGIN_UNIX_SOCKET_DIR`},
		{"ends after the handshake", self("ends"), `start .*: (the plugin does not answer|plugin exited|rpc error|.*Canceled)`},
		{"does not accept", self("mute"), `start .*: the plugin does not answer: `},
		{"no certificate", self("nocert"), `showed no certificate: want go-plugin with AutoMTLS`},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
			p, err := Starter(socketDir(t), slog.New(slog.DiscardHandler))(t.Context(), c.conf)
			if err == nil {
				p.Close()
				t.Fatal("started")
			}
			if !regexp.MustCompile(c.want).MatchString(err.Error()) || len(err.Error()) > maxError || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("error %q, want %q", err, c.want)
			}
		})
	}
}

// TestStartCalledOff: a plugin that never says where it listens does not keep the service from ending.
func TestStartCalledOff(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	begin := time.Now()
	p, err := start(ctx, socketDir(t), "silent", nil)
	if err == nil {
		p.Close()
	}
	// Ten times as long as it takes, and less than go-plugin's own limit.
	if took := time.Since(begin); err == nil || !strings.Contains(err.Error(), "deadline") || took > 5*time.Second {
		t.Errorf("%v after %s, want the context's error", err, took)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := start(ctx, socketDir(t), "plain", nil); err == nil {
		t.Error("started with a context that had ended")
	}
}

// TestClose ends plugins of all manners, and leaves nothing.
func TestClose(t *testing.T) {
	for _, mode := range []string{"plain", "helper", "deaf", "stop"} {
		t.Run(mode, func(t *testing.T) { closes(t, mode, nil) })
	}
	t.Run("leaves", func(t *testing.T) {
		var log lines
		var pids []int
		var since []string
		closes(t, "leaves", func() {
			for _, m := range log.find(t, `left (\d+)`, 2) {
				pid, _ := strconv.Atoi(m)
				pids, since = append(pids, pid), append(since, began(t, pid))
			}
		}, &log)
		gone(t, pids[0], since[0]) // of the same group
		if err := unix.Kill(pids[1], unix.SIGKILL); err != nil {
			t.Errorf("who left the group: %v", err) // is out of reach, as documented
		}
	})
}

func closes(t *testing.T, mode string, before func(), log ...*lines) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := socketDir(t)
	p, err := start(t.Context(), dir, mode, append(log, &lines{})[0].logger())
	if err != nil {
		t.Fatal(err)
	}
	pid, since := p.PID(), began(t, p.PID())
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, _ = p.Decide(ctx, request("lap7")) // stops the one that stops
	if before != nil {
		before()
	}
	begin := time.Now()
	p.Close()
	if took := time.Since(begin); took > 20*time.Second { // 1.3 s at most when nothing else runs
		t.Errorf("close took %s", took)
	}
	select {
	case <-p.Done():
	default:
		t.Error("not done after Close")
	}
	if now, err := proc.StartTime(pid); err == nil && now == since {
		t.Errorf("process %d is there after Close (%s)", pid, p.End())
	}
	if left, err := filepath.Glob(filepath.Join(dir, "policy-p", "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestNoOrphans kills the service: its plugins end, also one that knows nothing of us, and one whose signal is lost.
func TestNoOrphans(t *testing.T) {
	for _, mode := range []string{"plain", "helper", "nodeathsig"} {
		t.Run(mode, func(t *testing.T) {
			c := exec.Command("/proc/self/exe", "host", socketDir(t), mode)
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			line, _ := bufio.NewReader(out).ReadString('\n')
			pid, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "started ")))
			if err != nil {
				_ = c.Process.Kill()
				t.Fatalf("host says %q", line)
			}
			since := began(t, pid)
			if err := c.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = c.Wait()
			gone(t, pid, since)
		})
	}
}

// TestThreadsEnd: the kernel's signal comes with the end of a thread, and threads of a Go program end while it goes on.
func TestThreadsEnd(t *testing.T) {
	dir := socketDir(t)
	var p *process
	var err error
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // and not unlocked: the thread ends with this goroutine
		p, err = start(t.Context(), dir, "plain", nil)
	})
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 50 {
		wg.Go(func() {
			runtime.LockOSThread()
			time.Sleep(time.Millisecond)
		})
	}
	wg.Wait()
	for range 20 {
		time.Sleep(10 * time.Millisecond)
		if _, err := p.Decide(t.Context(), request("lap7")); err != nil {
			t.Fatalf("%v (%v)", err, p.End())
		}
	}
}

// lines keeps what is logged.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// find waits for n matches of a pattern and returns their first groups.
func (l *lines) find(t *testing.T, pattern string, n int) (out []string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if m := regexp.MustCompile(pattern).FindAllStringSubmatch(l.text(), -1); len(m) >= n {
			for _, one := range m {
				out = append(out, one[1])
			}
			return out
		}
		if time.Now().After(end) {
			t.Fatalf("log has not %d times %q:\n%s", n, pattern, l.text())
		}
	}
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// TestOutput: a plugin can neither fill the log nor write to a terminal through it.
func TestOutput(t *testing.T) {
	var log lines
	p := mustStart(t, socketDir(t), "chatty", log.logger())
	if _, err := p.Decide(t.Context(), request("lap7")); err != nil {
		t.Fatal(err)
	}
	got := log.text()
	if n := strings.Count(got, "policy plugin says"); n < lineBurst || n > 10*lineBurst {
		t.Errorf("%d lines of 10000, want a bit more than %d", n, lineBurst)
	}
	first, _, _ := strings.Cut(got, "\n")
	if !strings.Contains(first, "line 0 ") || !strings.Contains(first, "plugin=p") || len(first) > maxLine+200 || strings.Contains(got, "\x1b") {
		t.Errorf("first line: %q", first)
	}
}

func FuzzOutput(f *testing.F) {
	f.Add([]byte("a\nb\x1b\n"), []byte("\n\n"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var log lines
		o := newOutput(log.logger())
		for _, part := range [][]byte{a, b} {
			if n, err := o.Write(part); n != len(part) || err != nil {
				t.Fatalf("wrote %d of %d, %v", n, len(part), err)
			}
		}
		if len(o.line) > maxLine {
			t.Errorf("%d bytes kept, want at most %d", len(o.line), maxLine)
		}
	})
}
