package labrun

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the holder of a node, and a program that brings a lab up.
func TestMain(m *testing.M) {
	var err error
	switch args := os.Args[1:]; {
	case len(args) > 2 && args[0] == "lab" && args[1] == "hold":
		err = Hold(os.Stdin, os.Stdout, args[2], args[3:])
	case len(args) == 3 && args[0] == "lab" && args[1] == "up":
		var l *Lab
		if l, err = Open(args[2]); err == nil {
			err = l.Up(context.Background(), os.Stdout)
		}
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

const bridged = `
topology:
  defaults: {kind: linux, binds: ["shared:/mnt/shared"]}
  nodes:
    a:
      exec: [ip addr add 192.0.2.1/24 dev eth1, "sleep 300 & echo $! >/run/sleeper"]
      labels: {dstm.role: "svc,tep"}
      binds: ["shared:/mnt/fixed:ro"]
    b:
      env: {WHO: bob}
      sysctls: {net.ipv4.ip_forward: "1", net.ipv4.ip_local_port_range: "2000 3000"}
      exec: [ip addr add 192.0.2.2/24 dev eth1, "echo $WHO >/mnt/shared/who", "echo mine >/etc/mine"]
      labels: {dstm.role: host}
    sw: {kind: bridge}
  links:
    - endpoints: ["a:eth1", "sw:p1"]
    - {endpoints: ["b:eth1", "sw:p2"], mtu: 1400}
`

const steps = `
-- a: the other one answers through the bridge --
ping -c1 -W5 192.0.2.2
-- b: environment, sysctls, bind and mtu are as in the file --
[ "$WHO" = bob ]; [ "$(cat /mnt/shared/who)" = bob ]
[ "$(sysctl -n net.ipv4.ip_forward)" = 1 ]; [ "$(sysctl -n net.ipv4.ip_local_port_range | tr '\t' ' ')" = '2000 3000' ]
[ "$(cat /sys/class/net/eth1/mtu)" = 1400 ]; [ -d /sys/class/net/eth1 ]; [ ! -e /sys/class/net/p1 ]
-- a: its files are its own, and a bind with ro is not written to --
[ ! -e /etc/mine ]; bpftool map create /sys/fs/bpf/m type array key 4 value 4 entries 1 name m; [ "$(hostname)" = a ]
[ "$(cat /mnt/fixed/who)" = bob ]; if touch /mnt/fixed/x; then exit 1; fi
-- b: pins too --
[ ! -e /sys/fs/bpf/m ]
-- b: this one fails --
echo what it says; false
`

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: DSTM_TEST_ROOT=1 go test ./internal/labrun")
	}
}

// writeLab writes a topology with a name of its own, so that tests of several checkouts do not meet, and takes the lab
// down when the test is over.
func writeLab(t *testing.T, topology, expect string) (path string) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "x.clab.yml")
	topology = fmt.Sprintf("name: test-%d-%s\n%s", os.Getpid(), t.Name(), topology)
	for name, text := range map[string]string{path: topology, filepath.Join(dir, "expect.txtar"): expect} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "shared"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := open(t, path).Down(io.Discard); err != nil {
			t.Errorf("down after the test: %v", err)
		}
	})
	return path
}

func open(t *testing.T, path string) *Lab {
	t.Helper()
	l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func output(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// machine returns a look at what a lab could leave in the namespaces of who brings it up. The network namespace becomes
// the test's own, since others work on the machine's.
func machine(t *testing.T) func() string {
	t.Helper()
	runtime.LockOSThread() // for good: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	return func() string {
		b, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		mounts := 0
		for line := range strings.Lines(string(b)) {
			switch strings.Fields(line)[1] {
			case "/sys", "/sys/fs/bpf", "/run", "/etc", "/var", "/mnt/shared", "/mnt/fixed":
				mounts++
			}
		}
		return output(t, "ip", "-o", "link") + output(t, "ip", "route", "show", "table", "all") +
			fmt.Sprintf("%d mounts", mounts)
	}
}

// ended says what is left of a lab that was taken down.
func ended(t *testing.T, path string, nodes map[string]node) {
	t.Helper()
	for name, n := range nodes {
		if p := n.NetNS.processes(); len(p) > 0 {
			t.Errorf("node %s: processes %v stay", name, p)
		}
	}
	for _, f := range []string{open(t, path).stateFile(), filepath.Join(filepath.Dir(path), ".dstm-lab")} {
		if _, err := os.Stat(f); err == nil {
			t.Errorf("%s stays", f)
		}
	}
}

func TestLab(t *testing.T) {
	needRoot(t)
	look := machine(t)
	before := look()
	path := writeLab(t, bridged, steps)
	var out bytes.Buffer
	if err := open(t, path).Up(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	if err := open(t, path).Up(t.Context(), &out); err == nil || !strings.HasSuffix(err.Error(), "dstm lab down "+path) {
		t.Errorf("second up: %v, want how to take it down", err)
	}
	for _, f := range []string{"svc/a.pem", "tep/a.pem", "b.pem", "noc.pem", "ca.pem"} {
		if _, err := os.Stat(filepath.Join(filepath.Dir(path), ".dstm-lab/pki", f)); err != nil {
			t.Error(err)
		}
	}
	// Another process finds the lab by its file.
	l := open(t, path)
	out.Reset()
	if err := l.Run(t.Context(), &out); !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "1 of 5") {
		t.Errorf("run: %v, want ErrFailed", err)
	}
	for _, what := range []string{
		"ok   1/5 a: the other one answers through the bridge ", "ok   2/5 b: environment", "ok   3/5 a: its files",
		"ok   4/5 b: pins too", "FAIL 5/5 b: this one fails ", "\n     exit status 1\n     what it says\n",
	} {
		if !strings.Contains(out.String(), what) {
			t.Errorf("output without %q:\n%s", what, out.String())
		}
	}
	nodes := l.state.Nodes
	if p := nodes["a"].NetNS.processes(); len(p) != 2 { // the holder and what exec left in the background
		t.Errorf("processes in a: %v", p)
	}
	for range 2 { // the second time there is nothing to do
		if err := open(t, path).Down(&out); err != nil {
			t.Fatal(err)
		}
		ended(t, path, nodes)
	}
	if after := look(); after != before {
		t.Errorf("the machine has changed:\nbefore:\n%s\nafter:\n%s", before, after)
	}
}

// TestFailedUp leaves what Down removes, and says how.
func TestFailedUp(t *testing.T) {
	needRoot(t)
	path := writeLab(t, `topology: {nodes: {a: {kind: linux}, b: {kind: linux, exec: ["echo reason; exit 3"]}}}`, steps)
	err := open(t, path).Up(t.Context(), io.Discard)
	for _, want := range []string{
		`node b: exec "echo reason; exit 3": exit status 3`, "\nreason\n", "dstm lab down " + path,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("up: %v, want %q", err, want)
		}
	}
	l := open(t, path)
	if !l.Has("a") || !l.Has("b") {
		t.Error("the nodes are not known after the failure")
	}
	nodes := l.state.Nodes
	if err := open(t, path).Down(io.Discard); err != nil {
		t.Error(err)
	}
	ended(t, path, nodes)
}

// TestDownSparesStrangers: a number that was given out again is forgotten, our own namespace is refused.
func TestDownSparesStrangers(t *testing.T) {
	needRoot(t)
	path := writeLab(t, "topology: {nodes: {a: {kind: linux}}}", steps)
	l := open(t, path)
	own, err := netnsOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	reused := own
	reused.Cookie++ // the same inode, another namespace
	l.state.Nodes = map[string]node{"reused": {os.Getpid(), reused}, "own": {os.Getpid(), own}}
	if l.Has("reused") {
		t.Error("a reused number counts as a node")
	}
	err = l.Down(io.Discard)
	if err == nil || !strings.Contains(err.Error(), "node own: is our own network namespace") {
		t.Errorf("down in our own namespace: %v", err)
	}
	l = open(t, path)
	if _, ok := l.state.Nodes["reused"]; ok || len(l.state.Nodes) != 1 {
		t.Errorf("nodes after down: %v, want the refused one", l.state.Nodes)
	}
	delete(l.state.Nodes, "own")
	if err := l.save(); err != nil {
		t.Error(err)
	}
}

// TestHolderDies: what runs in a node whose holder was killed is found all the same, by up and by down.
func TestHolderDies(t *testing.T) {
	needRoot(t)
	path := writeLab(t, `topology: {nodes: {a: {kind: linux, exec: ["sleep 300 &"]}}}`, steps)
	l := open(t, path)
	if err := l.Up(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	nodes := l.state.Nodes
	if err := unix.Kill(nodes["a"].PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the holder ends", func() bool { return !open(t, path).Has("a") })
	if err := open(t, path).Up(t.Context(), io.Discard); err == nil || !strings.Contains(err.Error(), "is up (1 nodes)") {
		t.Errorf("up: %v", err)
	}
	if err := open(t, path).Down(io.Discard); err != nil {
		t.Error(err)
	}
	ended(t, path, nodes)
}

// TestOtherFile: a lab is taken down by the file that it came from, though another has the same name.
func TestOtherFile(t *testing.T) {
	needRoot(t)
	path := writeLab(t, "topology: {nodes: {a: {kind: linux}}}", steps)
	if err := open(t, path).Up(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "x.clab.yml")
	output(t, "cp", path, other)
	if _, err := Open(other); err == nil || !strings.HasSuffix(err.Error(), "dstm lab down "+path) {
		t.Errorf("open: %v", err)
	}
	if err := open(t, path).Down(io.Discard); err != nil {
		t.Error(err)
	}
	open(t, other)
}

// TestUnknownNode: a step in a node that is not there is found before any step runs.
func TestUnknownNode(t *testing.T) {
	path := writeLab(t, "topology: {nodes: {a: {kind: linux}}}", "-- b: x --\ntrue\n")
	err := open(t, path).Run(t.Context(), io.Discard)
	if err == nil || !strings.Contains(err.Error(), `expect.txtar:1:4: node "b" does not run: want one of ["a"]`) {
		t.Errorf("run: %v", err)
	}
}

// TestInterruptedUp: of an up that is killed at any moment, down finds everything.
func TestInterruptedUp(t *testing.T) {
	needRoot(t)
	path := writeLab(t, `
topology:
  nodes:
    a: {kind: linux}
    b: {kind: linux, exec: ["echo >/run/here; sleep 300"]}
`, steps)
	up := exec.Command("/proc/self/exe", "lab", "up", path)
	if err := up.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "exec begins", func() bool {
		l := open(t, path)
		return l.Has("b") && l.Command(t.Context(), "b", "test", "-e", "/run/here").Run() == nil
	})
	if err := up.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := up.Wait(); err == nil {
		t.Error("up ended well")
	}
	nodes := open(t, path).state.Nodes
	if len(nodes) != 2 {
		t.Errorf("nodes %v", nodes)
	}
	if err := open(t, path).Down(io.Discard); err != nil {
		t.Error(err)
	}
	ended(t, path, nodes)
}

// TestCancelledStep: who is told to stop takes what runs in a node along.
func TestCancelledStep(t *testing.T) {
	needRoot(t)
	path := writeLab(t, "topology: {nodes: {a: {kind: linux}}}", "-- a: takes long --\necho >/run/here\nsleep 300 | cat\n")
	l := open(t, path)
	if err := l.Up(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	why := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		eventually(t, "the step begins", func() bool { return l.Command(ctx, "a", "test", "-e", "/run/here").Run() == nil })
		cancel(why)
	}()
	var out bytes.Buffer
	if err := l.Run(ctx, &out); !errors.Is(err, ErrFailed) || !strings.Contains(out.String(), why.Error()) {
		t.Errorf("run: %v\n%s", err, out.String())
	}
	eventually(t, "only the holder is left", func() bool { return len(l.state.Nodes["a"].NetNS.processes()) == 1 })
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not in time: %s", what)
			return
		}
	}
}

// TestUnrecordedHolder: a holder whose parent goes away before it has recorded it makes nothing.
func TestUnrecordedHolder(t *testing.T) {
	var out bytes.Buffer
	if err := Hold(strings.NewReader(""), &out, "a", nil); !errors.Is(err, io.EOF) || out.Len() > 0 {
		t.Errorf("hold: %v, it says %q", err, out.String())
	}
}

// TestBadBind says which node failed and why.
func TestBadBind(t *testing.T) {
	needRoot(t)
	path := writeLab(t, `topology: {nodes: {a: {kind: linux, binds: ["missing:/x"]}}}`, steps)
	err := open(t, path).Up(t.Context(), io.Discard)
	for _, want := range []string{"node a: its holder did not get ready", "missing: no such file"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("up: %v, want %q", err, want)
		}
	}
	if err := open(t, path).Down(io.Discard); err != nil {
		t.Errorf("down: %v", err)
	}
	ended(t, path, nil)
}
