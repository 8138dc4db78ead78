package wire

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/dstm-project/dstm/lease"
)

// packedLen is how many bytes a binding has in SnapshotChunk.packed.
const packedLen = 4 + 1 + 1 + 2 + 8 + 16 + 16 + 2

// packs reports whether a record can be packed.
func packs(r lease.Record) bool {
	b := r.Bind
	return r.Kind == lease.KindBind && r.Critical && r.Rev == b.Gen.Rev() && b.Resource.Addr.Is4() && plain6(b.Host) && plain6(b.TEP)
}

func plain6(a netip.Addr) bool { return a.Is6() && a.Zone() == "" }

// pack encodes records that pack.
func pack(rs []lease.Record) []byte {
	out := make([]byte, 0, len(rs)*packedLen)
	for _, r := range rs {
		b := r.Bind
		a, host, tep := b.Resource.Addr.As4(), b.Host.As16(), b.TEP.As16()
		out = append(append(out, a[:]...), b.Resource.PSIDLen, 0)
		out = binary.BigEndian.AppendUint16(out, b.Resource.PSID)
		out = binary.BigEndian.AppendUint64(out, uint64(b.Gen))
		out = append(append(out, host[:]...), tep[:]...)
		out = binary.BigEndian.AppendUint16(out, b.MTU)
	}
	return out
}

// unpack appends packed bindings to records.
func unpack(rs []lease.Record, p []byte) ([]lease.Record, error) {
	if len(p)%packedLen != 0 {
		return nil, fmt.Errorf("snapshot.packed: %d bytes: want %d for each binding", len(p), packedLen)
	}
	rs = slices.Grow(rs, len(p)/packedLen)
	for i := 0; len(p) > 0; i, p = i+1, p[packedLen:] {
		b := lease.Binding{
			Resource: lease.Resource{Addr: netip.AddrFrom4([4]byte(p)), PSIDLen: p[4], PSID: binary.BigEndian.Uint16(p[6:])},
			Gen:      lease.Gen(binary.BigEndian.Uint64(p[8:])),
			Host:     netip.AddrFrom16([16]byte(p[16:])), TEP: netip.AddrFrom16([16]byte(p[32:])),
		}
		err := b.Resource.Valid()
		if err == nil {
			b.MTU, err = MTU("mtu", uint32(binary.BigEndian.Uint16(p[48:])))
		}
		if err == nil && p[5] != 0 {
			err = fmt.Errorf("byte 5 is %d: want 0", p[5])
		}
		if err != nil {
			return nil, fmt.Errorf("snapshot.packed: binding %d: %w", i, err)
		}
		rs = append(rs, lease.BindRecord(b.Gen.Rev(), b))
	}
	return rs, nil
}
