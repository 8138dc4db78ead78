package dataplanetest

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/dataplane/packet"
	"github.com/dstm-project/dstm/lease"
)

const deviceMTU = 1460

// testMTU: a packet that is too big for the tunnel of a binding is answered with the MTU of that tunnel if it must not
// be fragmented (RFC 1191), and fragmented otherwise.
func (b *gatewayBed) testMTU(t *testing.T) {
	t.Run("above the device's MTU", func(t *testing.T) {
		b.fromServer(t, sized(deviceMTU+1, server, leased, fragment(packet.DontFragment)), deviceMTU)
	})
	tooBig := sized(smallMTU+1, server, small, fragment(packet.DontFragment))
	t.Run("above the binding's MTU", func(t *testing.T) { b.fromServer(t, tooBig, smallMTU) })
	whole := sized(smallMTU+100, server, small)
	t.Run("fragments", func(t *testing.T) { b.testFragments(t, frame{exit, whole}, whole) })
	whole = sized(smallMTU+100, leased, small)
	t.Run("fragments from host to host", func(t *testing.T) {
		b.testFragments(t, frame{uplink, tunnel(hostIP, tepIP, whole)}, whole)
	})
	t.Run("from host to host", b.testHairpinMTU)

	widened := gatewayTable()[3]
	widened.MTU = 0
	passes := []row{{"widened", frame{exit, tooBig}, on(uplink, encapsulated(tepIP, otherHostIP, hop(tooBig))), downSent}}
	ctx, table, wide := t.Context(), gatewayTable(), []lease.Binding{widened}
	for _, s := range []struct {
		name   string
		change func() error
		answer bool
	}{
		{"upsert with the device's MTU", func() error { return b.path.Apply(ctx, wide, nil) }, false},
		{"upsert with its own", func() error { return b.path.Apply(ctx, table, nil) }, true},
		{"replace", func() error { return b.path.Replace(ctx, wide) }, false},
		{"replace again", func() error { return b.path.Replace(ctx, table) }, true},
		{"replace by the next process", func() error {
			if err := b.path.Close(true); err != nil {
				return err
			}
			b.open(t)
			return b.path.Replace(ctx, wide)
		}, false},
		{"replace at last", func() error { return b.path.Replace(ctx, table) }, true},
		{"device down and up, and configured again", func() error {
			b.ns.IP("link set "+device+" down", "link set "+device+" up", "route add 198.51.100.0/24 dev "+device)
			b.configure(t)
			return nil
		}, true},
	} {
		if err := s.change(); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		t.Run(s.name, func(t *testing.T) {
			if s.answer {
				b.fromServer(t, tooBig, smallMTU)
			} else {
				b.run(t, passes)
			}
		})
	}
}

// fromServer sends a packet of the server that comes back as "fragmentation needed" before the engine sees it.
func (b *gatewayBed) fromServer(t *testing.T, pkt []byte, mtu uint32) {
	t.Helper()
	before := b.counters(t)
	b.ports[exit].send(t, pkt)
	expectTooBig(t, b.ports[exit].receive(t, 2*time.Second), pkt, mtu)
	b.expectMoved(t, before, row{}.counters())
	b.expectQuiet(t)
}

// expectTooBig compares an ICMP error with the packet that it is about. Its source and length are the kernel's choice.
func expectTooBig(t *testing.T, got, about []byte, mtu uint32) {
	t.Helper()
	h, message, err := packet.ParseIPv4(got)
	if err != nil {
		t.Errorf("no ICMP error came: %v", err)
		return
	}
	icmp, quoted, err := packet.ParseICMPv4(message)
	sent, _, _ := packet.ParseIPv4(about)
	want := packet.ICMPv4{Type: packet.ICMPUnreachable, Code: packet.CodeFragmentsNeeded, Rest: mtu}
	if err != nil || h.Protocol != packet.ProtoICMP || h.Dst != sent.Src || icmp != want {
		t.Errorf("got %v\n%s, want %+v to %s", err, describe(got), want, sent.Src)
	}
	const least = 28 // RFC 792: the header and 8 bytes
	if len(quoted) < least || !bytes.HasPrefix(about, quoted) {
		t.Errorf("it is about\n%s, want\n%s", describe(quoted), describe(about))
	}
}

// testFragments: the kernel fragments for the binding's MTU, and every fragment is a packet of its own to the engine.
func (b *gatewayBed) testFragments(t *testing.T, in frame, whole []byte) {
	h, payload, err := packet.ParseIPv4(hop(whole))
	if err != nil {
		t.Fatal(err)
	}
	const first = (smallMTU - 20) / 8 * 8
	h.Fragment = packet.MoreFragments
	pieces := [][]byte{h.Packet(payload[:first])}
	h.Fragment = first / 8
	pieces = append(pieces, h.Packet(payload[first:]))

	want := row{}.counters()
	if in.at == uplink { // decapsulated first
		want = row{in: in, out: on(exit, whole), tally: upSent}.counters()
	}
	before := b.counters(t)
	b.ports[in.at].send(t, in.pkt)
	for _, p := range pieces {
		b.expect(t, on(uplink, encapsulated(tepIP, otherHostIP, p)))
		want.Down.Rx, want.Down.RxBytes = want.Down.Rx+1, want.Down.RxBytes+uint64(len(p))
	}
	want.Down.Tx, want.Down.TxBytes = want.Down.Rx, want.Down.RxBytes
	b.expectMoved(t, before, want)
	b.expectQuiet(t)
}

// testHairpinMTU: what is too big for the other host's tunnel takes the way through the kernel, whose answer goes back
// through the tunnel.
func (b *gatewayBed) testHairpinMTU(t *testing.T) {
	fits := sized(smallMTU, leased, small, fragment(packet.DontFragment))
	b.run(t, []row{{
		"all that the binding carries",
		frame{uplink, tunnel(hostIP, tepIP, fits)},
		on(uplink, tunnel(tepIP, otherHostIP, hop(fits), hops(hopsOut))), upSent,
	}})
	inner := sized(smallMTU+1, leased, small, fragment(packet.DontFragment))
	before := b.counters(t)
	b.ports[uplink].send(t, tunnel(hostIP, tepIP, inner))
	o, answer, err := packet.ParseIPv6(b.ports[uplink].receive(t, 2*time.Second))
	if err != nil || o.Src != addr(tepIP) || o.Dst != addr(hostIP) || o.NextHeader != packet.ProtoIPv4 {
		t.Fatalf("got %+v, %v, want an answer in the host's tunnel", o, err)
	}
	expectTooBig(t, answer, inner, smallMTU)
	up := row{in: frame{uplink, tunnel(hostIP, tepIP, inner)}, out: on(exit, inner), tally: upSent}.counters()
	down := row{in: frame{tun, answer}, out: on(uplink, answer), tally: downSent}.counters()
	b.expectMoved(t, before, dataplane.Counters{Up: up.Up, Down: down.Down})
	b.expectQuiet(t)
}

// testSuperPacket: a TCP super-packet that a virtual machine hands over is one packet to the engine, and its segments
// are what has to fit. Such a packet says how long its segments are, but not how many there are.
//
//	IPv4 server > small ttl 64 | TCP | 2000 bytes in segments of 1000
func (b *gatewayBed) testSuperPacket(t *testing.T) {
	inner := tcp(server, small, 80, 4000, 2000, fragment(packet.DontFragment))
	h, segment, err := packet.ParseIPv4(inner)
	if err != nil {
		t.Fatal(err)
	}
	// The checksum is to be completed: it covers the pseudo header only.
	pseudo := append(append(h.Src.AsSlice(), h.Dst.AsSlice()...), 0, h.Protocol, byte(len(segment)>>8), byte(len(segment)))
	binary.BigEndian.PutUint16(segment[16:], ^packet.Checksum(pseudo))

	before := b.counters(t)
	b.sendSuper(t, inner, 1000)
	if out := b.ports[uplink].receive(t, 2*time.Second); out == nil {
		t.Error("nothing came")
	}
	want := row{in: frame{exit, inner}, out: on(uplink, inner), tally: downSent}.counters()
	b.expectMoved(t, before, want)
	for b.ports[uplink].receive(t, 5*time.Millisecond) != nil { // further segments
		continue
	}
}

// sendSuper sends a TCP super-packet out of the suite's end of the exit, as struct virtio_net_hdr describes it.
func (b *gatewayBed) sendSuper(t *testing.T, inner []byte, size uint16) {
	t.Helper()
	const needsChecksum, tcp4, ethernetLen = 1, 1, 14
	v := []byte{needsChecksum, tcp4}
	for _, n := range []uint16{ethernetLen + 40, size, ethernetLen + 20, 16} { // headers, segment, checksum from, at
		v = binary.NativeEndian.AppendUint16(v, n)
	}
	v = append(append(append(v, engineMAC...), suiteMAC...), 0x08, 0x00)
	b.suite.Do(func() error {
		ifi, err := net.InterfaceByName("v4")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return err
		}
		return unix.Sendto(fd, append(v, inner...), 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
	})
}
