package main

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// cache keeps answers for a while: denials for another while than permissions, errors not at all. When it is full, the answer
// that was used longest ago goes. Its methods may be called from any goroutine.
type cache struct {
	ttl, negative time.Duration
	now           func() time.Time

	mu      sync.Mutex
	entries *simplelru.LRU[question, entry] // nil = nothing is kept
}

type entry struct {
	answer
	until time.Time
}

func newCache(size int, ttl, negative time.Duration, now func() time.Time) *cache {
	c := &cache{ttl: ttl, negative: negative, now: now}
	if size > 0 {
		c.entries, _ = simplelru.NewLRU[question, entry](size, nil) // fails for sizes below 1 only
	}
	return c
}

func (c *cache) get(q question) (answer, bool) {
	if c.entries == nil {
		return answer{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries.Get(q)
	if ok && !c.now().Before(e.until) {
		c.entries.Remove(q)
		ok = false
	}
	return e.answer, ok
}

func (c *cache) put(q question, a answer) {
	ttl := c.negative
	if a.allow {
		ttl = c.ttl
	}
	if c.entries == nil || ttl == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries.Add(q, entry{a, c.now().Add(ttl)})
}
