package dataplanetest

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/dataplane/packet"
	"github.com/dstm-project/dstm/lease"
)

// gatewayBed is a gateway between tunnels and IPv4:
//
//	hosts 2001:db8:1::/64 ── up0 [ gateway, dstm0 ] v4 ── 203.0.113.2 server
type gatewayBed struct {
	bed
	engine    Engine
	ns, suite *Namespace
	path      dataplane.Gateway
	cfg       dataplane.GatewayConfig
}

// smallMTU is the MTU of one binding, below the device's.
const smallMTU = 1280

func gatewayTable() []lease.Binding {
	bind := func(a, host, tep string, mtu uint16) lease.Binding {
		return lease.Binding{Resource: lease.Whole(addr(a)), Host: addr(host), TEP: addr(tep), Gen: 1, MTU: mtu}
	}
	return []lease.Binding{
		bind(leased, hostIP, tepIP, 0),
		bind(otherLeased, otherHostIP, tepIP, 0),
		bind(secondTEP, hostIP, otherTEPIP, 0),
		bind(small, otherHostIP, tepIP, smallMTU),
		bind(unreachable, nowhereIP, tepIP, 0),
	}
}

func newGatewayBed(t *testing.T, e Engine, kind uplinkKind, seen map[dataplane.DropReason]bool) *gatewayBed {
	t.Helper()
	ns, suite := NewNamespace(t, "g"), NewNamespace(t, "s")
	b := &gatewayBed{engine: e, ns: ns, suite: suite, cfg: dataplane.GatewayConfig{
		Device: device, Uplinks: []string{uplinkDev}, TEPs: []netip.Addr{addr(tepIP), addr(otherTEPIP)},
		HopLimit: hopsOut, Hairpin: true, PinDir: PinDir(t),
	}}
	b.seen = seen
	b.ports = map[place]*port{
		uplink: addUplink(ns, suite, kind, "2001:db8:1::1/64", hostIP, otherHostIP),
		exit:   addVeth(ns, suite, "v4"),
	}
	ns.IP("addr add "+tepIP+"/128 dev lo nodad", "addr add "+otherTEPIP+"/128 dev lo nodad",
		"addr add "+router4+"/24 dev v4")
	addNeighbours(ns, "v4", server)
	// Strict reverse path filters are common, so that they have to be no obstacle.
	// Fragments from host to host leave through the device that they came by, which is no news to a host.
	for name, v := range map[string]string{
		"ip_forward": "1", "icmp_ratelimit": "0", "conf/all/rp_filter": "1",
		"conf/all/send_redirects": "0", "conf/default/send_redirects": "0",
	} {
		ns.Sysctl("net/ipv4/"+name, v)
	}
	t.Cleanup(func() { _ = b.path.Close(false) })
	b.open(t)
	ns.IP("addr add 192.0.2.1/32 dev "+device, "route add 198.51.100.0/24 dev "+device)
	b.ports[tun] = openPacket(ns, device, nil, 0)
	b.deadline(t, time.Hour)
	if err := b.path.Replace(t.Context(), gatewayTable()); err != nil {
		t.Fatal(err)
	}
	b.settle(t)
	return b
}

// open is what a process does first, be it the first one or another.
func (b *gatewayBed) open(t *testing.T) {
	t.Helper()
	b.ns.Do(func() (err error) { b.path, err = b.engine.NewGateway(); return err })
	b.bed.path = b.path
	b.configure(t)
}

func (b *gatewayBed) configure(t *testing.T) {
	t.Helper()
	b.ns.Do(func() error { return b.path.Configure(t.Context(), b.cfg) })
}

func (b *gatewayBed) deadline(t *testing.T, in time.Duration) {
	t.Helper()
	if err := b.path.SetDeadline(t.Context(), BootNS(in)); err != nil {
		t.Fatal(err)
	}
}

func testGateway(t *testing.T, e Engine, kind uplinkKind, seen map[dataplane.DropReason]bool) {
	b := newGatewayBed(t, e, kind, seen)
	b.run(t, gatewayForwards())
	b.run(t, gatewayHairpins())
	b.run(t, gatewayRefuses())
	b.testForged(t)
	b.run(t, gatewayMalformed())
	b.run(t, notForGateway())
	b.testMTU(t)
	t.Run("super-packet", b.testSuperPacket)
	t.Run("flow label", b.testLabel)

	b.cfg.Hairpin = false
	b.configure(t)
	between := frame{uplink, tunnel(hostIP, tepIP, data(leased, otherLeased))}
	b.run(t, []row{{"hairpin switched off", between, nil, upDropped(dataplane.DropHairpin)}})
	b.testTable(t)
	b.deadline(t, -time.Second)
	up, down := frame{uplink, tunnel(hostIP, tepIP, data(leased, server))}, frame{exit, data(server, leased)}
	b.run(t, []row{
		{"up after the deadline", up, nil, upDropped(dataplane.DropSessionExpired)},
		{"down after the deadline", down, nil, downDropped(dataplane.DropSessionExpired)},
	})
	b.expectExact(t)
	b.testClose(t)
}

// gatewayForwards: of the inner packet only the hop count changes, as behind any router.
func gatewayForwards() []row {
	up := func(name string, pkt, inner []byte) row {
		return row{name, frame{uplink, pkt}, on(exit, hop(inner)), upSent}
	}
	in := func(name string, inner []byte, edits ...func(*packet.IPv6)) row {
		return up("up: "+name, tunnel(hostIP, tepIP, inner, edits...), inner)
	}
	down := func(name, tep, host string, inner []byte) row {
		return row{"down: " + name, frame{exit, inner}, on(uplink, encapsulated(tep, host, hop(inner))), downSent}
	}
	plain := data(leased, server)
	withOpts := func(o [6]byte) []byte { return withOptions(hostIP, tepIP, o, plain) }
	rows := []row{
		in("one hop less", plain),
		in("DSCP inside stays, DSCP outside goes", data(leased, server, tos(0xb8)), class(0x28)),
		in("IPv4 options", data(leased, server, options(1, 1, 1, 0))),
		in("inner fragment", data(leased, server, fragment(packet.MoreFragments))),
		in("TCP", tcp(leased, server, 4000, 80, 11)),
		in("outer hop limit 1 is enough", plain, hops(1)),
		up("up: encapsulation limit, PadN", withOpts([6]byte{4, 1, 4, 1, 1, 0}), plain),
		up("up: encapsulation limit, Pad1", withOpts([6]byte{4, 1, 4, 0, 0, 0}), plain),
		up("up: PadN alone", withOpts([6]byte{1, 4, 0, 0, 0, 0}), plain),
		up("up: Pad1 alone", withOpts([6]byte{}), plain),
		up("up: an option that may be ignored", withOpts([6]byte{0x1e, 3, 0xff, 0xff, 0xff, 0}), plain),

		down("inner one hop less, outer hop limit as configured", tepIP, hostIP, data(server, leased)),
		down("each binding its tunnel", tepIP, otherHostIP, data(server, otherLeased)),
		down("from the gateway address of the binding", otherTEPIP, hostIP, data(server, secondTEP)),
		down("DSCP and ECN are copied", tepIP, hostIP, data(server, leased, tos(0xb9))),
		down("IPv4 options", tepIP, hostIP, data(server, leased, options(1, 1, 1, 0))),
		down("inner fragment", tepIP, hostIP, data(server, leased, fragment(20))),
		down("all that the device carries", tepIP, hostIP, sized(deviceMTU, server, leased)),
		down("all that the binding carries", tepIP, otherHostIP, sized(smallMTU, server, small)),
	}
	for _, e := range ecnRows {
		pkt := tunnel(hostIP, tepIP, data(leased, server, tos(e.inner)), class(e.outer))
		if e.drop {
			rows = append(rows, row{"up: " + e.name, frame{uplink, pkt}, nil, upDropped(dataplane.DropECN)})
			continue
		}
		rows = append(rows, up("up: "+e.name, pkt, data(leased, server, tos(e.out))))
	}
	return rows
}

// ecnRows is RFC 6040 figure 4: what becomes of the ECN fields when the outer header goes.
var ecnRows = []struct {
	name              string
	inner, outer, out uint8
	drop              bool
}{
	{name: "Not-ECT in Not-ECT", inner: 0, outer: 0, out: 0},
	{name: "Not-ECT in ECT(0)", inner: 0, outer: 2, out: 0},
	{name: "Not-ECT in ECT(1)", inner: 0, outer: 1, out: 0},
	{name: "Not-ECT in CE", inner: 0, outer: 3, drop: true},
	{name: "ECT(0) in Not-ECT", inner: 2, outer: 0, out: 2},
	{name: "ECT(0) in ECT(0)", inner: 2, outer: 2, out: 2},
	{name: "ECT(0) in ECT(1)", inner: 2, outer: 1, out: 1},
	{name: "ECT(0) in CE", inner: 2, outer: 3, out: 3},
	{name: "ECT(1) in Not-ECT", inner: 1, outer: 0, out: 1},
	{name: "ECT(1) in ECT(0)", inner: 1, outer: 2, out: 1},
	{name: "ECT(1) in ECT(1)", inner: 1, outer: 1, out: 1},
	{name: "ECT(1) in CE", inner: 1, outer: 3, out: 3},
	{name: "CE in Not-ECT", inner: 3, outer: 0, out: 3},
	{name: "CE in ECT(0)", inner: 3, outer: 2, out: 3},
	{name: "CE in ECT(1)", inner: 3, outer: 1, out: 3},
	{name: "CE in CE", inner: 3, outer: 3, out: 3},
}

// gatewayHairpins: from host to host only the addresses and hop counts change; the outer traffic class stays.
func gatewayHairpins() []row {
	return []row{
		{
			"hairpin",
			frame{uplink, tunnel(hostIP, tepIP, data(leased, otherLeased), class(0x28))},
			on(uplink, tunnel(tepIP, otherHostIP, hop(data(leased, otherLeased)), class(0x28), hops(hopsOut))), upSent,
		},
		{
			"hairpin: the last hop",
			frame{uplink, tunnel(hostIP, tepIP, data(leased, otherLeased, ttl(1)))},
			nil, upDropped(dataplane.DropHairpin),
		},
		{
			"hairpin: no route",
			frame{uplink, tunnel(hostIP, tepIP, data(leased, unreachable))},
			nil, upDropped(dataplane.DropNoRoute),
		},
	}
}

// gatewayRefuses: packets that are in order, but must not pass.
func gatewayRefuses() []row {
	up := func(name string, pkt []byte, why dataplane.DropReason) row {
		return row{name, frame{uplink, pkt}, nil, upDropped(why)}
	}
	return []row{
		up("another host's lease", tunnel(hostIP, tepIP, data(otherLeased, server)), dataplane.DropOuterSource),
		up("another host's tunnel source", tunnel(otherHostIP, tepIP, data(leased, server)), dataplane.DropOuterSource),
		up("a tunnel source unknown", tunnel(nowhereIP, tepIP, data(leased, server)), dataplane.DropOuterSource),
		up("another gateway address", tunnel(hostIP, tepIP, data(secondTEP, server)), dataplane.DropOuterDestination),
		up("nobody's lease", tunnel(hostIP, tepIP, data(unbound, server)), dataplane.DropNoBinding),
		up("a source outside of the pools", tunnel(hostIP, tepIP, data(server, leased)), dataplane.DropNoBinding),
		up("to loopback", tunnel(hostIP, tepIP, data(leased, "127.0.0.1")), dataplane.DropInnerAddress),
		up("to this network", tunnel(hostIP, tepIP, data(leased, "0.0.0.0")), dataplane.DropInnerAddress),
		up("to multicast", tunnel(hostIP, tepIP, data(leased, "224.0.0.1")), dataplane.DropInnerAddress),
		up("to broadcast", tunnel(hostIP, tepIP, data(leased, "255.255.255.255")), dataplane.DropInnerAddress),

		{"down to nobody's lease", frame{exit, data(server, unbound)}, nil, downDropped(dataplane.DropNoBinding)},
		{"down without route to the host", frame{exit, data(server, unreachable)}, nil, downDropped(dataplane.DropNoRoute)},
		{"down from loopback", frame{tun, data("127.0.0.1", leased)}, nil, downDropped(dataplane.DropInnerAddress)},
		{"down from multicast", frame{tun, data("224.0.0.1", leased)}, nil, downDropped(dataplane.DropInnerAddress)},
		{"down and IPv6", frame{tun, tunnel(hostIP, tepIP, data(server, leased))}, nil, downDropped(dataplane.DropNotIPv4)},
		{"down above the MTU", frame{tun, sized(smallMTU+1, server, small)}, nil, downDropped(dataplane.DropTooBig)},
	}
}

// testForged: a leased source that comes from the IPv4 side. Strict reverse path filters would drop it before us, so they
// are off here.
func (b *gatewayBed) testForged(t *testing.T) {
	filters := []string{"net/ipv4/conf/all/rp_filter", "net/ipv4/conf/v4/rp_filter"}
	for _, f := range filters {
		b.ns.Sysctl(f, "0")
	}
	forged := frame{exit, data(otherLeased, leased)}
	b.run(t, []row{{"down from another host's lease, forged outside", forged, nil, downDropped(dataplane.DropInnerAddress)}})
	for _, f := range filters {
		b.ns.Sysctl(f, "1")
	}
}

// gatewayMalformed: headers that are cut short or contradict each other.
func gatewayMalformed() []row {
	good := data(leased, server)
	var rows []row
	for _, m := range malformedInner(good) {
		rows = append(rows, row{m.name, frame{uplink, tunnel(hostIP, tepIP, m.pkt)}, nil, upDropped(m.why)})
	}
	for _, m := range malformedOuter(hostIP, tepIP, good) {
		rows = append(rows, row{m.name, frame{uplink, m.pkt}, nil, upDropped(m.why)})
	}
	for _, m := range malformedAtDevice(data(server, leased)) {
		rows = append(rows, row{"down: " + m.name, frame{tun, m.pkt}, nil, downDropped(m.why)})
	}
	return rows
}

// notForGateway: what the engine hands to the stack. Only outer fragments count as its own.
func notForGateway() []row {
	inner := data(leased, server)
	toStack := func(name string, pkt []byte) row { return row{name, frame{uplink, pkt}, nil, tally{}} }
	// A routing header that names no node to visit is skipped (RFC 8200 section 4.4), but not by us.
	routing := append([]byte{packet.ProtoIPv4, 0, 4, 0, 0, 0, 0, 0}, inner...)
	return []row{
		toStack("not a gateway address", tunnel(hostIP, "2001:db8:1::1", inner)),
		toStack("IPv6 in IPv6", tunnel(hostIP, tepIP, tunnel(hostIP, tepIP, inner), next(packet.ProtoIPv6))),
		toStack("no next header", tunnel(hostIP, tepIP, nil, next(59))),
		toStack("an unknown next header", tunnel(hostIP, tepIP, inner, next(253))),
		toStack("a routing header", tunnel(hostIP, tepIP, routing, next(43))),
		toStack("options before something else", edit(withOptions(hostIP, tepIP, [6]byte{1, 4}, inner), 40, 59)),
		toStack("IPv4 on the uplink", inner),
		// The stack reassembles fragments.
		{"the first fragment", frame{uplink, fragmented(hostIP, tepIP, 0, true, inner[:24])}, nil, upConsumed},
		{"the last fragment", frame{uplink, fragmented(hostIP, tepIP, 24, false, inner[24:])}, nil, upConsumed},
	}
}

// testTable: a change of the table is complete when the call returns.
func (b *gatewayBed) testTable(t *testing.T) {
	ctx := t.Context()
	in := frame{exit, data(server, leased)}
	good := row{in: in, out: on(uplink, encapsulated(tepIP, hostIP, hop(in.pkt))), tally: downSent}
	gone := row{in: in, tally: downDropped(dataplane.DropNoBinding)}
	first := gatewayTable()[0]
	for _, s := range []struct {
		name   string
		change func() error
		then   row
	}{
		{"delete", func() error { return b.path.Apply(ctx, nil, []lease.Resource{first.Resource}) }, gone},
		{"delete again", func() error { return b.path.Apply(ctx, nil, []lease.Resource{first.Resource}) }, gone},
		{"upsert", func() error { return b.path.Apply(ctx, []lease.Binding{first}, nil) }, good},
		{"replace without", func() error { return b.path.Replace(ctx, gatewayTable()[1:]) }, gone},
		{"replace with", func() error { return b.path.Replace(ctx, gatewayTable()) }, good},
	} {
		if err := s.change(); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		s.then.name = s.name
		b.run(t, []row{s.then})
	}
	es, err := b.path.Entries(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got := map[lease.Binding]bool{}
	for _, e := range es {
		got[e.Binding] = true
	}
	for _, want := range gatewayTable() {
		if !got[want] || len(es) != len(gatewayTable()) {
			t.Errorf("%d entries, want %d and among them %+v", len(es), len(gatewayTable()), want)
		}
	}
}

// testClose: nothing stays behind.
func (b *gatewayBed) testClose(t *testing.T) {
	b.ns.Do(func() error { return b.path.Close(false) })
	b.ns.Do(func() error {
		if _, err := net.InterfaceByName(device); err == nil {
			t.Errorf("the device %s is left behind", device)
		}
		return nil
	})
	if es, err := os.ReadDir(b.cfg.PinDir); err != nil && !errors.Is(err, os.ErrNotExist) || len(es) > 0 {
		t.Errorf("pins left behind: %v %v", es, err)
	}
}

// testLabel: the flow label tells flows apart, for routers that balance by it (RFC 6438), and keeps the packets of one
// together. Fragments have no ports, so that all of a packet go the same way.
func (b *gatewayBed) testLabel(t *testing.T) {
	label := func(inner []byte) uint32 {
		b.ports[exit].send(t, inner)
		h, _, err := packet.ParseIPv6(b.ports[uplink].receive(t, 2*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		return h.FlowLabel
	}
	one := label(tcp(server, leased, 80, 4000, 9))
	if again := label(tcp(server, leased, 80, 4000, 99)); again != one {
		t.Errorf("one flow has the labels %#05x and %#05x", one, again)
	}
	if other := label(tcp(server, leased, 80, 4001, 9)); other == one || other == 0 || one == 0 {
		t.Errorf("two flows have the labels %#05x and %#05x", one, other)
	}
	first := label(data(server, leased, fragment(packet.MoreFragments)))
	if last := label(data(server, leased, fragment(20))); last != first {
		t.Errorf("fragments have the labels %#05x and %#05x", first, last)
	}
}
