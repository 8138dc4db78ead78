// Package bucket counts events by key and says which are too many: token buckets in their shortest form (the virtual
// scheduling algorithm of ITU-T I.371, annex A), of which only the time is kept at which each is full again.
package bucket

import (
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// Set is a bounded number of buckets. No entry is a full bucket, so that one that is dropped to make room gives no more than
// a fresh one does. A nil Set has no limit. One goroutine uses it.
type Set[K comparable] struct {
	each time.Duration // to earn one
	size time.Duration // to fill an empty bucket
	full *simplelru.LRU[K, time.Duration]
}

// New returns buckets that hold burst events and earn n of them in window, for at most most keys; those not heard of for the
// longest time are dropped first. n 0 means no limit.
func New[K comparable](n int, window time.Duration, burst, most int) *Set[K] {
	if n == 0 {
		return nil
	}
	full, err := simplelru.NewLRU[K, time.Duration](most, nil)
	if err != nil {
		panic(err) // of most alone
	}
	each := window / time.Duration(n)
	return &Set[K]{each: each, size: each * time.Duration(burst), full: full}
}

// Len returns how many buckets are remembered.
func (s *Set[K]) Len() int { return s.full.Len() }

// Next returns when the bucket of k will be full again if one is taken now, and whether one may be.
func (s *Set[K]) Next(now time.Duration, k K) (full time.Duration, ok bool) {
	if s == nil {
		return 0, true
	}
	have, _ := s.full.Get(k)
	full = max(have, now) + s.each
	return full, full-now <= s.size
}

// Set keeps the bucket of k. spilled: to make room one was dropped that was not full.
func (s *Set[K]) Set(now time.Duration, k K, full time.Duration) (spilled bool) {
	if s == nil {
		return false
	}
	_, oldest, _ := s.full.GetOldest()
	return s.full.Add(k, full) && oldest > now
}

// Take takes one from the bucket of k and reports whether there was one.
func (s *Set[K]) Take(now time.Duration, k K) bool {
	full, ok := s.Next(now, k)
	if ok {
		s.Set(now, k, full)
	}
	return ok
}
