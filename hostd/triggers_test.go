package hostd

import (
	"net/netip"
	"testing"

	"github.com/dstm-project/dstm/dataplane/packet"
)

var (
	testPlaceholder = netip.MustParsePrefix("192.0.0.2/29")
	testOwn         = []netip.Prefix{netip.MustParsePrefix("203.0.113.5/24")}
)

func ipv4(src, dst string) []byte {
	h := packet.IPv4{TTL: 64, Protocol: packet.ProtoUDP, Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst)}
	return h.Packet(make([]byte, 8))
}

func TestClassify(t *testing.T) {
	to := func(dst string) []byte { return ipv4("192.0.0.2", dst) }
	edit := func(b []byte, at int, v byte) []byte { b[at] = v; return b }
	for _, c := range []struct {
		name   string
		packet []byte
		want   Cause
	}{
		{"internet", to("198.51.100.1"), CausePacket},
		{"below multicast", to("223.255.255.255"), CausePacket},
		{"beside 10/8", to("11.0.0.1"), CausePacket},
		{"beside 172.16/12", to("172.32.0.1"), CausePacket},
		{"beside 100.64/10", to("100.128.0.1"), CausePacket},
		{"mdns", to("224.0.0.251"), CauseMulticast},
		{"ssdp", to("239.255.255.250"), CauseMulticast},
		{"limited broadcast", to("255.255.255.255"), CauseBroadcast},
		{"own broadcast", to("203.0.113.255"), CauseBroadcast},
		{"own prefix", to("203.0.113.77"), CauseOwn},
		{"placeholder's prefix", to("192.0.0.1"), CauseOwn},
		{"placeholder's broadcast", to("192.0.0.7"), CauseBroadcast},
		{"link-local", to("169.254.169.254"), CauseLinkLocal},
		{"10/8", to("10.1.2.3"), CausePrivate},
		{"172.16/12", to("172.31.255.255"), CausePrivate},
		{"192.168/16", to("192.168.1.1"), CausePrivate},
		{"shared", to("100.64.0.1"), CausePrivate},
		{"this network", to("0.0.0.1"), CauseReserved},
		{"loopback", to("127.0.0.1"), CauseReserved},
		{"class E", to("240.0.0.1"), CauseReserved},
		{"forwarded", ipv4("172.17.0.2", "198.51.100.1"), CauseSource},
		{"former lease", ipv4("198.51.100.7", "198.51.100.1"), CauseSource},
		{"empty", nil, CauseMalformed},
		{"short", to("198.51.100.1")[:19], CauseMalformed},
		{"ipv6", edit(to("198.51.100.1"), 0, 0x65), CauseMalformed},
		{"header length below 20", edit(to("198.51.100.1"), 0, 0x44), CauseMalformed},
		{"total length above the packet", edit(to("198.51.100.1"), 3, 29), CauseMalformed},
		{"total length below the header", edit(to("198.51.100.1"), 3, 19), CauseMalformed},
	} {
		if got := classify(c.packet, testPlaceholder, testOwn); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func FuzzClassify(f *testing.F) {
	f.Add(ipv4("192.0.0.2", "198.51.100.1"))
	f.Add(ipv4("192.0.0.2", "224.0.0.1"))
	f.Add([]byte{0x45})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c := classify(b, testPlaceholder, testOwn); c == CausePacket {
			dst := netip.AddrFrom4([4]byte(b[16:]))
			if !dst.IsGlobalUnicast() || dst.IsPrivate() || testOwn[0].Contains(dst) {
				t.Errorf("%s asks for a lease", dst)
			}
		}
	})
}
