package store

import (
	"context"
	"sync"

	"github.com/dstm-project/dstm/lease"
)

// Ring keeps the newest records in memory for watchers. Stores publish to it what is durable, in order.
type Ring struct {
	mu      sync.Mutex
	size    int
	base    lease.Rev // everything after it is here
	last    lease.Rev
	records []lease.Record // sorted by revision
	changed chan struct{}  // closed at the next change
	closed  bool
}

// NewRing returns a ring that keeps the newest size records and begins after last.
func NewRing(size int, last lease.Rev) *Ring {
	return &Ring{size: size, base: last, last: last, changed: make(chan struct{})}
}

// Publish adds the records of revisions up to to. Records of KindNone are left out.
func (r *Ring) Publish(to lease.Rev, records []lease.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if to <= r.last {
		return
	}
	for _, rec := range records {
		if rec.Kind != lease.KindNone {
			r.records = append(r.records, rec)
		}
	}
	r.last = to
	if over := len(r.records) - r.size; over > 0 {
		r.base = r.records[over-1].Rev
		// Copied now and then only, so that a full ring costs a constant time per record.
		r.records = r.records[over:]
		if cap(r.records) < 2*len(r.records) {
			r.records = append(make([]lease.Record, 0, 3*r.size), r.records...)
		}
	}
	r.wake()
}

// Close wakes every watcher with ErrClosed.
func (r *Ring) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.closed = true
		r.wake()
	}
}

func (r *Ring) wake() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// Watch returns a cursor after a revision, which may lie in the future.
func (r *Ring) Watch(after lease.Rev) Watcher { return &cursor{r: r, at: after} }

type cursor struct {
	r  *Ring
	at lease.Rev
}

// maxBatch bounds the records of one batch, and with it the size of a message.
const maxBatch = 4096

func (c *cursor) Next(ctx context.Context) (Batch, error) {
	for {
		b, changed, err := c.take()
		if err != nil || b.To != 0 {
			return b, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Batch{}, ctx.Err()
		}
	}
}

func (c *cursor) take() (Batch, <-chan struct{}, error) {
	r := c.r
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return Batch{}, nil, ErrClosed
	case c.at < r.base:
		return Batch{}, nil, ErrCompacted
	case c.at >= r.last:
		return Batch{}, r.changed, nil
	}
	b := Batch{From: c.at + 1, To: r.last}
	i := search(r.records, c.at)
	for ; i < len(r.records); i++ {
		// A revision is never split: stop only in front of a new one.
		if n := len(b.Records); n >= maxBatch && r.records[i].Rev != b.Records[n-1].Rev {
			b.To = b.Records[n-1].Rev
			break
		}
		b.Records = append(b.Records, r.records[i])
	}
	c.at = b.To
	return b, nil, nil
}

// search returns the index of the first record after rev.
func search(rs []lease.Record, rev lease.Rev) int {
	lo, hi := 0, len(rs)
	for lo < hi {
		if mid := (lo + hi) / 2; rs[mid].Rev <= rev {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}
