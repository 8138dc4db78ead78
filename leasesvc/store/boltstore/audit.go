package boltstore

import (
	"bytes"
	"context"
	"net/netip"
	"time"

	"go.etcd.io/bbolt"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
)

// pruneStep bounds the records that one step of pruning looks at, and with it the time that commits wait for it.
const pruneStep = 512

// auditLog reads the log in a transaction.
type auditLog struct{ log, index *bbolt.Cursor }

var _ audit.Reader = auditLog{}

func newAuditLog(tx *bbolt.Tx) auditLog {
	return auditLog{tx.Bucket(bucketAudit).Cursor(), tx.Bucket(bucketIndex).Cursor()}
}

// Record implements audit.Reader.
func (l auditLog) Record(from lease.Rev) (lease.Rev, []byte, error) {
	k, v := l.log.Seek(audit.Key(from))
	if k == nil {
		return 0, nil, nil
	}
	rev, err := audit.KeyRev(k)
	return rev, v, err
}

// First implements audit.Reader.
func (l auditLog) First(key []byte) (k, v []byte, err error) {
	k, v = l.index.Seek(key)
	return k, v, nil
}

// Last implements audit.Reader.
func (l auditLog) Last(key []byte) (k, v []byte, err error) {
	k, v = l.index.Seek(key)
	switch {
	case k == nil:
		k, v = l.index.Last()
	case !bytes.Equal(k, key):
		k, v = l.index.Prev()
	}
	return k, v, nil
}

// History implements store.Store.
func (s *Store) History(ctx context.Context, addr netip.Addr, at time.Time, yield func(lease.Audit) bool) error {
	return s.db.View(func(tx *bbolt.Tx) error { return audit.History(ctx, newAuditLog(tx), addr, at, yield) })
}

// Events implements store.Store.
func (s *Store) Events(ctx context.Context, after lease.Rev, limit int) (out []store.AuditEvent, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		var m storev1.Meta
		if err := getProto(tx.Bucket(bucketMeta), keyMeta, &m); err != nil {
			return err
		}
		out, err = audit.Events(ctx, newAuditLog(tx), m.Audit, after, limit)
		return err
	})
	return out, err
}

// Prune implements store.Store.
func (s *Store) Prune(ctx context.Context, before time.Time) (more bool, err error) {
	p, complete := store.NewPending()
	job := &pruning{before: before}
	if err := s.enqueue(item{prune: job, complete: complete}); err != nil {
		return false, err
	}
	if err := p.Wait(ctx); err != nil {
		return false, err // job is still the writer's if ctx ended
	}
	return job.more, nil
}

// pruning is a step that waits for the writer.
type pruning struct {
	before time.Time
	more   bool
}

func (w *writer) prune(p *pruning) error {
	out, err := audit.Prune(newAuditLog(w.tx), w.meta.Audit, p.before, pruneStep)
	if err != nil {
		return err
	}
	p.more = out.More
	for _, k := range out.Log {
		if err := w.log.Delete(k); err != nil {
			return err
		}
	}
	for _, k := range out.Index {
		if err := w.index.Delete(k); err != nil {
			return err
		}
	}
	return nil
}
