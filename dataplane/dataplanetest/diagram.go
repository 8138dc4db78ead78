package dataplanetest

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/dstm-project/dstm/dataplane/packet"
)

// The addresses of the suite, all for documentation.
const (
	hostIP      = "2001:db8:1::2"
	otherHostIP = "2001:db8:1::3"
	tepIP       = "2001:db8:a::1"
	otherTEPIP  = "2001:db8:a::2"
	nowhereIP   = "2001:db8:ffff::1" // no route leads there

	leased      = "198.51.100.7"  // hostIP's
	otherLeased = "198.51.100.8"  // otherHostIP's
	secondTEP   = "198.51.100.9"  // hostIP's, at otherTEPIP
	small       = "198.51.100.10" // otherHostIP's, with an MTU below the device's
	unreachable = "198.51.100.11" // nowhereIP's
	unbound     = "198.51.100.99" // nobody's

	placeholder = "192.0.0.2"
	server      = "203.0.113.2"
	router4     = "203.0.113.1" // the gateway, towards the server
)

// The hop counts of every packet that does not say otherwise, and the size of data.
const (
	ttlIn    = 64
	hopsIn   = 61 // of the outer header as it comes: unlike what an engine sends
	hopsOut  = 64
	dataSize = 44
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// data is a whole IPv4 packet with a UDP datagram.
//
//	IPv4 src > dst ttl 64 | UDP 4000 > 9 | 16 bytes
func data(src, dst string, edits ...func(*packet.IPv4)) []byte {
	return sized(dataSize, src, dst, edits...)
}

// sized is data of n bytes.
func sized(n int, src, dst string, edits ...func(*packet.IPv4)) []byte {
	h := packet.IPv4{ID: 0x1234, TTL: ttlIn, Protocol: packet.ProtoUDP, Src: addr(src), Dst: addr(dst)}
	for _, e := range edits {
		e(&h)
	}
	payload := make([]byte, n-28-len(h.Options))
	for i := range payload {
		payload[i] = byte(i)
	}
	return h.Packet(packet.UDP{SrcPort: 4000, DstPort: 9}.Datagram(h.Src, h.Dst, payload))
}

// hop is the packet behind one router more.
func hop(b []byte) []byte {
	h, payload, err := packet.ParseIPv4(b)
	if err != nil {
		panic(err) // a row of the suite is wrong
	}
	h.TTL--
	return h.Packet(payload)
}

func ttl(n uint8) func(*packet.IPv4)       { return func(h *packet.IPv4) { h.TTL = n } }
func tos(v uint8) func(*packet.IPv4)       { return func(h *packet.IPv4) { h.TOS = v } }
func options(o ...byte) func(*packet.IPv4) { return func(h *packet.IPv4) { h.Options = o } }
func fragment(v uint16) func(*packet.IPv4) { return func(h *packet.IPv4) { h.Fragment = v } }

// tunnel is IPv4 in IPv6 on its way to the engine.
//
//	IPv6 src > dst hops 61 next 4 | inner
func tunnel(src, dst string, inner []byte, edits ...func(*packet.IPv6)) []byte {
	h := packet.IPv6{NextHeader: packet.ProtoIPv4, HopLimit: hopsIn, Src: addr(src), Dst: addr(dst)}
	for _, e := range edits {
		e(&h)
	}
	return h.Packet(inner)
}

func class(v uint8) func(*packet.IPv6) { return func(h *packet.IPv6) { h.TrafficClass = v } }
func hops(n uint8) func(*packet.IPv6)  { return func(h *packet.IPv6) { h.HopLimit = n } }
func next(p uint8) func(*packet.IPv6)  { return func(h *packet.IPv6) { h.NextHeader = p } }

// encapsulated is IPv4 in IPv6 as an engine sends it: a hop limit of its own, the inner traffic class.
func encapsulated(src, dst string, inner []byte) []byte {
	return tunnel(src, dst, inner, hops(hopsOut), class(inner[1]))
}

// withOptions puts a destination options header (RFC 8200 section 4.6) of 8 bytes before the inner packet.
func withOptions(src, dst string, opts [6]byte, inner []byte) []byte {
	h := append([]byte{packet.ProtoIPv4, 0}, opts[:]...)
	return tunnel(src, dst, append(h, inner...), next(packet.ProtoDstOptions))
}

// fragmented is the outer fragment (RFC 8200 section 4.5) at offset, a multiple of 8, of a tunnel packet.
func fragmented(src, dst string, offset int, more bool, part []byte) []byte {
	h := []byte{packet.ProtoIPv4, 0, 0, 0, 0, 0, 0, 1}
	binary.BigEndian.PutUint16(h[2:], uint16(offset))
	if more {
		h[3] |= 1
	}
	return tunnel(src, dst, append(h, part...), next(packet.ProtoFragment))
}

// edit overwrites bytes from at on, whatever they mean.
func edit(b []byte, at int, v ...byte) []byte {
	b = slices.Clone(b)
	copy(b[at:], v)
	return b
}

// tcp is a whole IPv4 packet with a TCP header (RFC 9293 section 3.1) of 20 bytes and n bytes of data.
//
//	IPv4 src > dst ttl 64 | TCP sport > dport ack | n bytes
func tcp(src, dst string, sport, dport uint16, n int, edits ...func(*packet.IPv4)) []byte {
	const protocol, headerLen = 6, 20
	h := packet.IPv4{ID: 0x1234, TTL: ttlIn, Protocol: protocol, Src: addr(src), Dst: addr(dst)}
	for _, e := range edits {
		e(&h)
	}
	b := make([]byte, headerLen+n)
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	b[12], b[13] = headerLen/4<<4, 0x10 // data offset, ACK
	pseudo := slices.Concat(h.Src.AsSlice(), h.Dst.AsSlice(), []byte{0, protocol, byte(len(b) >> 8), byte(len(b))}, b)
	binary.BigEndian.PutUint16(b[16:], packet.Checksum(pseudo))
	return h.Packet(b)
}

// echo is a whole IPv4 packet with an ICMP echo message of identifier 7.
func echo(typ uint8, src, dst string) []byte {
	h := packet.IPv4{TTL: ttlIn, Protocol: packet.ProtoICMP, Src: addr(src), Dst: addr(dst)}
	return h.Packet(packet.ICMPv4{Type: typ, Rest: 7<<16 | 1}.Message([]byte("ping")))
}

// unlabelled sets the one variable field of a packet to 0: an engine chooses the flow label (RFC 6438).
func unlabelled(b []byte) []byte {
	if len(b) < 4 || b[0]>>4 != 6 {
		return b
	}
	return edit(b, 1, b[1]&0xf0, 0, 0)
}

// describe draws a packet for people.
func describe(b []byte) string {
	if h, payload, err := packet.ParseIPv6(b); err == nil {
		s := fmt.Sprintf("IPv6 %s > %s class %#02x label %#05x hops %d next %d",
			h.Src, h.Dst, h.TrafficClass, h.FlowLabel, h.HopLimit, h.NextHeader)
		if h.NextHeader == packet.ProtoIPv4 {
			return s + " | " + describe(payload)
		}
		return s + " | " + hexOf(payload)
	}
	h, payload, err := packet.ParseIPv4(b)
	if err != nil {
		return fmt.Sprintf("%s (%v)", hexOf(b), err)
	}
	return fmt.Sprintf("IPv4 %s > %s tos %#02x id %#04x fragment %#04x ttl %d protocol %d sum %x options %x | %s",
		h.Src, h.Dst, h.TOS, h.ID, h.Fragment, h.TTL, h.Protocol, b[10:12], h.Options, hexOf(payload))
}

func hexOf(b []byte) string {
	const most = 64
	if len(b) <= most {
		return fmt.Sprintf("%x", b)
	}
	return fmt.Sprintf("%x... %d bytes", b[:most], len(b))
}
