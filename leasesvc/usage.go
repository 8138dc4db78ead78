package leasesvc

import (
	"math"
	"time"

	"github.com/dstm-project/dstm/lease"
)

// What a pool's use is measured over.
const (
	usageDay   = 24 * 60 // minutes of which something is kept, 34 kB a pool
	usageHour  = 60      // minutes of the load
	usageTrend = 10      // minutes of the trend
)

// usage is how a pool was used over the last day, minute by minute. An address is taken while it is neither free nor
// merely reserved. It has no clock; now is Now.Mono and never goes back.
type usage struct {
	taken   int
	peak    int           // most addresses taken at once since the beginning
	begin   time.Duration // of measuring
	at      time.Duration // up to where it is measured
	current int           // minute of at
	minutes [usageDay]usageMinute
}

// usageMinute is one minute; its place in the ring is its number modulo usageDay.
type usageMinute struct {
	first, peak uint32        // addresses taken when it began, and at most
	binds, ends uint32        // leases that began and ended
	area        time.Duration // sum of the times for which addresses were taken
}

// newUsage begins to measure a pool.
func newUsage(now time.Duration, st lease.Stats) *usage {
	u := &usage{begin: now, at: now, current: int(now / time.Minute)}
	u.taken = taken(st)
	u.peak = u.taken
	u.minutes[u.current%usageDay] = usageMinute{first: uint32(u.taken), peak: uint32(u.taken)}
	return u
}

func taken(st lease.Stats) int { return st.Size - st.Free - st.Reserved }

// note takes in what an event changed.
func (u *usage) note(now time.Duration, st lease.Stats, a lease.Actions) {
	u.pass(now)
	m := &u.minutes[u.current%usageDay]
	u.taken = taken(st)
	u.peak = max(u.peak, u.taken)
	m.peak = max(m.peak, uint32(u.taken))
	m.ends += uint32(len(a.Ended))
	if a.Grant != nil && !a.Grant.Renewed {
		m.binds++
	}
}

// pass lets time pass up to now.
func (u *usage) pass(now time.Duration) {
	if to := int(now / time.Minute); to-u.current > usageDay { // nothing of what was is kept
		u.current = to - usageDay
		u.at = time.Duration(u.current) * time.Minute
	}
	for {
		m := &u.minutes[u.current%usageDay]
		end := min(now, time.Duration(u.current+1)*time.Minute)
		m.area += time.Duration(u.taken) * (end - u.at)
		u.at = end
		if end < time.Duration(u.current+1)*time.Minute {
			return
		}
		u.current++
		u.minutes[u.current%usageDay] = usageMinute{first: uint32(u.taken), peak: uint32(u.taken)}
	}
}

// used is what a usage says about a pool.
type used struct {
	peak, peakDay int           // most addresses taken at once: since the beginning, in the last 24 h
	window        time.Duration // the last hour, or since the beginning: what the next three are of
	binds, ends   uint64
	area          time.Duration // sum of the times for which addresses were taken
	dry           time.Duration // until nothing is free at the trend of the last ten minutes; 0 = there is no such trend
}

// report says how the pool was used until now.
func (u *usage) report(now time.Duration, st lease.Stats) used {
	u.pass(now)
	out := used{peak: u.peak}
	for i := range u.span(usageDay) {
		out.peakDay = max(out.peakDay, int(u.back(i).peak))
	}
	hour := u.span(usageHour)
	for i := range hour {
		m := u.back(i)
		out.binds += uint64(m.binds)
		out.ends += uint64(m.ends)
		out.area += m.area
	}
	out.window = u.since(hour)
	out.dry = u.dry(st.Free + st.Reserved)
	return out
}

// dry looks for a trend: more addresses taken than ten minutes ago, and more than chance explains. Were hosts as many as
// before, the difference would have a standard deviation of at most √(binds+ends); a trend is more than two of them.
func (u *usage) dry(free int) time.Duration {
	n := u.span(usageTrend)
	var events float64
	for i := range n {
		events += float64(u.back(i).binds) + float64(u.back(i).ends)
	}
	growth := float64(u.taken) - float64(u.back(n-1).first)
	window := u.since(n)
	if growth <= 2*math.Sqrt(events) || window < time.Minute {
		return 0
	}
	left := float64(free) / growth * float64(window)
	return time.Duration(min(left, float64(365*24*time.Hour)))
}

// span returns how many of the last n minutes, the current one among them, were measured.
func (u *usage) span(n int) int { return min(n, u.current-int(u.begin/time.Minute)+1) }

// back returns the minute i before the current one.
func (u *usage) back(i int) *usageMinute { return &u.minutes[(u.current-i)%usageDay] }

// since returns how long ago the first of the last n minutes began, or measuring if that was later.
func (u *usage) since(n int) time.Duration {
	return u.at - max(u.begin, time.Duration(u.current-n+1)*time.Minute)
}
