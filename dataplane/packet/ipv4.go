package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

const (
	ipv4HeaderLen    = 20
	ipv4MaxHeaderLen = 60
)

// Flags of IPv4.Fragment (RFC 791 section 3.1). The 13 bits below them are the offset in units of 8 bytes.
const (
	DontFragment  uint16 = 0x4000
	MoreFragments uint16 = 0x2000
)

// IPv4 is an IPv4 header (RFC 791 section 3.1) without the fields that follow from the packet: lengths and checksum.
type IPv4 struct {
	TOS      uint8 // DSCP and ECN (RFC 2474, RFC 3168)
	ID       uint16
	Fragment uint16 // flags and offset
	TTL      uint8
	Protocol uint8
	Src, Dst netip.Addr
	Options  []byte // as on the wire: a multiple of 4 bytes, at most 40; nil = none
}

// ErrNotIPv4 is wrapped by the errors of ParseIPv4.
var ErrNotIPv4 = errors.New("not a whole IPv4 packet")

// ParseIPv4 reads the IPv4 packet at the start of b. What stands behind its total length is not part of the payload.
// The header's checksum is not compared: packets come from the kernel, which may not have filled it in yet.
func ParseIPv4(b []byte) (IPv4, []byte, error) {
	if len(b) < ipv4HeaderLen {
		return IPv4{}, nil, fmt.Errorf("%w: %d bytes, want at least %d", ErrNotIPv4, len(b), ipv4HeaderLen)
	}
	head, total := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
	switch {
	case b[0]>>4 != 4:
		return IPv4{}, nil, fmt.Errorf("%w: version %d", ErrNotIPv4, b[0]>>4)
	case head < ipv4HeaderLen:
		return IPv4{}, nil, fmt.Errorf("%w: header of %d bytes, want at least %d", ErrNotIPv4, head, ipv4HeaderLen)
	case total < head || total > len(b):
		return IPv4{}, nil, fmt.Errorf("%w: total length %d, want %d to %d", ErrNotIPv4, total, head, len(b))
	}
	h := IPv4{
		TOS: b[1], ID: binary.BigEndian.Uint16(b[4:]), Fragment: binary.BigEndian.Uint16(b[6:]), TTL: b[8], Protocol: b[9],
		Src: netip.AddrFrom4([4]byte(b[12:])), Dst: netip.AddrFrom4([4]byte(b[16:])),
	}
	if head > ipv4HeaderLen {
		h.Options = b[ipv4HeaderLen:head:head]
	}
	return h, b[head:total:total], nil
}

// Packet returns the packet of the header and its payload, with lengths and checksum. It panics if there can be no such
// packet: other addresses than IPv4, options of a wrong length, more than 65535 bytes.
func (h IPv4) Packet(payload []byte) []byte {
	head := ipv4HeaderLen + len(h.Options)
	if head%4 != 0 || head > ipv4MaxHeaderLen {
		panic(fmt.Sprintf("packet: %d bytes of IPv4 options: want a multiple of 4, at most 40", len(h.Options)))
	}
	total := head + len(payload)
	checkLen("IPv4 packet", total)
	b := make([]byte, head, total)
	b[0] = 4<<4 | uint8(head/4)
	b[1] = h.TOS
	binary.BigEndian.PutUint16(b[2:], uint16(total))
	binary.BigEndian.PutUint16(b[4:], h.ID)
	binary.BigEndian.PutUint16(b[6:], h.Fragment)
	b[8], b[9] = h.TTL, h.Protocol
	src, dst := h.Src.As4(), h.Dst.As4()
	copy(b[12:], src[:])
	copy(b[16:], dst[:])
	copy(b[20:], h.Options)
	binary.BigEndian.PutUint16(b[10:], Checksum(b))
	return append(b, payload...)
}
