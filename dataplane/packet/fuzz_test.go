package packet

import (
	"bytes"
	"reflect"
	"slices"
	"testing"
)

// guarded returns a copy of b whose capacity ends with it, so that any access behind it panics.
func guarded(b []byte) []byte { return slices.Clip(bytes.Clone(b)) }

// inside fails unless part lies within whole and cannot be appended into it.
func inside(t *testing.T, whole, part []byte) {
	t.Helper()
	if len(part) > len(whole) || cap(part) > len(whole) {
		t.Errorf("payload of %d bytes, capacity %d, from %d bytes", len(part), cap(part), len(whole))
	}
}

func FuzzParseIPv4(f *testing.F) {
	f.Add(IPv4{TTL: 1, Src: host4, Dst: peer4, Options: []byte{1, 1, 1, 0}}.Packet([]byte("payload")))
	f.Add([]byte{0x45})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := ParseIPv4(guarded(b))
		if err != nil {
			return
		}
		inside(t, b, payload)
		again, same, err := ParseIPv4(h.Packet(payload))
		if err != nil || !reflect.DeepEqual(again, h) || !bytes.Equal(same, payload) {
			t.Errorf("built and parsed again: %+v %x %v, want %+v %x", again, same, err, h, payload)
		}
	})
}

func FuzzParseIPv6(f *testing.F) {
	f.Add(IPv6{NextHeader: ProtoIPv4, HopLimit: 64, Src: host6, Dst: tep6}.Packet([]byte("payload")))
	f.Add([]byte{0x60})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := ParseIPv6(guarded(b))
		if err != nil {
			return
		}
		inside(t, b, payload)
		// Every bit of the header is in the struct: the packet comes back as it was.
		if got := h.Packet(payload); !bytes.Equal(got, b[:len(got)]) {
			t.Errorf("built again: %x, want %x", got, b)
		}
	})
}

func FuzzParseICMPv4(f *testing.F) {
	f.Add(ICMPv4{Type: ICMPUnreachable, Code: CodeFragmentsNeeded, Rest: 1280}.Message([]byte("quoted")))
	f.Add([]byte{8})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, body, err := ParseICMPv4(guarded(b))
		if err != nil {
			return
		}
		inside(t, b, body)
		again, same, err := ParseICMPv4(h.Message(body))
		if err != nil || again != h || !bytes.Equal(same, body) {
			t.Errorf("built and parsed again: %+v %x %v, want %+v %x", again, same, err, h, body)
		}
	})
}

// FuzzBuild: what is built has right checksums and comes back.
func FuzzBuild(f *testing.F) {
	f.Add(uint8(0), uint16(1), DontFragment, uint8(64), []byte("payload"))
	f.Fuzz(func(t *testing.T, tos uint8, id, fragment uint16, ttl uint8, data []byte) {
		if len(data) > 1400 {
			return
		}
		datagram := UDP{SrcPort: id, DstPort: fragment}.Datagram(host4, peer4, data)
		pseudo := append(host4.AsSlice(), peer4.AsSlice()...)
		pseudo = append(pseudo, 0, ProtoUDP, byte(len(datagram)>>8), byte(len(datagram)))
		if c := Checksum(append(pseudo, datagram...)); c != 0 {
			t.Errorf("UDP checksum is wrong by %#04x", c)
		}
		h := IPv4{TOS: tos, ID: id, Fragment: fragment, TTL: ttl, Protocol: ProtoUDP, Src: host4, Dst: peer4}
		inner := h.Packet(datagram)
		if c := Checksum(inner[:ipv4HeaderLen]); c != 0 {
			t.Errorf("IPv4 checksum is wrong by %#04x", c)
		}
		outer := IPv6{TrafficClass: tos, NextHeader: ProtoIPv4, HopLimit: ttl, Src: host6, Dst: tep6}
		_, payload, err := ParseIPv6(outer.Packet(inner))
		if err != nil {
			t.Fatal(err)
		}
		got, same, err := ParseIPv4(payload)
		if err != nil || !reflect.DeepEqual(got, h) || !bytes.Equal(same, datagram) {
			t.Errorf("IPv4 in IPv6 comes back as %+v %x %v, want %+v %x", got, same, err, h, datagram)
		}
	})
}
