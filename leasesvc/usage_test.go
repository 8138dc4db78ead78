package leasesvc

import (
	"math/rand/v2"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"github.com/dstm-project/dstm/lease"
)

// history is everything that happened to a pool, kept without bounds: what usage must agree with.
type history struct {
	begin time.Duration
	first int
	all   []change
}

type change struct {
	at          time.Duration
	taken       int
	binds, ends int
}

const usageSize = 10_000

func usageStats(taken int) lease.Stats {
	return lease.Stats{Size: usageSize, Free: usageSize - taken - 3, Reserved: 3, Bound: taken}
}

func actions(binds, ends int) lease.Actions {
	a := lease.Actions{Ended: make([]lease.Ended, ends)}
	if binds > 0 {
		a.Grant = &lease.Grant{}
	}
	return a
}

// at returns what was taken at a time, and the most from then until now.
func (h *history) at(from time.Duration) (taken, most int) {
	taken = h.first
	for _, c := range h.all {
		if c.at < from {
			taken = c.taken
		}
	}
	most = taken
	for _, c := range h.all {
		if c.at >= from {
			most = max(most, c.taken)
		}
	}
	return taken, most
}

// report counts from the beginning of whole minutes, as usage does.
func (h *history) report(now time.Duration) used {
	start := func(minutes time.Duration) time.Duration {
		return max(h.begin, now.Truncate(time.Minute)-(minutes-1)*time.Minute)
	}
	var out used
	_, out.peak = h.at(h.begin)
	_, out.peakDay = h.at(start(usageDay))
	hour := start(usageHour)
	out.window = now - hour
	taken, _ := h.at(hour)
	last := hour
	for _, c := range h.all {
		if c.at >= hour {
			out.binds += uint64(c.binds)
			out.ends += uint64(c.ends)
			out.area += time.Duration(taken) * (c.at - last)
			taken, last = c.taken, c.at
		}
	}
	out.area += time.Duration(taken) * (now - last)
	return out
}

// TestUsage compares with a history without bounds, over steps from milliseconds to days.
func TestUsage(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		now := time.Duration(rng.Int64N(int64(3 * time.Minute)))
		taken := rng.IntN(100)
		h := history{begin: now, first: taken}
		u := newUsage(now, usageStats(taken))
		for range 300 {
			limit := []time.Duration{time.Millisecond, time.Second, time.Minute, 10 * time.Minute, 3 * time.Hour, 40 * time.Hour}[min(rng.IntN(20), 5)]
			if limit > 3*time.Hour && rng.IntN(8) > 0 {
				limit = time.Minute
			}
			now += time.Duration(rng.Int64N(int64(limit)))
			c := change{at: now, taken: max(0, taken+rng.IntN(21)-10), binds: rng.IntN(2), ends: rng.IntN(2)}
			taken = c.taken
			h.all = append(h.all, c)
			u.note(now, usageStats(taken), actions(c.binds, c.ends))
			if rng.IntN(5) > 0 {
				continue
			}
			now += time.Duration(rng.Int64N(int64(2 * time.Minute)))
			got, want := u.report(now, usageStats(taken)), h.report(now)
			got.dry = 0 // see TestDry
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(used{})); diff != "" {
				t.Fatalf("seed %d at %s: -want +got:\n%s", seed, now, diff)
			}
		}
	}
	if size := unsafe.Sizeof(usage{}); size > 40_000 {
		t.Errorf("%d bytes for a pool, want at most 40,000", size)
	}
}

// TestUsageRenewals: a renewal is no new lease.
func TestUsageRenewals(t *testing.T) {
	u := newUsage(0, usageStats(0))
	u.note(time.Second, usageStats(1), lease.Actions{Grant: &lease.Grant{}})
	u.note(2*time.Second, usageStats(1), lease.Actions{Grant: &lease.Grant{Renewed: true}})
	u.note(3*time.Second, usageStats(1), lease.Actions{Deny: lease.ReasonPoolDry})
	want := used{peak: 1, peakDay: 1, window: 4 * time.Second, binds: 1, area: 3 * time.Second}
	if diff := cmp.Diff(want, u.report(4*time.Second, usageStats(1)), cmp.AllowUnexported(used{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestDry: a trend is what chance does not explain, over the last ten minutes.
func TestDry(t *testing.T) {
	type phase struct {
		minutes     int
		binds, ends int // a minute
	}
	for _, tt := range []struct {
		name   string
		phases []phase
		later  time.Duration
		want   time.Duration
	}{
		{"nothing happens", []phase{{30, 0, 0}}, 0, 0},
		{"as many come as go", []phase{{30, 100, 100}}, 0, 0},
		{"they go", []phase{{30, 0, 20}}, 0, 0},
		// Nine whole minutes and the one that begins: 72 more, chance makes 2·√1800 = 85.
		{"less than chance explains", []phase{{30, 104, 96}}, 0, 0},
		// 90 more, and 8,700 free at 10 a minute.
		{"more than chance explains", []phase{{30, 105, 95}}, 0, 870 * time.Minute},
		{"a rush", []phase{{30, 100, 100}, {5, 1000, 0}}, 0, 4000 * 9 * time.Minute / 5000},
		{"a rush that is over", []phase{{5, 1000, 0}, {9, 0, 0}}, time.Minute, 0},
		{"a rush from the start", []phase{{5, 1000, 0}}, 0, 4 * time.Minute},
		{"too short to say", []phase{{1, 1000, 0}}, -time.Second, 0},
		{"dry", []phase{{9, 1000, 0}}, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			taken, now := 1000, 100*time.Minute
			u := newUsage(now, usageStats(taken))
			for _, p := range tt.phases {
				for range p.minutes {
					for range p.ends {
						taken--
						u.note(now, usageStats(taken), actions(0, 1))
					}
					for range p.binds {
						taken++
						u.note(now, usageStats(taken), actions(1, 0))
					}
					now += time.Minute
				}
			}
			if got := u.report(now+tt.later, usageStats(taken)).dry; got != tt.want {
				t.Errorf("dry in %s, want %s", got, tt.want)
			}
		})
	}
}
