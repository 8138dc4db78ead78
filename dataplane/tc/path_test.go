package tc

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/dataplane/dataplanetest"
	"github.com/dstm-project/dstm/lease"
)

// The path of these tests: host ── gateway ── server, three namespaces. Host and gateway speak IPv6 to each other, the
// server is IPv4-only. What becomes of single packets is the suite's; here are connections and processes.
//
//	host 2001:db8:1::2 ──── 2001:db8:1::1 gateway 203.0.113.1 ──── 203.0.113.2 server
const (
	hostAddr   = "2001:db8:1::2"
	tepAddr    = "2001:db8:a::1"
	serverAddr = "203.0.113.2"
	leased     = "198.51.100.7"
)

type lab struct {
	t                     *testing.T
	host, gateway, server *dataplanetest.Namespace
	pins                  string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	dataplanetest.NeedRoot(t)
	l := &lab{
		t: t, pins: dataplanetest.PinDir(t), host: dataplanetest.NewNamespace(t, "h"),
		gateway: dataplanetest.NewNamespace(t, "g"), server: dataplanetest.NewNamespace(t, "s"),
	}
	l.host.IP("link add up0 type veth peer name up0 netns "+l.gateway.String(),
		"link set up0 up", "addr add 2001:db8:1::2/64 dev up0 nodad", "addr add fe80::2/64 dev up0 nodad")
	l.gateway.IP("link add v4 type veth peer name eth0 netns "+l.server.String(), "link set up0 up", "link set v4 up",
		"addr add 2001:db8:1::1/64 dev up0 nodad", "addr add fe80::1/64 dev up0 nodad",
		"addr add 2001:db8:a::1/128 dev lo nodad", "addr add 203.0.113.1/24 dev v4")
	l.host.IP("route add default via 2001:db8:1::1")
	l.server.IP("link set eth0 up", "addr add 203.0.113.2/24 dev eth0", "route add default via 203.0.113.1")
	l.gateway.Sysctl("net/ipv4/ip_forward", "1")
	return l
}

// in is the command that runs args in a namespace.
func in(ns *dataplanetest.Namespace, args ...string) *exec.Cmd {
	return exec.Command("ip", append([]string{"netns", "exec", ns.String()}, args...)...)
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func (l *lab) newGateway() *Gateway {
	l.t.Helper()
	var g *Gateway
	l.gateway.Do(func() (err error) {
		if g, err = NewGateway(quiet()); err != nil {
			return err
		}
		return g.Configure(context.Background(), dataplane.GatewayConfig{
			Device: "dstm0", Uplinks: []string{"up0"}, TEPs: []netip.Addr{netip.MustParseAddr(tepAddr)}, PinDir: l.pins,
		})
	})
	return g
}

func (l *lab) newHost() *Host {
	l.t.Helper()
	var h *Host
	l.host.Do(func() (err error) {
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
		Resource: lease.Whole(netip.MustParseAddr(addr)),
		Host:     netip.MustParseAddr(hostAddr), TEP: netip.MustParseAddr(tepAddr), Gen: 1,
	}
}

// TestPath is the life of a connection over the real kernel: a first packet that waits for the lease, then TCP.
func TestPath(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	g, h := l.newGateway(), l.newHost()
	defer l.gateway.Do(func() error { return g.Close(false) })
	defer l.host.Do(h.Close)
	l.gateway.IP("route add 198.51.100.0/24 dev dstm0")
	l.host.IP("addr add 192.0.0.2/29 dev dstm0", "route add default dev dstm0")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	// No lease: the packet goes to the reader, and leaves through the lease once there is one.
	ping := in(l.host, "ping", "-c1", "-W10", serverAddr)
	var out strings.Builder
	ping.Stdout = &out
	must(ping.Start())
	rctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	held, err := h.ReadHeld(rctx)
	must(err)
	b := binding(leased)
	must(g.Apply(ctx, []lease.Binding{b}, nil))
	must(g.SetDeadline(ctx, dataplanetest.BootNS(time.Hour)))
	must(h.SetLease(ctx, &b, dataplanetest.BootNS(time.Hour)))
	l.host.Do(func() error { return h.Inject(ctx, held) })
	if err := ping.Wait(); err != nil {
		c, _ := g.Counters(ctx)
		hc, _ := h.Counters(ctx)
		t.Fatalf("first ping, held and sent again: %v\n%s\ngateway %+v\nhost %+v", err, out.String(), c, hc)
	}

	// A leased source address, TCP both ways, bytes compared.
	l.host.IP("addr add "+leased+"/32 dev dstm0", "route replace default dev dstm0 src "+leased)
	l.transfer(8 << 20)

	// A DF packet above the tunnel MTU is answered by the kernel.
	o, err := in(l.host, "ping", "-c1", "-W2", "-M", "do", "-s", fmt.Sprint(1460-28+1), serverAddr).CombinedOutput()
	if err == nil || !strings.Contains(string(o), "mtu") || !strings.Contains(string(o), "1460") {
		t.Errorf("ping with DF above the MTU: %v\n%s, want the MTU 1460", err, o)
	}
	// Super-packets count as one, whole.
	c, err := g.Counters(ctx)
	must(err)
	hc, err := h.Counters(ctx)
	must(err)
	for name, d := range map[string]dataplane.Direction{
		"gateway up": c.Up, "gateway down": c.Down, "host up": hc.Up, "host down": hc.Down,
	} {
		if d.Rx != d.Tx+d.Consumed+d.Drops[dataplane.DropNotIPv4] || d.TxBytes < 8<<20 {
			t.Errorf("%s: %+v, want every packet sent or consumed, and at least 8 MiB", name, d)
		}
	}
}

// transfer sends n bytes each way over one TCP connection.
func (l *lab) transfer(n int64) {
	l.t.Helper()
	var ln net.Listener
	l.server.Do(func() (err error) { ln, err = net.Listen("tcp", serverAddr+":8080"); return err })
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
	l.host.Do(func() error {
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

// TestRestartKeepsForwarding: a gateway process that dies loses no packet, and neither does the next one.
func TestRestartKeepsForwarding(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	g, h := l.newGateway(), l.newHost()
	defer l.host.Do(h.Close)
	l.gateway.IP("route add 198.51.100.0/24 dev dstm0")
	l.host.IP("addr add "+leased+"/32 dev dstm0", "route add default dev dstm0 src "+leased)
	b := binding(leased)
	for _, err := range []error{
		g.Apply(ctx, []lease.Binding{b}, nil),
		g.SetDeadline(ctx, dataplanetest.BootNS(time.Hour)),
		h.SetLease(ctx, &b, dataplanetest.BootNS(time.Hour)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	const packets = 300
	stream := in(l.host, "ping", "-c", fmt.Sprint(packets), "-i", "0.01", "-W5", "-q", serverAddr)
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
	want := fmt.Sprintf("%d packets transmitted, %d received, 0%% packet loss", packets, packets)
	if err := stream.Wait(); err != nil || !strings.Contains(out.String(), want) {
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
	l.gateway.Do(func() error { return g.Close(false) })
}

// TestForeignDevice: a device of our name that is not ours is refused.
func TestForeignDevice(t *testing.T) {
	l := newLab(t)
	l.gateway.IP("link add dstm0 type veth peer name x0")
	l.gateway.Do(func() error {
		g, err := NewGateway(quiet())
		if err != nil {
			return err
		}
		c := dataplane.GatewayConfig{Device: "dstm0", Uplinks: []string{"up0"}, PinDir: l.pins}
		err = g.Configure(context.Background(), c)
		if err == nil || !strings.Contains(err.Error(), "device dstm0 exists and is not ours (type veth") {
			t.Errorf("foreign device: %v, want a refusal that names it", err)
		}
		return nil
	})
}
