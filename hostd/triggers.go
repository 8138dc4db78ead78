package hostd

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/dstm-project/dstm/dataplane/packet"
)

// Cause says what a packet without a lease is, as the label of dstm_triggers_total.
type Cause uint8

// The causes. Only CausePacket asks for a lease: chatter that goes on by itself must not keep a desktop awake.
const (
	CausePacket    Cause = 0 // to somewhere on the internet
	CauseMalformed Cause = 1 // not an IPv4 packet
	CauseSource    Cause = 2 // not from the placeholder: forwarded, or of a lease that is over
	CauseMulticast Cause = 3 // 224.0.0.0/4
	CauseBroadcast Cause = 4 // 255.255.255.255, or the last address of an own prefix
	CauseLinkLocal Cause = 5 // 169.254.0.0/16
	CausePrivate   Cause = 6 // RFC 1918, RFC 6598
	CauseOwn       Cause = 7 // a prefix that an interface of this host has, or the placeholder's
	CauseReserved  Cause = 8 // 0.0.0.0/8, 127.0.0.0/8, 240.0.0.0/4
	CauseDNS       Cause = 9 // no packet: an offer of the lease service
	CauseManual    Cause = 10
)

var causeNames = [...]string{
	"packet", "malformed", "source", "multicast", "broadcast", "link_local", "private", "own", "reserved", "dns", "manual",
}

// String returns the metric label.
func (c Cause) String() string { return causeNames[c] }

// classes are the destinations that are not on the internet.
func classes() []struct {
	prefix netip.Prefix
	cause  Cause
} {
	p := netip.MustParsePrefix
	return []struct {
		prefix netip.Prefix
		cause  Cause
	}{
		{p("224.0.0.0/4"), CauseMulticast},
		{p("255.255.255.255/32"), CauseBroadcast},
		{p("169.254.0.0/16"), CauseLinkLocal},
		{p("10.0.0.0/8"), CausePrivate},
		{p("172.16.0.0/12"), CausePrivate},
		{p("192.168.0.0/16"), CausePrivate},
		{p("100.64.0.0/10"), CausePrivate},
		{p("0.0.0.0/8"), CauseReserved},
		{p("127.0.0.0/8"), CauseReserved},
		{p("240.0.0.0/4"), CauseReserved},
	}
}

// classify says what the packet b is to a host without a lease. own are the IPv4 prefixes of the host's interfaces.
func classify(b []byte, placeholder netip.Prefix, own []netip.Prefix) Cause {
	src, dst, ok := addresses(b)
	switch {
	case !ok:
		return CauseMalformed
	case src != placeholder.Addr():
		return CauseSource
	}
	return destination(dst, append(slices.Clone(own), placeholder))
}

// destination says what an address is to a host with these prefixes.
func destination(dst netip.Addr, own []netip.Prefix) Cause {
	for _, p := range own {
		if !p.Contains(dst) {
			continue
		}
		if p.Bits() < 31 && dst == last(p) {
			return CauseBroadcast
		}
		return CauseOwn
	}
	for _, c := range classes() {
		if c.prefix.Contains(dst) {
			return c.cause
		}
	}
	return CausePacket
}

// addresses returns source and destination of a whole IPv4 packet.
func addresses(b []byte) (src, dst netip.Addr, ok bool) {
	h, _, err := packet.ParseIPv4(b)
	return h.Src, h.Dst, err == nil
}

// last returns the last address of an IPv4 prefix.
func last(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	v := binary.BigEndian.Uint32(a[:]) | uint32(1<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(a[:], v)
	return netip.AddrFrom4(a)
}
