package labrun

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What a node's commands and its holder may take.
const (
	commandTimeout = 2 * time.Minute // each exec line and each step
	holderTimeout  = 10 * time.Second
	maxOutput      = 64 << 10 // bytes of a command's output that are kept
)

// bridgeName is the bridge in a node of that kind.
const bridgeName = "br0"

// startNode starts the holder of a node and makes what the node has before its links.
func (l *Lab) startNode(ctx context.Context, name string) error {
	if err := l.startHolder(ctx, name); err != nil {
		return err
	}
	n := l.t.Topology.Nodes[name]
	// Addresses count at once, and nothing of the kernel's own making is in the way.
	sysctls := map[string]string{
		"net.ipv6.conf.all.accept_dad": "0", "net.ipv6.conf.default.accept_dad": "0",
		"net.ipv6.conf.default.accept_ra": "0",
	}
	maps.Copy(sysctls, n.Sysctls)
	set := []string{"sysctl", "-qw"}
	for _, k := range slices.Sorted(maps.Keys(sysctls)) {
		set = append(set, k+"="+sysctls[k])
	}
	commands := [][]string{set, {"ip", "link", "set", "lo", "up"}}
	if n.Kind == KindBridge {
		commands = append(commands, []string{"ip", "link", "add", bridgeName, "up", "type", "bridge"})
	}
	for _, c := range commands {
		if o, err := l.run(ctx, name, c...); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(c, " "), err, bytes.TrimSpace(o))
		}
	}
	return nil
}

// startHolder starts the process that keeps a node, records it and lets it go on, in this order: one that was started
// but not recorded ends by itself when we do.
func (l *Lab) startHolder(ctx context.Context, name string) error {
	args := []string{"lab", "hold", name}
	for _, b := range l.t.Topology.Nodes[name].Binds {
		if !filepath.IsAbs(b) {
			b = filepath.Join(l.t.dir(), b)
		}
		args = append(args, b)
	}
	// Our own standard error would be held open as long as the lab is up.
	log, err := os.Create(filepath.Join(l.t.runDir(), "log", name+".holder.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Dir, cmd.Stderr = "/", log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS, Setsid: true,
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	defer stdout.Close()
	if err := cmd.Start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, holderTimeout, fmt.Errorf("not ready after %s", holderTimeout))
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	err = l.record(name, cmd.Process.Pid)
	if err == nil {
		err = letGo(stdin, stdout)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if said, _ := os.ReadFile(log.Name()); len(said) > 0 {
			err = errors.New(string(bytes.TrimSpace(said)))
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("its holder did not get ready: %w", err)
	}
	return nil
}

// record saves that a process holds a node.
func (l *Lab) record(name string, pid int) error {
	ns, err := netnsOf(pid)
	if err != nil {
		return err
	}
	l.state.Nodes[name] = node{PID: pid, NetNS: ns}
	return l.save()
}

// letGo tells a holder that it is recorded and waits until it is ready; see Hold.
func letGo(stdin io.Writer, stdout io.Reader) error {
	if _, err := io.WriteString(stdin, recorded); err != nil {
		return err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil && line != ready {
		err = fmt.Errorf("it says %q", line)
	}
	return err
}

func (l *Lab) link(ctx context.Context, k Link) error {
	a, ai, _ := strings.Cut(k.Endpoints[0], ":")
	b, bi, _ := strings.Cut(k.Endpoints[1], ":")
	at := netlink.NewLinkAttrs()
	at.Name, at.Namespace, at.MTU = ai, netlink.NsPid(l.state.Nodes[a].PID), k.MTU
	v := &netlink.Veth{
		LinkAttrs: at, PeerName: bi, PeerNamespace: netlink.NsPid(l.state.Nodes[b].PID), PeerMTU: uint32(k.MTU),
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
		if o, err := l.run(ctx, e.node, args...); err != nil {
			return fmt.Errorf("%w: %s", err, o)
		}
	}
	return nil
}

// run runs a command in a node and returns what it wrote. It does not wait for what the command left in the background
// with its output: that goes to a file, which unlike a pipe nobody has to close.
func (l *Lab) run(ctx context.Context, node string, args ...string) ([]byte, error) {
	f, err := os.OpenFile(os.TempDir(), os.O_RDWR|unix.O_TMPFILE, 0o600) // without a name nothing stays
	if err != nil {
		return nil, fmt.Errorf("file for output: %w", err)
	}
	defer f.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, commandTimeout, fmt.Errorf("not done after %s", commandTimeout))
	defer cancel()
	c := l.Command(ctx, node, args...)
	c.Stdout, c.Stderr = f, f
	// A group of its own: what a shell waits for has to end with it.
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	err = c.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	out, readErr := io.ReadAll(io.NewSectionReader(f, 0, maxOutput))
	return out, errors.Join(err, readErr)
}

// Command returns a command inside a node; our programs come first in its PATH.
func (l *Lab) Command(ctx context.Context, node string, args ...string) *exec.Cmd {
	enter := []string{"-t", fmt.Sprint(l.state.Nodes[node].PID), "-n", "-m", "-u", "--"}
	c := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	c.Env = append(os.Environ(), "PATH="+l.bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if n := l.t.Topology.Nodes[node]; n != nil {
		for k, v := range n.Env {
			c.Env = append(c.Env, k+"="+v)
		}
	}
	return c
}
