package labrun

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstm-project/dstm/internal/proc"
)

// TestMain lets the test binary be the holder of a node.
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == "lab" && os.Args[2] == "hold" {
		if err := Hold(os.Args[3], os.Args[4:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const bridged = `name: labtest
topology:
  defaults: {kind: linux, binds: ["shared:/mnt/shared"]}
  nodes:
    a: {exec: [ip addr add 192.0.2.1/24 dev eth1, "sleep 300 & echo $! >/run/sleeper"], labels: {dstm.role: "svc,tep"}}
    b:
      env: {WHO: bob}
      sysctls: {net.ipv4.ip_forward: "1"}
      exec: [ip addr add 192.0.2.2/24 dev eth1, "mkdir -p /mnt/shared && echo $WHO >/mnt/shared/who", "echo mine >/etc/mine"]
      labels: {dstm.role: host}
    sw: {kind: bridge}
  links:
    - endpoints: ["a:eth1", "sw:p1"]
    - {endpoints: ["b:eth1", "sw:p2"], mtu: 1400}
`

const steps = `
-- a: the other one answers through the bridge --
ping -c1 -W5 192.0.2.2
-- b: environment, sysctl, bind and mtu are as in the file --
[ "$WHO" = bob ]; [ "$(sysctl -n net.ipv4.ip_forward)" = 1 ]; [ "$(cat /mnt/shared/who)" = bob ]
[ "$(cat /sys/class/net/eth1/mtu)" = 1400 ]; [ -d /sys/class/net/eth1 ]; [ ! -e /sys/class/net/p1 ]
-- a: its files are its own --
[ ! -e /etc/mine ]; bpftool map create /sys/fs/bpf/m type array key 4 value 4 entries 1 name m; [ "$(hostname)" = a ]
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

func writeLab(t *testing.T, topology, expect string) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "x.clab.yml")
	for name, text := range map[string]string{"x.clab.yml": topology, "expect.txtar": expect} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "shared"), 0o755); err != nil {
		t.Fatal(err)
	}
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

func TestLab(t *testing.T) {
	needRoot(t)
	path := writeLab(t, bridged, steps)
	machine := func() string {
		return output(t, "ip", "-o", "link") + output(t, "ip", "route", "show", "table", "all") + output(t, "findmnt", "-rno", "TARGET")
	}
	before := machine()
	l := open(t, path)
	t.Cleanup(func() { _ = open(t, path).Down(&bytes.Buffer{}) })
	var out bytes.Buffer
	if err := l.Up(&out); err != nil {
		t.Fatal(err)
	}
	if err := open(t, path).Up(&out); err == nil || !strings.Contains(err.Error(), "lab labtest is up: take it down first") {
		t.Errorf("second up: %v", err)
	}
	for _, f := range []string{"svc/a.pem", "tep/a.pem", "b.pem", "noc.pem", "ca.pem"} {
		if _, err := os.Stat(filepath.Join(filepath.Dir(path), ".dstm-lab/pki", f)); err != nil {
			t.Error(err)
		}
	}
	// Another process finds the lab by its file.
	l = open(t, path)
	out.Reset()
	if err := l.Run(&out); !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "1 of 5") {
		t.Errorf("run: %v, want ErrFailed", err)
	}
	got := out.String()
	for i, what := range []string{
		"ok   1/5 a: the other one answers through the bridge ", "ok   2/5 b: environment", "ok   3/5 a: its files", "ok   4/5 b: pins too",
		"FAIL 5/5 b: this one fails ", "  what it says",
	} {
		if !strings.Contains(got, what) {
			t.Errorf("output without line %d, %q:\n%s", i+1, what, got)
		}
	}
	namespaces := map[string]string{}
	for _, n := range []string{"a", "b", "sw"} {
		o, err := l.run(n, "readlink", "/proc/self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		namespaces[n] = strings.TrimSpace(string(o))
	}
	if len(inNamespace(namespaces["a"])) != 2 { // the holder and what exec left in the background
		t.Errorf("processes in a: %v", inNamespace(namespaces["a"]))
	}
	if err := open(t, path).Down(&out); err != nil {
		t.Fatal(err)
	}
	for n, ns := range namespaces {
		if p := inNamespace(ns); len(p) > 0 {
			t.Errorf("node %s: processes %v stay", n, p)
		}
	}
	if after := machine(); after != before {
		t.Errorf("the machine has changed:\nbefore:\n%safter:\n%s", before, after)
	}
	for _, f := range []string{l.stateFile(), filepath.Join(filepath.Dir(path), ".dstm-lab")} {
		if _, err := os.Stat(f); err == nil {
			t.Errorf("%s stays", f)
		}
	}
	if err := open(t, path).Down(&out); err != nil {
		t.Errorf("second down: %v", err)
	}
}

// TestFailedUp leaves what Down removes, and Down spares what Up did not make.
func TestFailedUp(t *testing.T) {
	needRoot(t)
	path := writeLab(t, "name: labfail\ntopology: {nodes: {a: {kind: linux}, b: {kind: linux, exec: [\"echo reason; exit 3\"]}}}\n", steps)
	t.Cleanup(func() { _ = open(t, path).Down(&bytes.Buffer{}) })
	err := open(t, path).Up(&bytes.Buffer{})
	if err == nil || !strings.Contains(err.Error(), `node b: exec "echo reason; exit 3": exit status 3`) || !strings.Contains(err.Error(), "reason") {
		t.Errorf("up: %v", err)
	}
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	l := open(t, path)
	if !l.Has("a") || !l.Has("b") {
		t.Error("the nodes are not known after the failure")
	}
	start, err := proc.StartTime(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	l.state.Nodes["reused"] = holder{other.Process.Pid, "1"}
	l.state.Nodes["stranger"] = holder{other.Process.Pid, start}
	if err := l.Down(&bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "node stranger: process") {
		t.Errorf("down with a process of our own namespace: %v", err)
	}
	delete(l.state.Nodes, "stranger")
	if err := errors.Join(l.save(), open(t, path).Down(&bytes.Buffer{})); err != nil {
		t.Error(err)
	}
	if _, err := proc.StartTime(other.Process.Pid); err != nil {
		t.Error("a process that the lab did not make was ended")
	}
	if open(t, path).Has("a") {
		t.Error("node a runs after down")
	}
}

// TestBadBind says which node failed and why.
func TestBadBind(t *testing.T) {
	needRoot(t)
	path := writeLab(t, "name: labbind\ntopology: {nodes: {a: {kind: linux, binds: [\"missing:/x\"]}}}\n", steps)
	t.Cleanup(func() { _ = open(t, path).Down(&bytes.Buffer{}) })
	err := open(t, path).Up(&bytes.Buffer{})
	if err == nil || !strings.Contains(err.Error(), "node a: its holder did not get ready") || !strings.Contains(err.Error(), "missing: no such file") {
		t.Errorf("up: %v", err)
	}
	l := open(t, path)
	if err := l.Down(&bytes.Buffer{}); err != nil {
		t.Errorf("down: %v", err)
	}
	if _, err := os.Stat(l.stateFile()); err == nil {
		t.Errorf("%s stays", l.stateFile())
	}
}
