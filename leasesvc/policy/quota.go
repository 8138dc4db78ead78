package policy

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/dstm-project/dstm/internal/bucket"
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
	hosts *bucket.Set[string]
	nets  *bucket.Set[netip.Prefix]
}

func newQuotas(c QuotasConfig, now time.Time, evicted func()) *quotas {
	return &quotas{
		conf: c, start: now, evicted: evicted,
		hosts: bucket.New[string](c.PerHost.Binds, c.PerHost.Window, c.PerHost.Binds, maxBuckets),
		nets:  bucket.New[netip.Prefix](c.Per64.Binds, c.Per64.Window, c.Per64.Binds, maxBuckets),
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
	host, hostOK := q.hosts.Next(at, r.Host)
	of64, of64OK := q.nets.Next(at, net)
	switch {
	case !hostOK:
		return Decision{Deny, fmt.Sprintf("more than %s by this host", q.conf.PerHost)}
	case !of64OK:
		return Decision{Deny, fmt.Sprintf("more than %s from this /64", q.conf.Per64)}
	}
	for _, spilled := range []bool{q.hosts.Set(at, r.Host, host), q.nets.Set(at, net, of64)} {
		if spilled {
			q.evicted()
		}
	}
	return Decision{Verdict: Allow}
}
