// Package audit is the form of the audit log in every store of the lease service: what is written for an event, how the
// log is chained, read, checked and pruned. It does no I/O.
//
//	log:   revision (8 bytes)                                  → AuditRecord: bound, unbound or fenced
//	index: address, port set (7 bytes), revision of the bind (8) → AuditLease: where the other two are
//
// The log is append-only. Its chain is a running hash: the first 16 bytes of SHA-256 over the value before, the revision
// and the record. Only the newest value is kept, in the head, which the meta record holds; beside it stands the value up
// to which the log is pruned. To find a place without reading everything, the first record of each 64 revisions holds the
// value before it. So a log that was changed, cut or reordered, anywhere, does not end where its head says.
package audit

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// stretch is the number of revisions of which the first record holds the chain before it.
const stretch = 64

// Entry is what one event adds to a log: two keys and what is kept under them. The index entry replaces the one before.
type Entry struct {
	Key, Value           []byte
	IndexKey, IndexValue []byte
}

// Append returns what a commit adds to the log, and the log's new head. A commit without an audit record adds nothing:
// the entry has no key. A bind whose generation is not of its revision is an error; no core makes one (I3).
func Append(h *storev1.AuditHead, c lease.Commit) (Entry, error) {
	if c.Audit.Ref == (lease.Ref{}) {
		return Entry{}, nil
	}
	ev := event(c)
	l := Lease{Resource: ev.Resource, Bound: ev.Gen.Rev()}
	switch {
	case ev.Rev <= lease.Rev(h.LastRev):
		return Entry{}, fmt.Errorf("audit: record at revision %d after %d", ev.Rev, h.LastRev)
	case ev.Kind == store.AuditBound && l.Bound != ev.Rev, l.Bound > ev.Rev:
		return Entry{}, fmt.Errorf("audit: lease %s %s at revision %d", ev.Ref, ev.Kind, ev.Rev)
	case ev.Kind == store.AuditUnbound:
		l.Unbound = ev.Rev
	case ev.Kind == store.AuditFenced:
		l.Unbound, l.Fenced = max(c.Address.RevokeRev, l.Bound), ev.Rev
	}
	chain := chainOf(h.Chain)
	m := encode(ev)
	if uint64(ev.Rev)/stretch != h.LastRev/stretch {
		m.Before = chain[:]
	}
	value, err := proto.Marshal(m)
	if err != nil { // a host id that is no UTF-8
		return Entry{}, fmt.Errorf("audit: %w", err)
	}
	chain = next(chain, ev.Rev, value)
	h.LastRev, h.Chain = uint64(ev.Rev), chain[:]
	return Entry{Key: Key(ev.Rev), Value: value, IndexKey: l.key(), IndexValue: l.value()}, nil
}

// event returns what happened to the lease of a commit: the last of the three things that its record knows.
func event(c lease.Commit) store.AuditEvent {
	a := c.Audit
	ev := store.AuditEvent{Rev: c.Rev, Ref: a.Ref}
	switch {
	case !a.Fenced.IsZero():
		ev.Kind, ev.At = store.AuditFenced, a.Fenced
	case !a.Unbound.IsZero():
		ev.Kind, ev.At, ev.End = store.AuditUnbound, a.Unbound, a.End
	default:
		ev.Kind, ev.At = store.AuditBound, a.Bound
		ev.Host, ev.Source, ev.TEP, ev.Trigger = a.Host, a.Source, a.TEP, a.Trigger
	}
	return ev
}

func chainOf(b []byte) store.Chain {
	var c store.Chain
	copy(c[:], b)
	return c
}

// next returns the chain after a record.
func next(before store.Chain, rev lease.Rev, value []byte) store.Chain {
	b := make([]byte, 0, 256)
	b = append(b, before[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(rev))
	sum := sha256.Sum256(append(b, value...))
	return store.Chain(sum[:])
}

// toggle adds the fingerprint of a record to a set of records, or takes it out.
func toggle(set []byte, rev lease.Rev, value []byte) []byte {
	out, f := chainOf(set), next(store.Chain{}, rev, value)
	for i := range out {
		out[i] ^= f[i]
	}
	return out[:]
}

// Key is the key of a record: its revision.
func Key(rev lease.Rev) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 0, 8), uint64(rev))
}

// KeyRev is the inverse of Key.
func KeyRev(k []byte) (lease.Rev, error) {
	if len(k) != 8 {
		return 0, fmt.Errorf("audit: key of %d bytes: want 8", len(k))
	}
	return lease.Rev(binary.BigEndian.Uint64(k)), nil
}

// Lease is an entry of the index: the revisions of a lease's records. 0 = not there yet.
type Lease struct {
	lease.Resource
	Bound, Unbound, Fenced lease.Rev
}

func indexKey(r lease.Resource, bound lease.Rev) []byte {
	return binary.BigEndian.AppendUint64(record.ResourceKey(r), uint64(bound))
}

func (l Lease) key() []byte { return indexKey(l.Resource, l.Bound) }
