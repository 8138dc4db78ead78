package policy

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// maxBuckets is how many hosts, and how many /64, are remembered: about 10 MB each. Who was not heard for the longest time
// is forgotten first, and begins with a fresh bucket.
const maxBuckets = 1 << 16

// quotas count the new leases of hosts and of /64 together.
type quotas struct {
	conf    QuotasConfig
	start   time.Time // times are counted from here, monotonic
	evicted func()

	mu    sync.Mutex
	hosts *buckets[string]
	nets  *buckets[netip.Prefix]
}

func newQuotas(c QuotasConfig, now time.Time, evicted func()) *quotas {
	return &quotas{
		conf: c, start: now, evicted: evicted,
		hosts: newBuckets[string](c.PerHost, maxBuckets), nets: newBuckets[netip.Prefix](c.Per64, maxBuckets),
	}
}

// take takes one from both quotas, or from none.
func (q *quotas) take(now time.Time, r Request) Decision {
	if q.hosts == nil && q.nets == nil {
		return Decision{Verdict: Allow}
	}
	net, err := r.Source.Prefix(64)
	if err != nil {
		return Decision{Deny, "the source is no address"}
	}
	at := now.Sub(q.start)
	q.mu.Lock()
	defer q.mu.Unlock()
	host, hostOK := q.hosts.next(at, r.Host)
	of64, of64OK := q.nets.next(at, net)
	switch {
	case !hostOK:
		return Decision{Deny, fmt.Sprintf("more than %s by this host", q.conf.PerHost)}
	case !of64OK:
		return Decision{Deny, fmt.Sprintf("more than %s from this /64", q.conf.Per64)}
	}
	for _, spilled := range []bool{q.hosts.set(at, r.Host, host), q.nets.set(at, net, of64)} {
		if spilled {
			q.evicted()
		}
	}
	return Decision{Verdict: Allow}
}

// buckets are token buckets in their shortest form (the virtual scheduling algorithm of ITU-T I.371, annex A): of each only
// the time is kept at which it is full again. No entry is a full bucket, so that an entry that is lost gives no more than a
// fresh one does. A nil one has no limit.
type buckets[K comparable] struct {
	each time.Duration // to earn one
	size time.Duration // to fill an empty bucket
	full *simplelru.LRU[K, time.Duration]
}

func newBuckets[K comparable](q Quota, most int) *buckets[K] {
	if q.Binds == 0 {
		return nil
	}
	full, err := simplelru.NewLRU[K, time.Duration](most, nil)
	if err != nil {
		panic(err) // of most alone
	}
	n := time.Duration(q.Binds)
	return &buckets[K]{each: q.Window / n, size: q.Window / n * n, full: full}
}

// next returns when the bucket of k will be full again if one is taken now, and whether one may be.
func (b *buckets[K]) next(now time.Duration, k K) (full time.Duration, ok bool) {
	if b == nil {
		return 0, true
	}
	have, _ := b.full.Get(k)
	full = max(have, now) + b.each
	return full, full-now <= b.size
}

// set keeps the bucket of k. spilled: to make room one was dropped that was not full.
func (b *buckets[K]) set(now time.Duration, k K, full time.Duration) (spilled bool) {
	if b == nil {
		return false
	}
	_, oldest, _ := b.full.GetOldest()
	return b.full.Add(k, full) && oldest > now
}
