// Package record is the form in which every store of the lease service keeps its records: keys that sort by address, and
// the messages of api/store/v1.
package record

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
)

// NewMeta returns the record of a new cluster: a cluster id and a secret of its own, epoch 1.
func NewMeta(layout uint32) *storev1.Meta {
	id, secret := make([]byte, len(lease.ClusterID{})), make([]byte, len(store.State{}.Secret))
	_, _ = rand.Read(id) // never fails, see crypto/rand
	_, _ = rand.Read(secret)
	return &storev1.Meta{ClusterId: id, Secret: secret, Epoch: 1, Layout: layout, Audit: &storev1.AuditHead{}}
}

// CheckMeta refuses the record of another layout and a damaged one.
func CheckMeta(m *storev1.Meta, layout uint32) error {
	if m.Layout != layout {
		return fmt.Errorf("layout %d: this version reads layout %d", m.Layout, layout)
	}
	if m.Audit == nil {
		return errors.New("no head of the audit log")
	}
	if len(m.ClusterId) != len(lease.ClusterID{}) {
		return fmt.Errorf("cluster id of %d bytes", len(m.ClusterId))
	}
	if n := len(store.State{}.Secret); len(m.Secret) != n {
		return fmt.Errorf("secret of %d bytes: want %d", len(m.Secret), n)
	}
	return nil
}

// State returns what a checked record says.
func State(m *storev1.Meta) store.State {
	return store.State{
		Cluster: lease.ClusterID(m.ClusterId), Secret: [32]byte(m.Secret), Epoch: lease.Epoch(m.Epoch),
		Last: lease.Rev(m.LastRev), Wall: Time(m.LastWall), Restored: m.Restored,
	}
}

// Nanos returns Unix nanoseconds, 0 for the zero time.
func Nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// Time is the inverse of Nanos.
func Time(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// duration reads milliseconds; what is longer than the configuration allows (7 days) is read as a year.
func duration(ms uint64) time.Duration {
	const year = 365 * 24 * time.Hour
	return time.Duration(min(ms, uint64(year/time.Millisecond))) * time.Millisecond
}

// AddrBytes returns 4 or 16 bytes in network order, none for no address.
func AddrBytes(a netip.Addr) []byte {
	if !a.IsValid() {
		return nil
	}
	return a.AsSlice()
}

// Addr is the inverse of AddrBytes.
func Addr(b []byte) (netip.Addr, error) {
	if len(b) == 0 {
		return netip.Addr{}, nil
	}
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fmt.Errorf("address of %d bytes", len(b))
	}
	return a, nil
}

// ResourceKey is address, psid length, psid: 7 bytes, big endian, so that keys sort by address.
func ResourceKey(r lease.Resource) []byte {
	k := append(make([]byte, 0, 15), r.Addr.AsSlice()...)
	k = append(k, r.PSIDLen)
	return binary.BigEndian.AppendUint16(k, r.PSID)
}

// DecodeResource reads the resource that a key begins with.
func DecodeResource(k []byte) (lease.Resource, error) {
	if len(k) < 7 {
		return lease.Resource{}, fmt.Errorf("key of %d bytes: want 7 or more", len(k))
	}
	r := lease.Resource{Addr: netip.AddrFrom4([4]byte(k)), PSIDLen: k[4], PSID: binary.BigEndian.Uint16(k[5:])}
	return r, r.Valid()
}

// EncodeAddress returns the value kept under ResourceKey.
func EncodeAddress(a lease.Address) *storev1.Address {
	return &storev1.Address{
		State: uint32(a.State), Gen: uint64(a.Gen), Rev: uint64(a.Rev), RevokeRev: uint64(a.RevokeRev),
		Host: a.Host, Source: AddrBytes(a.Source), Tep: AddrBytes(a.TEP), Mtu: uint32(a.MTU), Trigger: uint32(a.Trigger),
		BoundAt: Nanos(a.BoundAt), UnboundAt: Nanos(a.UnboundAt), FencedAt: Nanos(a.FencedAt), ValidMs: uint64(a.Valid.Milliseconds()),
		End: uint32(a.End),
	}
}

// DecodeAddress reads a key and its value.
func DecodeAddress(k, v []byte) (lease.Address, error) {
	res, err := DecodeResource(k)
	if err != nil {
		return lease.Address{}, err
	}
	var m storev1.Address
	if err := proto.Unmarshal(v, &m); err != nil {
		return lease.Address{}, fmt.Errorf("address %s: %w", res, err)
	}
	source, err := Addr(m.Source)
	if err != nil {
		return lease.Address{}, fmt.Errorf("address %s: source: %w", res, err)
	}
	tep, err := Addr(m.Tep)
	if err != nil {
		return lease.Address{}, fmt.Errorf("address %s: tep: %w", res, err)
	}
	return lease.Address{
		Resource: res, State: lease.State(m.State), Gen: lease.Gen(m.Gen), Rev: lease.Rev(m.Rev),
		RevokeRev: lease.Rev(m.RevokeRev), Host: m.Host, Source: source, TEP: tep, MTU: uint16(m.Mtu),
		Trigger: lease.Trigger(m.Trigger), BoundAt: Time(m.BoundAt), UnboundAt: Time(m.UnboundAt),
		FencedAt: Time(m.FencedAt), Valid: duration(m.ValidMs), End: lease.Reason(m.End),
	}, nil
}

// EncodeMember returns the value kept under the id.
func EncodeMember(m lease.Member) *storev1.Member {
	rec := &storev1.Member{
		Instance: m.Instance, Session: m.Session, HorizonMs: uint64(m.Horizon.Milliseconds()), Witnesses: m.Witnesses,
		FailStaticMs: uint64(m.FailStatic.Milliseconds()),
	}
	if q := m.Question; q.IsValid() {
		rec.Question = binary.BigEndian.AppendUint16(q.Addr().AsSlice(), q.Port())
	}
	return rec
}

// DecodeMember reads an id and its value.
func DecodeMember(k, v []byte) (lease.Member, error) {
	var m storev1.Member
	if err := proto.Unmarshal(v, &m); err != nil {
		return lease.Member{}, fmt.Errorf("member %s: %w", k, err)
	}
	out := lease.Member{
		TEP: string(k), Instance: m.Instance, Session: m.Session, Horizon: duration(m.HorizonMs), Witnesses: m.Witnesses,
		FailStatic: duration(m.FailStaticMs),
	}
	switch len(m.Question) {
	case 0:
	case 18:
		out.Question = netip.AddrPortFrom(netip.AddrFrom16([16]byte(m.Question)), binary.BigEndian.Uint16(m.Question[16:]))
	default:
		return lease.Member{}, fmt.Errorf("member %s: question of %d bytes: want 18", k, len(m.Question))
	}
	return out, nil
}

// DecodePool reads a name and its value.
func DecodePool(k, v []byte) (lease.Pool, error) {
	var m storev1.Pool
	if err := proto.Unmarshal(v, &m); err != nil {
		return lease.Pool{}, fmt.Errorf("pool %s: %w", k, err)
	}
	addr, err := Addr(m.Prefix)
	if err != nil {
		return lease.Pool{}, fmt.Errorf("pool %s: prefix: %w", k, err)
	}
	tep, err := Addr(m.Tep)
	if err != nil {
		return lease.Pool{}, fmt.Errorf("pool %s: tep: %w", k, err)
	}
	return lease.Pool{Name: string(k), Prefix: netip.PrefixFrom(addr, int(m.Bits)), TEP: tep}, nil
}

// EncodePool returns the value kept under the name.
func EncodePool(p lease.Pool) *storev1.Pool {
	return &storev1.Pool{Prefix: p.Prefix.Addr().AsSlice(), Bits: uint32(p.Prefix.Bits()), Tep: p.TEP.AsSlice()}
}
