package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

const ipv6HeaderLen = 40

// IPv6 is an IPv6 header (RFC 8200 section 3) without the payload length.
type IPv6 struct {
	TrafficClass uint8  // DSCP and ECN
	FlowLabel    uint32 // 20 bits
	NextHeader   uint8
	HopLimit     uint8
	Src, Dst     netip.Addr
}

// ErrNotIPv6 is wrapped by the errors of ParseIPv6.
var ErrNotIPv6 = errors.New("not a whole IPv6 packet")

// ParseIPv6 reads the IPv6 packet at the start of b. The payload begins with the first extension header, if there is
// one.
func ParseIPv6(b []byte) (IPv6, []byte, error) {
	if len(b) < ipv6HeaderLen {
		return IPv6{}, nil, fmt.Errorf("%w: %d bytes, want at least %d", ErrNotIPv6, len(b), ipv6HeaderLen)
	}
	first, end := binary.BigEndian.Uint32(b), ipv6HeaderLen+int(binary.BigEndian.Uint16(b[4:]))
	switch {
	case first>>28 != 6:
		return IPv6{}, nil, fmt.Errorf("%w: version %d", ErrNotIPv6, first>>28)
	case end > len(b):
		return IPv6{}, nil, fmt.Errorf("%w: total length %d, want at most %d", ErrNotIPv6, end, len(b))
	}
	return IPv6{
		TrafficClass: uint8(first >> 20), FlowLabel: first & 0xfffff, NextHeader: b[6], HopLimit: b[7],
		Src: netip.AddrFrom16([16]byte(b[8:])), Dst: netip.AddrFrom16([16]byte(b[24:])),
	}, b[ipv6HeaderLen:end:end], nil
}

// Packet returns the packet of the header and its payload. It panics if there can be no such packet: a flow label of
// more than 20 bits, a payload of more than 65535 bytes.
func (h IPv6) Packet(payload []byte) []byte {
	if h.FlowLabel > 0xfffff {
		panic(fmt.Sprintf("packet: flow label %#x: want 20 bits", h.FlowLabel))
	}
	checkLen("IPv6 payload", len(payload))
	b := make([]byte, ipv6HeaderLen, ipv6HeaderLen+len(payload))
	binary.BigEndian.PutUint32(b, 6<<28|uint32(h.TrafficClass)<<20|h.FlowLabel)
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = h.NextHeader, h.HopLimit
	src, dst := h.Src.As16(), h.Dst.As16()
	copy(b[8:], src[:])
	copy(b[24:], dst[:])
	return append(b, payload...)
}
