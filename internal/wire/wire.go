// Package wire is the only place where protobuf messages and our own types meet. Decoding is strict: what another
// machine sent is checked here once, and every error names the field.
package wire

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"time"

	leasev1 "github.com/dstm-project/dstm/api/lease/v1"
	"github.com/dstm-project/dstm/lease"
)

// Addr4 decodes an IPv4 address from its value in host order.
func Addr4(v uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return netip.AddrFrom4(b)
}

// FromAddr4 encodes an IPv4 address; the zero Addr becomes 0.
func FromAddr4(a netip.Addr) uint32 {
	if !a.Is4() {
		return 0
	}
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// Addr6 decodes a 16-byte IPv6 address. IPv4-mapped addresses are refused: they are never tunnel ends.
func Addr6(field string, b []byte) (netip.Addr, error) {
	if len(b) != 16 {
		return netip.Addr{}, fmt.Errorf("%s: %d bytes: want the 16 of an IPv6 address", field, len(b))
	}
	a := netip.AddrFrom16([16]byte(b))
	if a.Is4In6() || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("%s: %s: want an IPv6 unicast address", field, a)
	}
	return a, nil
}

// FromAddr6 encodes an IPv6 address; the zero Addr becomes empty.
func FromAddr6(a netip.Addr) []byte {
	if !a.Is6() {
		return nil
	}
	return a.AsSlice()
}

// Duration decodes milliseconds.
func Duration(ms uint32) time.Duration { return time.Duration(ms) * time.Millisecond }

// FromDuration encodes a duration in milliseconds, rounded down and cut to what the field can say: a lease must never
// look longer on the wire than it is.
func FromDuration(d time.Duration) uint32 {
	return uint32(max(0, min(d.Milliseconds(), math.MaxUint32)))
}

// Time decodes Unix milliseconds; 0 is the zero Time.
func Time(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// FromTime encodes a time as Unix milliseconds; the zero Time becomes 0.
func FromTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// Instant decodes Unix nanoseconds; 0 is the zero Time.
func Instant(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// FromInstant encodes a time as Unix nanoseconds; the zero Time becomes 0.
func FromInstant(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// Resource decodes a required resource.
func Resource(field string, m *leasev1.Resource) (lease.Resource, error) {
	if m == nil {
		return lease.Resource{}, fmt.Errorf("%s: not set", field)
	}
	if m.PsidLen > lease.MaxPSIDLen || m.Psid > math.MaxUint16 {
		return lease.Resource{}, fmt.Errorf("%s: psid %d of length %d: want a length of at most %d", field, m.Psid, m.PsidLen, lease.MaxPSIDLen)
	}
	r := lease.Resource{Addr: Addr4(m.Addr), PSIDLen: uint8(m.PsidLen), PSID: uint16(m.Psid)}
	if err := r.Valid(); err != nil {
		return lease.Resource{}, fmt.Errorf("%s: %w", field, err)
	}
	return r, nil
}

// FromResource encodes a resource.
func FromResource(r lease.Resource) *leasev1.Resource {
	return &leasev1.Resource{Addr: FromAddr4(r.Addr), PsidLen: uint32(r.PSIDLen), Psid: uint32(r.PSID)}
}

// Ref decodes a required lease reference.
func Ref(field string, m *leasev1.LeaseRef) (lease.Ref, error) {
	if m == nil {
		return lease.Ref{}, fmt.Errorf("%s: not set", field)
	}
	r, err := Resource(field+".res", m.Res)
	if err != nil {
		return lease.Ref{}, err
	}
	return lease.Ref{Resource: r, Gen: lease.Gen(m.Gen)}, nil
}

// OptionalRef decodes a lease reference; an absent one is the zero Ref.
func OptionalRef(field string, m *leasev1.LeaseRef) (lease.Ref, error) {
	if m == nil {
		return lease.Ref{}, nil
	}
	return Ref(field, m)
}

// FromRef encodes a lease reference; the zero Ref becomes nil.
func FromRef(r lease.Ref) *leasev1.LeaseRef {
	if r == (lease.Ref{}) {
		return nil
	}
	return &leasev1.LeaseRef{Res: FromResource(r.Resource), Gen: uint64(r.Gen)}
}

// MTU decodes a tunnel MTU in inner bytes: 0 (not given) or 576 and more, the least that an IPv4 host must take (RFC 791).
func MTU(field string, v uint32) (uint16, error) {
	if v != 0 && v < 576 || v > math.MaxUint16 {
		return 0, fmt.Errorf("%s: %d: want 0 or 576 to 65535", field, v)
	}
	return uint16(v), nil
}

// Reason decodes a reason. One from a newer peer becomes ReasonNone, which every caller must handle anyway.
func Reason(m leasev1.Reason) lease.Reason {
	if _, ok := leasev1.Reason_name[int32(m)]; !ok {
		return lease.ReasonNone
	}
	return lease.Reason(m)
}

// FromReason encodes a reason.
func FromReason(r lease.Reason) leasev1.Reason { return leasev1.Reason(r) }

// Trigger decodes a trigger; one from a newer peer becomes TriggerUnspecified.
func Trigger(m leasev1.Trigger) lease.Trigger {
	if _, ok := leasev1.Trigger_name[int32(m)]; !ok {
		return lease.TriggerUnspecified
	}
	return lease.Trigger(m)
}

// Binding decodes a binding.
func Binding(field string, m *leasev1.Binding) (lease.Binding, error) {
	if m == nil {
		return lease.Binding{}, fmt.Errorf("%s: not set", field)
	}
	b, err := unnamedBinding(m)
	if err != nil { // named only now: a table has a million of them
		return lease.Binding{}, fmt.Errorf("%s.%w", field, err)
	}
	return b, nil
}

func unnamedBinding(m *leasev1.Binding) (lease.Binding, error) {
	res, err := Resource("res", m.Res)
	if err != nil {
		return lease.Binding{}, err
	}
	host, err := Addr6("host", m.Host)
	if err != nil {
		return lease.Binding{}, err
	}
	tep, err := Addr6("tep", m.Tep)
	if err != nil {
		return lease.Binding{}, err
	}
	mtu, err := MTU("mtu", m.Mtu)
	if err != nil {
		return lease.Binding{}, err
	}
	return lease.Binding{Resource: res, Host: host, TEP: tep, Gen: lease.Gen(m.Gen), MTU: mtu}, nil
}

// FromBinding encodes a binding.
func FromBinding(b lease.Binding) *leasev1.Binding {
	return &leasev1.Binding{
		Res: FromResource(b.Resource), Host: FromAddr6(b.Host), Tep: FromAddr6(b.TEP), Gen: uint64(b.Gen), Mtu: uint32(b.MTU),
	}
}

// Record decodes a record. A kind from a newer service becomes KindUnknown; whether that is an error is the replica's
// decision, by Critical.
func Record(m *leasev1.Record) (lease.Record, error) {
	if m == nil {
		return lease.Record{}, fmt.Errorf("record: not set")
	}
	r := lease.Record{Rev: lease.Rev(m.Rev), Critical: m.Critical, Kind: lease.KindUnknown}
	switch k := m.K.(type) {
	case *leasev1.Record_Bind:
		b, err := Binding("record.bind", k.Bind)
		if err != nil {
			return lease.Record{}, err
		}
		r.Kind, r.Bind = lease.KindBind, b
	case *leasev1.Record_Unbind:
		res, err := Resource("record.unbind.res", k.Unbind.GetRes())
		if err != nil {
			return lease.Record{}, err
		}
		r.Kind, r.Unbind = lease.KindUnbind, lease.Ref{Resource: res, Gen: lease.Gen(k.Unbind.GetGen())}
	case *leasev1.Record_Pool:
		p, err := poolChange(k.Pool)
		if err != nil {
			return lease.Record{}, err
		}
		r.Kind, r.Pool = lease.KindPool, p
	}
	return r, nil
}

func poolChange(m *leasev1.PoolRecord) (lease.PoolChange, error) {
	p := lease.PoolChange{Pool: lease.Pool{Name: m.GetName()}, Removed: m.GetRemoved()}
	var err error
	if p.Prefix, err = Prefix4("record.pool", m.GetPrefix(), m.GetBits()); err != nil {
		return lease.PoolChange{}, err
	}
	if p.TEP, err = Addr6("record.pool.tep", m.GetTep()); err != nil {
		return lease.PoolChange{}, err
	}
	return p, nil
}

// FromRecord encodes a record. KindNone and KindUnknown have no body.
func FromRecord(r lease.Record) *leasev1.Record {
	m := &leasev1.Record{Rev: uint64(r.Rev), Critical: r.Critical}
	switch r.Kind {
	case lease.KindBind:
		m.K = &leasev1.Record_Bind{Bind: FromBinding(r.Bind)}
	case lease.KindUnbind:
		m.K = &leasev1.Record_Unbind{Unbind: &leasev1.Unbind{Res: FromResource(r.Unbind.Resource), Gen: uint64(r.Unbind.Gen)}}
	case lease.KindPool:
		m.K = &leasev1.Record_Pool{Pool: &leasev1.PoolRecord{
			Name: r.Pool.Name, Prefix: FromAddr4(r.Pool.Prefix.Addr()), Bits: uint32(r.Pool.Prefix.Bits()),
			Tep: FromAddr6(r.Pool.TEP), Removed: r.Pool.Removed,
		}}
	case lease.KindNone, lease.KindUnknown:
	}
	return m
}

// Prefix4 decodes an IPv4 prefix without host bits.
func Prefix4(field string, addr, bits uint32) (netip.Prefix, error) {
	if bits > 32 {
		return netip.Prefix{}, fmt.Errorf("%s: prefix length %d: want at most 32", field, bits)
	}
	p := netip.PrefixFrom(Addr4(addr), int(bits))
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s: prefix %s has host bits", field, p)
	}
	return p, nil
}

// Prefix6 decodes an IPv6 prefix without host bits.
func Prefix6(field string, m *leasev1.Prefix) (netip.Prefix, error) {
	if len(m.GetAddr()) != 16 || m.GetBits() > 128 {
		return netip.Prefix{}, fmt.Errorf("%s: %d bytes, length %d: want 16 bytes and at most 128", field, len(m.GetAddr()), m.GetBits())
	}
	p := netip.PrefixFrom(netip.AddrFrom16([16]byte(m.Addr)), int(m.Bits))
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s: prefix %s has host bits", field, p)
	}
	return p, nil
}

// RequestID decodes a request id: 16 bytes, or none.
func RequestID(b []byte) (lease.RequestID, error) {
	switch len(b) {
	case 0:
		return lease.RequestID{}, nil
	case len(lease.RequestID{}):
		return lease.RequestID(b), nil
	}
	return lease.RequestID{}, fmt.Errorf("request_id: %d bytes: want 16", len(b))
}

// MaxSources is how many addresses a host may report.
const MaxSources = 16

// Sources decodes the addresses that a host reports.
func Sources(field string, bs [][]byte) ([]netip.Addr, error) {
	if len(bs) > MaxSources {
		return nil, fmt.Errorf("%s: %d addresses: want at most %d", field, len(bs), MaxSources)
	}
	out := make([]netip.Addr, 0, len(bs))
	for _, b := range bs {
		a, err := Addr6(field, b)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// FromSources encodes addresses.
func FromSources(as []netip.Addr) [][]byte {
	out := make([][]byte, len(as))
	for i, a := range as {
		out[i] = FromAddr6(a)
	}
	return out
}
