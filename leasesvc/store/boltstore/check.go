package boltstore

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store/audit"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// mapped is the address space that bbolt maps a file into. Growing behind it would have to wait until no copy is read.
const mapped = min(1<<36, math.MaxInt/4)

// errLocked means that another process has the file open.
var errLocked = errors.New("locked by another process")

// openChecked gives a locked file to bbolt after a look at all of its pages and at every record but those of the audit
// log, of which it reads the ends. The file is closed with the database, and after an error.
func openChecked(f *os.File) (db *bbolt.DB, last lease.Rev, err error) {
	if _, err := checkRecords(f); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	if db, err = openBolt(f, &bbolt.Options{FreelistType: bbolt.FreelistMapType, InitialMmapSize: mapped}); err != nil {
		return nil, 0, err
	}
	err = db.View(func(tx *bbolt.Tx) error {
		m, err := loadMeta(tx)
		if err != nil {
			return err
		}
		last = lease.Rev(m.LastRev)
		return audit.CheckEnds(newAuditLog(tx), m.Audit, lease.Rev(m.GroupAfter))
	})
	if err != nil {
		return nil, 0, errors.Join(err, db.Close())
	}
	return db, last, nil
}

// openLocked opens a file and waits a while for its lock, which bbolt takes over.
func openLocked(path string, flag, lock int, wait time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(wait); ; time.Sleep(lockTry) {
		err := unix.Flock(int(f.Fd()), lock|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, errors.Join(fmt.Errorf("lock: %w", err), f.Close())
		case time.Now().After(end):
			return nil, errors.Join(errLocked, f.Close())
		}
	}
}

// lockTry is the time between attempts to get a lock.
const lockTry = 50 * time.Millisecond

// openBolt gives a file whose pages are good to bbolt, which closes it.
func openBolt(f *os.File, o *bbolt.Options) (db *bbolt.DB, err error) {
	o.OpenFile = func(string, int, os.FileMode) (*os.File, error) { return f, nil }
	err = guard(func() error {
		db, err = bbolt.Open(f.Name(), 0o600, o)
		return err
	})
	return db, err
}

// guard turns panics and memory faults of f into errors.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("page check: %v", p)
		}
	}()
	return f()
}

// checkRecords looks at all pages of a file, and reads every record but those of the audit log.
func checkRecords(f *os.File) (meta, error) {
	var sum, want digest
	m, err := checkPages(f, func(bucket string, k, v []byte) (err error) {
		switch bucket {
		case string(bucketMeta):
			var m storev1.Meta
			if err = proto.Unmarshal(v, &m); err == nil {
				err = record.CheckMeta(&m, layout)
			}
			copy(want[:], m.Digest)
			return err
		case string(bucketAddress):
			_, err = record.DecodeAddress(k, v)
		case string(bucketMember):
			_, err = record.DecodeMember(k, v)
		case string(bucketPool):
			_, err = record.DecodePool(k, v)
		default:
			return nil
		}
		sum.toggle(bucket, k, v)
		return err
	})
	if err == nil && sum != want {
		err = errors.New("addresses, members and pools are not as the newest transaction left them")
	}
	return m, err
}

// loadMeta reads and checks the meta record, and that the other buckets are there.
func loadMeta(tx *bbolt.Tx) (*storev1.Meta, error) {
	for _, name := range allBuckets {
		if tx.Bucket(name) == nil {
			return nil, fmt.Errorf("bucket %q is missing", name)
		}
	}
	var m storev1.Meta
	if err := getProto(tx.Bucket(bucketMeta), keyMeta, &m); err != nil {
		return nil, err
	}
	return &m, record.CheckMeta(&m, layout)
}
