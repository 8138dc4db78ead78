package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

const (
	udpHeaderLen  = 8
	icmpHeaderLen = 8
)

// UDP is a UDP header (RFC 768) without length and checksum.
type UDP struct{ SrcPort, DstPort uint16 }

// Datagram returns the datagram for an IPv4 packet between src and dst, whose addresses its checksum covers. It
// panics if there are more than 65535 bytes.
func (h UDP) Datagram(src, dst netip.Addr, payload []byte) []byte {
	total := udpHeaderLen + len(payload)
	checkLen("UDP datagram", total)
	b := make([]byte, udpHeaderLen, total)
	binary.BigEndian.PutUint16(b, h.SrcPort)
	binary.BigEndian.PutUint16(b[2:], h.DstPort)
	binary.BigEndian.PutUint16(b[4:], uint16(total))
	b = append(b, payload...)
	s, d := src.As4(), dst.As4()
	c := ^fold(sum(sum(sum(uint64(ProtoUDP)+uint64(total), s[:]), d[:]), b))
	if c == 0 {
		c = 0xffff // 0 says that there is no checksum (RFC 768)
	}
	binary.BigEndian.PutUint16(b[6:], c)
	return b
}

// Types and codes of ICMP for IPv4 (RFC 792).
const (
	ICMPEchoReply       uint8 = 0
	ICMPUnreachable     uint8 = 3
	ICMPEcho            uint8 = 8
	CodeFragmentsNeeded uint8 = 4 // of ICMPUnreachable
)

// ICMPv4 is the header of an ICMP message (RFC 792) without its checksum.
type ICMPv4 struct {
	Type, Code uint8
	Rest       uint32 // echo: identifier << 16 | sequence; fragmentation needed: the next hop's MTU (RFC 1191 section 4)
}

// ErrNotICMP is wrapped by the errors of ParseICMPv4.
var ErrNotICMP = errors.New("not an ICMP message")

// ParseICMPv4 reads the message that is b, the payload of an IPv4 packet. Of an error message, the body is the start of
// the packet that it is about.
func ParseICMPv4(b []byte) (ICMPv4, []byte, error) {
	if len(b) < icmpHeaderLen {
		return ICMPv4{}, nil, fmt.Errorf("%w: %d bytes, want at least %d", ErrNotICMP, len(b), icmpHeaderLen)
	}
	if c := Checksum(b); c != 0 {
		return ICMPv4{}, nil, fmt.Errorf("%w: the checksum is wrong by %#04x", ErrNotICMP, c)
	}
	return ICMPv4{Type: b[0], Code: b[1], Rest: binary.BigEndian.Uint32(b[4:])}, b[icmpHeaderLen:], nil
}

// Message returns the message with its checksum.
func (h ICMPv4) Message(body []byte) []byte {
	b := make([]byte, icmpHeaderLen, icmpHeaderLen+len(body))
	b[0], b[1] = h.Type, h.Code
	binary.BigEndian.PutUint32(b[4:], h.Rest)
	b = append(b, body...)
	binary.BigEndian.PutUint16(b[2:], Checksum(b))
	return b
}
