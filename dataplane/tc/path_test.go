package tc

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/lease"
)

// The path of these tests: host ── gateway ── server, three namespaces. Host and gateway speak IPv6 to each other, the
// server is IPv4-only.
//
//	host 2001:db8:1::2 ──── 2001:db8:1::1 gateway 203.0.113.1 ──── 203.0.113.2 server
const (
	hostAddr   = "2001:db8:1::2"
	tepAddr    = "2001:db8:a::1"
	serverAddr = "203.0.113.2"
	leased     = "198.51.100.7"
	other      = "198.51.100.8"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getenv("DSTM_TEST_ROOT") != "1" {
		t.Skip("needs root: DSTM_TEST_ROOT=1 go test ./dataplane/tc")
	}
}

type lab struct {
	t                     *testing.T
	host, gateway, server string
	pins                  string
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func newLab(t *testing.T) *lab {
	t.Helper()
	needRoot(t)
	id := fmt.Sprintf("dp%d", os.Getpid()%10000)
	l := &lab{t: t, host: id + "h", gateway: id + "g", server: id + "s", pins: fmt.Sprintf("/sys/fs/bpf/dstm-test-%d", os.Getpid())}
	t.Cleanup(func() { os.RemoveAll(l.pins) })
	for _, n := range []string{l.host, l.gateway, l.server} {
		run(t, "ip", "netns", "add", n)
		t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", n).Run() })
		run(t, "ip", "-n", n, "link", "set", "lo", "up")
	}
	for _, c := range []string{
		"ip -n HOST link add up0 type veth peer name up0 netns GW",
		"ip -n GW link add v4 type veth peer name eth0 netns SRV",
		"ip -n HOST link set up0 up", "ip -n GW link set up0 up", "ip -n GW link set v4 up", "ip -n SRV link set eth0 up",
		"ip -n HOST addr add 2001:db8:1::2/64 dev up0 nodad", "ip -n GW addr add 2001:db8:1::1/64 dev up0 nodad",
		"ip -n GW addr add 2001:db8:a::1/128 dev lo nodad", "ip -n HOST -6 route add default via 2001:db8:1::1",
		"ip -n GW addr add 203.0.113.1/24 dev v4", "ip -n SRV addr add 203.0.113.2/24 dev eth0",
		"ip -n SRV route add default via 203.0.113.1",
		"ip netns exec GW sysctl -qw net.ipv4.ip_forward=1",
	} {
		c = strings.NewReplacer("HOST", l.host, "GW", l.gateway, "SRV", l.server).Replace(c)
		run(t, strings.Fields(c)...)
	}
	return l
}

// in runs f on a thread that is in a namespace.
func (l *lab) in(ns string, f func() error) {
	l.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		h, err := os.Open("/run/netns/" + ns)
		if err == nil {
			defer h.Close()
			if err = unix.Setns(int(h.Fd()), unix.CLONE_NEWNET); err == nil {
				// Settings of the namespace are reached through a /proc of its own.
				err = unix.Unshare(unix.CLONE_FS)
			}
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		l.t.Fatal(err)
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func (l *lab) newGateway() *Gateway {
	l.t.Helper()
	var g *Gateway
	l.in(l.gateway, func() (err error) {
		if g, err = NewGateway(quiet()); err != nil {
			return err
		}
		return g.Configure(context.Background(), dataplane.GatewayConfig{
			Device: "dstm0", Uplinks: []string{"up0"}, TEPs: []netip.Addr{netip.MustParseAddr(tepAddr)}, Hairpin: true, PinDir: l.pins,
		})
	})
	return g
}

func (l *lab) newHost() *Host {
	l.t.Helper()
	var h *Host
	l.in(l.host, func() (err error) {
		if h, err = NewHost(quiet()); err != nil {
			return err
		}
		return h.Configure(context.Background(), dataplane.HostConfig{
			Device: "dstm0", Placeholder: netip.MustParsePrefix("192.0.0.2/29"), PinDir: l.pins,
		})
	})
	return h
}

func binding(addr string) lease.Binding {
	return lease.Binding{
		Resource: lease.Whole(netip.MustParseAddr(addr)), Host: netip.MustParseAddr(hostAddr), TEP: netip.MustParseAddr(tepAddr), Gen: 1,
	}
}

func bootNS(in time.Duration) uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err)
	}
	return uint64(ts.Nano() + int64(in))
}

func (l *lab) try(ns string, args ...string) (string, error) {
	out, err := exec.Command("ip", append([]string{"netns", "exec", ns}, args...)...).CombinedOutput()
	return string(out), err
}

// TestPath is the whole life of a connection over the real kernel.
func TestPath(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	g, h := l.newGateway(), l.newHost()
	defer func() {
		l.in(l.host, h.Close)
		l.in(l.gateway, func() error { return g.Close(false) })
		if out, _ := l.try(l.gateway, "ip", "link", "show", "dstm0"); !strings.Contains(out, "does not exist") {
			t.Errorf("the device is left behind: %s", out)
		}
	}()
	run(t, "ip", "-n", l.gateway, "route", "add", "198.51.100.0/24", "dev", "dstm0")
	run(t, "ip", "-n", l.host, "addr", "add", "192.0.0.2/29", "dev", "dstm0")
	run(t, "ip", "-n", l.host, "route", "add", "default", "dev", "dstm0")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	// No lease: the packet goes to the reader, and leaves through the lease once there is one.
	ping := exec.Command("ip", "netns", "exec", l.host, "ping", "-c1", "-W10", serverAddr)
	var out strings.Builder
	ping.Stdout = &out
	must(ping.Start())
	rctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	held, err := h.ReadHeld(rctx)
	must(err)
	b := binding(leased)
	must(g.Apply(ctx, []lease.Binding{b}, nil))
	must(g.SetDeadline(ctx, bootNS(time.Hour)))
	must(h.SetLease(ctx, &b, bootNS(time.Hour)))
	l.in(l.host, func() error { return h.Inject(ctx, held) })
	if err := ping.Wait(); err != nil {
		c, _ := g.Counters(ctx)
		hc, _ := h.Counters(ctx)
		t.Fatalf("first ping, held and sent again: %v\n%s\ngateway %+v\nhost %+v", err, out.String(), c, hc)
	}

	// A leased source address, TCP both ways, bytes compared.
	run(t, "ip", "-n", l.host, "addr", "add", leased+"/32", "dev", "dstm0")
	run(t, "ip", "-n", l.host, "route", "replace", "default", "dev", "dstm0", "src", leased)
	l.transfer(8 << 20)

	// A DF packet above the tunnel MTU is answered by the kernel.
	o, err := l.try(l.host, "ping", "-c1", "-W2", "-M", "do", "-s", fmt.Sprint(1460-28+1), serverAddr)
	if err == nil || !strings.Contains(o, "mtu") || !strings.Contains(o, "1460") {
		t.Errorf("ping with DF above the MTU: %v\n%s, want the MTU 1460", err, o)
	}
	o, err = l.try(l.server, "ping", "-c1", "-W2", "-M", "do", "-s", fmt.Sprint(1460-28+1), leased)
	if err == nil || !strings.Contains(o, "Frag needed and DF set (mtu = 1460)") {
		t.Errorf("ping from the server with DF above the MTU: %v\n%s, want frag needed with 1460", err, o)
	}

	// A source that somebody else has leased: dropped at the gateway and counted.
	must(g.Apply(ctx, []lease.Binding{{Resource: lease.Whole(netip.MustParseAddr(other)), Host: netip.MustParseAddr("2001:db8:1::99"), TEP: b.TEP, Gen: 2}}, nil))
	spoof := binding(other)
	must(h.SetLease(ctx, &spoof, bootNS(time.Hour)))
	run(t, "ip", "-n", l.host, "addr", "add", other+"/32", "dev", "dstm0")
	if o, err := l.try(l.host, "ping", "-c2", "-i0.2", "-W1", "-I", other, serverAddr); err == nil {
		t.Errorf("a spoofed source got through: %s", o)
	}
	must(h.SetLease(ctx, &b, bootNS(time.Hour)))
	// Nobody has this one.
	if o, err := l.try(l.server, "ping", "-c1", "-W1", "198.51.100.9"); err == nil {
		t.Errorf("an address without a binding answers: %s", o)
	}
	// The deadline stops everything.
	must(g.SetDeadline(ctx, bootNS(-time.Second)))
	if o, err := l.try(l.host, "ping", "-c1", "-W1", "-I", leased, serverAddr); err == nil {
		t.Errorf("forwarded after the deadline: %s", o)
	}
	must(g.SetDeadline(ctx, bootNS(time.Hour)))
	run(t, "ip", "netns", "exec", l.host, "ping", "-c1", "-W5", "-I", leased, serverAddr)

	c, err := g.Counters(ctx)
	must(err)
	for name, n := range map[string]uint64{
		"outer_source": c.Up.Drops[dataplane.DropOuterSource], "session_expired": c.Up.Drops[dataplane.DropSessionExpired],
	} {
		if want := map[string]uint64{"outer_source": 2, "session_expired": 1}[name]; n != want {
			t.Errorf("%d packets dropped as %s, want %d", n, name, want)
		}
	}
	if c.Down.Drops[dataplane.DropNoBinding] == 0 {
		t.Error("the packet to an address without a binding was not counted")
	}
	hc, err := h.Counters(ctx)
	must(err)
	for name, d := range map[string]dataplane.Direction{"gateway up": c.Up, "gateway down": c.Down, "host up": hc.Up, "host down": hc.Down} {
		sum := d.Tx + d.Consumed
		for _, n := range d.Drops {
			sum += n
		}
		if d.Rx != sum || d.Rx == 0 {
			t.Errorf("%s: rx %d, tx + consumed + drops %d: %s", name, d.Rx, sum, toJSON(d))
		}
	}
}

func toJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// transfer sends n bytes each way over one TCP connection.
func (l *lab) transfer(n int64) {
	l.t.Helper()
	var ln net.Listener
	l.in(l.server, func() (err error) { ln, err = net.Listen("tcp", serverAddr+":8080"); return err })
	defer ln.Close()
	got := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			got <- err
			return
		}
		defer c.Close()
		if from := c.RemoteAddr().(*net.TCPAddr).IP.String(); from != leased {
			got <- fmt.Errorf("connection from %s, want %s", from, leased)
			return
		}
		_, err = io.CopyN(c, io.LimitReader(c, n), n) // echo
		got <- err
	}()
	l.in(l.host, func() error {
		c, err := net.DialTimeout("tcp", serverAddr+":8080", 10*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
			return err
		}
		sent := make(chan error, 1)
		go func() {
			_, err := io.CopyN(c, &pattern{}, n)
			sent <- err
		}()
		buf, at := make([]byte, 1<<16), int64(0)
		for at < n {
			k, err := c.Read(buf)
			if err != nil {
				return fmt.Errorf("after %d bytes: %w", at, err)
			}
			for i, b := range buf[:k] {
				if b != patternAt(at+int64(i)) {
					return fmt.Errorf("byte %d is %#x, want %#x", at+int64(i), b, patternAt(at+int64(i)))
				}
			}
			at += int64(k)
		}
		return <-sent
	})
	if err := <-got; err != nil {
		l.t.Error(err)
	}
}

// pattern is a stream in which every position can be told.
type pattern struct{ at int64 }

func patternAt(i int64) byte { return byte(i % 251) }

// Read implements io.Reader.
func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = patternAt(p.at)
		p.at++
	}
	return len(b), nil
}

// TestRestartKeepsForwarding: a gateway process that dies loses no packet, and neither does the next one that takes over.
func TestRestartKeepsForwarding(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	g, h := l.newGateway(), l.newHost()
	defer l.in(l.host, h.Close)
	run(t, "ip", "-n", l.gateway, "route", "add", "198.51.100.0/24", "dev", "dstm0")
	run(t, "ip", "-n", l.host, "addr", "add", leased+"/32", "dev", "dstm0")
	run(t, "ip", "-n", l.host, "route", "add", "default", "dev", "dstm0", "src", leased)
	b := binding(leased)
	for _, err := range []error{g.Apply(ctx, []lease.Binding{b}, nil), g.SetDeadline(ctx, bootNS(time.Hour)), h.SetLease(ctx, &b, bootNS(time.Hour))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	const packets = 300
	stream := exec.Command("ip", "netns", "exec", l.host, "ping", "-c", fmt.Sprint(packets), "-i", "0.01", "-W5", "-q", serverAddr)
	var out strings.Builder
	stream.Stdout = &out
	if err := stream.Start(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		time.Sleep(300 * time.Millisecond)
		if err := g.Close(true); err != nil { // what is left of a process that dies: pins and the persistent device
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
		g = l.newGateway()
		if err := g.Replace(ctx, []lease.Binding{b}); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.Wait(); err != nil || !strings.Contains(out.String(), fmt.Sprintf("%d packets transmitted, %d received, 0%% packet loss", packets, packets)) {
		t.Errorf("stream over three restarts: %v\n%s", err, out.String())
	}
	es, err := g.Entries(ctx)
	if err != nil || len(es) != 1 || es[0].Binding != b || es[0].LastSeen == 0 {
		t.Errorf("entries %+v, %v, want the one binding, seen", es, err)
	}
	if err := g.Replace(ctx, nil); err != nil {
		t.Error(err)
	}
	if es, err := g.Entries(ctx); err != nil || len(es) != 0 {
		t.Errorf("entries %+v, %v after an empty table, want none", es, err)
	}
	l.in(l.gateway, func() error { return g.Close(false) })
}

// TestForeignDevice: a device of our name that is not ours is refused.
func TestForeignDevice(t *testing.T) {
	l := newLab(t)
	run(t, "ip", "-n", l.gateway, "link", "add", "dstm0", "type", "veth", "peer", "name", "x0")
	l.in(l.gateway, func() error {
		g, err := NewGateway(quiet())
		if err != nil {
			return err
		}
		err = g.Configure(context.Background(), dataplane.GatewayConfig{Device: "dstm0", Uplinks: []string{"up0"}, PinDir: l.pins})
		if err == nil || !strings.Contains(err.Error(), "device dstm0 exists and is not ours (type veth") {
			t.Errorf("foreign device: %v, want a refusal that names it", err)
		}
		return nil
	})
}
