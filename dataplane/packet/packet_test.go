package packet

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

var (
	host4 = netip.MustParseAddr("198.51.100.7")
	peer4 = netip.MustParseAddr("203.0.113.2")
	host6 = netip.MustParseAddr("2001:db8:1::2")
	tep6  = netip.MustParseAddr("2001:db8:a::1")
)

// wire turns a packet diagram, hexadecimal with blanks, into bytes.
func wire(t testing.TB, lines ...string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(strings.Join(lines, ""), " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestChecksum(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []byte
		want uint16
	}{
		{"RFC 1071 section 3", wire(t, "0001 f203 f4f5 f6f7"), ^uint16(0xddf2)},
		{"odd", wire(t, "ff"), 0x00ff},
		{"nothing", nil, 0xffff},
		{"its own checksum inside", wire(t, "0001 f203 220d f4f5 f6f7"), 0},
		{"many carries", bytes.Repeat([]byte{0xff}, 1<<16), 0},
	} {
		if got := Checksum(c.in); got != c.want {
			t.Errorf("%s: %#04x, want %#04x", c.name, got, c.want)
		}
	}
}

// TestBuild compares with packets written down by hand, their checksums computed by another program.
func TestBuild(t *testing.T) {
	udp := UDP{SrcPort: 4000, DstPort: 53}
	in4 := IPv4{TOS: 0x28, ID: 1, Fragment: DontFragment, TTL: 64, Protocol: ProtoUDP, Src: host4, Dst: peer4}
	in6 := IPv6{TrafficClass: 0x28, FlowLabel: 0xabcde, NextHeader: ProtoIPv4, HopLimit: 64, Src: host6, Dst: tep6}
	options := in4
	options.Options = []byte{7, 3, 4, 0}
	for _, c := range []struct {
		name string
		got  []byte
		want []byte
	}{
		{
			"UDP", udp.Datagram(host4, peer4, []byte("dstm!")),
			wire(t, "0fa0 0035 000d 8fe0", "6473 746d 21"),
		},
		{
			"IPv4", in4.Packet([]byte{0xaa}),
			wire(t, "4528 0015 0001 4000 4011 d471", "c633 6407 cb00 7102", "aa"),
		},
		{
			"IPv4 with options", options.Packet(nil),
			wire(t, "4628 0018 0001 4000 4011 c86b", "c633 6407 cb00 7102", "0703 0400"),
		},
		{
			"IPv4 in IPv6", in6.Packet(in4.Packet(nil)),
			wire(t, "628a bcde 0014 04 40", "2001 0db8 0001 0000 0000 0000 0000 0002", "2001 0db8 000a 0000 0000 0000 0000 0001",
				"4528 0014 0001 4000 4011 d472", "c633 6407 cb00 7102"),
		},
		{
			"ICMP echo", ICMPv4{Type: ICMPEcho, Rest: 7<<16 | 1}.Message([]byte{0xff}),
			wire(t, "0800 f8f6 0007 0001", "ff"),
		},
		{
			"ICMP fragmentation needed", ICMPv4{Type: ICMPUnreachable, Code: CodeFragmentsNeeded, Rest: 1280}.Message(nil),
			wire(t, "0304 f7fb 0000 0500"),
		},
	} {
		if !bytes.Equal(c.got, c.want) {
			t.Errorf("%s:\n%x, want\n%x", c.name, c.got, c.want)
		}
	}
}

// TestUDPChecksumZero: a sum that comes to 0 is sent as 0xffff (RFC 768).
func TestUDPChecksumZero(t *testing.T) {
	d := UDP{}.Datagram(host4, peer4, []byte{0, 0})
	free := ^uint16(0)
	free -= ^(uint16(d[6])<<8 | uint16(d[7])) // what is missing to a sum of all ones
	d = UDP{}.Datagram(host4, peer4, []byte{byte(free >> 8), byte(free)})
	if d[6] != 0xff || d[7] != 0xff {
		t.Errorf("checksum %x, want ffff", d[6:8])
	}
}

func TestParseErrors(t *testing.T) {
	p4 := IPv4{TTL: 64, Protocol: ProtoUDP, Src: host4, Dst: peer4}.Packet(make([]byte, 8))
	p6 := IPv6{NextHeader: ProtoIPv4, Src: host6, Dst: tep6}.Packet(p4)
	echo := ICMPv4{Type: ICMPEcho}.Message(nil)
	edit := func(b []byte, at int, v byte) []byte { b = bytes.Clone(b); b[at] = v; return b }
	ipv4 := func(b []byte) error { _, _, err := ParseIPv4(b); return err }
	ipv6 := func(b []byte) error { _, _, err := ParseIPv6(b); return err }
	icmp := func(b []byte) error { _, _, err := ParseICMPv4(b); return err }
	for _, c := range []struct {
		name  string
		parse func([]byte) error
		in    []byte
		is    error
		want  string
	}{
		{"nothing", ipv4, nil, ErrNotIPv4, "not a whole IPv4 packet: 0 bytes, want at least 20"},
		{"cut header", ipv4, p4[:19], ErrNotIPv4, "not a whole IPv4 packet: 19 bytes, want at least 20"},
		{"version", ipv4, edit(p4, 0, 0x65), ErrNotIPv4, "not a whole IPv4 packet: version 6"},
		{"IHL", ipv4, edit(p4, 0, 0x44), ErrNotIPv4, "not a whole IPv4 packet: header of 16 bytes, want at least 20"},
		{"IHL beyond total", ipv4, edit(p4, 0, 0x48), ErrNotIPv4, "not a whole IPv4 packet: total length 28, want 32 to 28"},
		{"total above the bytes", ipv4, p4[:27], ErrNotIPv4, "not a whole IPv4 packet: total length 28, want 20 to 27"},
		{"cut header", ipv6, p6[:39], ErrNotIPv6, "not a whole IPv6 packet: 39 bytes, want at least 40"},
		{"version", ipv6, edit(p6, 0, 0x45), ErrNotIPv6, "not a whole IPv6 packet: version 4"},
		{"payload above the bytes", ipv6, p6[:67], ErrNotIPv6, "not a whole IPv6 packet: total length 68, want at most 67"},
		{"cut", icmp, echo[:7], ErrNotICMP, "not an ICMP message: 7 bytes, want at least 8"},
		{"checksum", icmp, edit(echo, 7, 1), ErrNotICMP, "not an ICMP message: the checksum is wrong by 0xfffe"},
	} {
		if err := c.parse(c.in); !errors.Is(err, c.is) || err.Error() != c.want {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
}

// TestImpossible: a packet that cannot exist is not built.
func TestImpossible(t *testing.T) {
	big := make([]byte, 1<<16)
	for name, build := range map[string]func(){
		"IPv4 length":      func() { IPv4{Src: host4, Dst: peer4}.Packet(big[:65516]) },
		"IPv4 options":     func() { IPv4{Src: host4, Dst: peer4, Options: []byte{1}}.Packet(nil) },
		"IPv4 options' 41": func() { IPv4{Src: host4, Dst: peer4, Options: big[:44]}.Packet(nil) },
		"IPv6 length":      func() { IPv6{Src: host6, Dst: tep6}.Packet(big) },
		"IPv6 flow label":  func() { IPv6{Src: host6, Dst: tep6, FlowLabel: 1 << 20}.Packet(nil) },
		"UDP length":       func() { UDP{}.Datagram(host4, peer4, big[:65528]) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: built", name)
				}
			}()
			build()
		}()
	}
}
