package boltstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstm-project/dstm/leasesvc/store"
)

// Copies makes copies of a store while it runs, and keeps the newest of them.
type Copies struct {
	Store store.Store   // which writes a store file, see Store.Snapshot
	Dir   string        // is made when it is not there
	Every time.Duration // above 0
	Keep  int           // at least 1
	Log   *slog.Logger

	newest atomic.Int64 // when the newest copy was made, Unix nanoseconds; 0 = there is none
	failed atomic.Int64
}

// The name of a copy is the time at which it was begun, so that names sort by age. A file that is not whole yet has tmp
// behind it.
const (
	copyPrefix = "lease-"
	copyTime   = "20060102T150405.000Z"
	copySuffix = ".db"
	tmpSuffix  = ".tmp"
)

func copyName(t time.Time) string { return copyPrefix + t.UTC().Format(copyTime) + copySuffix }

// copyMade returns when a copy was begun; false for any other file.
func copyMade(name string) (time.Time, bool) {
	s, ok1 := strings.CutPrefix(name, copyPrefix)
	s, ok2 := strings.CutSuffix(s, copySuffix)
	t, err := time.Parse(copyTime, s)
	return t, ok1 && ok2 && err == nil
}

// Register adds the metrics of the copies.
func (c *Copies) Register(r prometheus.Registerer) {
	const ns = "dstm_leasesvc_store_copy"
	r.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: ns + "_age_seconds", Help: "Age of the newest whole copy of the store; +Inf when there is none.",
		}, func() float64 {
			if at := c.newest.Load(); at != 0 {
				return time.Since(time.Unix(0, at)).Seconds()
			}
			return math.Inf(1)
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: ns + "_failures_total", Help: "Copies of the store that failed.",
		}, func() float64 { return float64(c.failed.Load()) }),
	)
}

// settle is how long an overdue copy waits after a start: gateways and hosts come back then, and need disk and processor more.
const settle = time.Minute

// Run makes a copy whenever the newest is as old as Every. A copy that fails is logged and counted; the service goes on.
func (c *Copies) Run(ctx context.Context, ready func()) error {
	made, err := list(c.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("copies: %w", err)
	}
	wait := min(c.Every, settle)
	if n := len(made); n > 0 {
		at, _ := copyMade(made[n-1])
		c.newest.Store(at.UnixNano())
		wait = min(c.Every, max(settle, c.Every-time.Since(at)))
	}
	ready()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		if path, err := c.Make(ctx); err != nil && ctx.Err() == nil {
			c.failed.Add(1)
			c.Log.Error("store not copied", "dir", c.Dir, "err", err)
		} else if err == nil {
			c.Log.Debug("store copied", "file", path)
		}
		wait = c.Every
	}
}

// Make makes one copy, checks it and removes those that are too many. Commits go on meanwhile. A damaged copy is not kept,
// and neither is an older one removed; one whose records contradict each other is, and is an error, too.
func (c *Copies) Make(ctx context.Context) (string, error) {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return "", err
	}
	now := time.Now()
	path := filepath.Join(c.Dir, copyName(now))
	var r Report
	err := writeFile(path, func(w io.Writer) error { return c.Store.Snapshot(ctx, w) }, func(tmp string) (err error) {
		r, err = Check(tmp, func(store.AuditEvent) error { return ctx.Err() })
		return err
	})
	if err != nil {
		return "", err
	}
	c.newest.Store(now.UnixNano())
	return path, errors.Join(append(r.Problems, c.clean())...)
}

// clean removes copies that are too many, and what was left of one that was broken off.
func (c *Copies) clean() error {
	made, err := list(c.Dir)
	if err != nil {
		return err
	}
	for _, name := range made[:max(0, len(made)-c.Keep)] {
		err = errors.Join(err, os.Remove(filepath.Join(c.Dir, name)))
	}
	left, globErr := filepath.Glob(filepath.Join(c.Dir, copyPrefix+"*"+copySuffix+tmpSuffix))
	for _, path := range left {
		err = errors.Join(err, os.Remove(path))
	}
	return errors.Join(err, globErr)
}

// list returns the names of the copies in a directory, oldest first.
func list(dir string) ([]string, error) {
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range es {
		if _, ok := copyMade(e.Name()); ok {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	return out, nil
}

// Receive writes a store file that comes from elsewhere and checks it. The file is replaced only by one that is whole;
// its records may contradict each other, see Report.Problems.
func Receive(path string, write func(io.Writer) error) (r Report, err error) {
	err = writeFile(path, write, func(tmp string) error {
		r, err = Check(tmp, nil)
		return err
	})
	if err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// writeFile makes a file that is either whole, checked and on the disk, or not there under its name.
func writeFile(path string, write func(io.Writer) error, check func(tmp string) error) error {
	tmp := path + tmpSuffix
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(write(f), f.Sync(), f.Close())
	if err == nil {
		err = check(tmp)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
