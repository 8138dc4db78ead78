package audit

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

func encode(ev store.AuditEvent) *storev1.AuditRecord {
	a := ev.Addr.As4()
	m := &storev1.AuditRecord{
		Addr: binary.BigEndian.Uint32(a[:]), PortSet: uint32(ev.PSIDLen)<<16 | uint32(ev.PSID), Epoch: uint32(ev.Gen.Epoch()),
		Since: uint64(ev.Rev - ev.Gen.Rev()), T: record.Nanos(ev.At),
	}
	switch ev.Kind {
	case store.AuditBound:
		m.Kind = &storev1.AuditRecord_Bound{Bound: &storev1.AuditBound{
			Host: ev.Host, Source: record.AddrBytes(ev.Source), Tep: record.AddrBytes(ev.TEP), Trigger: uint32(ev.Trigger),
		}}
	case store.AuditUnbound:
		m.Kind = &storev1.AuditRecord_Unbound{Unbound: &storev1.AuditUnbound{Reason: uint32(ev.End)}}
	case store.AuditFenced:
		m.Kind = &storev1.AuditRecord_Fenced{Fenced: &storev1.AuditFenced{}}
	}
	return m
}

// decode reads a record. before is the chain before it, if the record says.
func decode(rev lease.Rev, b []byte) (ev store.AuditEvent, before []byte, err error) {
	var m storev1.AuditRecord
	if err := proto.Unmarshal(b, &m); err != nil {
		return ev, nil, fmt.Errorf("audit record %d: %w", rev, err)
	}
	ev = store.AuditEvent{Rev: rev, At: record.Time(m.T)}
	ev.Addr = netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, m.Addr)))
	ev.PSIDLen, ev.PSID = uint8(m.PortSet>>16), uint16(m.PortSet)
	switch {
	case m.PortSet>>24 != 0:
		return ev, nil, fmt.Errorf("audit record %d: port set %#x", rev, m.PortSet)
	case m.Since >= uint64(rev) || rev > lease.MaxRev || m.Epoch > 1<<16-1:
		return ev, nil, fmt.Errorf("audit record %d: lease of epoch %d, %d revisions ago", rev, m.Epoch, m.Since)
	case len(m.Before) != 0 && len(m.Before) != len(store.Chain{}):
		return ev, nil, fmt.Errorf("audit record %d: chain of %d bytes", rev, len(m.Before))
	}
	ev.Gen = lease.MakeGen(lease.Epoch(m.Epoch), rev-lease.Rev(m.Since))
	if err := ev.Valid(); err != nil {
		return ev, nil, fmt.Errorf("audit record %d: %w", rev, err)
	}
	switch k := m.Kind.(type) {
	case *storev1.AuditRecord_Bound:
		ev.Kind, ev.Host, ev.Trigger = store.AuditBound, k.Bound.GetHost(), lease.Trigger(k.Bound.GetTrigger())
		if ev.Source, err = record.Addr(k.Bound.GetSource()); err == nil {
			ev.TEP, err = record.Addr(k.Bound.GetTep())
		}
		if err != nil {
			return ev, nil, fmt.Errorf("audit record %d: %w", rev, err)
		}
	case *storev1.AuditRecord_Unbound:
		ev.Kind, ev.End = store.AuditUnbound, lease.Reason(k.Unbound.GetReason())
	case *storev1.AuditRecord_Fenced:
		ev.Kind = store.AuditFenced
	default:
		return ev, nil, fmt.Errorf("audit record %d: unknown kind", rev)
	}
	return ev, m.Before, nil
}

// Decode reads a record of the log; the event has no chain.
func Decode(key, value []byte) (store.AuditEvent, error) {
	rev, err := KeyRev(key)
	if err != nil {
		return store.AuditEvent{}, err
	}
	ev, _, err := decode(rev, value)
	return ev, err
}

func (l Lease) value() []byte {
	var m storev1.AuditLease
	if l.Unbound != 0 {
		m.Unbound = uint64(l.Unbound - l.Bound)
	}
	if l.Fenced != 0 {
		m.Fenced = uint64(l.Fenced - l.Bound)
	}
	b, err := proto.Marshal(&m)
	if err != nil {
		panic("audit: two numbers do not marshal: " + err.Error())
	}
	return b
}

// DecodeLease reads an entry of the index.
func DecodeLease(key, value []byte) (Lease, error) {
	res, err := record.DecodeResource(key)
	if err != nil {
		return Lease{}, fmt.Errorf("audit index: %w", err)
	}
	if len(key) != indexLen {
		return Lease{}, fmt.Errorf("audit index: key of %d bytes: want %d", len(key), indexLen)
	}
	var m storev1.AuditLease
	if err := proto.Unmarshal(value, &m); err != nil {
		return Lease{}, fmt.Errorf("audit index %s: %w", res, err)
	}
	l := Lease{Resource: res, Bound: lease.Rev(binary.BigEndian.Uint64(key[resourceLen:]))}
	if l.Bound > lease.MaxRev || lease.Rev(max(m.Unbound, m.Fenced)) > lease.MaxRev {
		return Lease{}, fmt.Errorf("audit index %s: revision %d and %d, %d more: want at most %d", res, l.Bound, m.Unbound, m.Fenced, lease.MaxRev)
	}
	if m.Unbound != 0 {
		l.Unbound = l.Bound + lease.Rev(m.Unbound)
	}
	if m.Fenced != 0 {
		l.Fenced = l.Bound + lease.Rev(m.Fenced)
	}
	return l, nil
}

// Lengths of keys of the index.
const (
	resourceLen = 7
	indexLen    = resourceLen + 8
)

// fold puts the records of one lease together.
func fold(a *lease.Audit, ev store.AuditEvent) {
	a.Ref = ev.Ref
	switch ev.Kind {
	case store.AuditBound:
		a.Host, a.Source, a.TEP, a.Trigger, a.Bound = ev.Host, ev.Source, ev.TEP, ev.Trigger, ev.At
	case store.AuditUnbound:
		a.Unbound, a.End = ev.At, ev.End
	case store.AuditFenced:
		a.Fenced = ev.At
	}
}

// held says whether the holder of a lease may have sent packets at an instant. At the instant at which every gateway is
// fenced no packet passes any more; the next holder may begin there.
func held(a lease.Audit, at time.Time) bool {
	return !at.Before(a.Bound) && (a.Fenced.IsZero() || at.Before(a.Fenced))
}
