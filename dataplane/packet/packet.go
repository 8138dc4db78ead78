// Package packet reads and writes the headers that DSTM meets: IPv4, IPv6, UDP and ICMP for IPv4. It is pure bytes:
// no socket, no kernel, only the standard library. IPv4 in IPv6 (RFC 2473) is an IPv6 header with ProtoIPv4 whose
// payload is an IPv4 packet.
package packet

import "fmt"

// Protocol numbers: IPv4's protocol and IPv6's next header.
const (
	ProtoICMP       uint8 = 1
	ProtoIPv4       uint8 = 4
	ProtoUDP        uint8 = 17
	ProtoIPv6       uint8 = 41
	ProtoFragment   uint8 = 44 // RFC 8200 section 4.5
	ProtoICMPv6     uint8 = 58
	ProtoDstOptions uint8 = 60 // RFC 8200 section 4.6
)

// Checksum is the Internet checksum of b (RFC 1071). Over data that holds its own checksum it is 0.
func Checksum(b []byte) uint16 { return ^fold(sum(0, b)) }

// sum adds b as big-endian 16-bit words; an odd byte at the end counts as the high half of a word.
func sum(s uint64, b []byte) uint64 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint64(b[0])<<8 | uint64(b[1])
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

func fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// checkLen keeps a length field from wrapping round. A packet that cannot exist is the caller's mistake.
func checkLen(what string, n int) {
	if n > 0xffff {
		panic(fmt.Sprintf("packet: %s of %d bytes: the length field holds at most 65535", what, n))
	}
}
