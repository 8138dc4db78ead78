package hostd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/hostprobe"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/leaseclient"
)

// tun is a packet path of a TUN alone: what the kernel sends is held while there is no lease, and noted while there is.
type tun struct {
	fakePath
	f    *os.File
	mu   sync.Mutex
	on   bool
	sent []Cause // of packets with the leased source, to the outside
}

func (t *tun) Configure(_ context.Context, c dataplane.HostConfig) error {
	if t.f != nil { // open already: the MTU is what may differ
		l, err := netlink.LinkByName(c.Device)
		if err != nil || c.MTU == 0 {
			return err
		}
		return netlink.LinkSetMTU(l, int(c.MTU))
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq(c.Device)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return err
	}
	t.f = os.NewFile(uintptr(fd), "tun")
	return nil
}

func (t *tun) SetLease(_ context.Context, b *lease.Binding, _ uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.on = b != nil
	return nil
}

func (t *tun) ReadHeld(ctx context.Context) (dataplane.Held, error) {
	stop := context.AfterFunc(ctx, func() { _ = t.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	b := make([]byte, 2000)
	for {
		n, err := t.f.Read(b)
		if err != nil {
			return dataplane.Held{}, err
		}
		t.mu.Lock()
		on := t.on
		if src, _, ok := addresses(b[:n]); ok && on && src == ip7.Addr {
			t.sent = append(t.sent, CausePacket)
		}
		t.mu.Unlock()
		if !on {
			return dataplane.Held{Data: b[:n], At: time.Now()}, nil
		}
	}
}

func (t *tun) Close() error { return t.f.Close() }

// command runs a program and returns its output without line ends.
func command(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// eventually waits for what other goroutines and the kernel do in their own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s\n%s", what, command(t, "ip -4 addr; ip -4 route; nft list ruleset"))
		}
	}
}

// TestAgentInKernel runs the agent over a real kernel: netlink, nft, sock_diag, sockets. Only the lease service and the
// tunnel are not there. Goroutines change threads, so the whole process needs a namespace of its own: it starts itself.
func TestAgentInKernel(t *testing.T) {
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: sudo DSTM_TEST_ROOT=1 go test ./hostd/")
	}
	const inner = "-test.run=^TestAgentInKernel$"
	if !strings.Contains(strings.Join(os.Args, " "), inner) {
		c := exec.Command("/proc/self/exe", inner, "-test.v")
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	command(t, "ip link set lo up; ip link add v0 type veth peer v1; ip link set v0 up; ip link set v1 up; "+
		"ip addr add 2001:db8:1::5/64 dev v0 nodad; ip -6 route add default dev v0; ip addr add 192.168.7.1/24 dev v0")
	before := networkText(t)
	w := &world{start: time.Now()}
	cfg, err := ParseConfig("test", []byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(t.TempDir(), "net.json")
	network, err := netcfg.Open(state, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer network.Close()
	a := New(cfg, Deps{
		Service: fakeService{w}, DataPath: &tun{fakePath: fakePath{w}}, Network: network, Filter: Firewall{},
		Sockets: Sockets{InUse: hostprobe.InUse, Abort: hostprobe.Abort}, Now: w.now, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, func() {}) }()

	kernelStart(t, a)
	kernelLease(ctx, t, a, w)
	kernelChanges(t, a)

	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if after := networkText(t); before != after {
		t.Errorf("network before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("state file: %v, want it gone", err)
	}
}

// networkText is everything that the agent could leave behind.
func networkText(t *testing.T) string {
	t.Helper()
	return command(t, "ip -o addr | grep -v fe80; ip -4 route; ip -6 route | grep -v fe80; nft list ruleset")
}

// kernelStart: the placeholder is there, and chatter asks for nothing.
func kernelStart(t *testing.T, a *Agent) {
	t.Helper()
	eventually(t, "registered", func() bool { return a.Status().Attended })
	if got, want := command(t, "ip -4 route show default"), "default dev dstm0 proto 213 scope link metric 4096"; got != want {
		t.Errorf("default route %q, want %q", got, want)
	}
	if got := command(t, "ip link show dev dstm0"); !strings.Contains(got, " mtu 1460 ") || strings.Contains(got, "MULTICAST") {
		t.Errorf("device %s, want mtu 1460 and no multicast", got)
	}
	if got := command(t, "ip -6 addr show dev dstm0; sysctl -n net.ipv6.conf.dstm0.forwarding net.ipv6.conf.v0.forwarding"); got != "1\n0" {
		t.Errorf("IPv6 on the device: %q, want no address, and forwarding there alone", got)
	}
	command(t, "ping -c1 -W1 239.1.1.1 || true; ping -c1 -W1 10.1.1.1 || true")
	if s := a.Status(); s.State != "idle" {
		t.Errorf("state %s after multicast and private destinations, want idle", s.State)
	}
}

// kernelLease: the first packet gets a lease, new sockets use it, and its end is the end of its connections.
func kernelLease(ctx context.Context, t *testing.T, a *Agent, w *world) {
	t.Helper()
	first := make(chan error, 1) // a connection that starts the lease and never gets an answer
	go func() { first <- dialError(ctx, "203.0.113.99:80") }()
	eventually(t, "lease for the first packet", func() bool { return a.Status().State == "held" })
	eventually(t, "default route with the lease", func() bool { // the state comes first
		return command(t, "ip -4 route show default") == "default dev dstm0 proto 213 scope link src 198.51.100.7 metric 4096"
	})
	u, err := net.Dial("udp4", "203.0.113.99:9")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if got := u.LocalAddr().(*net.UDPAddr).AddrPort().Addr(); got != ip7.Addr {
		t.Errorf("new socket has source %s, want the lease %s", got, ip7.Addr)
	}
	if used, err := hostprobe.InUse(func(c hostprobe.Conn) bool { return c.Local == ip7.Addr }); !used || err != nil {
		t.Errorf("lease in use: %v %v", used, err)
	}

	w.mu.Lock()
	down := w.down
	w.mu.Unlock()
	down <- leaseclient.Revoked{Ref: lease.Ref{Resource: ip7, Gen: 1}, Reason: lease.ReasonAdmin}
	select {
	case err := <-first:
		if !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("connection at the end of the lease: %v, want ECONNABORTED", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("connection goes on after the end of the lease")
	}
	eventually(t, "address gone", func() bool { return !strings.Contains(command(t, "ip -4 addr"), ip7.Addr.String()) })
}

// kernelChanges: native IPv4 comes and goes, then the IPv6 prefix changes.
func kernelChanges(t *testing.T, a *Agent) {
	t.Helper()
	command(t, "ip route add default via 192.168.7.2")
	eventually(t, "standby", func() bool { return a.Status().State == "standby: native ipv4" })
	eventually(t, "no route of ours", func() bool { return command(t, "ip -4 route show proto 213") == "" })
	command(t, "ip route del default")
	eventually(t, "back from standby", func() bool { return a.Status().State == "idle" && a.Status().Attended })

	command(t, "ip addr add 2001:db8:7::5/64 dev v0 nodad; ip addr change 2001:db8:1::5/64 dev v0 nodad preferred_lft 0")
	eventually(t, "renumbered", func() bool { return a.Status().Source == "2001:db8:7::5" && a.Status().Attended })
	command(t, "ip addr del 2001:db8:7::5/64 dev v0; ip addr change 2001:db8:1::5/64 dev v0 nodad preferred_lft forever")
}

func dialError(ctx context.Context, to string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp4", to)
	if err == nil {
		c.Close()
		return errors.New("connected to nowhere")
	}
	return err
}

var _ Network = (*netcfg.Config)(nil)
