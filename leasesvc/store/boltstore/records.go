package boltstore

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
)

// apply writes a group of transactions into one of bbolt's.
func apply(tx *bbolt.Tx, group []item) error {
	var meta storev1.Meta
	if err := getProto(tx.Bucket(bucketMeta), keyMeta, &meta); err != nil {
		return err
	}
	for _, it := range group {
		if err := applyOne(tx, it); err != nil {
			return err
		}
		meta.LastRev = uint64(it.last)
		meta.LastWall = max(meta.LastWall, nanos(it.tx.Wall))
		meta.Restored = meta.Restored && !it.tx.Recovered
	}
	return putProto(tx.Bucket(bucketMeta), keyMeta, &meta)
}

func applyOne(tx *bbolt.Tx, it item) error {
	for _, c := range it.tx.Commits {
		if err := putProto(tx.Bucket(bucketAddress), resourceKey(c.Address.Resource), encodeAddress(c.Address)); err != nil {
			return err
		}
		if c.Audit.Ref == (lease.Ref{}) {
			continue
		}
		if err := putProto(tx.Bucket(bucketAudit), auditKey(c.Audit.Ref), encodeAudit(c.Audit)); err != nil {
			return err
		}
	}
	for _, p := range it.tx.Pools {
		b, k := tx.Bucket(bucketPool), []byte(p.Pool.Name)
		if p.Pool.Removed {
			if err := b.Delete(k); err != nil {
				return err
			}
			continue
		}
		m := &storev1.Pool{Prefix: p.Pool.Prefix.Addr().AsSlice(), Bits: uint32(p.Pool.Prefix.Bits()), Tep: p.Pool.TEP.AsSlice()}
		if err := putProto(b, k, m); err != nil {
			return err
		}
	}
	for _, m := range it.tx.Members {
		if err := putProto(tx.Bucket(bucketMember), []byte(m.TEP), encodeMember(m)); err != nil {
			return err
		}
	}
	for _, id := range it.tx.Removed {
		if err := tx.Bucket(bucketMember).Delete([]byte(id)); err != nil {
			return err
		}
	}
	return nil
}

// nanos returns Unix nanoseconds, 0 for the zero time.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

func addrBytes(a netip.Addr) []byte {
	if !a.IsValid() {
		return nil
	}
	return a.AsSlice()
}

func fromBytes(b []byte) (netip.Addr, error) {
	if len(b) == 0 {
		return netip.Addr{}, nil
	}
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fmt.Errorf("address of %d bytes", len(b))
	}
	return a, nil
}

func encodeAddress(a lease.Address) *storev1.Address {
	return &storev1.Address{
		State: uint32(a.State), Gen: uint64(a.Gen), Rev: uint64(a.Rev), RevokeRev: uint64(a.RevokeRev),
		Host: a.Host, Source: addrBytes(a.Source), Tep: addrBytes(a.TEP), Mtu: uint32(a.MTU), Trigger: uint32(a.Trigger),
		BoundAt: nanos(a.BoundAt), UnboundAt: nanos(a.UnboundAt), FencedAt: nanos(a.FencedAt), ValidMs: uint64(a.Valid.Milliseconds()),
		End: uint32(a.End),
	}
}

func decodeAddress(k, v []byte) (lease.Address, error) {
	res, err := decodeResource(k)
	if err != nil {
		return lease.Address{}, err
	}
	var m storev1.Address
	if err := proto.Unmarshal(v, &m); err != nil {
		return lease.Address{}, fmt.Errorf("address %s: %w", res, err)
	}
	source, err := fromBytes(m.Source)
	if err != nil {
		return lease.Address{}, fmt.Errorf("address %s: source: %w", res, err)
	}
	tep, err := fromBytes(m.Tep)
	if err != nil {
		return lease.Address{}, fmt.Errorf("address %s: tep: %w", res, err)
	}
	return lease.Address{
		Resource: res, State: lease.State(m.State), Gen: lease.Gen(m.Gen), Rev: lease.Rev(m.Rev),
		RevokeRev: lease.Rev(m.RevokeRev), Host: m.Host, Source: source, TEP: tep, MTU: uint16(m.Mtu),
		Trigger: lease.Trigger(m.Trigger), BoundAt: fromNanos(m.BoundAt), UnboundAt: fromNanos(m.UnboundAt),
		FencedAt: fromNanos(m.FencedAt), Valid: duration(m.ValidMs), End: lease.Reason(m.End),
	}, nil
}

// auditKey is the resource and the generation.
func auditKey(r lease.Ref) []byte {
	return binary.BigEndian.AppendUint64(resourceKey(r.Resource), uint64(r.Gen))
}

func encodeAudit(a lease.Audit) *storev1.Audit {
	return &storev1.Audit{
		Host: a.Host, Source: addrBytes(a.Source), Tep: addrBytes(a.TEP), Trigger: uint32(a.Trigger),
		Bound: nanos(a.Bound), Unbound: nanos(a.Unbound), Fenced: nanos(a.Fenced), End: uint32(a.End),
	}
}

func decodeAudit(k, v []byte) (lease.Audit, error) {
	res, err := decodeResource(k)
	if err != nil || len(k) != 15 {
		return lease.Audit{}, fmt.Errorf("audit key of %d bytes: %w", len(k), err)
	}
	ref := lease.Ref{Resource: res, Gen: lease.Gen(binary.BigEndian.Uint64(k[7:]))}
	var m storev1.Audit
	if err := proto.Unmarshal(v, &m); err != nil {
		return lease.Audit{}, fmt.Errorf("audit %s: %w", ref, err)
	}
	source, err := fromBytes(m.Source)
	if err != nil {
		return lease.Audit{}, fmt.Errorf("audit %s: source: %w", ref, err)
	}
	tep, err := fromBytes(m.Tep)
	if err != nil {
		return lease.Audit{}, fmt.Errorf("audit %s: tep: %w", ref, err)
	}
	return lease.Audit{
		Ref: ref, Host: m.Host, Source: source, TEP: tep, Trigger: lease.Trigger(m.Trigger),
		Bound: fromNanos(m.Bound), Unbound: fromNanos(m.Unbound), Fenced: fromNanos(m.Fenced), End: lease.Reason(m.End),
	}, nil
}

func sortNewestFirst(as []lease.Audit) {
	slices.SortFunc(as, func(a, b lease.Audit) int { return cmp.Compare(b.Gen, a.Gen) })
}

func encodeMember(m lease.Member) *storev1.Member {
	rec := &storev1.Member{
		Instance: m.Instance, Session: m.Session, HorizonMs: uint64(m.Horizon.Milliseconds()), Witnesses: m.Witnesses,
	}
	if q := m.Question; q.IsValid() {
		rec.Question = binary.BigEndian.AppendUint16(q.Addr().AsSlice(), q.Port())
	}
	return rec
}

func decodeMember(k, v []byte) (lease.Member, error) {
	var m storev1.Member
	if err := proto.Unmarshal(v, &m); err != nil {
		return lease.Member{}, fmt.Errorf("member %s: %w", k, err)
	}
	out := lease.Member{
		TEP: string(k), Instance: m.Instance, Session: m.Session, Horizon: duration(m.HorizonMs), Witnesses: m.Witnesses,
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

func decodePool(k, v []byte) (lease.Pool, error) {
	var m storev1.Pool
	if err := proto.Unmarshal(v, &m); err != nil {
		return lease.Pool{}, fmt.Errorf("pool %s: %w", k, err)
	}
	addr, err := fromBytes(m.Prefix)
	if err != nil {
		return lease.Pool{}, fmt.Errorf("pool %s: prefix: %w", k, err)
	}
	tep, err := fromBytes(m.Tep)
	if err != nil {
		return lease.Pool{}, fmt.Errorf("pool %s: tep: %w", k, err)
	}
	return lease.Pool{Name: string(k), Prefix: netip.PrefixFrom(addr, int(m.Bits)), TEP: tep}, nil
}
