package dataplanetest

import (
	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/dataplane/packet"
)

// named is a packet that is wrong in one way.
type named struct {
	name string
	pkt  []byte
	why  dataplane.DropReason
}

// malformedInner spoils the inner packet; the outer header around it is in order.
func malformedInner(good []byte) []named {
	const why = dataplane.DropMalformed
	return []named{
		{"no inner packet", nil, why},
		{"inner header cut short", good[:19], why},
		{"inner packet cut short", good[:len(good)-1], why},
		{"inner version 6", edit(good, 0, 0x65), why},
		{"inner version 0", edit(good, 0, 0x05), why},
		{"IHL 4", edit(good, 0, 0x44), why},
		{"IHL 0", edit(good, 0, 0x40), why},
		{"IHL beyond the packet", edit(good, 0, 0x4f), why},
		{"total length above the outer payload", edit(good, 2, 0, uint8(len(good)+1)), why},
		{"total length 65535", edit(good, 2, 0xff, 0xff), why},
		{"total length below the header", edit(good, 2, 0, 19), why},
		{"total length 0", edit(good, 2, 0, 0), why},
	}
}

// malformedAtDevice spoils a packet that the own kernel sends through the device.
func malformedAtDevice(good []byte) []named {
	const why = dataplane.DropMalformed
	return []named{
		{"cut header", good[:19], why},
		{"version 5", edit(good, 0, 0x55), why},
		{"IHL 4", edit(good, 0, 0x44), why},
		{"total length above the packet", edit(good, 2, 0, uint8(len(good)+1)), why},
		{"total length below the header", edit(good, 2, 0, 19), why},
	}
}

// malformedOuter spoils the outer headers.
func malformedOuter(src, dst string, good []byte) []named {
	pkt := tunnel(src, dst, good)
	payload := uint8(len(good))
	// The extension header is 8 bytes: next header, length 0, six bytes of options (RFC 8200 section 4.2).
	opt := func(o ...byte) []byte {
		var opts [6]byte
		copy(opts[:], o)
		return withOptions(src, dst, opts, good)
	}
	short := tunnel(src, dst, []byte{packet.ProtoIPv4, 0, 1}, next(packet.ProtoDstOptions))
	return []named{
		{"payload length above the frame", edit(pkt, 4, 0, payload+1), dataplane.DropMalformed},
		{"bytes of the frame behind the payload do not count", edit(pkt, 4, 0, payload-1), dataplane.DropMalformed},
		{"payload length 0", edit(pkt, 4, 0, 0), dataplane.DropMalformed},
		{"options cut short", short, dataplane.DropMalformed},
		{"an option that must be known", opt(0xc2, 4), dataplane.DropOption},
		{"an option behind the encapsulation limit", opt(4, 1, 4, 0x80, 1), dataplane.DropOption},
		{"an option longer than the header", opt(0x1e, 5), dataplane.DropMalformed},
		{"an option without its length", opt(1, 3, 0, 0, 0, 1), dataplane.DropMalformed},
		{"options of 16 bytes", edit(opt(1, 4), 41, 1), dataplane.DropOption},
	}
}
