// Package bgptest is the contract suite of bgp.Speaker, with real routers (BIRD 2) as peers in network namespaces.
package bgptest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/bgp"
)

// InNamespace runs the calling test once more in a network namespace of its own and reports whether this is that run. Needs
// DSTM_TEST_ROOT=1; without it the test is skipped.
func InNamespace(t *testing.T) bool {
	t.Helper()
	const inside = "DSTM_TEST_NETNS"
	if os.Getenv(inside) == t.Name() {
		must(t, "ip", "link", "set", "lo", "up")
		return true
	}
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: DSTM_TEST_ROOT=1 go test ./bgp/...")
	}
	c := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	c.Env = append(os.Environ(), inside+"="+t.Name())
	c.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("in its namespace: %v", err)
	} else if !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Error("in its namespace: nothing ran")
	}
	return false
}

// Router is a BIRD at the other end of a link.
type Router struct {
	t     *testing.T
	index int
	sock  string
	moves string // file with what "ip monitor route" says
	// Peer is how the speaker is to see it.
	Peer bgp.Peer
}

// RouterOptions are what makes routers different.
type RouterOptions struct {
	Password        string
	GracefulRestart bool
}

// For makes t the test that fails with what the router does from here on.
func (r *Router) For(t *testing.T) { r.t = t }

// Local is the speaker's address on the link to this router.
func (r *Router) Local() netip.Addr { return r.addr(2) }

func (r *Router) addr(host int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("2001:db8:3:%d::%d", r.index, host))
}

// ASN is the speaker's autonomous system in this suite. Each router has its own, so that no loop detection hides a transit.
const ASN = 64512

func (r *Router) asn() uint32 { return ASN + uint32(r.index) }

// NewRouter starts the router number index (1 or higher) in a namespace of its own, linked to ours.
func NewRouter(t *testing.T, index int, o RouterOptions) *Router {
	t.Helper()
	dir := t.TempDir()
	r := &Router{t: t, index: index, sock: filepath.Join(dir, "bird.ctl"), moves: filepath.Join(dir, "moves")}
	r.Peer = bgp.Peer{
		Address: r.addr(1), ASN: r.asn(), HoldTime: 9 * time.Second, Password: o.Password,
		GracefulRestart: o.GracefulRestart,
	}
	if o.GracefulRestart {
		r.Peer.RestartTime = 60 * time.Second
	}
	extra := ""
	if o.Password != "" {
		extra = fmt.Sprintf("password %q;", o.Password)
	}
	conf := fmt.Sprintf(`router id 203.0.113.%[1]d;
log stderr all;
protocol device { scan time 1; }
# What a router must never get back from a gateway, nor through it from another router.
protocol static noise { ipv4; route 192.0.2.%[1]d/32 blackhole; }
protocol kernel { ipv4 { export where proto = "tep"; }; }
protocol kernel { ipv6 { export where proto = "tep"; }; }
protocol bgp tep {
	local %[2]s as %[3]d;
	neighbor %[4]s as %[5]d;
	passive yes; hold time 9; connect delay time 1; error wait time 1, 2; graceful restart on; %[6]s
	ipv4 { import all; export all; extended next hop on; };
	ipv6 { import all; export all; };
}
`, index, r.addr(1), r.asn(), r.addr(2), ASN, extra)
	file := filepath.Join(dir, "bird.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	r.start(file, dir)
	return r
}

func (r *Router) start(conf, dir string) {
	t := r.t
	t.Helper()
	// The namespace is held apart from BIRD, so that the link is there before it starts.
	hold := exec.Command("sleep", "600")
	hold.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hold.Process.Kill(); _ = hold.Wait() })
	pid, dev := fmt.Sprint(hold.Process.Pid), fmt.Sprintf("r%d", r.index)
	in := []string{"nsenter", "-t", pid, "-n", "--"}
	must(t, "ip", "link", "add", dev, "type", "veth", "peer", "name", "eth1", "netns", pid)
	must(t, "ip", "link", "set", dev, "up")
	must(t, "ip", "addr", "add", r.addr(2).String()+"/64", "dev", dev, "nodad")
	must(t, append(in, "ip", "link", "set", "lo", "up")...)
	must(t, append(in, "ip", "link", "set", "eth1", "up")...)
	must(t, append(in, "ip", "addr", "add", r.addr(1).String()+"/64", "dev", "eth1", "nodad")...)
	background(t, r.moves, append(in, "ip", "monitor", "route")...)
	log := filepath.Join(dir, "bird.log")
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(log)
			t.Logf("router %d:\n%s", r.index, b)
		}
	})
	background(t, log, append(in, "bird", "-f", "-c", conf, "-s", r.sock)...)
	r.Eventually("answers", func() error { _, err := r.birdc("show", "status"); return err })
}

// background runs a program until the test ends, with its output in a file.
func background(t *testing.T, file string, args ...string) {
	t.Helper()
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c := exec.Command(args[0], args[1:]...)
	c.Stdout, c.Stderr = out, out
	c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
}

// Moves returns how often the kernel of the router was told to add or replace a route, and to delete it.
func (r *Router) Moves(prefix string) (set, deleted int) {
	r.t.Helper()
	b, err := os.ReadFile(r.moves)
	if err != nil {
		r.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		switch {
		case strings.HasPrefix(line, "Deleted "+prefix+" "):
			deleted++
		case strings.HasPrefix(line, prefix+" "):
			set++
		}
	}
	return set, deleted
}

func (r *Router) birdc(args ...string) (string, error) {
	out, err := exec.Command("birdc", append([]string{"-r", "-s", r.sock}, args...)...).CombinedOutput()
	return string(out), err
}

// Show returns what BIRD says to a "show" command.
func (r *Router) Show(args ...string) string {
	r.t.Helper()
	out, err := r.birdc(append([]string{"show"}, args...)...)
	if err != nil {
		r.t.Fatalf("birdc show %v: %v\n%s", args, err, out)
	}
	return out
}

// Route returns what the router learnt of a prefix from the speaker, with all attributes; empty when nothing.
func (r *Router) Route(prefix string) string {
	r.t.Helper()
	out, err := r.birdc("show", "route", prefix, "protocol", "tep", "all")
	switch {
	case strings.Contains(out, "Network not found"):
		return ""
	case err != nil:
		r.t.Fatalf("birdc: %v\n%s", err, out)
	}
	return out
}

// Count is the number of routes learnt from the speaker.
func (r *Router) Count() int {
	r.t.Helper()
	return strings.Count(r.Show("route", "protocol", "tep"), "[tep ")
}

// Up reports whether the session is established.
func (r *Router) Up() bool {
	r.t.Helper()
	return strings.Contains(r.Show("protocols", "tep"), "Established")
}

// Eventually waits until f has no complaint.
func (r *Router) Eventually(what string, f func() error) {
	r.t.Helper()
	Eventually(r.t, fmt.Sprintf("router %d: %s", r.index, what), f)
}

// Learns waits for a route with all the given pieces of text in its attributes.
func (r *Router) Learns(prefix string, attrs ...string) {
	r.t.Helper()
	r.Eventually("learns "+prefix, func() error {
		got := r.Route(prefix)
		if got == "" {
			return errors.New("no route")
		}
		for _, a := range attrs {
			if !strings.Contains(got, a) {
				return fmt.Errorf("without %q:\n%s", a, got)
			}
		}
		return nil
	})
}

// Forgets waits until a route is gone.
func (r *Router) Forgets(prefix string) {
	r.t.Helper()
	r.Eventually("forgets "+prefix, func() error {
		if got := r.Route(prefix); got != "" {
			return errors.New(got)
		}
		return nil
	})
}

// Eventually waits up to half a minute until f has no complaint.
func Eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%s: not within 30 s: %v", what, err)
		}
	}
}

func must(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
