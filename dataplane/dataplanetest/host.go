package dataplanetest

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/dataplane/packet"
	"github.com/dstm-project/dstm/lease"
)

// hostBed is a host on an IPv6-only link:
//
//	[ applications, dstm0, host ] up0 2001:db8:1::2 ── ... ── 2001:db8:a::1 gateway
//
// The suite is the applications too. No address is leased as far as the host's stack knows, so that nothing answers.
type hostBed struct {
	bed
	ns   *Namespace
	path dataplane.Host
}

func newHostBed(t *testing.T, e Engine, kind uplinkKind, seen map[dataplane.DropReason]bool) *hostBed {
	t.Helper()
	const router = "2001:db8:1::1"
	ns, suite := NewNamespace(t, "h"), NewNamespace(t, "s")
	b := &hostBed{ns: ns}
	b.seen = seen
	b.ports = map[place]*port{uplink: addUplink(ns, suite, kind, hostIP+"/64", router)}
	way := "dev " + uplinkDev
	if kind == ethernet {
		way += " via " + router
	}
	ns.IP("addr add "+otherHostIP+"/64 dev "+uplinkDev+" nodad", "route add 2001:db8:a::/48 "+way)
	ns.Do(func() (err error) {
		if b.path, err = e.NewHost(); err != nil {
			return err
		}
		return b.path.Configure(t.Context(), dataplane.HostConfig{
			Device: device, Placeholder: netip.MustParsePrefix(placeholder + "/29"), Uplinks: []string{uplinkDev},
			HopLimit: hopsOut, HoldPackets: 8, PinDir: PinDir(t),
		})
	})
	t.Cleanup(func() { _ = b.path.Close() })
	b.bed.path = b.path
	b.ports[tun] = openPacket(ns, device, nil, unix.ETH_P_IP)
	b.settle(t)
	return b
}

// lease sets a lease through the gateway tep that runs for some time, or with "" removes it.
func (b *hostBed) lease(t *testing.T, tep string, in time.Duration) {
	t.Helper()
	var l *lease.Binding
	if tep != "" {
		l = &lease.Binding{Resource: lease.Whole(addr(leased)), Host: addr(hostIP), TEP: addr(tep), Gen: 1}
	}
	if err := b.path.SetLease(t.Context(), l, BootNS(in)); err != nil {
		t.Fatal(err)
	}
}

func testHost(t *testing.T, e Engine, kind uplinkKind, seen map[dataplane.DropReason]bool) {
	b := newHostBed(t, e, kind, seen)
	b.testFirstPacket(t)
	b.run(t, hostSends())
	b.run(t, hostTranslates())
	b.run(t, hostReceives())
	b.run(t, hostMalformed())

	b.ns.Sysctl("net/ipv6/conf/"+uplinkDev+"/mtu", "1400") // as a router advertisement does (RFC 4861 section 4.6.4)
	fits := sized(1360, leased, server)
	b.run(t, []row{
		{"out: all that the link carries", frame{tun, fits}, on(uplink, encapsulated(hostIP, tepIP, fits)), upSent},
		{"out: more than the link carries", frame{tun, sized(1361, leased, server)}, nil, upDropped(dataplane.DropTooBig)},
	})
	b.lease(t, nowhereIP, time.Hour)
	b.run(t, []row{{"no route to the gateway", frame{tun, data(leased, server)}, nil, upDropped(dataplane.DropNoRoute)}})
	in := frame{uplink, tunnel(tepIP, hostIP, data(server, leased))}
	b.lease(t, tepIP, -time.Second)
	b.run(t, []row{
		{"out after the deadline", frame{tun, data(leased, server)}, nil, upConsumed},
		{"in after the deadline", in, nil, downDropped(dataplane.DropSessionExpired)},
	})
	b.expectHeld(t, data(leased, server))
	b.lease(t, "", 0)
	b.run(t, []row{
		{"in without a lease", in, nil, tally{}},
		{"out without a lease", frame{tun, data(leased, server)}, nil, upConsumed},
	})
	b.expectExact(t)
}

// testFirstPacket: what finds no lease goes to Go, and leaves through the lease when it is sent again.
func (b *hostBed) testFirstPacket(t *testing.T) {
	first := data(placeholder, server)
	b.run(t, []row{
		{"the first packet", frame{tun, first}, nil, upConsumed},
		{"in before a lease", frame{uplink, tunnel(tepIP, hostIP, data(server, leased))}, nil, tally{}},
	})
	held := b.expectHeld(t, first)
	b.lease(t, tepIP, time.Hour)
	if a, err := b.path.Activity(t.Context()); err != nil || a != 0 {
		t.Errorf("activity at %v, %v before a packet went through the lease, want 0", a, err)
	}
	out := on(uplink, encapsulated(hostIP, tepIP, data(leased, server)))
	again := row{in: frame{tun, first}, out: out, tally: upSent}
	before := b.counters(t)
	b.ns.Do(func() error { return b.path.Inject(t.Context(), held) })
	b.expect(t, again.out)
	b.expectMoved(t, before, again.counters())
	now := time.Duration(BootNS(0))
	if a, err := b.path.Activity(t.Context()); err != nil || a > now || a < now-10*time.Second {
		t.Errorf("activity at %v, %v, want just before %v", a, err, now)
	}
}

func (b *hostBed) expectHeld(t *testing.T, want []byte) dataplane.Held {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for {
		h, err := b.path.ReadHeld(ctx)
		if err != nil {
			t.Fatalf("held packet: %v", err)
		}
		if bytes.Equal(h.Data, want) {
			return h
		}
		t.Errorf("held\n%s, want\n%s", describe(h.Data), describe(want))
	}
}

func hostSends() []row {
	out := func(name string, inner []byte) row {
		return row{name, frame{tun, inner}, on(uplink, encapsulated(hostIP, tepIP, inner)), upSent}
	}
	refused := func(name string, pkt []byte, why dataplane.DropReason) row {
		return row{name, frame{tun, pkt}, nil, upDropped(why)}
	}
	return []row{
		out("out: the inner packet is not touched", data(leased, server)),
		out("out: DSCP and ECN are copied", data(leased, server, tos(0xb9))),
		out("out: all that the device carries", sized(deviceMTU, leased, server)),
		out("out: TCP", tcp(leased, server, 4000, 80, 100)),
		out("out: inner fragment", data(leased, server, fragment(20))),
		refused("out: not the lease", data(otherLeased, server), dataplane.DropInnerAddress),
		refused("out: to multicast", data(leased, "224.0.0.1"), dataplane.DropInnerAddress),
		refused("out: to loopback", data(leased, "127.0.0.1"), dataplane.DropInnerAddress),
		refused("out: IPv6", tunnel(hostIP, tepIP, data(leased, server)), dataplane.DropNotIPv4),
	}
}

// hostTranslates: a flow that began before the lease keeps the placeholder on the host's side; checksums stay right.
func hostTranslates() []row {
	noSum := func(b []byte) []byte { return edit(b, 26, 0, 0) } // no UDP checksum (RFC 768)
	var rows []row
	for _, f := range []struct {
		name string
		out  func(src string) []byte
		in   func(dst string) []byte
	}{
		{
			"UDP",
			func(src string) []byte { return data(src, server) },
			func(dst string) []byte { return back(server, dst) },
		},
		{
			"UDP without checksum",
			func(src string) []byte { return noSum(data(src, server)) },
			func(dst string) []byte { return noSum(back(server, dst)) },
		},
		{
			"TCP",
			func(src string) []byte { return tcp(src, server, 5000, 80, 9) },
			func(dst string) []byte { return tcp(server, dst, 80, 5000, 9) },
		},
		{
			"ping",
			func(src string) []byte { return echo(packet.ICMPEcho, src, server) },
			func(dst string) []byte { return echo(packet.ICMPEchoReply, server, dst) },
		},
	} {
		out := on(uplink, encapsulated(hostIP, tepIP, f.out(leased)))
		in := frame{uplink, tunnel(tepIP, hostIP, f.in(leased))}
		rows = append(rows,
			row{f.name + " out from the placeholder", frame{tun, f.out(placeholder)}, out, upSent},
			row{f.name + " in to the placeholder", in, on(tun, f.in(placeholder)), downSent})
	}
	other := tcp(server, leased, 80, 5001, 9)
	in := frame{uplink, tunnel(tepIP, hostIP, other)}
	return append(rows, row{"another flow in to the lease", in, on(tun, other), downSent})
}

// back is data in the other direction: UDP 9 > 4000.
func back(src, dst string) []byte {
	h := packet.IPv4{TTL: ttlIn, Protocol: packet.ProtoUDP, Src: addr(src), Dst: addr(dst)}
	return h.Packet(packet.UDP{SrcPort: 9, DstPort: 4000}.Datagram(h.Src, h.Dst, []byte("reply")))
}

func hostReceives() []row {
	in := func(name string, pkt, out []byte) row { return row{name, frame{uplink, pkt}, on(tun, out), downSent} }
	refused := func(name string, pkt []byte, why dataplane.DropReason) row {
		return row{name, frame{uplink, pkt}, nil, downDropped(why)}
	}
	toStack := func(name string, pkt []byte) row { return row{name, frame{uplink, pkt}, nil, tally{}} }
	inner := tcp(server, leased, 80, 4000, 9)
	rows := []row{
		in("in: the inner packet is not touched", tunnel(tepIP, hostIP, inner), inner),
		in("in: outer hop limit 1 is enough", tunnel(tepIP, hostIP, inner, hops(1)), inner),
		in("in: encapsulation limit", withOptions(tepIP, hostIP, [6]byte{4, 1, 4, 1, 1, 0}, inner), inner),
		refused("in: another gateway", tunnel(otherTEPIP, hostIP, inner), dataplane.DropOuterSource),
		refused("in: a neighbour", tunnel(otherHostIP, hostIP, inner), dataplane.DropOuterSource),
		refused("in: not for the lease", tunnel(tepIP, hostIP, data(server, otherLeased)), dataplane.DropInnerAddress),
		refused("in: from multicast", tunnel(tepIP, hostIP, data("224.0.0.1", leased)), dataplane.DropInnerAddress),
		toStack("in: another address of the host", tunnel(tepIP, otherHostIP, inner)),
		toStack("in: IPv6 in IPv6", tunnel(tepIP, hostIP, tunnel(tepIP, hostIP, inner), next(packet.ProtoIPv6))),
		toStack("in: an outer fragment", fragmented(tepIP, hostIP, 0, true, inner[:24])),
	}
	for _, e := range ecnRows {
		pkt := tunnel(tepIP, hostIP, tcp(server, leased, 80, 4000, 9, tos(e.inner)), class(e.outer))
		if e.drop {
			rows = append(rows, refused("in: "+e.name, pkt, dataplane.DropECN))
			continue
		}
		rows = append(rows, in("in: "+e.name, pkt, tcp(server, leased, 80, 4000, 9, tos(e.out))))
	}
	return rows
}

func hostMalformed() []row {
	good := data(server, leased)
	var rows []row
	for _, m := range malformedInner(good) {
		rows = append(rows, row{"in: " + m.name, frame{uplink, tunnel(tepIP, hostIP, m.pkt)}, nil, downDropped(m.why)})
	}
	for _, m := range malformedOuter(tepIP, hostIP, good) {
		rows = append(rows, row{"in: " + m.name, frame{uplink, m.pkt}, nil, downDropped(m.why)})
	}
	for _, m := range malformedAtDevice(data(leased, server)) {
		rows = append(rows, row{"out: " + m.name, frame{tun, m.pkt}, nil, upDropped(m.why)})
	}
	return rows
}
