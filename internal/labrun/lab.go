package labrun

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/proc"
	"github.com/dstm-project/dstm/internal/tlsid"
)

// TrustDomain and Cell are those of every lab.
const (
	TrustDomain = "example.net"
	Cell        = "lab"
)

// Lab is a topology and the nodes of it that run.
type Lab struct {
	t     *Topology
	bin   string // directory of our programs
	state state
}

// state is written before a node is used, so that `down` finds everything after a crash of `up`.
type state struct {
	Nodes map[string]holder `json:"nodes"`
}

type holder struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // of /proc/PID/stat, tells a reused number
}

// Open loads the topology and what is known of a run of it.
func Open(path string) (*Lab, error) {
	t, err := Load(path)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	l := &Lab{t: t, bin: filepath.Dir(self), state: state{Nodes: map[string]holder{}}}
	b, err := os.ReadFile(l.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &l.state)
	}
	return l, err
}

func (l *Lab) stateFile() string { return filepath.Join("/run/dstm-lab", l.t.Name+".json") }

func (l *Lab) save() error {
	b, err := json.Marshal(l.state)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(l.stateFile()), 0o755); err != nil {
		return err
	}
	return os.WriteFile(l.stateFile(), b, 0o644)
}

// Prepare writes a certificate authority and the certificates of all nodes with a role into the run directory. It refuses
// to do so under a lab that runs.
func (l *Lab) Prepare() error {
	if slices.ContainsFunc(l.t.names(), l.Has) {
		return fmt.Errorf("lab %s is up: take it down first (dstm lab down)", l.t.Name)
	}
	dir := filepath.Join(l.t.runDir(), "pki")
	if err := errors.Join(os.RemoveAll(l.t.runDir()), os.MkdirAll(filepath.Join(l.t.runDir(), "log"), 0o755)); err != nil {
		return err
	}
	if err := pki.Init(dir, TrustDomain, 30*24*time.Hour); err != nil {
		return err
	}
	for _, name := range l.t.names() {
		if err := issue(dir, name, l.t.Topology.Nodes[name].Labels[RoleLabel]); err != nil {
			return err
		}
	}
	noc := tlsid.ID{TrustDomain: TrustDomain, Cell: Cell, Role: tlsid.RoleOperator, Name: "noc"}
	_, err := pki.Issue(dir, dir, noc, pki.Options{})
	return err
}

// issue writes the certificates of one node, see RoleLabel.
func issue(ca, node, label string) error {
	if label == "" {
		return nil
	}
	roles := strings.Split(label, ",")
	for _, role := range roles {
		dir := ca
		if len(roles) > 1 {
			dir = filepath.Join(ca, role)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		id := tlsid.ID{TrustDomain: TrustDomain, Cell: Cell, Role: tlsid.Role(role), Name: node}
		if _, err := pki.Issue(ca, dir, id, pki.Options{DNS: []string{node + "." + TrustDomain}}); err != nil {
			return fmt.Errorf("node %s: label %s %q: %w", node, RoleLabel, label, err)
		}
	}
	return nil
}

// Up makes the nodes and links and runs every node's exec lines, node by node in order of their names. What it made before
// an error stays for a look; Down removes it.
func (l *Lab) Up(out io.Writer) error {
	if err := l.Prepare(); err != nil {
		return err
	}
	l.state.Nodes = map[string]holder{} // what an earlier run left has ended
	for _, name := range l.t.names() {
		if err := l.startNode(name); err != nil {
			return fmt.Errorf("node %s: %w", name, err)
		}
	}
	for _, k := range l.t.Topology.Links {
		if err := l.link(k); err != nil {
			return fmt.Errorf("link %v: %w", k.Endpoints, err)
		}
	}
	for _, name := range l.t.names() {
		for _, line := range l.t.Topology.Nodes[name].Exec {
			if o, err := l.run(name, "sh", "-c", line); err != nil {
				return fmt.Errorf("node %s: exec %q: %w\n%s", name, line, err, o)
			}
		}
	}
	fmt.Fprintf(out, "lab %s is up: %d nodes\n", l.t.Name, len(l.state.Nodes))
	return nil
}

func (l *Lab) startNode(name string) error {
	n := l.t.Topology.Nodes[name]
	args := []string{"lab", "hold", name}
	for _, b := range n.Binds {
		if !filepath.IsAbs(b) {
			b = filepath.Join(l.t.dir, b)
		}
		args = append(args, b)
	}
	cmd := exec.Command("/proc/self/exe", args...)
	// Our own standard error would be held open as long as the lab is up.
	log, err := os.Create(filepath.Join(l.t.runDir(), "log", name+".holder.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS, Setsid: true}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	start, err := proc.StartTime(cmd.Process.Pid)
	if err != nil {
		return err
	}
	l.state.Nodes[name] = holder{cmd.Process.Pid, start}
	if err := l.save(); err != nil {
		return err
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		why, _ := os.ReadFile(log.Name())
		return fmt.Errorf("its holder did not get ready: %s", bytes.TrimSpace(why))
	}
	// Addresses count at once, and nothing of the kernel's own making is in the way.
	sysctls := map[string]string{
		"net.ipv6.conf.all.accept_dad": "0", "net.ipv6.conf.default.accept_dad": "0", "net.ipv6.conf.default.accept_ra": "0",
	}
	for k, v := range n.Sysctls {
		sysctls[k] = v
	}
	lines := []string{"ip link set lo up"}
	if n.Kind == KindBridge {
		lines = append(lines, "ip link add "+bridgeName+" type bridge && ip link set "+bridgeName+" up")
	}
	for k, v := range sysctls {
		lines = append(lines, "sysctl -qw "+k+"="+v)
	}
	o, err := l.run(name, "sh", "-ec", strings.Join(lines, "\n"))
	if err != nil {
		return fmt.Errorf("%w: %s", err, o)
	}
	return nil
}

func (l *Lab) link(k Link) error {
	a, ai, _ := strings.Cut(k.Endpoints[0], ":")
	b, bi, _ := strings.Cut(k.Endpoints[1], ":")
	at := netlink.NewLinkAttrs()
	at.Name, at.Namespace, at.MTU = ai, netlink.NsPid(l.state.Nodes[a].PID), k.MTU
	v := &netlink.Veth{LinkAttrs: at, PeerName: bi, PeerNamespace: netlink.NsPid(l.state.Nodes[b].PID)}
	if k.MTU > 0 {
		v.PeerMTU = uint32(k.MTU)
	}
	h, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.LinkAdd(v); err != nil {
		return err
	}
	for _, e := range []struct{ node, dev string }{{a, ai}, {b, bi}} {
		args := []string{"ip", "link", "set", e.dev, "up"}
		if l.t.Topology.Nodes[e.node].Kind == KindBridge {
			args = append(args, "master", bridgeName)
		}
		if o, err := l.run(e.node, args...); err != nil {
			return fmt.Errorf("%w: %s", err, o)
		}
	}
	return nil
}

// bridgeName is the bridge in a node of that kind.
const bridgeName = "br0"

// commandTimeout bounds every exec line and every step.
const commandTimeout = 2 * time.Minute

// run runs a command in a node and returns what it wrote. It does not wait for what the command left in the background with
// its output: that goes to a file, which unlike a pipe nobody has to close.
func (l *Lab) run(node string, args ...string) ([]byte, error) {
	f, err := os.CreateTemp("", "dstm-lab")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return nil, err
	}
	c := l.Command(node, args...)
	c.Stdout, c.Stderr = f, f
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		return nil, err
	}
	late := time.AfterFunc(commandTimeout, func() { _ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL) })
	err = c.Wait()
	if !late.Stop() {
		err = fmt.Errorf("ended after %s: %w", commandTimeout, err)
	}
	out, readErr := io.ReadAll(io.NewSectionReader(f, 0, maxOutput))
	return out, errors.Join(err, readErr)
}

// maxOutput is how much of a command's output is kept, in bytes.
const maxOutput = 64 << 10

// Command returns a command inside a node; our programs come first in its PATH.
func (l *Lab) Command(node string, args ...string) *exec.Cmd {
	env := []string{"PATH=" + l.bin + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}
	if n := l.t.Topology.Nodes[node]; n != nil {
		for k, v := range n.Env {
			env = append(env, k+"="+v)
		}
	}
	return enter(l.state.Nodes[node].PID, env, args...)
}

// Has reports whether the node runs.
func (l *Lab) Has(node string) bool {
	h, ok := l.state.Nodes[node]
	return ok && h.alive()
}

func (h holder) alive() bool {
	start, err := proc.StartTime(h.PID)
	return err == nil && start == h.Start
}

// Down ends every process in the nodes' namespaces, and with the last of them the namespaces, their devices and mounts.
// It touches nothing that Up did not make, and may be called again.
func (l *Lab) Down(out io.Writer) error {
	var errs error
	for name, h := range l.state.Nodes {
		if h.alive() {
			if err := killAll(h.PID); err != nil {
				errs = errors.Join(errs, fmt.Errorf("node %s: %w", name, err))
				continue
			}
		}
		delete(l.state.Nodes, name)
	}
	if errs != nil {
		return errors.Join(errs, l.save())
	}
	if err := errors.Join(os.RemoveAll(l.stateFile()), os.RemoveAll(l.t.runDir())); err != nil {
		return err
	}
	fmt.Fprintf(out, "lab %s is down\n", l.t.Name)
	return nil
}

// killAll ends the holder and everything that shares its network namespace, and waits until all are gone.
func killAll(pid int) error {
	want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	if own, err := os.Readlink("/proc/self/ns/net"); err != nil || own == want {
		return fmt.Errorf("process %d is in our own network namespace: not a node", pid)
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		left := 0
		for _, p := range inNamespace(want) {
			if err := syscall.Kill(p, syscall.SIGKILL); err == nil {
				left++
			}
		}
		if left == 0 {
			return nil
		}
	}
	return fmt.Errorf("processes of namespace %s do not end", want)
}

func inNamespace(ns string) []int {
	var out []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if got, err := os.Readlink(d + "/ns/net"); err == nil && got == ns {
			if b, err := os.ReadFile(d + "/stat"); err == nil && !strings.Contains(string(b), ") Z ") {
				if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
					out = append(out, pid)
				}
			}
		}
	}
	return out
}
