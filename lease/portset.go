package lease

import "iter"

// A port set (RFC 7597 section 5.1) is the ports of one address whose bits, from the top, are A (offsetBits, not 0), PSID
// (PSIDLen) and the rest. Because A is never 0, ports 0 to 1023 belong to no set: whoever shares an address has no
// well-known port.
const (
	offsetBits = 6
	// MaxPSIDLen is the largest PSIDLen: 1,024 sets of 63 ports.
	MaxPSIDLen = 16 - offsetBits
)

// PSIDOf returns the port set that a port belongs to when an address is cut into 1<<psidLen sets; false for ports 0 to 1023.
func PSIDOf(port uint16, psidLen uint8) (uint16, bool) {
	rest := MaxPSIDLen - psidLen
	return port >> rest & (1<<psidLen - 1), port>>MaxPSIDLen != 0
}

// HasPort reports whether a port is one of the resource's. A whole address has every port.
func (r Resource) HasPort(port uint16) bool {
	if r.PSIDLen == 0 {
		return true
	}
	psid, ok := PSIDOf(port, r.PSIDLen)
	return ok && psid == r.PSID
}

// PortCount returns the number of ports of the resource.
func (r Resource) PortCount() int {
	if r.PSIDLen == 0 {
		return 1 << 16
	}
	return (1<<offsetBits - 1) << (MaxPSIDLen - r.PSIDLen)
}

// Ports yields the resource's ports as ranges, first and last, in order.
func (r Resource) Ports() iter.Seq2[uint16, uint16] {
	return func(yield func(first, last uint16) bool) {
		if r.PSIDLen == 0 {
			yield(0, 1<<16-1)
			return
		}
		rest := MaxPSIDLen - r.PSIDLen
		for a := uint16(1); a < 1<<offsetBits; a++ {
			first := a<<MaxPSIDLen | r.PSID<<rest
			if !yield(first, first|(1<<rest-1)) {
				return
			}
		}
	}
}

// Overlaps reports whether two resources share a port of an address (I1).
func (r Resource) Overlaps(o Resource) bool {
	if r.PSIDLen > o.PSIDLen {
		r, o = o, r
	}
	return r.Addr == o.Addr && o.PSID>>(o.PSIDLen-r.PSIDLen) == r.PSID
}
