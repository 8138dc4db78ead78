package boltstore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/dstm-project/dstm/api/store/v1"
	"github.com/dstm-project/dstm/lease"
	"github.com/dstm-project/dstm/leasesvc/store"
	"github.com/dstm-project/dstm/leasesvc/store/record"
)

// RestoreOptions say what is put in the place of a store.
type RestoreOptions struct {
	From   string      // a copy or a backup
	Path   string      // of the store
	Copies string      // directory in which epochs are looked for; empty = none
	Epoch  lease.Epoch // the new epoch is above it
	// OtherCluster allows that the store in place is of another cluster, or cannot be read, so that nobody knows.
	OtherCluster bool
	// Problems allows a copy that contradicts itself, see Report.
	Problems bool
	Now      time.Time // for the name under which the store in place is kept
}

// Restored is what Restore did.
type Restored struct {
	Report             // of what was restored, with its new epoch
	Aside  string      // where the store is that was in place; empty = there was none
	Before lease.Epoch // the newest epoch that was found anywhere
}

// Restore puts a copy in the place of a store that no service has open. The store in place is kept under another name.
// What was leased since the copy was made is not known to it: so its epoch is new, and State.Restored is set. A cut at
// any instant leaves the one or the other in place.
func Restore(o RestoreOptions) (Restored, error) {
	r, err := restore(o)
	if err != nil {
		return r, fmt.Errorf("restore %s to %s: %w", o.From, o.Path, err)
	}
	return r, nil
}

func restore(o RestoreOptions) (r Restored, err error) {
	unlock, err := lockPlace(o.Path)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if same(o.From, o.Path) {
		return r, errors.New("this is the store itself")
	}
	if r.Report, err = inspect(o.From, nil); err != nil {
		return r, fmt.Errorf("damaged: %w", err)
	}
	if len(r.Problems) > 0 && !o.Problems {
		return r, fmt.Errorf("the copy contradicts itself: %w", errors.Join(r.Problems...))
	}
	if r.Before, err = newestEpoch(o, r.Report); err != nil {
		return r, err
	}
	if r.Before == math.MaxUint16 {
		return r, fmt.Errorf("epoch %d is the last: a new cluster is needed", r.Before)
	}
	r.Epoch, r.State.Restored = r.Before+1, true
	r.Aside, err = replace(o, r.Epoch)
	return r, err
}

// lockPlace keeps a service from using the store while it is replaced.
func lockPlace(path string) (unlock func() error, err error) {
	f, err := openLocked(path, os.O_RDWR, unix.LOCK_EX, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return func() error { return nil }, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the store in place is %w: is the service still running?", err)
	}
	return f.Close, nil
}

func same(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// newestEpoch looks for the newest epoch that the cluster ever had: in the copy, in the store in place, in those that
// earlier restores kept, and in other copies. If one were used again, generations would be, too (I3).
func newestEpoch(o RestoreOptions, copied Report) (lease.Epoch, error) {
	newest := max(o.Epoch, copied.Epoch)
	paths, err := filepath.Glob(escape(o.Path) + asideInfix + "*")
	if err != nil {
		return 0, err
	}
	if o.Copies != "" {
		names, err := list(o.Copies)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		for _, n := range names {
			paths = append(paths, filepath.Join(o.Copies, n))
		}
	}
	for _, p := range paths {
		if st, err := peek(p); err == nil && st.Cluster == copied.Cluster {
			newest = max(newest, st.Epoch)
		}
	}
	st, err := peek(o.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || o.OtherCluster && (err != nil || st.Cluster != copied.Cluster):
		return newest, nil
	case err != nil:
		return 0, fmt.Errorf("the store in place cannot be read (%w), so it is not known whether it is of the same cluster: if you know, say so", err)
	case st.Cluster != copied.Cluster:
		return 0, fmt.Errorf("the store in place is of cluster %x, the copy of %x: gateways and hosts of one are not those of the other", st.Cluster, copied.Cluster)
	}
	return max(newest, st.Epoch), nil
}

// escape makes a pattern of a path that matches itself only.
func escape(path string) string {
	var out []byte
	for _, c := range []byte(path) {
		switch c {
		case '*', '?', '[', '\\':
			out = append(out, '\\')
		}
		out = append(out, c)
	}
	return string(out)
}

// peek reads the meta record of a file, whatever else is wrong with it.
func peek(path string) (store.State, error) {
	f, err := os.Open(path)
	if err != nil {
		return store.State{}, err
	}
	var m storev1.Meta
	err = onePair(f, bucketMeta, keyMeta, func(v []byte) error { return proto.Unmarshal(v, &m) })
	if err == nil {
		err = record.CheckMeta(&m, layout)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return store.State{}, err
	}
	return record.State(&m), nil
}

// asideInfix stands between the path of a store and the time at which it was replaced.
const asideInfix = ".replaced-"

// replace puts the copy in place.
func replace(o RestoreOptions, epoch lease.Epoch) (aside string, err error) {
	err = writeFile(o.Path, func(w io.Writer) error { return copyFile(w, o.From) }, func(tmp string) error {
		if err := renew(tmp, epoch); err != nil {
			return err
		}
		if _, err := os.Lstat(o.Path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		aside = o.Path + asideInfix + o.Now.UTC().Format(copyTime)
		return os.Link(o.Path, aside) // never over a file that is there
	})
	return aside, err
}

func copyFile(w io.Writer, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return errors.Join(err, f.Close())
}

// renew makes a store of a copy: a new epoch, and the mark that leases may be in force that it does not know.
func renew(path string, epoch lease.Epoch) error {
	f, err := openLocked(path, os.O_RDWR, unix.LOCK_EX, 0)
	if err != nil {
		return err
	}
	db, _, err := openChecked(f)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		m, err := loadMeta(tx)
		if err != nil {
			return err
		}
		m.Epoch, m.Restored = uint32(epoch), true
		return putProto(tx.Bucket(bucketMeta), keyMeta, m)
	})
	return errors.Join(err, db.Close())
}
