package boltstore

import (
	"errors"
	"fmt"
	"os"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// Report is what a check of a store file found.
type Report struct {
	store.State
	Bytes     int64               // of the pages in use and free
	Addresses map[lease.State]int // that were ever leased
	Leases    int                 // in the audit log
	Events    int                 // in the audit log
	First     time.Time           // of the oldest event
	Newest    lease.Rev           // of the audit log
	Pruned    lease.Rev           // up to here the audit log was pruned
	Chain     store.Chain         // at the end of the audit log
	// Problems is what contradicts itself in a file whose pages and records are whole: a broken chain, records that do not
	// agree with each other. The first maxProblems.
	Problems []error
}

const maxProblems = 20

func (r *Report) problem(err error) {
	if err != nil && len(r.Problems) < maxProblems {
		r.Problems = append(r.Problems, err)
	}
}

// Check looks at everything in a store file that no service has open: pages, records, the chain of the audit log, and
// whether they agree with each other. An error means damage. each, if not nil, is called with the events of the audit
// log, in order, until the chain breaks.
func Check(path string, each func(store.AuditEvent) error) (Report, error) {
	r, err := inspect(path, each)
	if err != nil {
		return r, fmt.Errorf("store %s: %w", path, err)
	}
	return r, nil
}

func inspect(path string, each func(store.AuditEvent) error) (Report, error) {
	f, err := openLocked(path, os.O_RDONLY, unix.LOCK_SH, 0)
	if err != nil {
		return Report{}, err
	}
	m, err := checkRecords(f)
	if err != nil {
		return Report{}, errors.Join(err, f.Close())
	}
	db, err := openBolt(f, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return Report{}, err
	}
	r := Report{Bytes: int64(m.pages) * int64(m.pageSize), Addresses: map[lease.State]int{}}
	err = guard(func() error {
		return db.View(func(tx *bbolt.Tx) error { return r.read(tx, each) })
	})
	return r, errors.Join(err, db.Close())
}

func (r *Report) read(tx *bbolt.Tx, each func(store.AuditEvent) error) error {
	m, err := loadMeta(tx)
	if err != nil {
		return err
	}
	if r.State, err = state(tx, m); err != nil {
		return err
	}
	r.Newest, r.Pruned = lease.Rev(m.Audit.LastRev), lease.Rev(m.Audit.BaseRev)
	copy(r.Chain[:], m.Audit.Chain)
	if r.Newest > r.Last {
		r.problem(fmt.Errorf("audit log ends at revision %d: the store ends at %d", r.Newest, r.Last))
	}
	if err := r.events(tx, m.Audit, each); err != nil {
		return err
	}
	if err := r.index(tx, m.Audit); err != nil {
		return err
	}
	return r.addresses(tx)
}

// errStop ends the reading of the audit log.
var errStop = errors.New("stop")

// events checks the chain.
func (r *Report) events(tx *bbolt.Tx, h *storev1.AuditHead, each func(store.AuditEvent) error) error {
	v := audit.NewVerifier(h)
	err := tx.Bucket(bucketAudit).ForEach(func(k, b []byte) error {
		ev, err := v.Add(k, b)
		if err != nil {
			r.problem(err)
			return errStop
		}
		if r.Events++; r.First.IsZero() {
			r.First = ev.At
		}
		if each == nil {
			return nil
		}
		return each(ev)
	})
	switch {
	case errors.Is(err, errStop):
		return nil
	case err != nil:
		return err
	}
	r.problem(v.End())
	return nil
}

// index checks that every lease has its records.
func (r *Report) index(tx *bbolt.Tx, h *storev1.AuditHead) error {
	log := newAuditLog(tx)
	return tx.Bucket(bucketIndex).ForEach(func(k, b []byte) error {
		l, err := audit.DecodeLease(k, b)
		if err != nil {
			return err
		}
		r.Leases++
		r.problem(audit.CheckLease(log, h, l))
		return nil
	})
}

// addresses checks the addresses against each other and against the audit log.
func (r *Report) addresses(tx *bbolt.Tx) error {
	log := newAuditLog(tx)
	holds := map[string]lease.Resource{}
	return tx.Bucket(bucketAddress).ForEach(func(k, b []byte) error {
		a, err := record.DecodeAddress(k, b)
		if err != nil {
			return err
		}
		r.Addresses[a.State]++
		if a.State == lease.Bound {
			if other, ok := holds[a.Host]; ok {
				r.problem(fmt.Errorf("host %s holds %s and %s", a.Host, other, a.Resource))
			}
			holds[a.Host] = a.Resource
		}
		if err := checkAddress(a, r.Last); err != nil {
			r.problem(fmt.Errorf("address %s: %w", a.Resource, err))
		}
		r.problem(audit.CheckAddress(log, a))
		return nil
	})
}

// checkAddress says what is impossible in the record of an address.
func checkAddress(a lease.Address, last lease.Rev) error {
	switch {
	case a.State > lease.Conflict || a.State == lease.Reserved:
		return fmt.Errorf("state %s is never stored", a.State)
	case a.Rev > last || a.Gen.Rev() > a.Rev || a.RevokeRev > a.Rev:
		return fmt.Errorf("generation %s, revoked at %d, written at %d: the store ends at %d", a.Gen, a.RevokeRev, a.Rev, last)
	case a.State == lease.Bound && (a.Host == "" || a.RevokeRev != 0 || a.Gen == 0 || a.Gen.Rev() == 0):
		return fmt.Errorf("%s by host %q, generation %s, revoked at %d", a.State, a.Host, a.Gen, a.RevokeRev)
	case (a.State == lease.Revoking || a.State == lease.Hold) && a.RevokeRev <= a.Gen.Rev():
		return fmt.Errorf("%s, generation %s, revoked at %d", a.State, a.Gen, a.RevokeRev)
	}
	return nil
}
