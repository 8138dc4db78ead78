package tepd

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/internal/netcfg"
	"github.com/dstm-project/dstm/lease"
)

// tunPath is a packet path that consists of a persistent TUN.
type tunPath struct {
	*fakePath
	f *os.File
}

func (p *tunPath) Configure(ctx context.Context, c dataplane.GatewayConfig) error {
	if p.f == nil {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		p.f = os.NewFile(uintptr(fd), "tun")
		req, err := unix.NewIfreq(c.Device)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
			return err
		}
	}
	return p.fakePath.Configure(ctx, c)
}

func (p *tunPath) Close(keep bool) error {
	if p.f != nil {
		p.f.Close()
	}
	return p.fakePath.Close(keep)
}

func command(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s\n%s", what, command(t, "ip addr; ip -4 route"))
		}
	}
}

// TestGatewayInKernel runs a gateway over a real kernel; only the lease service and the tunnel are not there. Goroutines
// change threads, so the whole process needs a namespace of its own: it starts itself.
func TestGatewayInKernel(t *testing.T) {
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: sudo DSTM_TEST_ROOT=1 go test ./tepd/")
	}
	const inner = "-test.run=^TestGatewayInKernel$"
	if !strings.Contains(strings.Join(os.Args, " "), inner) {
		c := exec.Command("/proc/self/exe", inner, "-test.v")
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestGatewayInKernel") {
			t.Fatalf("in a network namespace of its own: %v\n%s", err, out)
		}
		return
	}
	command(t, "ip link set lo up; ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up; ip addr add 203.0.113.2/24 dev up0")
	forward := command(t, "cat /proc/sys/net/ipv4/ip_forward")
	addrs := command(t, "ip -o addr | grep -v fe80; ip route")
	w := &kernelWorld{newWorld(t, testConfig+testBGP)}
	w.cfg.Health = HealthConfig{Interval: 20 * time.Millisecond, Rise: 2, Fall: 2, Exit: w.cfg.Health.Exit}
	firstProcess(t, w)
	nextProcess(t, w)

	command(t, "ip route del default")
	d := Deps{Path: &tunPath{fakePath: &fakePath{t: t}}, Kernel: w.kernel()}
	if err := Cleanup(t.Context(), w.cfg, d, noSpeaker); err != nil {
		t.Fatal(err)
	}
	if got := command(t, "ip -o addr | grep -v fe80; ip route"); got != addrs {
		t.Errorf("addresses and routes after cleanup:\n%s\nbefore:\n%s", got, addrs)
	}
	if got := command(t, "cat /proc/sys/net/ipv4/ip_forward"); got != forward {
		t.Errorf("ip_forward %s after cleanup, %s before", got, forward)
	}
	if _, there, err := w.kernel().Link("dstm0"); err != nil || there {
		t.Errorf("device after cleanup: there %t, error %v", there, err)
	}
}

// inKernel is what a gateway with one pool keeps in the kernel.
const inKernel = `addr 192.0.2.1/32 dev dstm0
addr 2001:db8:a::1/128 dev lo nodad deprecated
blackhole 198.51.100.0/24 metric 4294967295
route 198.51.100.0/24 dev dstm0 metric 1024
sysctl net/ipv4/conf/all/send_redirects = 0
sysctl net/ipv4/conf/dstm0/ignore_routes_with_linkdown = 0
sysctl net/ipv4/conf/dstm0/send_redirects = 0
sysctl net/ipv4/ip_forward = 1
sysctl net/ipv6/conf/dstm0/forwarding = 1`

// kernelWorld is a world whose kernel is the real one.
type kernelWorld struct{ *world }

func (w *kernelWorld) kernel() *netcfg.Config {
	k, err := netcfg.Open(w.cfg.Paths.NetState(), slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(k.Close)
	return k
}

func (w *kernelWorld) dump() string {
	s, err := w.kernel().Dump()
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// process starts a gateway process.
func (w *kernelWorld) process() {
	w.path = &fakePath{t: w.t, table: map[lease.Resource]lease.Binding{}}
	w.g = New(w.cfg, Deps{
		Service: w.service, Path: &tunPath{fakePath: w.path}, Kernel: w.kernel(), Speakers: w.speaker,
		Now: w.now, Log: slog.New(slog.DiscardHandler),
	})
	w.start()
}

// firstProcess comes up, misses the way out, gets it, and heals a lost route.
func firstProcess(t *testing.T, w *kernelWorld) {
	w.process()
	st := <-w.service.streams
	st.down <- lease.SessionReply{Session: 1, EchoBootNS: st.hello.SentBootNS, GrantNS: uint64(time.Hour), Floor: 10, Cluster: cluster, Epoch: 1}
	st.down <- lease.SnapshotChunk{Session: 1, Rev: 10, Last: true, Records: []lease.Record{lease.PoolRecord(1, pool, false)}}
	eventually(t, "the self-test misses the IPv4 exit", func() bool {
		return strings.Contains(w.g.Status().Reason, "no IPv4 exit: the kernel has no route to 192.0.0.8")
	})
	command(t, "ip route add default via 203.0.113.1")
	eventually(t, "the gateway is up", func() bool { return w.g.Ready() == nil && len(w.speaker.calls()) == 1 })
	if d := cmp.Diff(inKernel, w.dump()); d != "" {
		t.Errorf("kernel state (-want +got):\n%s", d)
	}
	command(t, "ip route del 198.51.100.0/24 dev dstm0")
	eventually(t, "a lost route comes back", func() bool { return w.dump() == inKernel })
	w.end()
}

// nextProcess has no lease service and changes nothing.
func nextProcess(t *testing.T, w *kernelWorld) {
	w.service.setDown(true)
	w.process()
	eventually(t, "the next process runs", func() bool { return w.g.Status().Problem != "" })
	if d := cmp.Diff(inKernel, w.dump()); d != "" {
		t.Errorf("kernel state after a restart (-want +got):\n%s", d)
	}
	w.end()
}
